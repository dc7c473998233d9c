"""Small inputs that aren't dropped out: plain operations of torch, with the results of the shared products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from methods_table import METHODS, zoo_config
from tolerance import assert_sums_agree
from ziggurat.host import linear
from zoo import ZOO

#: Entries of the inputs of a llama's linear layers in the zoo: 2 texts of 7 tokens, 16 wide.
MOST = 2 * 7 * 64


def adapted(method: str, p: float, dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    config = zoo_config(method, "llama", init_weights=False, lora_dropout=p)
    return get_peft_model(ZOO["llama"].build(), config).to(dtype).train()


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """Of one step, with the output."""
    model.zero_grad()
    torch.manual_seed(1)
    logits = model(**ZOO["llama"].inputs()).logits
    logits.double().square().sum().backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **learning}


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Sets `FEW`, and returns a list that notes each product shared between siblings, and each made alone."""

    def watch(few: int) -> list[str]:
        products: list[str] = []
        for name in ("composed", "low_rank_add", "up_add"):
            function = getattr(linear, name)
            function = getattr(function, "watched", function)

            def noted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Tensor:
                products.append(_name)
                return _function(*args, **kwargs)

            noted.watched = function  # type: ignore[attr-defined]
            monkeypatch.setattr(linear, name, noted)
        monkeypatch.setattr(linear, "FEW", few)
        return products

    return watch


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_both_ways(method: str, checkpointed: bool, shared: Callable[[int], list[str]]) -> None:
    model = adapted(method, 0.0, torch.float64)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    shared(0)
    wanted = gradients(model)
    products = shared(MOST)
    got = gradients(model)
    kinds = {type(module) for module in model.modules() if isinstance(module, linear.AdaptedLinear)}
    by_pairs = any(kind._add is linear.AdaptedLinear._add for kind in kinds)
    assert set(products) == ({"composed"} if by_pairs else set())
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)


def test_in_autocast_the_sum_is_rounded_to_the_dtype_of_the_base(shared: Callable[[int], list[str]]) -> None:
    model = adapted("msplora", 0.0, torch.float32)
    for few in (0, MOST):
        shared(few)
        with torch.autocast("cpu", torch.bfloat16):
            steps = gradients(model)
        if few == 0:
            wanted = steps
    assert steps["logits"].dtype == wanted["logits"].dtype == torch.bfloat16
    assert_sums_agree(steps["logits"], wanted["logits"], 16, dtype=torch.bfloat16)


def test_a_compiled_model_does_not_ask_for_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with sizes that aren't fixed serves inputs below and above."""
    layer = next(m for m in adapted("msplora", 0.0, torch.float32).modules() if isinstance(m, linear.AdaptedLinear))
    monkeypatch.setattr(linear, "FEW", 8 * layer.in_features)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, dynamic=True)
    compiled_so_far = []
    for tokens in (4, 16, 5):
        x = torch.randn(tokens, layer.in_features, requires_grad=True)
        assert_sums_agree(compiled(x), layer(x), layer.in_features)
        compiled_so_far.append(graphs.frame_count)
    assert compiled_so_far[0] == compiled_so_far[-1] > 0
    torch._dynamo.reset()


def test_large_and_dropped_out_inputs_go_the_other_way(shared: Callable[[int], list[str]]) -> None:
    model = adapted("msplora", 0.0, torch.float32)
    widths = {module.in_features for module in model.modules() if isinstance(module, linear.AdaptedLinear)}
    for few, way in ((2 * 7 * max(widths), "composed"), (2 * 7 * min(widths) - 1, "up_add")):
        products = shared(few)
        gradients(model)
        assert set(products) == {way}
    products = shared(MOST)
    gradients(adapted("msplora", 0.1, torch.float32))
    assert "composed" not in products
    assert "up_add" in products
    products = shared(MOST)
    with torch.no_grad():
        model.eval()(**ZOO["llama"].inputs())
    assert set(products) == {"low_rank_add"}
