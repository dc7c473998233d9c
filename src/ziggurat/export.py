"""Writing an adapter as plain LoRA, exactly, and a model with the adapter merged in.

On a linear every method is one effective factor pair (A, B) with its scale folded in,
so W + B A is plain LoRA with lora_A = A, lora_B = B and lora_alpha = r.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ziggurat.errors import ConfigError, ExportError
from ziggurat.host.bank import PairBank
from ziggurat.host.folder import adapter_config, load_adapter, load_base, tensor_shapes
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.staging import written_beside
from ziggurat.host.untrusted import MOST_RUN, own_file, read_json
from ziggurat.lowrank.pair import FactorPair, pad

logger = logging.getLogger(__name__)

#: The ranks that vLLM's --max-lora-rank accepts.
SERVING_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
PREFIX = "base_model.model."
#: Files of a tokenizer that belong beside an adapter.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
TOKENIZER_FILES += ("chat_template*", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, the rank of its pairs (the largest where they differ), how many modules."""

    folder: Path
    rank: int
    modules: int
    serving: bool


def lora_pairs(model: nn.Module, adapter: str = "default") -> dict[str, FactorPair]:
    """The effective pair of every linear that `adapter` adapts, by the linear's path in the base model.

    Raises:
        ExportError: the adapter has a part that no low-rank update of a weight can express; or it isn't there.
    """
    base = _bare(model)
    pairs: dict[str, FactorPair] = {}
    for path, module in base.named_modules():
        if isinstance(module, AdaptedLinear):
            if adapter in module.adapters:
                a, b = module.effective_pair(adapter)
                pairs[path] = FactorPair(a.detach(), b.detach())
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, PairBank):
            raise ExportError(f"{path}: {_refusal(model, module, adapter)}")
    if not pairs:
        names = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ExportError(f"adapter {adapter!r} adapts no linear of this model; its adapters: {names}.")
    return pairs


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


def _export(model: nn.Module, out: Path, adapter: str, serving: bool, add: Callable[[Path], Any]) -> Exported:
    """`export_model`, with `add` to put files into the folder before it appears."""
    # A pair of rank 0 (LoRA² has pruned all of it) changes nothing, and LoRA knows no rank 0.
    pairs = {path: pair for path, pair in lora_pairs(model, adapter).items() if pair.A.shape[0]}
    if not pairs:
        raise ExportError(f"adapter {adapter!r} has rank 0 everywhere: there is no update to write.")
    config = model.peft_config[adapter]  # type: ignore[index]
    rest = _other_tensors(model, adapter)
    if serving and rest:
        raise ExportError(
            f"the adapter also holds {len(rest)} tensors that are no factor pairs ({next(iter(rest))}, ...), from "
            "modules_to_save or bias; servers reject them. Export without --serving, or merge into the model."
        )
    rank = max(pair.A.shape[0] for pair in pairs.values())
    if serving:
        rank = _serving_rank(rank)
        pairs = {path: pad(pair, rank) for path, pair in pairs.items()}
    lora = _lora_config(model, config, pairs, rank)
    tensors = dict(rest)
    for path, pair in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.B
    with written_beside(out) as folder:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / SAFETENSORS_WEIGHTS_NAME,
            metadata={"format": "pt"},
        )
        lora.save_pretrained(str(folder))
        (folder / "README.md").write_text(_card(_bare(model), config, rank, serving), encoding="utf-8")
        add(folder)
    return Exported(out, rank, len(pairs), serving)


def export(adapter: str | Path, out: str | Path, *, serving: bool = False, base_model: str | None = None) -> Exported:
    """Write the adapter in the folder `adapter` to `out` as plain LoRA. The base model's weights aren't needed.

    Raises:
        ConfigError: `adapter` is no adapter's folder, or its base model's config can't be found.
        ExportError: as `export_model`; or the adapter's file doesn't hold just what its config says.
    """
    config = adapter_config(adapter)
    if config.peft_type == PeftType.LORA:
        raise ExportError(f"{adapter} is a plain LoRA adapter already: use it as it is.")
    model = load_adapter(adapter, load_base(adapter, base_model, on_meta=True))
    unused = _check_complete(adapter, model)
    if unused:
        raise ExportError(f"{adapter} also holds {len(unused)} tensors with no place in its model ({unused[0]}, ...).")
    return _export(model, Path(out), "default", serving, lambda folder: _copy_tokenizer(Path(adapter), folder))


def merge(adapter: str | Path, out: str | Path, *, base_model: str | None = None) -> Path:
    """Write the base model with the adapter in the folder `adapter` merged in, and its tokenizer, to `out`.

    The model keeps its dtype and generation settings; a classifier takes the names of the labels
    from the adapter's run.json, if `ziggurat train` wrote one. LoR2C's paths can't be merged into weights: the
    folder then brings their code along, and loads with `trust_remote_code=True`, without ziggurat.

    Raises:
        ConfigError: `adapter` is no adapter's folder, or its base model can't be loaded.
        ExportError: `out` is taken, the method can't be merged into weights, or the adapter's file lacks tensors.
    """
    source = Path(adapter)
    with written_beside(Path(out)) as folder:
        model = load_adapter(source, load_base(source, base_model))
        _check_complete(source, model)
        _name_labels(source, _bare(model).config)  # type: ignore[arg-type]
        _write_merged(model, folder)
        _copy_tokenizer(source, folder)
        if not any(folder.glob("tokenizer*")):
            _save_tokenizer(base_model or str(adapter_config(source).base_model_name_or_path), folder)
    return Path(out)


