"""An adapter as plain LoRA, in memory: on a linear layer every method is one factor pair (A, B), which is LoRA's.

W + B A is plain LoRA with lora_A = A, lora_B = B and lora_alpha = r, as the pair has its scale folded in.
"""

import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from ziggurat.errors import ExportError
from ziggurat.host.bank import Bank
from ziggurat.host.base.unwrap import PREFIX, without_wrappers
from ziggurat.host.base.vocabulary import embedding_names, has_grown
from ziggurat.host.linear import AdaptedLinear, is_router
from ziggurat.host.method import kind_of
from ziggurat.host.method_layer import ExpertsLayer, MethodLayer
from ziggurat.host.tensors import whole
from ziggurat.lowrank.pair import FactorPair, pad

#: Initialisations of PEFT's LoRA that move a part of W into the pair.
FROM_WEIGHTS = ("pissa", "olora", "corda", "loftq")


class PlainLora(NamedTuple):
    """An adapter as PEFT's LoRA: its config, and its tensors by the names that PEFT gives them in a file."""

    config: LoraConfig
    tensors: dict[str, Tensor]


def plain_lora(model: nn.Module, rank: int | None = None, adapter: str = "default") -> PlainLora:
    """`adapter` of `model` as plain LoRA with the same updates, in memory: to send it to a server after each step.

    For each adapted linear layer, in its dtype and on its device, A (rank, d_in) and B (d_out, rank) with B A = dW, the
    update, its scale folded in, and lora_alpha = rank; modules_to_save and trained biases are included. The tensors are
    copies. The model isn't touched, and may be wrapped (DDP, torch.compile). Where FSDP2 has sharded it, the shards are
    gathered: all processes must call this.

    Args:
        rank: of every pair, filled up with zeros, so that shapes stay the same while a method prunes, and a server's
            `max_lora_rank` is met. None: each pair has its own, the largest is the config's, the others stand in
            rank_pattern.

    Raises:
        ExportError: the method's update is none of linear layers, a pair has a higher rank than `rank`, or there is no
            such adapter.
    """
    return as_plain(model, rank, adapter, grown=False)


def as_plain(
    model: nn.Module, rank: int | None, adapter: str, saved: Collection[str] | None = None, grown: bool = True
) -> PlainLora:
    """`plain_lora`; `grown`: with embeddings of another size than the base's. `saved`: as in `other_tensors`."""
    base = without_wrappers(model)
    pairs = {path: pair for path, pair in lora_pairs(base, adapter).items() if pair.A.shape[-2]}
    needed = max((pair.A.shape[-2] for pair in pairs.values()), default=0)
    if needed == 0:
        # LoRA knows no rank 0.
        raise ExportError(f"adapter {adapter!r} has rank 0 everywhere: there is no update to write.")
    if rank is not None and needed > rank:
        raise ExportError(
            f"rank={rank}, and adapter {adapter!r} has pairs of rank {needed}: give rank={needed} or more (a server's "
            "--max-lora-rank has to allow it)."
        )
    config = base.peft_config[adapter]  # type: ignore[index]
    tensors = other_tensors(base, adapter, saved, grown)
    names = lora_names(bare(base), pairs)
    for path, pair in pairs.items():
        a, b = pair if rank is None else pad(pair, rank)
        if a.dim() == 3:  # PEFT has experts in one matrix: A by expert and rank, B by rank and expert
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        # A pair that isn't filled up may be the parameters themselves, which the next step changes.
        tensors[f"{PREFIX}{names[path]}.lora_A.weight"] = a if a is not pair.A else a.clone()
        tensors[f"{PREFIX}{names[path]}.lora_B.weight"] = b if b is not pair.B else b.clone()
    ranks = {path: rank or pair.A.shape[-2] for path, pair in pairs.items()}
    experts = {path for path, pair in pairs.items() if pair.A.dim() == 3}
    return PlainLora(_lora_config(bare(base), config, ranks, experts), tensors)


def lora_names(base: nn.Module, pairs: Mapping[str, FactorPair]) -> dict[str, str]:
    """Path -> PEFT's name of the LoRA module there.

    It wraps the experts of a layer once for each adapted parameter, the first one in the module innermost.
    """
    names = {path: path for path in pairs}
    for path, pair in pairs.items():
        if pair.A.dim() == 3:
            experts, _, name = path.rpartition(".")
            inside: Any = base.get_submodule(experts)
            order = list(inside.get_base_layer()._parameters)
            around = sum(f"{experts}.{other}" in pairs for other in order[order.index(name) + 1 :])
            names[path] = experts + ".base_layer" * around
    return names


@torch.no_grad()
def lora_pairs(model: nn.Module, adapter: str = "default") -> dict[str, FactorPair]:
    """The effective pair of every linear layer that `adapter` adapts, by its path in the base model.

    Of a parameter with all experts of a layer: A (experts, rank, d_in), B (experts, d_out, rank).

    Raises:
        ExportError: the adapter has a part that no low-rank update of a weight can express; or it isn't there.
    """
    pairs: dict[str, FactorPair] = {}
    gathered = cache(whole)  # a tensor that several linear layers share is gathered once
    for path, module in bare(model).named_modules():
        if isinstance(module, MethodLayer) and isinstance(module, AdaptedLinear | ExpertsLayer):
            if adapter in module.adapters:
                pairs[path] = module.pair_of(adapter, {k: gathered(t) for k, t in module.stored(adapter).items()})
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, ExpertsLayer | Bank | TrainableTokensLayer):
            raise ExportError(f"{path}: {_refusal(model, module, adapter)}")
    if not pairs:
        names = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ExportError(f"adapter {adapter!r} adapts no linear layer of this model; its adapters: {names}.")
    return pairs


