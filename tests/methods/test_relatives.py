"""ShareLoRA, Tied-LoRA and LoRA-XS against their equations, and their numbers of parameters."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from methods_table import logits
from ziggurat import LoRAXSConfig, ShareLoRAConfig, TiedLoRAConfig
from ziggurat.errors import ConfigError
from ziggurat.host.count import count
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.tensors import Weight
from zoo import ZOO

#: Bert of the zoo: 4 layers, width 16, two target modules.
TARGETS, LAYERS, D, R, ALPHA = ["query", "value"], 4, 16, 4, 6


def adapted(config: type[Any], **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    values = {"r": R, "target_modules": TARGETS, "lora_alpha": ALPHA, "init_weights": False, **fields}
    return get_peft_model(ZOO["bert"].build(), config(**values)).eval()


def layers(model: nn.Module, role: str) -> list[AdaptedLinear]:
    return [m for path, m in model.named_modules() if isinstance(m, AdaptedLinear) and path.endswith(role)]


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def assert_equation(layer: AdaptedLinear, delta: torch.Tensor) -> None:
    x = torch.randn(3, D, dtype=torch.float64)
    expected = layer.base_layer(x) + x @ delta.T
    torch.testing.assert_close(layer.double()(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("share", "parameters"),
    [
        ("A", 2 * R * D + 2 * LAYERS * D * R),
        ("B", 2 * LAYERS * R * D + 2 * D * R),
        ("AB", 2 * R * D + 2 * D * R),
    ],
)
def test_sharelora(share: str, parameters: int) -> None:
    model = adapted(ShareLoRAConfig, share=share).double()
    for role in TARGETS:
        same = layers(model, role)
        assert len(same) == LAYERS
        tensors = [layer.stored("default") for layer in same]
        for key in "AB":
            assert all((t[key] is tensors[0][key]) == (key in share) for t in tensors[1:])
        for layer, t in zip(same, tensors, strict=True):
            assert_equation(layer, ALPHA / R * t["B"] @ t["A"])
    query, value = (layers(model, role)[0].stored("default") for role in TARGETS)
    assert all(query[key] is not value[key] for key in "AB")
    config = ShareLoRAConfig(r=R, target_modules=TARGETS, share=share)  # type: ignore[arg-type]
    assert trainable(model) == parameters == count(ZOO["bert"].build(), config)


@pytest.mark.parametrize("trained", ["ABuv", "AB", "Buv", "uv", "v", "u", "A", "Au"])
def test_tied_lora(trained: str) -> None:
    model = adapted(TiedLoRAConfig, trained=trained).double()
    for role in TARGETS:
        same = layers(model, role)
        tensors = [layer.stored("default") for layer in same]
        assert all(t[key] is tensors[0][key] for t in tensors for key in "AB")
        assert not torch.equal(tensors[0]["u"], tensors[1]["u"])
        for layer, t in zip(same, tensors, strict=True):
            assert_equation(layer, ALPHA / R * torch.diag(t["v"]) @ t["B"] @ torch.diag(t["u"]) @ t["A"])
    sizes = {"A": 2 * R * D, "B": 2 * D * R, "u": 2 * LAYERS * R, "v": 2 * LAYERS * D}
    parameters = sum(sizes[key] for key in trained)
    config = TiedLoRAConfig(r=R, target_modules=TARGETS, trained=trained)
    assert trainable(model) == parameters == count(ZOO["bert"].build(), config)

    fresh, inputs = adapted(TiedLoRAConfig, trained=trained, init_weights=True), ZOO["bert"].inputs()
    assert torch.equal(logits(fresh, inputs), logits(ZOO["bert"].build(), inputs))
    fresh(**inputs)[0].square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in fresh.parameters() if p.requires_grad)


def test_lora_xs() -> None:
    model = adapted(LoRAXSConfig).double()
    for role in TARGETS:
        for layer in layers(model, role):
            t = layer.stored("default")
            U, S, Vh = torch.linalg.svd(layer.get_base_layer().weight.detach())
            delta = ALPHA / R * t["B"] @ t["R"] @ t["A"]
            assert_equation(layer, delta)
            # B A is W cut to rank r; it was drawn in float32.
            cut = U[:, :R] * S[:R] @ Vh[:R]
            torch.testing.assert_close(t["B"] @ t["A"], cut, rtol=0, atol=1e-5 * float(S[0]))
            torch.testing.assert_close(t["B"].T @ t["B"], torch.eye(R).double(), rtol=0, atol=1e-5)
    config = LoRAXSConfig(r=R, target_modules=TARGETS)
    assert trainable(model) == 2 * LAYERS * R**2 == count(ZOO["bert"].build(), config)


def test_lora_xs_starts_as_in_the_paper() -> None:
    model = adapted(LoRAXSConfig, init_weights="gaussian", r=16)
    values = torch.cat([layer.stored("default")["R"].flatten() for layer in layers(model, "query")])
    assert values.std().item() == pytest.approx(1e-5, rel=0.1)
    assert LoRAXSConfig().init_weights == "gaussian"
    with pytest.raises(ConfigError, match=r"r=17: the weight of .*query' has 16 singular values"):
        adapted(LoRAXSConfig, r=17)


def test_a_large_weight_is_decomposed_by_iteration() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(1100, 20))[0]
    W = basis * torch.logspace(0, -2, 20) @ torch.linalg.qr(torch.randn(1200, 20))[0].T
    U, S, Vh = Weight("w", lambda: W).svd(6)
    exact = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(S, exact[1][:6], rtol=1e-4, atol=0)
    torch.testing.assert_close(U * S @ Vh, exact[0][:, :6] * exact[1][:6] @ exact[2][:6], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (ShareLoRAConfig, "share", "C"),
        (ShareLoRAConfig, "share", ["A"]),
        (TiedLoRAConfig, "trained", ""),
        (TiedLoRAConfig, "trained", "AA"),
        (TiedLoRAConfig, "trained", "Aw"),
        (TiedLoRAConfig, "trained", 7),
    ],
)
def test_what_a_config_refuses(config: type[Any], field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        config(**{field: value})
