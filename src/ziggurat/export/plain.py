"""An adapter written as plain LoRA, exactly.

On a linear every method is one effective factor pair (A, B) with its scale folded in,
so W + B A is plain LoRA with lora_A = A, lora_B = B and lora_alpha = r.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ziggurat.errors import ExportError
from ziggurat.files.staging import written_beside
from ziggurat.host.folder import adapter_config, load_adapter, load_base, tensor_shapes
from ziggurat.lowrank.pair import FactorPair

from .beside import copy_tokenizer
from .card import card
from .content import PREFIX, bare, check_complete, lora_pairs, other_tensors
from .serving import for_servers


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, the rank of its pairs (the largest where they differ), how many modules."""

    folder: Path
    rank: int
    modules: int
    serving: bool


def export_model(
    model: nn.Module, out: str | Path, adapter: str = "default", *, serving: bool = False, tokenizer: Any = None
) -> Exported:
    """Write `adapter` of `model` to the folder `out` as plain PEFT LoRA with the same deltas; `tokenizer` goes along.

    `serving`: the one form that PEFT, vLLM and llama.cpp scale alike: the same rank for all
    modules, one that vLLM allows (zeros fill it up), lora_alpha = r, nothing but factor pairs.

    Raises:
        ExportError: the method isn't an update of linears; or, for serving, the rank is above 512 or
            the adapter holds more than factor pairs (modules_to_save, biases).
    """

    def add(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))

    return _export(model, Path(out), adapter, serving, add)


def _export(
    model: nn.Module,
    out: Path,
    adapter: str,
    serving: bool,
    add: Callable[[Path], Any],
    saved: Collection[str] | None = None,
) -> Exported:
    """`export_model`, with `add` to put files into the folder before it appears. `saved`: as in `other_tensors`."""
    # A pair of rank 0 (LoRA² has pruned all of it) changes nothing, and LoRA knows no rank 0.
    pairs = {path: pair for path, pair in lora_pairs(model, adapter).items() if pair.A.shape[0]}
    if not pairs:
        raise ExportError(f"adapter {adapter!r} has rank 0 everywhere: there is no update to write.")
    config = model.peft_config[adapter]  # type: ignore[index]
    rest = other_tensors(model, adapter, saved)
    if serving:
        pairs = for_servers(pairs, rest)
    rank = max(pair.A.shape[0] for pair in pairs.values())
    lora = _lora_config(model, config, pairs, rank)
    tensors = dict(rest)
    for path, pair in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.B
    with written_beside(out) as folder:
        save_file(  # copies, for linear layers may share a factor, and safetensors refuses shared memory
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            folder / SAFETENSORS_WEIGHTS_NAME,
            metadata={"format": "pt"},
        )
        lora.save_pretrained(str(folder))
        (folder / "README.md").write_text(card(bare(model), config, rank, serving), encoding="utf-8")
        add(folder)
    return Exported(out, rank, len(pairs), serving)


def export(adapter: str | Path, out: str | Path, *, serving: bool = False, base_model: str | None = None) -> Exported:
    """Write the adapter in the folder `adapter` to `out` as plain LoRA.

    The base model's weights aren't needed, unless rows of its embedding train (`trainable_token_indices`).

    Raises:
        ConfigError: `adapter` is no adapter's folder, or its base model's config can't be found.
        ExportError: as `export_model`; or the adapter's file doesn't hold just what its config says.
    """
    config = adapter_config(adapter)
    if config.peft_type == PeftType.LORA:
        raise ExportError(f"{adapter} is a plain LoRA adapter already: use it as it is.")
    # PEFT can't put rows that train beside an embedding without numbers.
    on_meta = not getattr(config, "trainable_token_indices", None)
    model = load_adapter(adapter, load_base(adapter, base_model, on_meta=on_meta))
    unused = check_complete(adapter, model)
    if unused:
        raise ExportError(f"{adapter} also holds {len(unused)} tensors with no place in its model ({unused[0]}, ...).")
    return _export(
        *(model, Path(out), "default", serving, lambda folder: copy_tokenizer(Path(adapter), folder)),
        saved=tensor_shapes(adapter),
    )


def _lora_config(model: nn.Module, config: Any, pairs: dict[str, FactorPair], rank: int) -> LoraConfig:
    base = bare(model)
    ranks = {path: pair.A.shape[0] for path, pair in pairs.items()}
    different = {path: r for path, r in ranks.items() if r != rank}
    bias: Any = getattr(config, "bias", "none")
    first = base.get_submodule(next(iter(pairs)))
    taken = [path for path in pairs if taken_for_experts(base, path)]
    rest = [path for path in pairs if path not in taken]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(base, rest, getattr(config, "modules_to_save", None)),
        target_parameters=[f"{path}.weight" for path in taken] or None,
        rank_pattern=dict(different),
        alpha_pattern=dict(different),
        bias="lora_only" if bias.endswith("_only") else bias,
        fan_in_fan_out=bool(getattr(first, "fan_in_fan_out", False)),
        modules_to_save=getattr(config, "modules_to_save", None),
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def taken_for_experts(base: nn.Module, path: str) -> bool:
    """Whether PEFT takes a target module at `path` for one of the experts that transformers 5 has fused.

    It goes by the last name (gate_proj, up_proj, down_proj) on some 30 types of models, and so loses dense layers and
    shared experts. As a target parameter such a layer is what it is.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT takes every name as it is
        return False
    lora = LoraConfig(target_modules=[path])
    try:
        convert_peft_config_for_transformers(lora, base, None)
    except ValueError:  # one of two names that are fused into one
        return True
    return path not in (lora.target_modules or ())


def _targets(base: nn.Module, pairs: Collection[str], whole: list[str] | None) -> list[str] | str:
    """What means exactly the adapted linears: their last names where they suffice, else whole paths, else a regex.

    `whole`: the modules_to_save, in which PEFT looks for no targets.
    """
    paths = [path for path, _ in base.named_modules() if path and ".base_layer" not in path]
    names = sorted({path.rpartition(".")[2] for path in pairs})
    for targets in (names, sorted(pairs)):
        lora = LoraConfig(target_modules=targets, modules_to_save=whole)
        if {path for path in paths if check_target_module_exists(lora, path)} == set(pairs):
            return targets
    return "|".join(re.escape(path) for path in sorted(pairs))
