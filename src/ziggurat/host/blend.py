"""Weighted sums and other combinations of adapters, for every method: a new adapter of one plain pair at each site."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from numbers import Integral
from typing import Any

import torch
from peft.utils import merge_utils
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ziggurat.host.method_layer import MethodLayer
from ziggurat.host.site import body_name
from ziggurat.lowrank.pair import FactorPair, delta, stack
from ziggurat.lowrank.spectrum import factored_svd

#: Combinations whose update is sum_i w_i dW_i.
SUMS = ("linear", "cat", "svd")
#: PEFT's combinations of dense updates that drop entries first; PEFT's ending `_svd` makes no difference here.
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def check_request(
    configs: Mapping[str, Any], adapters: Sequence[str], weights: Sequence[float], kind: str, rank: int | None
) -> str:
    """The combination without PEFT's ending `_svd`.

    Raises:
        ValueError: an unknown adapter or combination, lists of unequal length, a weight or a rank that is none, or an
            adapter with biases or rows of an embedding, which a combination would lose.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter.")
    if broken := [weight for weight in weights if not isfinite(weight)]:
        raise ValueError(f"weights={list(weights)}: {broken[0]} is no finite number.")
    if rank is not None and not (isinstance(rank, Integral) and rank >= 1):
        raise ValueError(f"svd_rank={rank!r}: a whole number above 0, or None for the largest rank, is needed.")
    for name in adapters:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist; there are {', '.join(configs)}.")
        lost = [
            field
            for field in ("bias", "trainable_token_indices")
            if getattr(configs[name], field) not in ("none", None)
        ]
        if lost:
            raise ValueError(
                f"adapter {name!r} trains {' and '.join(lost)}, which a combination of updates can't hold. Merge the "
                "adapters into copies of the model, and combine those."
            )
    if kind.removesuffix("_svd") not in (*SUMS, *SPARSE):
        raise ValueError(f"Invalid combination_type: {kind}. There are {', '.join((*SUMS, *SPARSE))}.")
    return kind.removesuffix("_svd")


def combined(
    pairs: Sequence[FactorPair],
    weights: Sequence[float],
    kind: str,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> FactorPair:
    """The pair of a combination of updates dW_i = B_i A_i.

    "linear", "cat": A = [A_1; A_2; ...], B = [w_1 B_1, w_2 B_2, ...], so dW = sum_i w_i dW_i exactly.
    "svd": the same sum in its `rank` strongest directions (default: the largest rank of the pairs).
    "ties" [arXiv 2306.01708], "dare_linear", "dare_ties" [arXiv 2311.03099], "magnitude_prune": PEFT's functions on the
    dense dW_i, with the share `density` of the entries kept, then as "svd".

    Raises:
        ValueError: a combination that drops entries without a `density` in (0, 1].
    """
    pairs = [FactorPair(pair.A.float(), pair.B.float()) for pair in pairs]
    rank = rank or max(pair.A.shape[0] for pair in pairs)
    if kind in ("linear", "cat"):
        return stack(pairs, weights)
    if kind == "svd":
        return _strongest(*factored_svd(*stack(pairs, weights)), rank)
    if density is None or not 0 < density <= 1:
        raise ValueError(f"combination_type={kind!r} needs density, the share of entries to keep, above 0 up to 1.")
    sign_options = {"majority_sign_method": majority_sign_method} if "ties" in kind else {}
    function = getattr(merge_utils, kind)
    dense = function(
        [delta(pair) for pair in pairs], torch.tensor(weights, device=pairs[0].A.device), density, **sign_options
    )
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    return _strongest(U, S, Vh.T, rank)


def _strongest(U: Tensor, S: Tensor, V: Tensor, rank: int) -> FactorPair:
    return FactorPair(V[:, :rank].T.contiguous(), U[:, :rank] * S[:rank])


def add_blend(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter: str, kind: str, **options: Any
) -> None:
    """Add `adapter` to the model of `tuner`: the combination of `adapters` at every site that one of them has."""
    layers: dict[str, MethodLayer] = {}
    pairs: dict[str, FactorPair] = {}
    for path, layer in tuner.model.named_modules():
        if not isinstance(layer, MethodLayer):
            continue
        layer_weights = {name: weight for name, weight in zip(adapters, weights, strict=True) if name in layer.adapters}
        if layer_weights:
            pair = combined(
                [layer.effective_pair(name) for name in layer_weights], list(layer_weights.values()), kind, **options
            )
            if pair.A.shape[0]:
                layers[path], pairs[path] = layer, pair
    sites = {
        path: next(layer.sites[name] for name in adapters if name in layer.sites) for path, layer in layers.items()
    }
    ranks = {body_name(tuner.model, sites[path].path): pair.A.shape[0] for path, pair in pairs.items()}
    config = replace(tuner.peft_config[adapters[0]], blended=ranks, bias="none", freeze_tiers=None, from_adapter=None)
    if tuner.method.sites is None:  # each adapter may have different targets
        everywhere: dict[str, Any] = {"target_modules": sorted(ranks), "exclude_modules": None}
        config = replace(config, **everywhere, layers_to_transform=None, layers_pattern=None)
    with tuner.added(adapter, config):
        for path, pair in pairs.items():
            factors: Any = tuner.model.get_submodule(path).stores[adapter]
            factors["A"].copy_(pair.A)
            factors["B"].copy_(pair.B)
            factors.requires_grad_(False)
        blend_whole_modules(tuner.model, adapters, weights, adapter)


def blend_whole_modules(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter: str) -> None:
    """Blend the modules that `adapters` train whole into `adapter`: H + sum_i w_i (H_i - H), H the base model's."""
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        trained = {name: w for name, w in zip(adapters, weights, strict=True) if name in module.modules_to_save}
        if not trained:
            continue
        module.update(adapter)
        base = dict(module.original_module.named_parameters())
        whole = {name: dict(module.modules_to_save[name].named_parameters()) for name in trained}
        for key, blended in module.modules_to_save[adapter].named_parameters():
            moved = [w * (whole[name][key] - base[key]) for name, w in trained.items()]
            blended.data.copy_(base[key] + sum(moved))
            blended.requires_grad_(False)
