"""MSPLoRA as a PEFT method: its checks, its stages, and weighted sums of its adapters."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ziggurat.host.bank import Bank
from ziggurat.host.method import Card, Method
from ziggurat.host.registry import register
from ziggurat.host.site import Site
from ziggurat.host.trainers import ride_along
from ziggurat.host.tuner import MethodTuner
from ziggurat.host.values import check_room
from ziggurat.methods.msplora.config import CITATION, MSPLoraConfig
from ziggurat.methods.msplora.equations import pair, parts, tensors
from ziggurat.methods.msplora.pyramid import Tier, tier_of


class MSPLoraModel(MethodTuner):
    """Puts MSPLoRA adapters into a model. Made by PEFT from an `MSPLoraConfig`; see there."""

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].train_in_stages:  # type: ignore[union-attr]
            from ziggurat.methods.msplora.stages import StageCallback  # loads transformers' Trainer

            ride_along(StageCallback)

    def set_stage(self, progress: float, adapter: str = "default") -> str:
        """Let only one tier of `adapter` learn: the one whose share of the run `progress` (0 to 1) lies in.

        The tiers take equal shares of the run, coarse to fine. Returns the tier's name. It stays so until `end_stages`.
        A Trainer does this by itself when the config says `train_in_stages`.
        """
        tiers = self._tiers(adapter)
        bank = self.bank_cls.at_root(self.model)
        learning = stage(tiers, progress)
        bank.hold_still(adapter, [leaf for leaf in bank.factors(adapter).names() if tier_of(leaf) != learning])
        return learning

    def end_stages(self, adapter: str = "default") -> None:
        """Let all tiers of `adapter` learn again."""
        self.bank_cls.at_root(self.model).hold_still(adapter, ())

    def _tiers(self, adapter: str) -> tuple[Tier, ...]:
        if adapter not in self.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist; there are {', '.join(self.peft_config)}.")
        return self.peft_config[adapter].pyramid()  # type: ignore[union-attr]

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **_: Any,
    ) -> None:
        """Add an adapter whose every delta is the weighted sum of the given ones': dW = sum_i w_i dW_i, exactly.

        The ranks add up inside each tier: A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2, ...] with scale 1, so
        the new adapter shares as the old ones do. A module that all of them train whole becomes H + sum_i w_i (H_i - H)
        with H the base model's.

        Raises:
            ValueError: an unknown adapter, lists of unequal length, or adapters whose pyramids differ. No adapter is
                added then.
        """
        if adapter_name in self.peft_config:
            return
        if combination_type not in ("linear", "cat"):
            raise ValueError(
                f"Invalid combination_type: {combination_type}. Only 'linear' is supported: the weighted sum, which is "
                "exact because ranks are concatenated inside the shared pairs."
            )
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter.")
        pyramids = [self._tiers(name) for name in adapters]
        patterned = [name for name in adapters if self.peft_config[name].rank_pattern]  # type: ignore[union-attr]
        if patterned:
            raise ValueError(
                f"adapter {patterned[0]!r} has ranks by role (rank_pattern), which can't be added up tier by tier. "
                "Export the adapters to plain LoRA with ziggurat.export and combine those."
            )
        self._check_equal_structure(adapters, pyramids)
        tiers = [
            {
                "name": same[0].name,
                "groups": list(same[0].groups) if isinstance(same[0].groups, tuple) else same[0].groups,
                "r": (rank := sum(tier.r for tier in same)),
                "lora_alpha": float(rank),
            }
            for same in zip(*pyramids, strict=True)
        ]
        plain = {"num_groups": None, "group_starts": None, "ranks": None, "alpha_pattern": None}
        first: Any = self.peft_config[adapters[0]]
        summed = replace(first, tiers=tiers, **plain, use_rslora=False, even_scales=False, bias="none")
        summed.any_rank = True
        with self.added(adapter_name, summed):
            bank = self.bank_cls.at_root(self.model)
            sums = bank.factors(adapter_name)
            for layer in (layer for _, layer in self._linears() if adapter_name in layer.leaves):
                scales = [
                    {tier.name: tier.scale for tier in layer.configs[name].pyramid(layer.sites[name].role)}
                    for name in adapters
                ]
                for tier in tiers:
                    name = tier["name"]
                    down, up = (layer.leaves[adapter_name][f"{half}_{name}"][1] for half in "AB")
                    olds = [bank.factors(adapter) for adapter in adapters]
                    factors = [w * scale[name] for w, scale in zip(weights, scales, strict=True)]
                    sums[down].copy_(torch.cat([old[down] for old in olds]))
                    sums[up].copy_(torch.cat([f * old[up] for f, old in zip(factors, olds, strict=True)], dim=1))
            for half in sums.parameters():
                half.requires_grad_(False)
            self.blend_whole_modules(adapters, weights, adapter_name)

    def _check_equal_structure(self, adapters: list[str], pyramids: list[tuple[Tier, ...]]) -> None:
        bank = self.bank_cls.at_root(self.model)
        shapes = [[(t.name, t.groups, t.at_most) for t in pyramid] for pyramid in pyramids]
        names = [set(bank.factors(adapter).names()) for adapter in adapters]
        for adapter, shape, leaves in zip(adapters, shapes, names, strict=True):
            if shape != shapes[0] or leaves != names[0]:
                raise ValueError(
                    f"adapters {adapters[0]!r} and {adapter!r} have different pyramids (tiers, groups or targets), so "
                    "their shared pairs don't correspond. Combine adapters of equal structure, or export them to plain "
                    "LoRA with ziggurat.export and combine those."
                )


def stage(tiers: tuple[Tier, ...], progress: float) -> str:
    """The name of the tier whose equal share of the run `progress` (0 to 1) lies in, coarse to fine."""
    return tiers[min(int(progress * len(tiers)), len(tiers) - 1)].name


def check(config: MSPLoraConfig, site: Site) -> None:
    """Raise ConfigError if the pyramid has no room in the stack or the matrix of `site`."""
    for tier in config.pyramid(site.role):
        if site.role:
            tier.check(site)
        check_room(config, f"rank {tier.r} of tier {tier.name!r}", tier.r, site, free=not site.role)


def needs_steps(config: MSPLoraConfig) -> bool:
    """Whether the tiers train one after the other."""
    return config.train_in_stages


def step(
    root: nn.Module, adapter: str, config: MSPLoraConfig, step: int, total: int, optimizer: Optimizer | None
) -> None:
    """Let the tier learn in whose share of the run the next step lies; after the last step all learn again."""
    bank = next(module for module in root.modules() if isinstance(module, Bank) and module.method is METHOD)
    learning = stage(config.pyramid(), step / total)
    held = [] if step == total else [leaf for leaf in bank.factors(adapter).names() if tier_of(leaf) != learning]
    bank.hold_still(adapter, held)


METHOD = Method(
    "msplora",
    MSPLoraConfig,
    tensors,
    pair,
    Card("MSPLoRA", "2503.21838", "a pyramid of shared and private low-rank updates", CITATION),
    check=check,
    parts=parts,
    needs_steps=needs_steps,
    step=step,
    older_names=(
        (
            r"(^|\.)pyramid\.msplora_factors\.((?:[^.:]+\.)?)(.*):([^:]*\D)(\d+):([AB])$",
            r"\1bank_msplora.msplora_factors.\2\3:\5:\6_\4",
        ),
    ),
)
register(METHOD, tuner=MSPLoraModel)
