"""The sharing of tensors that training has changed, saved in an adapter's config and, as a tensor, beside its weights.

A Trainer that resumes, or loads its best checkpoint, loads weights into an existing model and doesn't read the config
beside them. So the structure is stored with the weights, and restored before them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ziggurat.errors import ConfigError
from ziggurat.files.untrusted import check_depth
from ziggurat.host.bank import Bank
from ziggurat.host.config import MethodConfig
from ziggurat.host.method import Method
from ziggurat.host.method_layer import layers_of
from ziggurat.host.site import Site
from ziggurat.host.tensors import Factors
from ziggurat.host.tuner import MethodTuner
from ziggurat.host.values import MOST_RANK, is_whole, option, shown

#: The name of the tensor in an adapter's file.
STRUCTURE = "structure"


def to_tensor(plain: Any) -> Tensor:
    """Plain lists and dicts as JSON in a tensor of bytes, which every format of weights can hold."""
    return torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8).clone()


def from_tensor(coded: Tensor) -> Any:
    """The inverse of `to_tensor`.

    Raises:
        ConfigError: the tensor holds something else.
    """
    try:
        plain = json.loads(bytes(coded.to(device="cpu", dtype=torch.uint8).tolist()).decode())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"the structure beside an adapter's weights isn't the JSON that was written ({error}): the file is "
            "damaged, or was converted to another dtype. Save the adapter again."
        ) from error
    check_depth(plain, "the structure of an adapter")
    return plain


@dataclass(repr=False, eq=False)
class MergingConfig(MethodConfig):
    """The config of a method whose layers come to share a tensor during training; see `Method.reads`.

    `structure` maps a site's `kind` to groups of layers, [[0, 2], [1], [3]]; the tensor of a group is that of its first
    layer. A layer in no group has its own. Copies of the config, as those at single sites, share the mapping.
    """

    no_factors = frozenset({STRUCTURE})

    structure: dict[str, Any] | None = option(None, "Which layers share which tensors; not for the user to set.")

    def __post_init__(self) -> None:
        super().__post_init__()
        structure, self.structure = self.structure, {}
        self.set_structure({} if structure is None else structure)

    def set_structure(self, structure: Any) -> None:
        """Set the structure.

        Raises:
            ConfigError: it isn't of that form, or a layer is in two groups.
        """
        try:
            for groups in structure.values():
                layers = [layer for group in groups for layer in group]
                if not all(groups) or not all(is_whole(n, 0, MOST_RANK) for n in layers):
                    raise ValueError("a group of no layers, or something that is no layer's number")
                if len(set(layers)) < len(layers):
                    raise ValueError("a layer is in two groups")
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"structure={shown(structure)}: groups of layers for each role are needed ({error}). It is written by "
                "training; leave it out."
            ) from error
        assert self.structure is not None
        self.structure.clear()
        self.structure.update(structure)

    def owner(self, site: Site) -> int:
        """The layer whose tensor the layer of `site` uses."""
        groups = (self.structure or {}).get(site.kind, ())
        return next((group[0] for group in groups if site.layer in group), site.layer)


class StructureBank(Bank):
    """A bank whose `state_dict` includes the structure: which of its tensors the layers read."""

    def structures(self) -> dict[str, Any]:
        """Adapter -> its current structure, in plain lists and dicts."""
        return {adapter: config.structure for adapter, config in self.configs.items()}

    def restore(self, adapter: str, plain: Any) -> None:
        """Give `adapter` a structure in the form of `structures`. Raises ConfigError if it doesn't fit."""
        self.configs[adapter].set_structure(plain)

    def stored_structure(self, adapter: str) -> Any:
        """The structure to store beside the weights, in plain lists and dicts; None if training doesn't change it."""
        return self.structures()[adapter]

    def take_structure(self, adapter: str, stored: Any) -> None:
        """Give `adapter` a structure in the form of `stored_structure`. Raises ConfigError for another form."""
        self.restore(adapter, stored)

    def get_extra_state(self) -> Tensor:
        return to_tensor(self.structures())

    def set_extra_state(self, state: Tensor) -> None:
        for adapter, plain in from_tensor(state).items():
            if adapter in self.structures():
                self.restore(adapter, plain)


class StructureTuner(MethodTuner):
    """Saves the structure beside the weights, and restores it before them.

    Every way to load weights into a model that already has the adapter passes here: a Trainer that resumes, or loads
    its best checkpoint, doesn't read the config beside the weights.
    """

    @classmethod
    def _bank_with(cls, adapter: str, model: nn.Module) -> Any:
        """The bank with the shared tensors of `adapter`; None for a sum of adapters, which shares nothing."""
        banks: Any = [module for module in model.modules() if isinstance(module, cls.bank_cls)]
        return next((bank for bank in banks if adapter in bank.structures()), None)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        bank = cls._bank_with(adapter_name, model)
        stored = None if bank is None else bank.stored_structure(adapter_name)
        if stored is None:
            return state
        (name,) = config.no_factors
        return {**state, name: to_tensor(stored)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        weights = {name: t for name, t in state_dict.items() if name.rpartition(".")[2] not in config.no_factors}
        if (bank := cls._bank_with(adapter_name, model)) is not None:
            for name in state_dict.keys() - weights.keys():
                bank.take_structure(adapter_name, from_tensor(state_dict[name]))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, weights)


def shared_tensors(root: nn.Module, method: Method, adapter: str) -> tuple[list[Site], Factors]:
    """The sites of an adapter in the model whose root is `root`, and its shared tensors, `<shared>:<key>` -> tensor."""
    sites = [layer.sites[adapter] for layer in layers_of(root, adapter, method)]
    return sites, getattr(root, method.bank).factors(adapter)


def acting_parameters(model: nn.Module, method: Method) -> int:
    """The number of parameters that the layers of `model` read, each counted once; more may be stored."""
    layers = layers_of(model, method=method)
    tensors = {id(t): t for layer in layers for name in layer.adapters for t in layer.stored(name).values()}
    return sum(tensor.numel() for tensor in tensors.values())
