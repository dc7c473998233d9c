"""`check_method` passes for every method that has a pair, and names the fault of a broken one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from methods_table import METHODS
from ziggurat import AdapterDropConfig, MSPLoraConfig, ShareLoRAConfig
from ziggurat.errors import ConfigError
from ziggurat.kit import (
    Card,
    FactorPair,
    Method,
    MethodConfig,
    Site,
    TensorSpec,
    kaiming,
    low_rank,
    register,
    unregister,
)
from ziggurat.testing import check_method
from zoo import ZOO

CARD = Card("Mine", "", "a method of a test")


@dataclass
class MineConfig(MethodConfig):
    """LoRA; `broken` says what is wrong with it."""

    broken: str = ""


def tensors(config: MineConfig, site: Site) -> dict[str, TensorSpec]:
    specs = low_rank(config.r, site.d_in, site.d_out, config.init_weights)
    if config.broken == "a missing field":
        specs["A"] = TensorSpec((config.width, site.d_in), kaiming)  # type: ignore[attr-defined]
    if config.broken == "not neutral":
        specs["B"] = TensorSpec((site.d_out, config.r), kaiming)
    if config.broken == "an unused tensor":
        specs["C"] = TensorSpec((config.r,), kaiming)
    if config.broken == "not stored":
        specs["A"] = TensorSpec((config.r, site.d_in), fickle, seed=1)
    if config.broken == "shapes":
        specs["A"] = TensorSpec((config.r + 1, site.d_in), kaiming)
    if config.broken == "shared by two shapes":
        specs["A"] = TensorSpec((config.r, site.d_in), kaiming, shared="all")
    if config.broken == "a bad name":
        specs["A"] = TensorSpec((config.r, site.d_in), kaiming, shared="all.layers")
    return specs


def pair(config: MineConfig, site: Site, t: Any, context: Any) -> FactorPair:
    if config.broken == "a missing key":
        return FactorPair(t["Z"], t["B"])
    if config.broken == "no pair":
        return t["A"]  # type: ignore[return-value]
    B = t["B"] if config.broken == "no scale" else config.scale_of(config.r) * t["B"]
    return FactorPair(t["A"].detach() if config.broken == "no gradient" else t["A"], B)


class Fickle:
    """Other numbers each time, whatever the seed."""

    drawn = 0

    def __call__(self, tensor: Tensor, weight: Any) -> None:
        Fickle.drawn += 1
        tensor.fill_(Fickle.drawn)


fickle = Fickle()


def naive(config: MineConfig, site: Site, t: Any) -> Tensor:
    update = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
    for i in range(config.r):
        update += config.lora_alpha / config.r * torch.outer(t["B"][:, i], t["A"][i])
    return update


@pytest.fixture(autouse=True)
def mine() -> Iterator[None]:
    register(Method("mine", MineConfig, tensors, pair, CARD))
    yield
    unregister("mine")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "adapterdrop"])
def test_our_methods_keep_what_every_method_promises(method: str) -> None:
    check_method(METHODS[method].config(ZOO["llama"]))


def test_a_method_that_is_right_passes_on_any_model() -> None:
    check_method(MineConfig(r=3), naive=naive)
    zoo, targets = ZOO["plain_list"], ["query", "value"]
    check_method(MineConfig(r=3, target_modules=targets), zoo.build(), inputs=zoo.inputs(), naive=naive)
    check_method(MineConfig(r=3, target_modules=targets), ZOO["bert"].build(), naive=naive)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("not neutral", "a fresh adapter's outputs and the base's differ by"),
        ("an unused tensor", "no gradient reaches .*mine_factors.default.C: does `pair` use it?"),
        ("no gradient", "no gradient reaches .*mine_factors.default.A"),
        ("not stored", "saved and loaded again gives other outputs"),
        ("no scale", "q_proj: B A of `pair` and the dense update of `naive` differ"),
    ],
)
def test_a_broken_method_is_told_what_is_wrong(broken: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_method(MineConfig(r=3, broken=broken), naive=naive)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("shapes", r"Mine at '.*q_proj': the pair has A \(4, 16\) and B \(16, 3\); A \(rank, 16\) and B \(16, rank\)"),
        ("shared by two shapes", r"'.*q_proj' and '.*down_proj' share the tensor 'all:A', but need it as \(3, 16\)"),
        ("a missing key", r"Mine at '.*q_proj': its `pair` ended in KeyError in line \d+: 'Z'"),
        ("a missing field", r"Mine at '.*q_proj': its `tensors` ended in AttributeError in line \d+: .*'width'"),
        ("no pair", r"Mine at '.*q_proj': the method's `pair` returned a Tensor; FactorPair\(A, B\) is needed"),
        ("a bad name", "calls a tensor of '.*q_proj' 'all.layers:A': a key is a Python name"),
    ],
)
def test_functions_that_do_not_fit_each_other(broken: str, says: str) -> None:
    targets = ["q_proj", "up_proj", "down_proj"]
    with pytest.raises(ConfigError, match=says):
        check_method(MineConfig(r=3, broken=broken, target_modules=targets), ZOO["llama"].build())


def test_a_dense_update_that_is_no_tensor() -> None:
    with pytest.raises(AssertionError, match="q_proj: `naive` returned a NoneType, no tensor"):
        check_method(MineConfig(r=3), naive=lambda config, site, t: None)  # type: ignore[arg-type, return-value]


def test_what_cannot_be_checked() -> None:
    with pytest.raises(ConfigError, match="AdapterDropConfig is no config of a registered method that has a pair"):
        check_method(AdapterDropConfig())
    with pytest.raises(ConfigError, match=r"no inputs for PlainList: give inputs="):
        check_method(MineConfig(target_modules=["query"]), ZOO["plain_list"].build())


def test_registering_again() -> None:
    again = Method("mine", MineConfig, tensors, pair, CARD)
    register(again)
    first = MineConfig
    cell = dataclass(type("MineConfig", (MethodConfig,), {"__module__": __name__, "__qualname__": "MineConfig"}))
    register(Method("mine", cell, tensors, pair, CARD))  # a notebook's cell, run again
    assert type(cell(r=2)).method.config is cell is not first
    other = dataclass(type("OtherConfig", (MethodConfig,), {"__module__": __name__}))
    with pytest.raises(ConfigError, match=r"PEFT type MINE is taken by test_testing\.MineConfig"):
        register(Method("mine", other, tensors, pair, CARD))


def test_a_check_leaves_config_model_and_generator_alone() -> None:
    model, config = ZOO["llama"].build(), ShareLoRAConfig(r=3, target_modules=["q_proj"])
    before, state = dict(vars(config)), torch.get_rng_state()
    check_method(config, model)
    assert vars(config) == before and torch.equal(torch.get_rng_state(), state)
    assert not any("sharelora" in name for name, _ in model.named_parameters())
    assert MSPLoraConfig().target_modules is None
