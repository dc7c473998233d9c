"""Pairs of fused experts under the names by which vLLM's loader looks for them.

vLLM keeps most mixtures as separate experts, and asks for three pairs of each: `experts.<e>.gate_proj`, `up_proj` and
`down_proj`, or w1, w3 and w2. Of gpt-oss it takes the two of all experts, named as PEFT names them. Either way it wants
all of them wherever one is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ziggurat.errors import ExportError
from ziggurat.host.base.unwrap import PREFIX
from ziggurat.host.plain import PlainLora, lora_names
from ziggurat.lowrank.pair import FactorPair, pad


class Naming(NamedTuple):
    """vLLM's names for one type of model.

    `each`: of the gate, up and down projection of one expert; None where vLLM takes the pairs of all experts together.
    `module`: transformers' and vLLM's name of the module around router and experts, where they differ. `router`: the
    same for the router.
    """

    each: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    module: tuple[str, str] = ("", "")
    router: tuple[str, str] = ("", "")

    def path(self, path: str) -> str:
        """vLLM's path of the module that transformers has at `path`."""
        for name, vllm_name in (self.module, self.router):
            path = f".{path}.".replace(f".{name}.", f".{vllm_name}.")[1:-1] if name else path
        return path


#: model_type -> vLLM's names, read in its model classes (0.32).
NAMES = {
    "deepseek_v2": Naming(),
    "deepseek_v3": Naming(),
    "gpt_oss": Naming(each=None),
    "granitemoe": Naming(router=("router", "gate")),
    "mixtral": Naming(("w1", "w3", "w2"), module=("mlp", "block_sparse_moe")),
    "olmoe": Naming(),
    "qwen2_moe": Naming(),
    "qwen3_moe": Naming(),
}
#: Those of them whose experts PEFT (0.21) doesn't look for under these names.
NOT_IN_PEFT = ("granitemoe", "qwen2_moe")


def only_for_vllm(base: nn.Module, pairs: Mapping[str, FactorPair]) -> bool:
    """Whether PEFT would leave the experts of `pairs` out when it reads them under the names of `for_vllm`."""
    kind = getattr(getattr(base, "config", None), "model_type", None)
    return kind in NOT_IN_PEFT and any(pair.A.dim() == 3 and pair.A.shape[-2] for pair in pairs.values())


@torch.no_grad()
def for_vllm(base: nn.Module, lora: PlainLora, pairs: Mapping[str, FactorPair]) -> PlainLora:
    """`lora`, all of one rank, with the pairs of fused experts and routers named as vLLM names them.

    `pairs`: all of the adapter, as `lora_pairs` gives them. The gate's and the up projection's A are one in ours and
    two in vLLM's; a projection that the adapter leaves alone gets a pair of zeros.

    Raises:
        ExportError: it isn't known here how vLLM names the experts of this type of model.
    """
    kind = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    pairs = {path: pair for path, pair in pairs.items() if pair.A.shape[-2]}
    if kind not in NAMES and all(pair.A.dim() == 2 for pair in pairs.values()):
        return lora
    if kind not in NAMES:
        raise ExportError(
            f"the adapter adapts fused experts of a {kind}, and vLLM's names of experts are known here for "
            f"{', '.join(NAMES)} alone. Export without --serving, or merge into the model."
        )
    naming, rank = NAMES[kind], lora.config.r
    fused = {path: pad(pair, rank) for path, pair in pairs.items() if pair.A.dim() == 3}
    written = {f"{PREFIX}{name}" for path, name in lora_names(base, pairs).items() if path in fused}
    tensors: dict[str, Tensor] = {}
    for name, tensor in lora.tensors.items():
        path, at, side = name.partition(".lora_")
        if path not in written:
            tensors[f"{PREFIX}{naming.path(path.removeprefix(PREFIX))}{at}{side}" if at else name] = tensor
    for path in dict.fromkeys(path.rpartition(".")[0] for path in fused):
        module: Any = base.get_submodule(path)
        experts, like = module.get_base_layer(), next(fused[at].A for at in fused if at.startswith(f"{path}."))
        both = {name: fused.get(f"{path}.{name}") or _zeros(experts, name, rank, like) for name in _BOTH}
        place = f"{PREFIX}{naming.path(path)}"
        for name, (A, B) in (_together(both) if naming.each is None else _apart(both, naming.each)).items():
            tensors[f"{place}{name}.lora_A.weight"] = A.contiguous()
            tensors[f"{place}{name}.lora_B.weight"] = B.contiguous()
    return PlainLora(_config(lora.config, naming, fused), tensors)


_BOTH = ("gate_up_proj", "down_proj")


def _zeros(experts: Any, name: str, rank: int, like: Tensor) -> FactorPair:
    """A pair for the weights called `name`, on the device of `like`: the experts may lie on the meta device."""
    weight = getattr(experts, name)
    number, d_out, d_in = weight.mT.shape if experts.is_transposed else weight.shape
    return FactorPair(like.new_zeros(number, rank, d_in), like.new_zeros(number, d_out, rank))


def _together(both: Mapping[str, FactorPair]) -> dict[str, FactorPair]:
    """A by expert and rank, B by rank and expert, as PEFT has them: the gate and up projection is the inner layer."""
    flat = {name: FactorPair(A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)) for name, (A, B) in both.items()}
    return {".base_layer": flat["gate_up_proj"], "": flat["down_proj"]}


def _apart(both: Mapping[str, FactorPair], names: tuple[str, str, str]) -> dict[str, FactorPair]:
    gate_up, down = both["gate_up_proj"], both["down_proj"]
    halves = gate_up.B.chunk(2, dim=1)
    three = (FactorPair(gate_up.A, halves[0]), FactorPair(gate_up.A, halves[1]), down)
    return {
        f".{expert}.{name}": FactorPair(A[expert].clone(), B[expert].clone())
        for name, (A, B) in zip(names, three, strict=True)
        for expert in range(len(A))
    }


def _config(config: LoraConfig, naming: Naming, fused: Mapping[str, FactorPair]) -> LoraConfig:
    """The config that PEFT reads these names by, where it knows them."""
    if not fused:
        return config
    others = [name for name in config.target_parameters or () if name not in fused]
    if naming.each is None:
        experts = dict.fromkeys(f"{path.rpartition('.')[0]}.{name}" for path in fused for name in _BOTH)
        config.target_parameters = [*others, *sorted(experts)]
    elif isinstance(config.target_modules, str):
        config.target_modules = rf"{config.target_modules}|.*\.experts\.\d+\.({'|'.join(naming.each)})"
        config.target_parameters = others or None
    else:
        config.target_modules = sorted({*(config.target_modules or ()), *naming.each})
        config.target_parameters = others or None
    return config