def other_tensors(
    model: nn.Module, adapter: str, saved: Collection[str] | None = None, grown: bool = True
) -> dict[str, Tensor]:
    """The tensors that PEFT saves with the adapter besides its factors: modules_to_save, biases, resized embeddings.

    `saved`: the names in the adapter's file, if it comes from one; its embeddings are included, except unchanged ones
    below an adapter.

    With bias="all" PEFT names the biases of modules_to_save twice, once by where they stand in the wrapper.
    """
    base, config = bare(model), getattr(model, "peft_config", {}).get(adapter)
    # Finding the base's size reads its config by name: too slow for every step, and `plain_lora` doesn't send it.
    grown = grown and config is not None and has_grown(base, config)
    other = getattr(config, "no_factors", ())
    extra = ("modules_to_save", "trainable_token_indices")
    if getattr(config, "bias", None) == "none" and not (grown or saved or any(getattr(config, n, True) for n in extra)):
        return {}
    layers: dict[str, Any] = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)
    }
    of_adapters = tuple(
        f"{PREFIX}{path}.{name}"
        for path, module in layers.items()
        for name in [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
        if name != "base_layer"
    )
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    prefixed = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in state.items()}
    weights = {name if name.startswith(PREFIX) else PREFIX + name: p for name, p in model.state_dict().items()}
    embeddings = {
        name: weights[name]
        for name in embedding_names(base, weights)
        if (saved is None or name in saved) and (grown or (saved and not name.endswith(".base_layer.weight")))
    }
    return {name: whole(tensor).clone() for name, tensor in embeddings.items()} | {
        name: whole(tensor).clone()
        for name, tensor in prefixed.items()
        if not name.startswith(of_adapters)
        and ".modules_to_save." not in name
        and ".original_module." not in name
        and name.rpartition(".")[2] not in other
    }


def bare(model: nn.Module) -> nn.Module:
    """The model inside PEFT's, or the model itself where transformers has added the adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _refusal(model: nn.Module, module: BaseTunerLayer, adapter: str) -> str:
    """The reason why a tuner layer other than an adapted linear layer can't become plain LoRA."""
    config = getattr(model, "peft_config", {}).get(adapter)
    if getattr(config, "peft_type", None) == PeftType.LORA:
        return f"this {of_lora(config)}"
    return getattr(
        module,
        "cannot_export",
        f"PEFT has adapted it by {kind_of(config)}, and only adapters of Ziggurat's methods are written as LoRA. Merge "
        "the adapter into the model instead (`ziggurat merge`).",
    )


def of_lora(config: Any) -> str:
    """What is to be done with an adapter of PEFT's LoRA in the place of an export."""
    start, merge = str(config.init_lora_weights).lower(), "Merge it into the model instead (`ziggurat merge`)"
    if config.use_dora:
        return f"is a DoRA adapter: its magnitudes scale the rows of W + B A, which plain LoRA can't express. {merge}."
    if start.startswith(FROM_WEIGHTS):
        if start != "loftq":
            merge += (
                "; or, if it was also saved before training, let PEFT write the difference: "
                "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
            )
        return (
            f"is a LoRA adapter that began as a part of W ({start}): B A still holds that part, which would count "
            f"twice beside the whole W. {merge}."
        )
    return "is a plain LoRA adapter already: use it as it is."


def _lora_config(base: nn.Module, config: Any, ranks: dict[str, int], experts: Collection[str]) -> LoraConfig:
    rank = max(ranks.values())
    bias: Any = getattr(config, "bias", "none")
    linear = [path for path in ranks if path not in experts]
    first = base.get_submodule(linear[0]) if linear else None
    taken = [path for path in linear if is_router(base.get_submodule(path)) or taken_for_experts(base, path)]
    rest = [path for path in linear if path not in taken]
    different = {path: r for path, r in ranks.items() if r != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(base, rest, getattr(config, "modules_to_save", None)) if rest else [],
        target_parameters=[*sorted(experts), *(f"{path}.weight" for path in taken)] or None,
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
    """Targets that name just the adapted layers: their last names where they suffice, else whole paths, else a regex.

    `whole`: the modules_to_save, in which PEFT looks for no targets.
    """
    paths = [path for path, _ in base.named_modules() if path and ".base_layer" not in path]
    names = sorted({path.rpartition(".")[2] for path in pairs})
    for targets in (names, sorted(pairs)):
        lora = LoraConfig(target_modules=targets, modules_to_save=whole)
        if {path for path in paths if check_target_module_exists(lora, path)} == set(pairs):
            return targets
    return "|".join(re.escape(path) for path in sorted(pairs))
