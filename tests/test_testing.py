"""`check_method` passes for every method that has a pair, and names the fault of a broken one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from methods_table import METHODS
from ziggurat import AdapterDropConfig, MSPLoraConfig, ShareLoRAConfig
from ziggurat.analysis.collect import collect
from ziggurat.errors import ConfigError
from ziggurat.export import export
from ziggurat.host.tensors import drawn_again
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
from ziggurat.plan.planner import plan
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
    if config.broken == "an init beside":
        specs["A"] = TensorSpec((config.r, site.d_in), lambda tensor, weight: torch.ones_like(tensor))
    if config.broken == "another seed by layer":
        specs["A"] = TensorSpec((config.r, site.d_in), kaiming, shared=site.kind, seed=site.layer)
    if config.broken == "trains in one layer":
        specs["A"] = TensorSpec((config.r, site.d_in), kaiming, shared=site.kind, trainable=site.layer == 0)
    if config.broken == "no dict":
        return None  # type: ignore[return-value]
    if config.broken == "no spec":
        specs["A"] = torch.zeros(config.r, site.d_in)  # type: ignore[assignment]
    if config.broken == "a list as shape":
        specs["A"] = TensorSpec([config.r, site.d_in], kaiming)  # type: ignore[arg-type]
    if config.broken == "seeded":
        specs["A"] = TensorSpec((config.r, site.d_in), kaiming, shared=site.kind, seed=1)
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
        ("an init beside", "the init of a tensor of '.*q_proj' returned a new tensor, which is lost"),
        ("another seed by layer", r"share the tensor '.*:A', but differ in its `trainable`, `seed` or `up`"),
        ("trains in one layer", r"share the tensor '.*:A', but differ in its `trainable`, `seed` or `up`"),
        ("no dict", "Mine at '.*q_proj': its `tensors` returned a NoneType, no dict of specs"),
        ("no spec", "tensor 'A' of '.*q_proj' is a Tensor; `tensors` gives each key a TensorSpec"),
        ("a list as shape", r"tensor 'A' of '.*q_proj' has the shape \[3, 16\]: a tuple of whole numbers"),
        ("a bad name", "calls a tensor of '.*q_proj' 'all.layers:A': a key is a Python name"),
    ],
)
def test_functions_that_do_not_fit_each_other(broken: str, says: str) -> None:
    targets = ["q_proj", "up_proj", "down_proj"]
    with pytest.raises(ConfigError, match=says):
        check_method(MineConfig(r=3, broken=broken, target_modules=targets), ZOO["llama"].build())


def test_a_seeded_tensor_is_there_for_every_reader(tmp_path: Path) -> None:
    """It is in no file: the analysis, the plan and an export without the base's weights draw it again."""
    config = MineConfig(r=3, broken="seeded", target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    check_method(config, naive=naive)
    base = ZOO["llama"].build()
    base.save_pretrained(tmp_path / "base")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    export(tmp_path / "adapter", tmp_path / "lora")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "lora"))
    ids = torch.arange(7)[None]
    assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-4)
    of_file, of_model = (
        sorted(collect(source).components, key=lambda c: (c.layers, c.role)) for source in (tmp_path / "adapter", model)
    )
    assert [c.layers for c in of_file] == [c.layers for c in of_model] and of_file
    assert all(torch.allclose(a.B @ a.A, b.B @ b.A, atol=1e-5) for a, b in zip(of_file, of_model, strict=True))
    planned = plan(base.to("meta"), config, measure_memory=False)
    assert planned.adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_seed_draws_the_same_whatever_the_default_dtype() -> None:
    spec = TensorSpec((3, 5), kaiming, seed=1)
    expected = drawn_again(spec, "here")
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(drawn_again(spec, "here"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["gate", "q", "up"])
def test_a_method_called_as_a_part_of_models(name: str) -> None:
    cell = dataclass(type("CalledConfig", (MineConfig,), {"__module__": __name__, "__qualname__": "CalledConfig"}))
    register(Method(name, cell, tensors, pair, CARD))
    try:
        check_method(cell(r=3))
    finally:
        unregister(name)


def test_a_config_of_another_library() -> None:
    with pytest.raises(ConfigError, match="a subclass of MethodConfig is needed"):
        register(Method("nm", LoraConfig, tensors, pair, CARD))
    assert not hasattr(LoraConfig, "method")


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
