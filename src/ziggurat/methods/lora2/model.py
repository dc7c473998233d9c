"""LoRA² as a PEFT method: prunes its directions, and drops the pruned ones."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ziggurat.errors import ConfigError
from ziggurat.extras import missing
from ziggurat.host.method import Card, Method
from ziggurat.host.registry import register
from ziggurat.host.site import Site, check_room
from ziggurat.host.tuner import MethodTuner
from ziggurat.methods.lora2 import pruning
from ziggurat.methods.lora2.config import CITATION, LoRA2Config
from ziggurat.methods.lora2.equations import pair, parts, tensors
from ziggurat.methods.lora2.layer import Directions, LoRA2Linear, most_alive
from ziggurat.methods.lora2.ranks import RANKS_PICTURE, heat_map
from ziggurat.methods.lora2.regulariser import Regulariser, deviation, penalty


class LoRA2Model(MethodTuner):
    """Puts LoRA² adapters into a model. Made by PEFT from a `LoRA2Config`; see there.

    A custom loop calls `prune` once a step; a transformers Trainer needs no call.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        Regulariser.start(self.model, self.method)

    @property
    def parameter_cls(self) -> type[Any]:
        from ziggurat.methods.lora2.experts import LoRA2Parameter

        return LoRA2Parameter

    def prune(self, step: int, total: int, adapter: str = "default") -> int:
        """Read the gradients of optimiser step `step` (from 1) of `total`, and prune if a pruning is due.

        The one call of a training loop without Trainer (AdaLoRA's `update_and_allocate`): after
        `loss.backward()` and `optimizer.step()`, before `optimizer.zero_grad()`. Returns how many
        directions the schedule allows at this step.

        Raises:
            ConfigError: warm-ups longer than the run, no gradients, or a step outside 1..total.
        """
        return pruning.prune(self.model, step, total, adapter)

    def penalty(self) -> Tensor | None:
        """The regularisation term. Add it to a loss that you compute outside the model. None: there is none."""
        return penalty(self.model)

    def orthogonality(self) -> float:
        """The deviation from orthonormality, ||G - I||_F, averaged over the factors that train, without its weight."""
        return float(deviation(self.model).detach())

    def pruning_state(self) -> dict[str, Tensor]:
        """Averages and masks, which a custom loop has to save with the optimiser's state."""
        return pruning.pruning_state(self.model)

    def load_pruning_state(self, state: dict[str, Tensor]) -> None:
        """Restore averages and masks from `pruning_state`.

        Raises:
            ConfigError: they are of another model or config.
        """
        pruning.load_pruning_state(self.model, state)

    def ranks(self, adapter: str = "default") -> dict[str, int]:
        """Path -> how many directions of `adapter` are active there (E_i isn't 0); for experts, the largest number."""
        return {path: most_alive(layer.alive(adapter)) for path, layer in self._layers(adapter).items()}

    def compact(self, adapter: str = "default") -> dict[str, int]:
        """Drop the pruned directions of `adapter`; path -> remaining rank, which the config stores as `rank_pattern`.

        The update doesn't change, and `save_pretrained` writes the smaller adapter, which loads like any other. The
        factors are new parameters, unknown to an existing optimiser.

        Raises:
            ConfigError: no direction is active, as in an untrained adapter.
        """
        layers = self._layers(adapter)
        alive = {path: layer.alive(adapter) for path, layer in layers.items()}
        if not any(mask.any() for mask in alive.values()):
            raise ConfigError(
                f"every direction of adapter {adapter!r} has E = 0, as before training: nothing would be left. Train "
                "it, or load trained weights, before compact()."
            )
        pattern = {path: layer.drop(adapter, alive[path]) for path, layer in layers.items()}
        self.peft_config[adapter].rank_pattern = pattern  # type: ignore[union-attr]
        return pattern

    def _layers(self, adapter: str) -> dict[str, Directions]:
        if adapter not in self.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist; there are {', '.join(self.peft_config)}.")
        return pruning.adapted(self.model, adapter)


def check(config: LoRA2Config, site: Site) -> None:
    """Raise ConfigError if a rank is above the largest rank of the matrix at `site`."""
    if config.outer_rank is not None and config.outer_rank > min(site.d_in, site.d_out):
        raise ConfigError(
            f"outer_rank={config.outer_rank} is above the matrix: {site.path!r} maps {site.d_in} to {site.d_out}, so "
            f"at most {min(site.d_in, site.d_out)} directions can be orthonormal there. Lower outer_rank, leave it out "
            "(8, or less where a matrix is smaller), or leave the module out by exclude_modules."
        )
    check_room(config, f"r={config.rank_at(site.path)}", config.rank_at(site.path), site, free=True)


def step(
    root: nn.Module, adapter: str, config: LoRA2Config, step: int, total: int, optimizer: Optimizer | None
) -> None:
    """Check the schedule and reset before the first step; after each step rank by the gradients, and prune."""
    if step:
        pruning.prune(root, step, total, adapter)
        return
    config.schedule(total)
    for layer in pruning.adapted(root, adapter).values():
        layer.begin(adapter)


def finish(model: Any) -> dict[str, int]:
    """Drop the pruned directions; returns the number of remaining parameters."""
    if any(model.ranks().values()):
        model.compact()
    prefix = model.base_model.prefix
    return {"active": sum(p.numel() for name, p in model.named_parameters() if prefix in name)}


def picture(model: Any, folder: Path) -> None:
    """Draw the remaining ranks, layers by roles, if matplotlib is installed."""
    if not missing(["matplotlib"]):
        heat_map(model, model.ranks(), folder / RANKS_PICTURE)


def callback(config: LoRA2Config) -> type[Any]:
    """The callback that adds the regulariser to losses computed outside the model."""
    from ziggurat.methods.lora2.callback import LoRA2Callback  # loads transformers' Trainer

    return LoRA2Callback


METHOD = Method(
    "lora2",
    LoRA2Config,
    tensors,
    pair,
    Card("LoRA²", "2408.06854", "two nested planes, pruned by importance", CITATION),
    check=check,
    parts=parts,
    needs_steps=lambda config: config.prunes,
    step=step,
    step_does="ranks directions by their gradients",
    callback=callback,
    run_state=pruning.pruning_state,
    resume=pruning.load_pruning_state,
    finish=finish,
    picture=picture,
    older_names=((r"\.lora2_([UVEvu])((?:\.[^.]+)?)$", r".lora2_factors\2.\1"),),
)
register(METHOD, tuner=LoRA2Model, layer=LoRA2Linear)
