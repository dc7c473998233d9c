"""MSPLoRA as a PEFT method: its checks, its stages, and weighted sums of its adapters."""

from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ziggurat.errors import ConfigError
from ziggurat.host.bank import Bank
from ziggurat.host.blend import blend_whole_modules
from ziggurat.host.method import Card, Method
from ziggurat.host.registry import register
from ziggurat.host.site import Site, check_room
from ziggurat.host.tensors import tier_of
from ziggurat.host.tuner import MethodTuner
from ziggurat.host.values import shown
from ziggurat.methods.msplora.config import CITATION, MSPLoraConfig
from ziggurat.methods.msplora.equations import pair, parts, tensors
from ziggurat.methods.msplora.pyramid import Tier


class MSPLoraModel(MethodTuner):
    """Puts MSPLoRA adapters into a model. Made by PEFT from an `MSPLoraConfig`; see there."""

    def set_stage(self, progress: float, adapter: str = "default") -> str:
        """Train only one tier of `adapter`: the one whose share of the run contains `progress` (0 to 1).

        The tiers take equal shares of the run, coarse to fine. Returns the tier's name. Holds until `end_stages`. A
        Trainer does this itself if the config sets `train_in_stages`.

        Raises:
            ConfigError: `progress` isn't a number from 0 to 1.
        """
        tiers = self._tiers(adapter)
        if not isinstance(progress, Real) or not 0 <= progress <= 1:
            raise ConfigError(f"set_stage got progress={shown(progress)}: the share of the run, 0 to 1, is needed.")
        bank = self.bank_cls.at_root(self.model)
        bank.hold_still(adapter, waiting(bank, adapter, tiers, progress))
        return stage(tiers, progress)

    def end_stages(self, adapter: str = "default") -> None:
        """Train all tiers of `adapter` again."""
        self._tiers(adapter)
        self.bank_cls.at_root(self.model).hold_still(adapter, ())

    def _tiers(self, adapter: str) -> tuple[Tier, ...]:
        if adapter not in self.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist; there are {', '.join(self.peft_config)}.")
        return self.peft_config[adapter].stages  # type: ignore[union-attr]

    def _add_combined(self, adapters: list[str], weights: list[float], adapter: str, kind: str, **options: Any) -> None:
        """A sum of equal pyramids stays one: in each tier A = [A_1; ...] and B = [w_1 s_1 B_1, ...]."""
        if kind not in ("linear", "cat") or not self._equal_pyramids(adapters):
            return super()._add_combined(adapters, weights, adapter, kind, **options)
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        tiers = [
            {
                "name": same[0].name,
                "groups": list(same[0].groups) if isinstance(same[0].groups, tuple) else same[0].groups,
                "r": (rank := sum(tier.r for tier in same)),
                "lora_alpha": float(rank),
            }
            for same in zip(*(config.pyramid() for config in configs), strict=True)
        ]
        unset = dict.fromkeys(("num_groups", "group_starts", "ranks", "alpha_pattern", "freeze_tiers", "from_adapter"))
        summed = replace(configs[0], tiers=tiers, **unset, use_rslora=False, even_scales=False, bias="none")
        summed.any_rank = True
        with self.added(adapter, summed):
            bank = self.bank_cls.at_root(self.model)
            sums, olds = bank.factors(adapter), [bank.factors(name) for name in adapters]
            for layer in (layer for _, layer in self._linear_layers() if adapter in layer.leaves):
                pyramids = [layer.configs[name].pyramid(layer.sites[name].role) for name in adapters]
                for same in zip(*pyramids, strict=True):
                    down, up = (layer.leaves[adapter][f"{half}_{same[0].name}"][1] for half in "AB")
                    factors = [w * tier.scale for w, tier in zip(weights, same, strict=True)]
                    sums[down].copy_(torch.cat([old[down] for old in olds]))
                    sums[up].copy_(torch.cat([f * old[up] for f, old in zip(factors, olds, strict=True)], dim=1))
            sums.requires_grad_(False)
            blend_whole_modules(self.model, adapters, weights, adapter)

    def _equal_pyramids(self, adapters: list[str]) -> bool:
        """Whether the shared pairs of these adapters correspond, tier by tier."""
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        if any(config.rank_pattern or config.blended for config in configs):
            return False
        bank = self.bank_cls.at_root(self.model)
        forms = [[(t.name, t.groups, t.at_most) for t in config.pyramid()] for config in configs]
        leaves = [set(bank.factors(name).names()) for name in adapters]
        if any(form != forms[0] for form in forms) or any(names != leaves[0] for names in leaves):
            return False
        # `alpha_pattern` may give the layers that share a B scales of their own, which no single B can hold.
        scales: dict[tuple[str, str], float] = {}
        for name, layer in ((name, layer) for _, layer in self._linear_layers() for name in adapters):
            for tier in layer.configs[name].pyramid(layer.sites[name].role) if name in layer.leaves else ():
                up = layer.leaves[name][f"B_{tier.name}"][1]
                if scales.setdefault((name, up), tier.scale) != tier.scale:
                    return False
        return True


def stage(tiers: tuple[Tier, ...], progress: float) -> str:
    """The name of the tier whose equal share of the run, coarse to fine, contains `progress` (0 to 1)."""
    return tiers[min(int(progress * len(tiers)), len(tiers) - 1)].name


def waiting(bank: Bank, adapter: str, tiers: tuple[Tier, ...], progress: float) -> list[str]:
    """The names of the shared tensors of the tiers that don't learn at `progress`."""
    learning = stage(tiers, progress)
    return [leaf for leaf in bank.factors(adapter).names() if tier_of(leaf) != learning]


def check(config: MSPLoraConfig, site: Site) -> None:
    """Raise ConfigError if the pyramid doesn't fit the stack or the matrix of `site`."""
    if not config.pyramid_at(site):
        raise ConfigError(
            f"every tier has several groups of experts, and {site.path!r} is none: add a tier with expert_groups 1, or "
            "leave the module out of target_modules."
        )
    for tier in config.pyramid_at(site):
        if site.role:
            tier.check(site)
        check_room(config, f"rank {tier.r} of tier {tier.name!r}", tier.r, site, free=not site.role)


def step(
    root: nn.Module, adapter: str, config: MSPLoraConfig, step: int, total: int, optimizer: Optimizer | None
) -> None:
    """Train the tier whose share of the run contains the next step; after the last step train all again."""
    bank: Bank = getattr(root, METHOD.bank)
    bank.hold_still(adapter, [] if step == total else waiting(bank, adapter, config.stages, step / total))


def callback(config: MSPLoraConfig) -> type[Any] | None:
    """The callback that trains in stages under a Trainer without changing the model."""
    if not config.train_in_stages:
        return None
    from ziggurat.methods.msplora.stages import StageCallback  # loads transformers' Trainer

    return StageCallback


METHOD = Method(
    "msplora",
    MSPLoraConfig,
    tensors,
    pair,
    Card("MSPLoRA", "2503.21838", "a pyramid of shared and private low-rank updates", CITATION),
    check=check,
    parts=parts,
    sums=True,
    needs_steps=lambda config: config.train_in_stages,
    step=step,
    step_fields=("train_in_stages",),
    callback=callback,
    steps_in_trainer=False,
    older_names=(
        (
            r"(^|\.)pyramid\.msplora_factors\.((?:[^.:]+\.)?)(.*):([^:]*\D)(\d+):([AB])$",
            r"\1bank_msplora.msplora_factors.\2\3:\5:\6_\4",
        ),
    ),
)
register(METHOD, tuner=MSPLoraModel)
