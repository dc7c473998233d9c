"""Further functions of torch, for every method: torch.func, tracing, hooks, selective checkpointing."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import versions
import ziggurat
from methods_table import METHODS, logits, zoo_config
from tolerance import assert_models_agree
from zoo import ZOO, shallow

every_method = pytest.mark.parametrize("method", METHODS)


def double(method: str, model: str = "llama", base: nn.Module | None = None, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    base = ZOO[model].build() if base is None else base
    base.set_attn_implementation("eager")  # the others have no forward derivative
    return get_peft_model(base, zoo_config(method, model, init_weights=False, **fields)).double()


def embedded(model: PeftModel) -> Tensor:
    return model.get_input_embeddings()(ZOO["llama"].inputs()["input_ids"]).detach()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dense(x).tanh()


class Stack(nn.Module):
    """Computes the same for any shape; a whole transformer's masks would be traced as constants."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def answer(model: nn.Module, inputs_embeds: Tensor) -> Tensor:
    return model(inputs_embeds=inputs_embeds)[0]


@every_method
def test_functional_gradients_are_those_of_a_backward(method: str) -> None:
    model = double(method).eval()
    inputs = embedded(model)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (), {"inputs_embeds": inputs})[0].square().mean()

    actual = torch.func.grad(loss)({name: p.detach() for name, p in learning.items()})
    answer(model, inputs).square().mean().backward()
    for name, parameter in learning.items():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual[name], wanted, rtol=1e-9, atol=1e-12)


@every_method
@pytest.mark.parametrize("grad", [True, False])
def test_forward_derivatives(method: str, grad: bool) -> None:
    """Along a direction, against a difference quotient. Of BERT: Llama norms in float32, which drowns it."""
    model = double(method, "bert").eval()
    x = embedded(model)
    direction, size = torch.randn_like(x), 1e-6
    with torch.set_grad_enabled(grad):
        _, slope = torch.func.jvp(partial(answer, model), (x,), (direction,))
    with torch.no_grad():
        wanted = (answer(model, x + size * direction) - answer(model, x - size * direction)) / (2 * size)
    torch.testing.assert_close(slope.detach(), wanted, rtol=1e-5, atol=1e-6)


@every_method
def test_hooks_on_all_modules_see_outputs_that_stay(method: str) -> None:
    model, seen = double(method).train(), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append((out, out.clone())) if isinstance(module, nn.Linear) else None
    )
    try:
        answer(model, embedded(model))
    finally:
        handle.remove()
    assert seen and all(torch.equal(out, then) for out, then in seen)


@every_method
def test_selective_checkpointing(method: str) -> None:
    """What is kept of matrix products is what the backward reads: nobody has written over it."""
    model = double(method).train()
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)

    def slope(run: Any) -> Tensor:
        x = embedded(model).requires_grad_()
        torch.manual_seed(1)
        run(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    plain = partial(answer, model)
    actual = slope(lambda x: checkpoint(plain, x, use_reentrant=False, context_fn=contexts))
    torch.testing.assert_close(actual, slope(plain), rtol=1e-9, atol=1e-12)


@every_method
def test_a_trace_computes_other_shapes_too(method: str) -> None:
    torch.manual_seed(0)
    fields = {"target_modules": ["dense"]} if METHODS[method].takes_targets else {}
    config = METHODS[method].config(ZOO["llama"], init_weights=False, task_type=None, **fields)
    model = get_peft_model(Stack(), config).eval()
    traced = torch.jit.trace(model, (torch.randn(2, 5, 16),), check_trace=False)
    x = torch.randn(3, 4, 16)
    assert_models_agree(traced(x), model(x))


@versions.compiles
@pytest.mark.parametrize(
    "method",
    # DyLoRA's rank is drawn anew in each step. What kit methods have in a graph, MSPLoRA and LoRA² have.
    [name for name, row in METHODS.items() if name != "dylora" and not row.kit],
)
def test_compiled_training_is_training(method: str) -> None:
    """Forward and backward in one graph; without dropout, for the compiler draws other numbers."""
    model = double(method, base=shallow("llama"), lora_dropout=0.0).train()
    x = embedded(model)

    def slopes(run: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        run(inputs_embeds=x)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = slopes(model)
    torch._dynamo.reset()
    actual = slopes(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert actual.keys() == wanted.keys()
    for name, slope in wanted.items():
        torch.testing.assert_close(actual[name], slope, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["msplora", "lor2c"])
def test_layers_on_two_devices_share_a_pair(method: str) -> None:
    """The second device is "meta", which shows where numbers go, if not which."""
    fields = {"share": True} if method == "lor2c" else {}
    model = double(method, **fields).eval()
    layers = model.get_submodule("base_model.model.model.layers")
    layers[-1].register_forward_pre_hook(
        lambda module, args, kwargs: (tuple(a.to("meta") for a in args), _moved(kwargs)), with_kwargs=True
    )
    shared = {n: p for n, p in model.named_parameters() if METHODS[method].prefix in n}
    for name, parameter in list(layers[-1].named_parameters()):
        if METHODS[method].prefix not in name:
            _replace(layers[-1], name, parameter.to("meta"))
    model.get_submodule("base_model.model.model.norm").to("meta")
    model.get_submodule("base_model.model.lm_head").to("meta")
    assert shared and all(p.device.type == "cpu" for p in shared.values())
    assert logits(model, ZOO["llama"].inputs()).device.type == "meta"


def test_a_pyramid_made_on_two_devices() -> None:
    """Each pair lies where the first of its layers does, so a later layer's three lie on two devices."""
    base = ZOO["bert"].build()
    base.bert.encoder.layer[2:].to("meta")
    model = get_peft_model(base, zoo_config("msplora", "bert"))
    layers = model.get_submodule("base_model.model.bert.encoder.layer")
    for layer, device in ((1, "cpu"), (3, "meta")):
        linear = layers[layer].attention.self.query
        assert {half.device.type for half in linear.effective_pair("default")} == {device}
        assert linear(torch.empty(2, 3, 16, device=device)).device.type == device


def _moved(kwargs: dict[str, Any]) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return tuple(map(move, value)) if isinstance(value, tuple) else _to_meta(value)

    return {name: move(value) for name, value in kwargs.items()}


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


class AppleLike(TorchDispatchMode):
    """Refuses what Apple's GPU refuses: tensors in float64, and, in many versions of torch, decompositions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)), func
        assert not any(name in str(func) for name in ("linalg_qr", "linalg_svd", "linalg_eigh")), func
        return out


@every_method
def test_a_training_step_asks_nothing_that_apples_gpu_lacks(method: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(ZOO["llama"].build(), zoo_config(method, "llama", init_weights=False, lora_dropout=0.1))
    inputs, optimizer = ZOO["llama"].inputs(), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with AppleLike():
        for step in range(2):
            ziggurat.step(model, step, 4, optimizer)
            model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
