"""Parameters of three dimensions that hold the weights of a layer's experts, and the sites that a config names.

transformers 5 keeps the experts of a layer as two parameters, gate and up projection in one and the down projection,
(experts, d_out, d_in), or (experts, d_in, d_out) where the module says `is_transposed`.
"""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from ziggurat.errors import ConfigError, with_article
from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.base.offload import check_in_place
from ziggurat.host.base.quantised import FLOATS
from ziggurat.host.base.targets import check_router, linear_site, site_at, targets
from ziggurat.host.base.unwrap import bare_tree, unwrap
from ziggurat.host.linear import is_router
from ziggurat.host.site import Site

#: The parameters of experts, in the order in which they act.
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


def is_fused(module: nn.Module) -> bool:
    """Whether `module` keeps all experts of a layer in parameters of three dimensions, as transformers 5 does."""
    if not all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias")):
        return False
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3


def parameter_sites(config: Any, model: nn.Module) -> dict[str, Site]:
    """Path -> site of the parameters that `config.target_parameters` names, by PEFT's rule; of a router its module's.

    Raises:
        ConfigError: a name matches no parameter, or one that holds no experts.
    """
    named = copy.copy(config)
    named.target_modules = set(config.target_parameters)
    root = unwrap(model)[0]
    anatomy = Anatomy(model, layers_pattern=config.layers_pattern)
    sites: dict[str, Site] = {}
    named_paths: list[str] = []
    for node in bare_tree(root).walk():
        for name, parameter in node.module._parameters.items():
            path = f"{node.path}.{name}"
            if parameter is None or not targets(named, path):
                continue
            named_paths.append(path)
            if is_router(node.module) and name == "weight":
                check_router(config, node.path, node.module)
                sites[node.path] = linear_site(root, anatomy, node.path, node.module)
                continue
            if not is_fused(node.module) or name not in PARAMETERS:
                raise ConfigError(
                    f"target_parameters names {path!r}, a parameter of {with_article(type(node.module).__name__)}, "
                    f"and only the weights of fused experts and routers can be adapted so: {_listed(root)}. Linear "
                    "layers are named by target_modules; another parameter is trained whole when modules_to_save names "
                    "its module."
                )
            if parameter.dtype not in FLOATS:
                raise ConfigError(
                    f"{path!r} is quantised ({parameter.dtype}), and adapters of fused experts need weights in "
                    "floating point: load the model without quantisation, or leave it out of target_parameters."
                )
            check_in_place(node.module, node.path)
            experts, d_out, d_in = parameter.shape
            if node.module.is_transposed:
                d_in, d_out = d_out, d_in
            sites[path] = site_at(root, anatomy, path, d_in, d_out, experts)
    lost = [
        name
        for name in sorted(config.target_parameters)
        if not any(f".{path}".endswith(f".{name}") for path in named_paths)
    ]
    if lost:
        raise ConfigError(
            f"target_parameters={lost} matches no parameter of {type(root).__name__}; its fused experts and routers "
            f"are {_listed(root)}."
        )
    return sites


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Path and parameter of the weights of all fused experts in the base model."""
    for node in bare_tree(unwrap(model)[0]).walk():
        if is_fused(node.module):
            for name in PARAMETERS:
                if (parameter := node.module._parameters.get(name)) is not None:
                    yield f"{node.path}.{name}", parameter


def _listed(root: nn.Module) -> str:
    routers = [f"{node.path}.weight" for node in bare_tree(root).walk() if is_router(node.module)]
    paths = [*(path for path, _ in expert_parameters(root)), *routers]
    ends = dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths)
    return ", ".join(ends) or "none in this model"
