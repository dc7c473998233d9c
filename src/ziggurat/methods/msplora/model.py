"""MSPLoRA's tuner: builds the pyramid over a model's stacks of layers."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.anatomy import Place
from ziggurat.host.linear import AdaptedLinear, features
from ziggurat.host.trainers import ride_along
from ziggurat.host.tuner import LinearTuner, check_rank_here
from ziggurat.methods.msplora.config import MSPLoraConfig
from ziggurat.methods.msplora.layer import MSPLoraLayer, MSPLoraLinear, Pyramid
from ziggurat.methods.msplora.pyramid import Tier, components, tier_of

#: Where the bank stands in the base model; must not contain the tuner's prefix.
BANK = "pyramid"


class MSPLoraModel(LinearTuner):
    """Puts MSPLoRA adapters into a model. Made by PEFT from an `MSPLoraConfig`; see there."""

    prefix = "msplora_"
    tuner_layer_cls = MSPLoraLayer
    layer_cls = MSPLoraLinear

    def _place(self, config: MSPLoraConfig, path: str) -> Place:
        """Where the linear at `path` lies; outside every stack it is a stack of its own, with one layer."""
        assert self.anatomy is not None
        return self.anatomy.find(path) or Place(stack=path, layer=0, role="", num_layers=1)

    def _prepare_model(self, peft_config: MSPLoraConfig, model: nn.Module) -> None:  # type: ignore[override]
        self._patterns_used: set[str | None] = set()
        super()._prepare_model(peft_config, model)
        unused = sorted(set(peft_config.rank_pattern or {}) - self._patterns_used)
        if unused:
            raise ConfigError(
                f"rank_pattern[{unused[0]!r}]: no adapted linear has this role, or longer keys take them all. A key is "
                "the name of a target module, or the end of its path inside the layer, without the layer's number."
            )

    def _check_target(self, config: MSPLoraConfig, path: str, module: nn.Module) -> None:
        assert self.anatomy is not None
        if not self.anatomy.stacks and config.speaks_of_depth:
            self.anatomy.place(path)  # raises: the config speaks of layers, and there are none
        place, (d_in, d_out) = self._place(config, path), features(module)
        self._patterns_used.add(config.pattern_key(place.role))
        if not place.role:
            for tier in config.pyramid():
                check_rank_here(f"rank of tier {tier.name!r}", tier.r, path, module)
            return
        for tier in config.pyramid(place.role):
            tier.check(place)
            if tier.r > min(d_in, d_out):
                raise ConfigError(
                    f"rank {tier.r} of tier {tier.name!r} is above the matrix: {path!r} maps {d_in} to {d_out}, so at "
                    f"most rank {min(d_in, d_out)} has a meaning there. Lower r, or leave the module out by "
                    "exclude_modules."
                )

    def _makes(self, config: MSPLoraConfig, path: str, module: nn.Module) -> dict[str, int]:
        d_in, d_out = features(module)
        place = self._place(config, path)
        tiers = config.pyramid(place.role)
        parts = components(tiers, place, d_in, d_out)
        return {part.pair: tier.r * (d_in + d_out) for tier, part in zip(tiers, parts, strict=True)}

    def _adapt(self, config: MSPLoraConfig, adapter: str, layer: AdaptedLinear, path: str) -> None:
        assert isinstance(layer, MSPLoraLinear)
        bank, place = self._bank(), self._place(config, path)
        tiers = config.pyramid(place.role)
        shape = (layer.in_features, layer.out_features)
        parts = components(tiers, place, *shape)
        device, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        for tier, part in zip(tiers, parts, strict=True):
            bank.create(adapter, part.pair, *shape, tier.r, config.init_weights, device, dtype)
        bank.tiers[adapter], bank.staged[adapter] = tiers, config.train_in_stages
        if config.train_in_stages:
            from ziggurat.methods.msplora.stages import StageCallback  # loads transformers' Trainer

            ride_along(StageCallback)
        bank.quantization_backend = layer.quantization_backend
        bank.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        layer.join(adapter, bank, parts, config.lora_dropout)

    def _bank(self) -> Pyramid:
        return Pyramid.at_root(self.model, BANK)

    def set_stage(self, progress: float, adapter: str = "default") -> str:
        """Let only one tier of `adapter` learn: the one whose share of the run `progress` (0 to 1) lies in.

        The tiers take equal shares of the run, coarse to fine. Returns the tier's name.
        A Trainer does this by itself when the config says `train_in_stages`.
        """
        self._tiers(adapter)
        return self._bank().set_stage(progress, adapter)

    def end_stages(self, adapter: str = "default") -> None:
        """Let all tiers of `adapter` learn again."""
        self._bank().end_stages(adapter)

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
        the new adapter shares as the old ones do.

        Raises:
            ValueError: an unknown adapter, lists of unequal length, or adapters whose pyramids differ.
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
        first = self.peft_config[adapters[0]]
        said = {"tiers": tiers, "num_groups": None, "group_starts": None, "ranks": None}
        self.peft_config[adapter_name] = replace(first, **said, use_rslora=False, even_scales=False, bias="none")
        self.inject_adapter(self.model, adapter_name)
        bank = self._bank()
        scales = {tier.name: [p[i].scale for p in pyramids] for i, tier in enumerate(pyramids[0])}
        for name in bank.factors(adapter_name).names():
            new = bank.factors(adapter_name).pair(name)
            olds = [bank.factors(adapter).pair(name) for adapter in adapters]
            factors = [w * s for w, s in zip(weights, scales[tier_of(name)], strict=True)]
            new.A.copy_(torch.cat([old.A for old in olds]))
            new.B.copy_(torch.cat([f * old.B for f, old in zip(factors, olds, strict=True)], dim=1))
        for half in bank.factors(adapter_name).parameters():
            half.requires_grad_(False)

    def _check_equal_structure(self, adapters: list[str], pyramids: list[tuple[Tier, ...]]) -> None:
        bank = self._bank()
        shapes = [[(t.name, t.groups, t.at_most) for t in pyramid] for pyramid in pyramids]
        names = [set(bank.factors(adapter).names()) for adapter in adapters]
        for adapter, shape, pairs in zip(adapters, shapes, names, strict=True):
            if shape != shapes[0] or pairs != names[0]:
                raise ValueError(
                    f"adapters {adapters[0]!r} and {adapter!r} have different pyramids (tiers, groups or targets), so "
                    "their shared pairs don't correspond. Combine adapters of equal structure, or export them to plain "
                    "LoRA with ziggurat.export and combine those."
                )
