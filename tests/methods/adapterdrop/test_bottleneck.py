"""Bottleneck adapters against their equation, and both kinds of dropping layers."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional

from methods_table import logits
from ziggurat import AdapterDropConfig
from ziggurat.errors import ConfigError, ExportError
from ziggurat.export import export_model
from ziggurat.methods.adapterdrop import BottleneckLinear
from zoo import ZOO


def adapted(model: str = "bert", **fields: object) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(ZOO[model].build(), AdapterDropConfig(**{"r": 3, "init_weights": False, **fields}))  # type: ignore[arg-type]


def bottlenecks(model: torch.nn.Module) -> dict[str, BottleneckLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, BottleneckLinear)}


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_equation(activation: str) -> None:
    layer = next(iter(bottlenecks(adapted(activation=activation).double().eval()).values()))
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    D, U, a, c = layer.stored("default").values()
    with torch.no_grad():
        for tensor in (a, c):
            tensor.normal_()
    y = layer.base_layer(x)
    expected = y + getattr(functional, activation)(y @ D.T + a) @ U.T + c
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5"])
def test_the_default_place_is_the_end_of_each_feed_forward_part(model: str) -> None:
    actual = bottlenecks(adapted(model))
    assert len(actual) == sum(ZOO[model].stacks.values())
    assert all("attention" not in path and "attn" not in path for path in actual)


def test_specialised_dropping_leaves_the_lowest_layers_without_adapter() -> None:
    layers = sum(ZOO["bert"].stacks.values())
    actual = bottlenecks(adapted(drop_layers=2))
    assert sorted(layer.sites["default"].layer for layer in actual.values()) == list(range(2, layers))
    with pytest.raises(ConfigError, match=f"drop_layers={layers} leaves none of the {layers} layers"):
        adapted(drop_layers=layers)


def test_robust_dropping_draws_a_depth_for_each_forward_in_training() -> None:
    model, inputs = adapted(robust_drop=2).train(), ZOO["bert"].inputs()
    depths, learning = set(), set()
    for seed in range(16):
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        model(**inputs)[0].square().sum().backward()
        drawn = {layer.context("default").drawn for layer in bottlenecks(model).values()}
        assert len(drawn) == 1
        depths |= drawn
        for layer in bottlenecks(model).values():
            learns = layer.stored("default")["up"].grad is not None
            assert learns == (layer.sites["default"].layer >= next(iter(drawn)))
            learning.add(learns)
    assert depths == {0, 1, 2} and learning == {True, False}
    model.eval()
    torch.testing.assert_close(logits(model, inputs), logits(model, inputs), rtol=0, atol=0)


def test_dropping_afterwards_equals_never_having_had_them() -> None:
    model, inputs = adapted(), ZOO["bert"].inputs()
    whole = logits(model.eval(), inputs)
    model.drop(1)
    dropped = logits(model, inputs)
    assert not torch.equal(dropped, whole)
    for layer in bottlenecks(model).values():
        if layer.sites["default"].layer == 0:
            for tensor in layer.stored("default").values():
                with torch.no_grad():
                    tensor.zero_()
    torch.testing.assert_close(logits(model, inputs), dropped, rtol=0, atol=0)
    model.drop(0)
    torch.testing.assert_close(logits(model, inputs), dropped, rtol=0, atol=0)  # the zeros do nothing
    with pytest.raises(ConfigError, match=r"drop\(99\)"):
        model.drop(99)


def test_it_can_neither_be_merged_nor_exported(tmp_path: object) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="no weight and no plain LoRA can hold it"):
        model.merge_and_unload()
    with pytest.raises(ExportError, match="isn't linear"):
        export_model(model, f"{tmp_path}/out")
    inputs = ZOO["bert"].inputs()
    assert torch.equal(logits(adapted(robust_drop=1).unload().eval(), inputs), logits(ZOO["bert"].build(), inputs))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop_layers": 1, "robust_drop": 1}, "two variants"),
        ({"robust_drop": -1}, "robust_drop=-1"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"lora_alpha": 8}, "have no meaning here"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(**fields)
