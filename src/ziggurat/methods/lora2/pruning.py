"""Pruning a model's LoRA² adapters during training: one call a step, and the state that a resumed run needs."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ziggurat.errors import ConfigError
from ziggurat.host.base.unwrap import unwrap
from ziggurat.host.lifecycle import Watch
from ziggurat.host.tensors import whole
from ziggurat.methods.lora2.config import LoRA2Config
from ziggurat.methods.lora2.importance import Importance, entries, scores, sensitivity, smooth, survivors
from ziggurat.methods.lora2.layer import Directions

#: Linear layers whose mask is final for some adapter.
_final: "weakref.WeakSet[Directions]" = weakref.WeakSet()
_watching = False


def adapted(model: nn.Module, adapter: str) -> dict[str, Directions]:
    """Path in the base model -> layer, for the linear layers that `adapter` reaches, in the order of the model."""
    return {path: layer for path, layer in _directions(model) if adapter in layer.configs and layer.has_planes(adapter)}


def _directions(model: nn.Module) -> Iterator[tuple[str, Directions]]:
    for path, layer in unwrap(model)[0].named_modules():
        if isinstance(layer, Directions):
            yield path, layer


def learning_adapters(model: Any) -> dict[str, LoRA2Config]:
    """The adapters that are active and train in `model`, with their configs; none in what is no module."""
    layers = [layer for _, layer in _directions(model)] if isinstance(model, nn.Module) else []
    return {adapter: layer.configs[adapter] for layer in layers for adapter in layer.learning}


@torch.no_grad()
def prune(model: nn.Module, step: int, total: int, adapter: str) -> int:
    """Read the gradients of optimiser step `step` (from 1) of `total`, and prune if due; returns the current budget.

    To be called after `optimizer.step()` (gradients are unscaled and clipped then) and before they are cleared.
    Averages are updated until the mask is final; on pruning steps all but the best directions of all linear layers
    together get E_i = 0. They may grow again until the final phase; from then on the mask is fixed, and its zeros are
    restored after every step of the optimiser. Step 1 begins a run and resets the state.

    Raises:
        ConfigError: warm-ups longer than the run; no gradients; a step outside 1..total.
    """
    layers = adapted(model, adapter)
    if not layers:
        raise ConfigError(f"no linear layer has a LoRA² adapter {adapter!r}.")
    config = next(iter(layers.values())).configs[adapter]
    schedule = config.schedule(total)
    if not 1 <= step <= total:
        raise ConfigError(f"step={step} of total={total}: steps are counted from 1, the last one is total.")
    if step == 1:
        for layer in layers.values():
            layer.begin(adapter)
    Watch.reset(model)
    full = sum(layer.factor(adapter, "E").numel() for layer in layers.values())
    matrices = sum(layer.factor(adapter, "E").shape[:-1].numel() for layer in layers.values())
    budget = schedule.budget(step, full, min(full, config.target * matrices))
    if not all(layer.final.get(adapter, False) for layer in layers.values()):
        scored = _update(layers, adapter, config)
        final = schedule.phase(step) == "final"
        if final or schedule.prunes(step):
            flat = [score.flatten() for score in scored]
            for layer, score, mask in zip(layers.values(), scored, survivors(flat, budget), strict=True):
                layer.masks[adapter], layer.final[adapter] = mask.view_as(score), final
                layer.clear_pruned(adapter)
        if not final:
            return budget
    for layer in layers.values():
        layer.clear_pruned(adapter)
    _stay_final(layers.values())
    return budget


def _update(layers: Mapping[str, Directions], adapter: str, config: LoRA2Config) -> list[Tensor]:
    """Take this step's gradients into the averages; the scores of each layer's directions, in its E's shape."""
    if all(layer.factor(adapter, "E").grad is None for layer in layers.values()):
        raise ConfigError(
            f"LoRA² prunes by gradients, and adapter {adapter!r} has none. Call prune(step, total) after "
            "loss.backward() and optimizer.step(), before optimizer.zero_grad()."
        )
    scored: dict[Directions, Tensor] = {}
    alike: dict[Any, list[Directions]] = {}
    for layer in layers.values():
        V = layer.factor(adapter, "V")
        alike.setdefault((V.shape, V.device), []).append(layer)
    sensed: list[Tensor] = []
    for group in alike.values():
        small = [[layer.factor(adapter, key) for layer in group] for key in "EVv"]
        weights = entries(*(torch.stack([whole(p) for p in factors]).float() for factors in small))
        gradients = entries(*(torch.stack([_gradient(p) for p in factors]).float() for factors in small))
        sensed.append(sensitivity(weights, gradients))
    # Loss scaling skips a step as a whole where one gradient isn't finite, so its averages are skipped as a whole too.
    finite = all(bool(torch.isfinite(s).all()) for s in sensed)
    for (((*_, k), device), group), now in zip(alike.items(), sensed, strict=True):
        zeros = torch.zeros_like(now[0])
        olds = [layer.importance.get(adapter, Importance(zeros, zeros)) for layer in group]
        old = Importance(*(torch.stack([part.to(device) for part in parts]) for parts in zip(*olds, strict=True)))
        new = smooth(old, now, config.beta1, config.beta2) if finite else old
        for layer, mean, uncertainty, score in zip(group, *new, scores(new, k), strict=True):
            layer.importance[adapter] = Importance(mean, uncertainty)
            scored[layer] = score
    return [scored[layer] for layer in layers.values()]


