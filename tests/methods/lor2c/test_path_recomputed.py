"""Spans whose layers a gradient checkpoint recomputes with their hooks, as transformers did before 5.20."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import versions
from plain_models import Block
from ziggurat import LoR2CConfig
from zoo import ZOO

both_ways = pytest.mark.parametrize("use_reentrant", [True, False])
on_models = pytest.mark.parametrize("model", ["plain_list", "llama", "bert", "t5"])
STACKS = {"plain_list": "blocks", "llama": "model.layers", "bert": "bert.encoder.layer", "t5": "encoder.block"}


def adapted(model: str, spans: Any = ((0, 2), (3, 3)), **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    spans = {"encoder.block": [*spans], "decoder.block": [[0, 1], [2, 4]]} if model == "t5" else [*spans]
    config = LoR2CConfig(r=4, init_weights=False, lora_dropout=0.1, spans=spans, **fields)
    return get_peft_model(ZOO[model].build(), config).double().train()


def layers_of(model: PeftModel, name: str) -> list[nn.Module]:
    stacks = ("encoder.block", "decoder.block") if name == "t5" else (STACKS[name],)
    return [layer for stack in stacks for layer in model.get_base_model().get_submodule(stack)]


def embedded(model: PeftModel, name: str, seed: int = 0, grad: bool = True) -> dict[str, Any]:
    """What goes in, as numbers that can have a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=generator).requires_grad_(grad)
    if name == "plain_list":
        return {"x": x}
    decoded = {"decoder_inputs_embeds": x.detach().flip(1).requires_grad_(grad)} if name == "t5" else {}
    # Whoever recomputes a layer must not let it write into a cache again.
    uncached = {} if name == "bert" else {"use_cache": False}
    return {"inputs_embeds": x, "attention_mask": torch.ones(2, 5, dtype=torch.long), **decoded, **uncached}


