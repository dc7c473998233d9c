"""Inputs that the backward makes again: bit for bit, without being kept, and kept where that isn't sure."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ziggurat import LoRA2Config, MSPLoraConfig
from ziggurat.lowrank import remade
from ziggurat.lowrank.product import composed, low_rank_add
from zoo import ZOO

TOKENS, D, RANK = (3, 5), 8, 2


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remade, "_LEAST", 0)


def leaf(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def gated(dtype: torch.dtype) -> Tensor:
    return F.silu(leaf(*TOKENS, D, dtype=dtype) * 1) * (leaf(*TOKENS, D, dtype=dtype) * 1)


def normed(dtype: torch.dtype) -> Tensor:
    """As Llama's norm has it: in float32 at least, and back."""
    h = (leaf(*TOKENS, D, dtype=dtype) * 1).to(torch.promote_types(dtype, torch.float32))
    return leaf(D, dtype=dtype, grad=False) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)


def gemma_normed(dtype: torch.dtype) -> Tensor:
    """As Gemma's: 1 + w, and the cast last."""
    h = (leaf(*TOKENS, D, dtype=dtype) * 1).float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + leaf(D, grad=False).float())).to(dtype)


def gelu(dtype: torch.dtype) -> Tensor:
    return F.gelu(leaf(*TOKENS, D, dtype=dtype) * 1, approximate="tanh")


MADE = [gated, normed, gemma_normed, gelu]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MADE)
def test_x_is_made_again_bit_for_bit(make, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = make(dtype)
    actual = remade.remade(x)
    assert actual is not None
    again = actual.make(actual.operands)
    assert again.dtype == dtype and torch.equal(again.view_as(x), x)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("make", MADE)
def test_gradients_are_those_of_a_kept_input_and_x_is_not_kept(make, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kept: bool) -> tuple[list[Tensor], bool]:
        torch.manual_seed(1)
        with monkeypatch.context() as patch:
            if kept:
                patch.setenv("ZIGGURAT_REMAKE", "0")
            x, A, B = make(torch.float64), leaf(RANK, D), leaf(D, RANK)
            storages = set()

            def pack(t: Tensor) -> Tensor:
                storages.add(t.untyped_storage().data_ptr())
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, remade.unchanged):
                y = low_rank_add(torch.zeros_like(x), x, A, B, p)
            gradients = torch.autograd.grad(y.pow(2).sum(), (x, A, B))
        return list(gradients), x.untyped_storage().data_ptr() in storages

    (got, kept), (expected, kept_when_off) = run(kept=False), run(kept=True)
    assert not kept and kept_when_off
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_a_backward_that_is_differentiated_reaches_the_operands() -> None:
    torch.manual_seed(2)
    a, b, A, B = leaf(*TOKENS, D), leaf(*TOKENS, D), leaf(RANK, D), leaf(D, RANK)

    def twice(add) -> tuple[Tensor, ...]:
        x = F.silu(a) * b.sin()
        (dA,) = torch.autograd.grad(add(torch.zeros_like(x), x, A, B).pow(2).sum(), A, create_graph=True)
        return torch.autograd.grad(dA.pow(2).sum(), (a, b, A, B))

    for got, expected in zip(twice(low_rank_add), twice(composed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_what_is_kept_after_all() -> None:
    a, b = leaf(*TOKENS, D), leaf(*TOKENS, D)
    changed = a.sin() * b.sin()
    with torch.no_grad():
        changed.add_(1)
    other_order = (a.sin() * b.sin()).transpose(0, 1)
    for x in (a, changed, other_order, a.sin(), a.sin() * 2.0, a.sin() * torch.tensor(2.0), a.sin() * b.detach()):
        assert remade.remade(x) is None
    x = a.sin() * b.sin()
    assert remade.remade(x) is not None
    with torch.autograd.graph.save_on_cpu():
        assert remade.remade(x) is None
    x.sum().backward()
    assert remade.remade(x) is None  # its graph is freed


def test_small_inputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gated(torch.float32)
    for least, expected in ((x.numel(), True), (x.numel() + 1, False)):
        monkeypatch.setattr(remade, "_LEAST", least)
        assert (remade.remade(x) is not None) == expected


def test_an_operand_changed_in_place_is_told() -> None:
    a = leaf(*TOKENS, D)
    side = a.sin()
    x = side * a.cos()
    y = low_rank_add(torch.zeros_like(x), x, leaf(RANK, D), leaf(D, RANK))
    with torch.no_grad():
        side.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpoints(reentrant: bool) -> None:
    torch.manual_seed(3)
    a, A, B = leaf(*TOKENS, D), leaf(RANK, D), leaf(D, RANK)

    def layer(h: Tensor) -> Tensor:
        return low_rank_add(h, F.silu(h) * h.sin(), A, B, 0.0)

    expected = torch.autograd.grad(layer(a).pow(2).sum(), (a, A, B))
    checkpoint(layer, a, use_reentrant=reentrant).pow(2).sum().backward()
    for t, wanted in zip((a, A, B), expected, strict=True):
        torch.testing.assert_close(t.grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [MSPLoraConfig, LoRA2Config])
def test_a_llama_adapted_everywhere_keeps_no_input(method: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes: a layer's two normed inputs (d) and act(gate) * up (d_ff). What reads the embedding has no graph."""
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = get_peft_model(ZOO["llama"].build(), method(target_modules=targets, init_weights=False)).train()
    inputs = ZOO["llama"].inputs()
    config, tokens = model.config, inputs["input_ids"].numel()

    def step() -> tuple[int, list[Tensor]]:
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, remade.unchanged):
            loss = model(**inputs).logits.pow(2).mean()
        trained = [p for p in model.parameters() if p.requires_grad]
        return sum(storages.values()), list(torch.autograd.grad(loss, trained))

    kept, gradients = step()
    monkeypatch.setenv("ZIGGURAT_REMAKE", "0")
    kept_when_off, expected = step()
    widths = config.num_hidden_layers * (2 * config.hidden_size + config.intermediate_size) - config.hidden_size
    assert kept_when_off - kept == tokens * widths * gradients[0].itemsize
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))