def _gradient(parameter: Tensor) -> Tensor:
    # None: a layer that this step didn't use, such as an expert without tokens.
    return torch.zeros_like(whole(parameter)) if parameter.grad is None else whole(parameter.grad)


def pruning_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that a resumed run needs: `<path>.<adapter>.{mean, uncertainty, kept, final}`, on the CPU."""
    state: dict[str, Tensor] = {}
    for path, layer in _directions(model):
        for adapter, importance in layer.importance.items():
            tensors = {**importance._asdict(), "final": torch.tensor(layer.final.get(adapter, False))}
            if adapter in layer.masks:
                tensors["kept"] = layer.masks[adapter]
            # A copy: the averages of linear layers of one shape share memory.
            state |= {f"{path}.{adapter}.{name}": tensor.cpu().clone() for name, tensor in tensors.items()}
    return state


def load_pruning_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore the result of `pruning_state`.

    Raises:
        ConfigError: the state is of other linear layers, adapters or ranks. Nothing has been changed then.
    """
    loaded: list[tuple[Directions, str, Importance, str]] = []
    for path, layer in _directions(model):
        for adapter in (name for name in layer.learning if layer.configs[name].prunes):
            at = f"{path}.{adapter}"
            *experts, k, r = layer.factor(adapter, "v").shape
            shape = (*experts, r, 1 + 2 * k)
            mean, uncertainty = state.get(f"{at}.mean"), state.get(f"{at}.uncertainty")
            if mean is None or uncertainty is None or mean.shape != shape:
                have = "nothing" if mean is None else f"averages of shape {tuple(mean.shape)}"
                raise ConfigError(
                    f"the pruning state holds {have} for {at!r}, which needs {shape}: it was saved from "
                    "another model or config. Resume with the config that the run was started with."
                )
            loaded.append((layer, adapter, Importance(mean, uncertainty), at))
    for layer, adapter, importance, at in loaded:
        layer.importance[adapter] = importance
        layer.final[adapter] = bool(state[f"{at}.final"])
        if f"{at}.kept" in state:
            layer.masks[adapter] = state[f"{at}.kept"]


def _stay_final(layers: Iterable[Directions]) -> None:
    """Keep the pruned directions of `layers` at zero after each step of the optimiser that has them."""
    global _watching
    _final.update(layers)
    if not _watching:
        # The optimiser's momentum moves a pruned E_i, so the zero is restored after each of its steps.
        register_optimizer_step_post_hook(_clear_final)
        _watching = True


def _clear_final(optimizer: Optimizer, *_: Any) -> None:
    if not _final:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(_final):
        if not any(layer.final.values()):
            _final.discard(layer)
        for adapter, final in layer.final.items():
            if final and id(layer.factor(adapter, "E")) in stepped:
                layer.clear_pruned(adapter)
