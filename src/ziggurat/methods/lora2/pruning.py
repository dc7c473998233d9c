"""Pruning a model's LoRA² adapters while they train: one call a step, and the state that a resumed run needs."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ziggurat.errors import ConfigError
from ziggurat.host.bare import unwrap
from ziggurat.methods.lora2.config import LoRA2Config
from ziggurat.methods.lora2.importance import Importance, entries, scores, sensitivity, smooth, survivors
from ziggurat.methods.lora2.layer import LoRA2Linear
from ziggurat.methods.lora2.regulariser import hook_of

#: Linears whose mask is final for some adapter.
_final: "weakref.WeakSet[LoRA2Linear]" = weakref.WeakSet()
_watching = False


def adapted(model: nn.Module, adapter: str) -> dict[str, LoRA2Linear]:
    """Path in the base model -> linear, for the linears that `adapter` reaches, in the order of the model."""
    root = unwrap(model)[0]
    return {
        path: layer
        for path, layer in root.named_modules()
        if isinstance(layer, LoRA2Linear) and adapter in layer.configs
    }


def learning_adapters(model: nn.Module) -> dict[str, LoRA2Config]:
    """The adapters that are active and train in `model`, with their configs."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRA2Linear)]
    return {adapter: layer.configs[adapter] for layer in layers for adapter in layer.learning}


@torch.no_grad()
def prune(model: nn.Module, step: int, total: int, adapter: str) -> int:
    """Read the gradients of optimiser step `step` (from 1) of `total`, and prune if it is time; the budget now.

    To be called after `optimizer.step()` (gradients are unscaled and clipped then) and before they
    are cleared. Averages are updated until the mask is final; on pruning steps all but the best
    directions of all linears together get E_i = 0. They may grow again until the final phase;
    from then on the mask stays, and so do its zeros after every step of any torch optimiser.

    Raises:
        ConfigError: warm-ups longer than the run; no gradients; a step outside 1..total.
    """
    layers = adapted(model, adapter)
    if not layers:
        raise ConfigError(f"no linear has a LoRA² adapter {adapter!r}.")
    config = next(iter(layers.values())).configs[adapter]
    schedule = config.schedule(total)
    if not 1 <= step <= total:
        raise ConfigError(f"step={step} of total={total}: steps are counted from 1, the last one is total.")
    if (hook := hook_of(model)) is not None:
        hook.forwards = 0
    full = sum(layer.lora2_E[adapter].numel() for layer in layers.values())
    budget = schedule.budget(step, full, min(full, config.target * len(layers)))
    if not all(layer.final[adapter] for layer in layers.values()):
        scored = _update(layers, adapter, config)
        final = schedule.phase(step) == "final"
        if final or schedule.prunes(step):
            for layer, kept in zip(layers.values(), survivors(scored, budget), strict=True):
                layer.kept[adapter], layer.final[adapter] = kept, final
                layer.clear_pruned(adapter)
        if not final:
            return budget
    _stay_final(layers.values())
    for layer in layers.values():
        layer.clear_pruned(adapter)
    return budget


def _update(layers: Mapping[str, LoRA2Linear], adapter: str, config: LoRA2Config) -> list[Tensor]:
    """Take this step's gradients into the averages; the scores of each linear's directions, (r) each."""
    if all(layer.lora2_E[adapter].grad is None for layer in layers.values()):
        raise ConfigError(
            f"LoRA² prunes by gradients, and adapter {adapter!r} has none. Call prune(step, total) after "
            "loss.backward() and optimizer.step(), before optimizer.zero_grad()."
        )
    scored: dict[LoRA2Linear, Tensor] = {}
    alike: dict[Any, list[LoRA2Linear]] = {}
    for layer in layers.values():
        V = layer.lora2_V[adapter]
        alike.setdefault((V.shape, V.device), []).append(layer)
    for ((_, k), device), group in alike.items():
        small = [[getattr(layer, name)[adapter] for layer in group] for name in ("lora2_E", "lora2_V", "lora2_v")]
        weights = entries(*(torch.stack([_whole(p) for p in factors]).float() for factors in small))
        gradients = entries(*(torch.stack([_gradient(p) for p in factors]).float() for factors in small))
        zeros = torch.zeros_like(weights[0])
        olds = [layer.importance.get(adapter, Importance(zeros, zeros)) for layer in group]
        old = Importance(*(torch.stack([part.to(device) for part in parts]) for parts in zip(*olds, strict=True)))
        new = smooth(old, sensitivity(weights, gradients), config.beta1, config.beta2)
        for layer, mean, uncertainty, score in zip(group, *new, scores(new, k), strict=True):
            layer.importance[adapter] = Importance(mean, uncertainty)
            scored[layer] = score
    return [scored[layer] for layer in layers.values()]


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t.detach()  # type: ignore[operator]