def merge_model(model: nn.Module, out: str | Path, tokenizer: Any = None) -> Path:
    """Write `model` with its active adapter merged in, and `tokenizer`, to the folder `out`. As `merge`, in memory.

    The adapter is gone from `model` afterwards, unless its method can't be merged into weights.

    Raises:
        ExportError: `out` is taken, or the method can't be merged into weights.
    """
    with written_beside(Path(out)) as folder:
        _write_merged(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    return Path(out)


def _write_merged(model: Any, folder: Path) -> None:
    if hasattr(model, "write_self_contained"):  # what no weight can absorb brings its code along
        model.write_self_contained(folder)
        return
    if any(isinstance(module, AdaptedLinear) or hasattr(module, "cannot_export") for module in model.modules()):
        lora_pairs(model)  # refuses, with the reason, what is no update of weights
    model.merge_and_unload(safe_merge=True).save_pretrained(str(folder))


def _bare(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _refusal(model: nn.Module, module: BaseTunerLayer, adapter: str) -> str:
    """Why a tuner layer that is no adapted linear can't become plain LoRA."""
    config = getattr(model, "peft_config", {}).get(adapter)
    if getattr(config, "peft_type", None) == PeftType.LORA:
        return "this is a plain LoRA adapter already: use it as it is."
    return getattr(module, "cannot_export", f"{type(module).__name__} is no update of a linear's weight")


def _check_complete(folder: str | Path, model: PeftModel) -> list[str]:
    """Names in the adapter's file that the model has no place for.

    Raises:
        ExportError: the file lacks a tensor of the adapter, which PEFT would have left as it was made.
    """
    held = set(tensor_shapes(folder))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    lacking = sorted(wanted - held)
    if lacking:
        raise ExportError(
            f"{folder} lacks {len(lacking)} of the {len(wanted)} tensors its config asks for ({lacking[0]}, ...): is "
            "its adapter_config.json another adapter's?"
        )
    return sorted(held - wanted)


def _other_tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """What PEFT saves of the adapter beside the method's own factors: modules_to_save and biases.

    With bias="all" PEFT names the biases of modules_to_save twice, once by where they stand in the wrapper.
    """
    layers: dict[str, Any] = {path: m for path, m in _bare(model).named_modules() if isinstance(m, BaseTunerLayer)}
    own = tuple(
        f"{PREFIX}{path}.{name}"
        for path, module in layers.items()
        for name in [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
        if name != "base_layer"
    )
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    prefixed = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in state.items()}
    return {
        name: tensor
        for name, tensor in prefixed.items()
        if not name.startswith(own) and ".modules_to_save." not in name and ".original_module." not in name
    }


def _serving_rank(rank: int) -> int:
    fitting = [allowed for allowed in SERVING_RANKS if allowed >= rank]
    if not fitting:
        raise ExportError(
            f"the update's rank is {rank}, and vLLM allows at most {SERVING_RANKS[-1]}: merge into the model instead."
        )
    return fitting[0]


def _lora_config(model: nn.Module, config: Any, pairs: dict[str, FactorPair], rank: int) -> LoraConfig:
    base = _bare(model)
    ranks = {path: pair.A.shape[0] for path, pair in pairs.items()}
    different = {path: r for path, r in ranks.items() if r != rank}
    bias: Any = getattr(config, "bias", "none")
    first = base.get_submodule(next(iter(pairs)))
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(base, pairs, getattr(config, "modules_to_save", None)),
        rank_pattern=dict(different),
        alpha_pattern=dict(different),
        bias="lora_only" if bias.endswith("_only") else bias,
        fan_in_fan_out=bool(getattr(first, "fan_in_fan_out", False)),
        modules_to_save=getattr(config, "modules_to_save", None),
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _targets(base: nn.Module, pairs: dict[str, FactorPair], whole: list[str] | None) -> list[str] | str:
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


def _name_labels(adapter: Path, config: Any) -> None:
    """Give a classifier's config the label names that a training run noted beside its adapter."""
    try:
        names = read_json(adapter, "run.json", MOST_RUN)["head"]["label_names"]
    except (ConfigError, KeyError, TypeError):
        return
    if isinstance(names, list) and len(names) == config.num_labels:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}


def _save_tokenizer(name: str, folder: Path) -> None:
    """The base model's tokenizer, if it has one: models of images have none."""
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        _copy_tokenizer(Path(name), folder)
        return
    try:
        AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        logger.warning("no tokenizer was found beside the adapter nor for %s: %s", name, error)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                # What is copied is handed on: a link out of the folder must not carry a private file along.
                shutil.copyfile(own_file(source, file.name), target / file.name)


def _card(model: nn.Module, config: Any, rank: int, serving: bool) -> str:
    method = str(getattr(config.peft_type, "value", config.peft_type))
    base = config.base_model_name_or_path or "the base model"
    load = "`peft.PeftModel.from_pretrained`; no other package is needed."
    owner, name = type(model).__module__, type(model).__qualname__
    if owner.partition(".")[0] == "ziggurat":
        load = f"`peft.PeftModel.from_pretrained` on a `{owner}.{name}`, whose head no other package has."
    serve = (
        f"""
All modules have rank {rank} and lora_alpha {rank}, so that every reader scales them alike. vLLM: `--enable-lora
--max-lora-rank {rank}`. llama.cpp: convert_lora_to_gguf.py.
"""
        if serving
        else ""
    )
    return f"""---
library_name: peft
base_model: {json.dumps(str(base))}
tags: [lora]
---

A plain LoRA adapter for {base}, exported exactly from an adapter of the method {method}. Load it with
{load}
{serve}"""
