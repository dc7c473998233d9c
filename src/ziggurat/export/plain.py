"""An adapter written as plain LoRA, exactly: `plain_lora` as a folder."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ziggurat.errors import ExportError
from ziggurat.files.staging import written_beside
from ziggurat.host.plain import PlainLora, as_plain, bare, lora_pairs, of_lora
from ziggurat.host.saved.folder import adapter_config, load_adapter, load_base, tensor_shapes

from .beside import put_tokenizer
from .card import card
from .content import check_complete
from .gguf import modelfile
from .serving import cost_of_serving, serving_rank


@dataclass(frozen=True)
class Exported:
    """A written export: the folder, the rank of its pairs (the largest if they differ), the number of modules.

    `cost`: the cost in servers of a rank above the adapter's r, in words; None if it isn't above. `only_for_vllm`: PEFT
    doesn't look for the experts under vLLM's names, and would leave them out.
    """

    folder: Path
    rank: int
    modules: int
    serving: bool
    cost: str | None = None
    only_for_vllm: bool = False


def export_model(
    model: nn.Module, out: str | Path, adapter: str = "default", *, serving: bool = False, tokenizer: Any = None
) -> Exported:
    """Write `adapter` of `model` to the folder `out` as plain PEFT LoRA with the same deltas; `tokenizer` goes along.

    `serving`: the one form that PEFT, vLLM and llama.cpp scale alike: the same rank for all
    modules, one that vLLM allows (zeros fill it up), lora_alpha = r, nothing but factor pairs. Experts that are one
    parameter are named as vLLM names them; llama.cpp doesn't know those names, and PEFT not of every type of model
    (`Exported.only_for_vllm`).

    Raises:
        ExportError: the method's update is none of linear layers; the adapter isn't finite; or, for serving, the
            rank is above 512 or the adapter holds more than factor pairs (modules_to_save, biases).
    """
    return _export(model, Path(out), adapter, serving, tokenizer)


def _export(
    model: nn.Module,
    out: Path,
    adapter: str,
    serving: bool,
    tokenizer: Any,
    saved: Collection[str] | None = None,
    base_model: str | None = None,
) -> Exported:
    """`export_model`. `tokenizer`: as in `put_tokenizer`. `saved`: as in `as_plain`.

    `base_model`: the base model, if the config names a wrong one.
    """
    lora, tensors = as_plain(model, None, adapter, saved)
    _check_finite(tensors, adapter)
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    of_experts = bool(getattr(config, "target_parameters", None))
    only_vllm = False
    if serving:
        lora, tensors = as_plain(model, serving_rank(lora.r, tensors), adapter, saved)
        if lora.target_parameters:  # dense layers, too, that PEFT would take for experts
            from .vllm_experts import for_vllm, only_for_vllm

            base, factors = bare(model), lora_pairs(model, adapter)
            lora, tensors = for_vllm(base, PlainLora(lora, tensors), factors)
            only_vllm = only_for_vllm(base, factors)
    with written_beside(out) as folder:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            folder / SAFETENSORS_WEIGHTS_NAME,
            metadata={"format": "pt"},
        )
        lora.save_pretrained(str(folder))
        if serving and not of_experts:
            (folder / "Modelfile").write_text(modelfile(base_model or config.base_model_name_or_path), encoding="utf-8")
        (folder / "README.md").write_text(
            card(bare(model), config, lora.r, serving, of_experts, only_vllm), encoding="utf-8"
        )
        put_tokenizer(tokenizer, folder)
    pairs = sum(name.endswith(".lora_A.weight") for name in tensors)
    return Exported(out, lora.r, pairs, serving, cost_of_serving(model, adapter), only_vllm)


def _check_finite(tensors: Mapping[str, Tensor], adapter: str) -> None:
    """Raise ExportError if a tensor isn't finite."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ExportError(
            f"adapter {adapter!r} holds NaN or infinite values ({len(broken)} of {len(tensors)} tensors: {broken[0]}"
            f"{', ...' if len(broken) > 1 else ''}): its training diverged, or the file is damaged. Nothing was "
            "written; export an earlier checkpoint."
        )


def export(adapter: str | Path, out: str | Path, *, serving: bool = False, base_model: str | None = None) -> Exported:
    """Write the adapter in the folder `adapter` to `out` as plain LoRA.

    The base model's weights aren't needed, unless rows of its embedding train (`trainable_token_indices`).

    Raises:
        ConfigError: `adapter` is no adapter's folder, or its base model's config can't be found.
        ExportError: as `export_model`; or the adapter's file doesn't hold just what its config says.
    """
    config = adapter_config(adapter)
    if config.peft_type == PeftType.LORA:
        raise ExportError(f"{adapter} {of_lora(config)}")
    # PEFT can't put rows that train beside an embedding on the meta device.
    on_meta = not getattr(config, "trainable_token_indices", None)
    model = load_adapter(adapter, load_base(adapter, base_model, on_meta=on_meta))
    unused = check_complete(adapter, model)
    if unused:
        raise ExportError(f"{adapter} also holds {len(unused)} tensors with no place in its model ({unused[0]}, ...).")
    saved = tensor_shapes(adapter)
    return _export(model, Path(out), "default", serving, Path(adapter), saved, base_model)