def _gradient(parameter: Tensor) -> Tensor:
    # None: a linear that took no part in this step, such as an expert that no token was sent to.
    return torch.zeros_like(_whole(parameter)) if parameter.grad is None else _whole(parameter.grad)


def sensitivities(model: nn.Module, adapter: str = "default") -> int:
    """How many sensitivities one step computes: 2 k r + r for each linear."""
    layers = adapted(model, adapter).values()
    return sum(2 * layer.lora2_V[adapter].numel() + layer.lora2_E[adapter].numel() for layer in layers)


def pruning_state(model: nn.Module) -> dict[str, Tensor]:
    """What a resumed run needs besides the adapter: `<path>.<adapter>.{mean, uncertainty, kept, final}`, on the CPU."""
    state: dict[str, Tensor] = {}
    for path, layer in unwrap(model)[0].named_modules():
        if isinstance(layer, LoRA2Linear):
            for adapter, importance in layer.importance.items():
                # A copy of its own: the averages of alike linears share memory.
                state[f"{path}.{adapter}.mean"] = importance.mean.cpu().clone()
                state[f"{path}.{adapter}.uncertainty"] = importance.uncertainty.cpu().clone()
                state[f"{path}.{adapter}.final"] = torch.tensor(layer.final[adapter])
                if adapter in layer.kept:
                    state[f"{path}.{adapter}.kept"] = layer.kept[adapter].cpu().clone()
    return state


def load_pruning_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `pruning_state` gave.

    Raises:
        ConfigError: the state is of other linears, adapters or ranks. Nothing has been changed then.
    """
    found: list[tuple[LoRA2Linear, str, Importance, str]] = []
    for path, layer in unwrap(model)[0].named_modules():
        for adapter in layer.learning if isinstance(layer, LoRA2Linear) else ():
            at = f"{path}.{adapter}"
            k, r = layer.lora2_v[adapter].shape  # type: ignore[union-attr]
            mean, uncertainty = state.get(f"{at}.mean"), state.get(f"{at}.uncertainty")
            if mean is None or uncertainty is None or mean.shape != (r, 1 + 2 * k):
                have = "nothing" if mean is None else f"averages of shape {tuple(mean.shape)}"
                raise ConfigError(
                    f"the pruning state holds {have} for {at!r}, which needs ({r}, {1 + 2 * k}): it was saved from "
                    "another model or config. Resume with the config that the run was started with."
                )
            found.append((layer, adapter, Importance(mean, uncertainty), at))  # type: ignore[arg-type]
    for layer, adapter, importance, at in found:
        layer.importance[adapter] = importance
        layer.final[adapter] = bool(state[f"{at}.final"])
        if f"{at}.kept" in state:
            layer.kept[adapter] = state[f"{at}.kept"]


def _stay_final(layers: Iterable[LoRA2Linear]) -> None:
    """Keep the pruned directions of `layers` at zero from now on."""
    global _watching
    _final.update(layers)
    if not _watching:
        # A pruned E_i has no gradient to follow but the optimiser's momentum: only after its step can the zero be
        # put back, whoever calls it.
        register_optimizer_step_post_hook(_clear_final)
        _watching = True


def _clear_final(*_: Any) -> None:
    for layer in list(_final):
        for adapter, final in layer.final.items():
            if final:
                layer.clear_pruned(adapter)
