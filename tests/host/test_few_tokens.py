"""Small inputs that aren't dropped out: torch's own operations, with the results of the shared products."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import versions
from methods_table import METHODS, zoo_config
from tolerance import assert_sums_agree
from ziggurat import MSPLoraConfig
from ziggurat.host import linear, siblings
from zoo import ZOO

#: More entries than any linear layer of the zoo's llama has in its input and output.
ALL = 1 << 17
TESTS = Path(__file__).resolve().parents[1]


def adapted(method: str, p: float = 0.0, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    config = zoo_config(method, "llama", init_weights=False, lora_dropout=p)
    return get_peft_model(ZOO["llama"].build(), config).to(dtype).train()


def alone(d_in: int, d_out: int) -> linear.AdaptedLinear:
    """One adapted linear layer without siblings."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(d_in, d_out)), MSPLoraConfig(r=4, target_modules=["0"], init_weights=False)
    )
    return next(module for module in model.modules() if isinstance(module, linear.AdaptedLinear)).train()


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """The output of one step and the gradients of all that learns."""
    model.zero_grad()
    torch.manual_seed(1)
    logits = model(**ZOO["llama"].inputs()).logits
    logits.double().square().sum().backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **learning}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Sets `FEW`, and returns a list that grows by the name of the function that computes each update."""
    functions = {name: getattr(linear, name) for name in ("composed", "low_rank_add", "up_add", "whole")}

    def begin(few: int) -> list[str]:
        used: list[str] = []
        for name, function in functions.items():

            def noted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Tensor:
                used.append(_name)
                return _function(*args, **kwargs)

            monkeypatch.setattr(linear, name, noted)
        monkeypatch.setattr(linear, "FEW", few)
        return used

    return begin


@pytest.mark.parametrize("checkpoint", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_both_ways(method: str, checkpoint: str | None, watch: Callable[[int], list[str]]) -> None:
    model = adapted(method, dtype=torch.float64)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
        model.enable_input_require_grads()
    watch(0)
    wanted = gradients(model)
    used = watch(ALL)
    got = gradients(model)
    kinds = {type(module) for module in model.modules() if isinstance(module, linear.AdaptedLinear)}
    by_pairs = any(kind._add is linear.AdaptedLinear._add for kind in kinds)
    # A checkpoint computes a layer without gradients first: that pass has to round as the second one does.
    assert set(used) == ({"composed"} if by_pairs else set())
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_computes_the_products_and_the_base_gives_the_dtype(
    base: torch.dtype, watch: Callable[[int], list[str]]
) -> None:
    layer = alone(48, 32)
    layer.base_layer.to(base)
    x = torch.randn(5, 48, dtype=base)
    A, B = layer.effective_pair("default")
    used = watch(ALL)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), layer.base_layer(x)
    assert used == ["composed"]
    assert y.dtype == plain.dtype == torch.bfloat16
    update = (x.double() @ A.double().T) @ B.double().T
    # x, A, h, B, y and the sum are rounded to 8 bits each.
    atol = 8 * torch.finfo(torch.bfloat16).eps * float((plain.abs().max() + update.abs().max()).detach())
    torch.testing.assert_close(y.double(), plain.double() + update, rtol=0, atol=atol)
    assert float(update.detach().abs().max()) > 4 * atol


def test_a_half_precision_base_keeps_its_dtype(watch: Callable[[int], list[str]]) -> None:
    layer = alone(48, 32)
    layer.base_layer.to(torch.bfloat16)
    used = watch(ALL)
    assert layer(torch.randn(5, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert used == ["composed"]


@versions.shares
def test_large_dropped_out_and_wide_products_are_shared_and_inference_has_its_own_way(
    watch: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, layer = torch.randn(5, 48), alone(48, 32)
    for few, ways in (
        (5 * (48 + 32) + 1, ["composed", "composed", "composed"]),
        (5 * (48 + 32), ["whole", "whole", "low_rank_add"]),
    ):
        used = watch(few)
        layer(x)
        with torch.no_grad():
            layer(x)
        layer(x, adapter_names=["default"] * 5)
        assert used == ways
    used = watch(ALL)
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert used == ["low_rank_add"]
    used = watch(ALL)
    together: list[int] = []
    whole = siblings.whole
    monkeypatch.setattr(
        siblings, "whole", lambda x, bases, *given: together.append(len(bases)) or whole(x, bases, *given)
    )
    gradients(adapted("msplora", 0.1))
    assert not used
    assert set(together) == {2}
    monkeypatch.setattr(linear.AdaptedLinear, "_whole", lambda layer, x: None)
    gradients(adapted("msplora", 0.1))
    assert set(used) == {"up_add"}


def test_a_compiled_model_does_not_ask_for_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with sizes that aren't fixed serves inputs below and above."""
    layer = alone(48, 32)
    monkeypatch.setattr(linear, "FEW", 8 * (48 + 32))
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, dynamic=True)
    compiled_so_far = []
    for tokens in (4, 16, 5):
        x = torch.randn(tokens, 48, requires_grad=True)
        assert_sums_agree(compiled(x), layer(x), 48, depth=3)
        compiled_so_far.append(graphs.frame_count)
    assert compiled_so_far[0] == compiled_so_far[-1] > 0
    torch._dynamo.reset()


def test_contracts_hold_without_the_tests_own_setting() -> None:
    """tests/conftest.py turns small inputs' own way off, so that small tests try what large inputs take."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "msplora or lora2"]
    files = ["contracts/test_torch.py", "contracts/test_numbers.py"]
    environment = os.environ | {"ZIGGURAT_FEW": "on"}
    command = [sys.executable, "-m", "pytest", *options, *files]
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