@contextmanager
def calls_checkpointed(kinds: set[type[nn.Module]], run: Callable[..., Any]) -> Iterator[None]:
    """Every call of a layer, hooks and all, goes through `run`, as GradientCheckpointingLayer did before 5.20."""
    theirs = {kind: kind.__call__ for kind in kinds}

    def called(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(partial(nn.Module.__call__, layer, **kwargs), *args)

    for kind in kinds:
        kind.__call__ = called
    try:
        yield
    finally:
        for kind, call in theirs.items():
            if "__call__" in vars(kind):
                kind.__call__ = call


def set_dropout(model: PeftModel, p: float) -> None:
    for module in model.modules():
        for config in getattr(module, "configs", {}).values():
            config.lora_dropout = p


def loss_of(model: PeftModel, inputs: dict[str, Any], seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    out = model(**inputs)
    return (out if isinstance(out, Tensor) else out[0]).square().mean()


def gradients(model: PeftModel, *inputs: dict[str, Any]) -> dict[str, Tensor]:
    gradients_by_name = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for number, given in enumerate(inputs):
        for name, x in given.items():
            if isinstance(x, Tensor) and x.grad is not None:
                gradients_by_name[f"{name} {number}"], x.grad = x.grad, None
    model.zero_grad()
    return gradients_by_name


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and any("lor2c" in name for name in actual)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def kinds(model: PeftModel, name: str) -> set[type[nn.Module]]:
    return {type(layer) for layer in layers_of(model, name)}


@both_ways
@on_models
@pytest.mark.parametrize("spans", [((0, 1), (2, 3)), ((0, 2), (3, 3)), ((1, 3),)])
def test_gradients_are_those_without_checkpointing(model: str, spans: Any, use_reentrant: bool) -> None:
    tuned = adapted(model, spans)
    inputs = embedded(tuned, model)
    loss_of(tuned, inputs).backward()
    expected = gradients(tuned, inputs)
    with calls_checkpointed(kinds(tuned, model), partial(checkpoint, use_reentrant=use_reentrant)):
        loss_of(tuned, inputs).backward()
    assert_same(gradients(tuned, inputs), expected)


@both_ways
@on_models
def test_two_forwards_then_their_backwards_in_any_order(model: str, use_reentrant: bool) -> None:
    tuned = adapted(model)
    inputs = [embedded(tuned, model, seed) for seed in (0, 1)]
    for number, given in enumerate(inputs):
        loss_of(tuned, given, seed=number).mul(number + 1).backward()
    expected = gradients(tuned, *inputs)
    with calls_checkpointed(kinds(tuned, model), partial(checkpoint, use_reentrant=use_reentrant)):
        for order in (lambda a, b: (a + b,), lambda a, b: (a, b), lambda a, b: (b, a)):
            losses = [loss_of(tuned, given, seed=number).mul(number + 1) for number, given in enumerate(inputs)]
            for loss in order(*losses):
                loss.backward()
            assert_same(gradients(tuned, *inputs), expected)


@both_ways
def test_two_forwards_that_read_the_same(use_reentrant: bool) -> None:
    """As R-Drop does: one input, two dropout masks. Both forwards hand over one tensor."""
    tuned = adapted("llama")
    inputs = embedded(tuned, "llama")
    first, second = (loss_of(tuned, inputs, seed) for seed in (1, 2))
    (first + 3 * second).backward()
    expected = gradients(tuned, inputs)
    with calls_checkpointed(kinds(tuned, "llama"), partial(checkpoint, use_reentrant=use_reentrant)):
        first, second = (loss_of(tuned, inputs, seed) for seed in (1, 2))
        (first + 3 * second).backward()
        assert_same(gradients(tuned, inputs), expected)
        first, second = (loss_of(tuned, inputs, seed) for seed in (1, 2))
        first.backward()
        (3 * second).backward()
        assert_same(gradients(tuned, inputs), expected)


@both_ways
def test_two_adapters_with_spans_that_cross(use_reentrant: bool) -> None:
    tuned = adapted("llama")
    tuned.add_adapter("other", LoR2CConfig(r=2, init_weights=False, spans=[(1, 3)]))
    tuned.double().base_model.set_adapter(["default", "other"])
    inputs = embedded(tuned, "llama")
    loss_of(tuned, inputs).backward()
    expected = gradients(tuned, inputs)
    assert len({name.split(".")[-1] for name in expected if "lor2c" in name}) == 2
    with calls_checkpointed(kinds(tuned, "llama"), partial(checkpoint, use_reentrant=use_reentrant)):
        loss_of(tuned, inputs).backward()
    assert_same(gradients(tuned, inputs), expected)


@versions.saves_whole
@both_ways
def test_paths_that_training_has_merged(use_reentrant: bool) -> None:
    tuned = adapted("bert", spans=((0, 0), (1, 1), (2, 2), (3, 3)), merges=2, max_span=3)
    tuned.restructure(10, 10)
    assert any(span.length > 1 for path in tuned.base_model._bank().adapters.values() for span in spans_in(path))
    inputs = embedded(tuned, "bert")
    loss_of(tuned, inputs).backward()
    expected = gradients(tuned, inputs)
    with calls_checkpointed(kinds(tuned, "bert"), partial(checkpoint, use_reentrant=use_reentrant)):
        loss_of(tuned, inputs).backward()
    assert_same(gradients(tuned, inputs), expected)


def spans_in(adapter: Any) -> list[Any]:
    return [span for state in adapter.structure.values() for span in state.spans]


@both_ways
@pytest.mark.parametrize("groups", [[(0, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 3), (3, 4)], [(1, 3)], [(2, 3)], [(0, 1)]])
def test_some_layers_or_several_in_one_checkpoint(groups: list[tuple[int, int]], use_reentrant: bool) -> None:
    """A span may begin before what is recomputed, in it, or not touch it."""
    tuned = adapted("plain_list")
    base, inputs = tuned.get_base_model(), embedded(tuned, "plain_list")
    loss_of(tuned, inputs).backward()
    expected = gradients(tuned, inputs)
    starts = dict(groups)

    def run(first: int, last: int, x: Tensor) -> Tensor:
        for block in base.blocks[first:last]:
            x = block(x)
        return x

    def grouped(x: Tensor) -> Tensor:
        x, number = base.stem(x), 0
        while number < len(base.blocks):
            last = starts.get(number, number + 1)
            part = partial(run, number, last)
            x = checkpoint(part, x, use_reentrant=use_reentrant) if number in starts else part(x)
            number = last
        return base.head(x)

    base.forward = grouped
    loss_of(tuned, inputs).backward()
    assert_same(gradients(tuned, inputs), expected)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_checkpoints_within_a_checkpoint(outer: bool, inner: bool) -> None:
    tuned = adapted("plain_list")
    inputs = embedded(tuned, "plain_list")
    loss_of(tuned, inputs).backward()
    expected = gradients(tuned, inputs)
    base = tuned.get_base_model()
    stack = base.forward
    base.forward = lambda x: checkpoint(stack, x, use_reentrant=outer)
    with calls_checkpointed({Block}, partial(checkpoint, use_reentrant=inner)):
        loss_of(tuned, inputs).backward()
    assert_same(gradients(tuned, inputs), expected)


@pytest.mark.parametrize("kind", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_torch_s_own_wrapper(kind: CheckpointImpl) -> None:
    """As accelerate's FSDP plugin sets it up."""
    tuned = adapted("plain_list")
    inputs = embedded(tuned, "plain_list")
    loss_of(tuned, inputs).backward()
    expected = gradients(tuned, inputs)
    wrap = partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(tuned, checkpoint_wrapper_fn=wrap, check_fn=lambda module: isinstance(module, Block))
    loss_of(tuned, inputs).backward()
    gradients_by_name = {
        name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(tuned, inputs).items()
    }
    assert_same(gradients_by_name, expected)


class Offloaded(torch.autograd.Function):
    """A checkpoint that keeps a copy of the hidden states elsewhere, as Unsloth's does."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *args: Any) -> Any:
        with torch.no_grad():
            out = run(x, *args)
        ctx.save_for_backward(x.clone())
        ctx.run, ctx.args = run, args
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x = ctx.saved_tensors[0].clone().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x, *ctx.args)
        torch.autograd.backward(out if isinstance(out, Tensor) else out[0], gradients[0])
        return None, x.grad, *(None for _ in ctx.args)


@pytest.mark.parametrize("model", ["plain_list", "llama"])
def test_a_checkpoint_that_keeps_a_copy_elsewhere(model: str) -> None:
    tuned = adapted(model)
    set_dropout(tuned, 0.0)
    inputs = [embedded(tuned, model, seed) for seed in (0, 1)]
    sum(loss_of(tuned, given) for given in inputs).backward()
    expected = gradients(tuned, *inputs)
    with calls_checkpointed(kinds(tuned, model), Offloaded.apply):
        sum(loss_of(tuned, given) for given in inputs).backward()
    assert_same(gradients(tuned, *inputs), expected)


def test_inputs_without_gradient() -> None:
    """A reentrant checkpoint gives nothing a gradient then, whatever it holds; the other one must be right."""
    tuned = adapted("plain_list", spans=((0, 2),))
    inputs = [embedded(tuned, "plain_list", seed, grad=False) for seed in (0, 1)]
    sum(loss_of(tuned, given) for given in inputs).backward()
    expected = gradients(tuned, *inputs)
    with calls_checkpointed({Block}, partial(checkpoint, use_reentrant=False)):
        first, second = (loss_of(tuned, given) for given in inputs)
        first.backward()
        second.backward()
    assert_same(gradients(tuned, *inputs), expected)


@both_ways
def test_a_graph_that_is_kept_can_be_gone_through_again(use_reentrant: bool) -> None:
    tuned = adapted("llama")
    inputs = embedded(tuned, "llama")
    loss_of(tuned, inputs).backward()
    once = gradients(tuned, inputs)
    with calls_checkpointed(kinds(tuned, "llama"), partial(checkpoint, use_reentrant=use_reentrant)):
        loss = loss_of(tuned, inputs)
        loss.backward(retain_graph=True)
        loss.backward()
        assert_same(gradients(tuned, inputs), {name: 2 * gradient for name, gradient in once.items()})
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def handed_over(model: PeftModel) -> list[weakref.ref]:
    """Weak references to the storages of what spans read, collected as the model runs."""
    alive: list[weakref.ref] = []
    first = model.get_base_model().blocks[0]
    first.register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0].untyped_storage())))
    return alive


@both_ways
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_outlives_the_backward_or_the_graph(use_reentrant: bool, grad: bool) -> None:
    tuned = adapted("plain_list", spans=((0, 2),))
    alive, inputs = handed_over(tuned), embedded(tuned, "plain_list", grad=grad)
    gc.disable()
    try:
        with calls_checkpointed({Block}, partial(checkpoint, use_reentrant=use_reentrant)):
            loss = loss_of(tuned, inputs)
            assert grad or use_reentrant or alive[0]() is not None
            if loss.requires_grad and (grad or not use_reentrant):
                loss.backward()
            # Though `loss` still leads to all nodes of the graph.
            assert alive[0]() is None
            dropped = loss_of(tuned, inputs)
            del dropped
            with torch.no_grad():
                loss_of(tuned, inputs)
        assert len(alive) >= 3 and not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


@both_ways
def test_an_input_that_lives_on_keeps_nothing(use_reentrant: bool) -> None:
    """The first layer reads the leaf itself, forward after forward."""
    tuned = adapted("llama")
    inputs = embedded(tuned, "llama")
    with calls_checkpointed(kinds(tuned, "llama"), partial(checkpoint, use_reentrant=use_reentrant)):
        for number in range(3):
            loss = loss_of(tuned, inputs)
            assert len(inputs["inputs_embeds"]._backward_hooks) == 1
            if number:
                loss.backward()
            del loss
            assert not inputs["inputs_embeds"]._backward_hooks


@both_ways
def test_an_exception_in_a_backward_leaves_nothing(use_reentrant: bool) -> None:
    tuned = adapted("plain_list", spans=((0, 2),))
    alive, inputs = handed_over(tuned), embedded(tuned, "plain_list")
    loss_of(tuned, inputs).backward()
    expected = gradients(tuned, inputs)

    def stop(*_: Any) -> None:
        if torch._C._current_autograd_node() is not None:
            raise KeyError("stop")

    with calls_checkpointed({Block}, partial(checkpoint, use_reentrant=use_reentrant)):
        handle = tuned.get_base_model().blocks[0].register_forward_pre_hook(stop)
        loss = loss_of(tuned, inputs)
        with pytest.raises(KeyError, match="stop"):
            loss.backward()
        handle.remove()
        gradients(tuned, inputs)
        loss_of(tuned, inputs).backward()
        del loss
    assert_same(gradients(tuned, inputs), expected)
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@both_ways
def test_threads_of_their_own(use_reentrant: bool) -> None:
    """One thread runs forward and backward while the other is between the two."""
    tuned = adapted("plain_list")
    inputs = [embedded(tuned, "plain_list", seed) for seed in (0, 1)]
    set_dropout(tuned, 0.0)
    sum(loss_of(tuned, given) for given in inputs).backward()
    expected = gradients(tuned, *inputs)
    with calls_checkpointed({Block}, partial(checkpoint, use_reentrant=use_reentrant, preserve_rng_state=False)):
        losses = [loss_of(tuned, given) for given in inputs]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert_same(gradients(tuned, *inputs), expected)


@both_ways
def test_an_input_that_was_written_over_is_refused(use_reentrant: bool) -> None:
    tuned = adapted("plain_list", spans=((0, 2),))
    seen: list[Tensor] = []
    tuned.get_base_model().blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with calls_checkpointed({Block}, partial(checkpoint, use_reentrant=use_reentrant)):
        loss = loss_of(tuned, embedded(tuned, "plain_list"))
        with torch.no_grad():
            seen[0].add_(1.0)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
            loss.backward()


@both_ways
def test_what_does_not_lead_back_to_the_forward_is_refused(use_reentrant: bool) -> None:
    """Hidden states that a checkpoint makes anew inside belong to no forward."""
    tuned = adapted("plain_list", spans=((0, 2),))

    def copied(run: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda x: run((x + 0.0).exp().log()), x, use_reentrant=use_reentrant)

    with calls_checkpointed({Block}, copied):
        loss = loss_of(tuned, embedded(tuned, "plain_list"))
        with pytest.raises(RuntimeError, match=r"path over layers 0 to 2 .* layer 2 is recomputed in a backward"):
            loss.backward()


def test_a_graph_that_is_cut_within_a_path_is_refused() -> None:
    """The gradient of x would come too late to be added. Only a reentrant checkpoint has to add it."""
    tuned = adapted("plain_list", spans=((0, 2),))
    base = tuned.get_base_model()

    def cut_after_the_first(x: Tensor) -> Tensor:
        x = checkpoint(base.blocks[0], base.stem(x), use_reentrant=True).detach().requires_grad_()
        for block in base.blocks[1:]:
            x = checkpoint(block, x, use_reentrant=True)
        return base.head(x)

    base.forward = cut_after_the_first
    loss = loss_of(tuned, embedded(tuned, "plain_list"))
    with pytest.raises(RuntimeError, match="has not reached the layers before it"):
        loss.backward()
