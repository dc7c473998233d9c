"""Linear layers that read one input compute together: the same numbers, one mask, and nobody is bound to it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import versions
from ziggurat import AdapterDropConfig, DyLoRAConfig, LoRA2Config, MSPLoraConfig
from ziggurat.host import siblings
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.siblings import SIBLINGS, Siblings
from ziggurat.lowrank import mask as masks
from ziggurat.lowrank.remade import unchanged

DOUBLE = {"rtol": 1e-10, "atol": 1e-10}
CONFIGS = [MSPLoraConfig, LoRA2Config]
QKV = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three linears that read x, or the keys and values another input; `o_proj` reads what comes of them."""

    def __init__(self, d: int = 12) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in "qkvo")

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        return self.o_proj(self.q_proj(x).tanh() * self.k_proj(other) + self.v_proj(other))


class Model(nn.Module):
    def __init__(self, name: str = "self_attn") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, Attention())

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return getattr(self, self.name)(x, other)


def adapted(config: type = MSPLoraConfig, p: float = 0.0, name: str = "self_attn") -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_dropout": p, "target_modules": [*QKV, "o_proj"], "init_weights": False}
    return get_peft_model(Model(name).double(), config(**settings)).train()


def linears(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {path.split(".")[-1]: m for path, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def alone(model: PeftModel) -> PeftModel:
    """A copy of the model whose linears share nothing."""
    model = copy.deepcopy(model)
    for linear in linears(model).values():
        linear.__dict__.pop(SIBLINGS, None)
    return model


def step(model: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    """The output and all gradients, the inputs' first."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    model.zero_grad()
    torch.manual_seed(1)
    out = model(*(x * 1.0 for x in inputs))
    out.square().sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *(x.grad for x in inputs), *(None if p.grad is None else p.grad.clone() for p in learning)]


def assert_equal(got: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, **DOUBLE)


@pytest.fixture(autouse=True, params=["whole", "down"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Linear layers compute their whole outputs together, or only go down together, as where an output was left."""
    if request.param == "down":
        monkeypatch.setattr(siblings.Siblings, "whole", lambda *given: None)
    return request.param


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linear layers compute together, call by call; one alone doesn't count."""
    seen: list[int] = []
    down, whole = siblings.down, siblings.whole
    monkeypatch.setattr(siblings, "down", lambda x, As, p: seen.append(len(As)) or down(x, As, p))

    def seen_whole(x: Tensor, bases: Any, pairs: Any, p: float) -> Any:
        seen.extend([len(bases)] if len(bases) > 1 else [])
        return whole(x, bases, pairs, p)

    monkeypatch.setattr(siblings, "whole", seen_whole)
    return seen


@versions.shares
@pytest.mark.parametrize("config", CONFIGS)
def test_together_and_alone_are_the_same_numbers(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(config), torch.randn(2, 5, 12, dtype=torch.float64)
    seen = calls(monkeypatch)
    together = step(model, x)
    assert seen == [3]
    assert_equal(together, step(alone(model), x))
    assert seen == [3]


@versions.shares
def test_linear_layers_share_while_a_tier_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier that doesn't learn is read as a detached tensor, another one in each call."""
    model, x = adapted(), torch.randn(2, 5, 12, dtype=torch.float64)
    model.base_model.set_stage(0.5)
    seen = calls(monkeypatch)
    together = step(model, x)
    assert seen == [3]
    assert_equal(together, step(alone(model), x))


def test_a_stage_that_changes_in_between_is_seen() -> None:
    """A key that is called after the next stage has begun gives its gradient to the tier that learns then."""
    model = adapted()
    parts, x = linears(model), torch.randn(3, 12, dtype=torch.float64)
    model.base_model.set_stage(0.0)
    parts["q_proj"](x)
    model.base_model.set_stage(0.99)
    parts["k_proj"](x).sum().backward()
    learned = {name.rpartition("_")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"layer"}


@versions.shares
def test_one_mask_for_all_three() -> None:
    """By the formula, with the mask drawn once: queries, keys and values of dropout(x) with the same entries zero."""
    p = 0.4
    model, x = adapted(p=p), torch.randn(2, 5, 12, dtype=torch.float64)
    parts = linears(model)
    out = step(model, x)[0]
    torch.manual_seed(1)
    ones = torch.ones_like(x)
    kept = masks.apply(ones, masks.draw(x, p)) * masks.keep_scale(p)

    def full(name: str, of: Tensor, kept: Tensor) -> Tensor:
        A, B = parts[name].effective_pair("default")
        return parts[name].base_layer(of) + (of * kept) @ A.T @ B.T

    inner = full("q_proj", x, kept).tanh() * full("k_proj", x, kept) + full("v_proj", x, kept)
    kept_there = masks.apply(ones, masks.draw(x, p)) * masks.keep_scale(p)
    torch.testing.assert_close(out, full("o_proj", inner, kept_there).detach(), **DOUBLE)


@versions.shares
@pytest.mark.parametrize("name", ["self_attn", "cross_attn"])
def test_another_input_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of another input, also where the name doesn't tell: each linear works on its own input."""
    model = adapted(name=name)
    x, other = torch.randn(2, 2, 5, 12, dtype=torch.float64)
    seen = calls(monkeypatch)
    got = step(model, x, other)
    assert seen == ([] if name == "cross_attn" else [3, 3])
    assert_equal(got, step(alone(model), x, other))


def test_an_input_changed_in_between_is_seen() -> None:
    model = adapted()
    parts, x = linears(model), torch.randn(3, 12, dtype=torch.float64)
    parts["q_proj"](x)
    x.mul_(2)
    A, B = parts["v_proj"].effective_pair("default")
    wanted = parts["v_proj"].base_layer(x) + x @ A.T @ B.T
    torch.testing.assert_close(parts["v_proj"](x), wanted, **DOUBLE)


def test_a_linear_that_is_not_called_gets_no_gradient() -> None:
    model = adapted(LoRA2Config)
    parts = linears(model)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    (parts["q_proj"](x * 1.0)).sum().backward()
    assert parts["q_proj"].factor("default", "u").grad is not None
    assert all(p.grad is None for p in parts["v_proj"].parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_computes_the_same_again(use_reentrant: bool) -> None:
    model, x = adapted(p=0.3), torch.randn(2, 5, 12, dtype=torch.float64)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=use_reentrant)  # type: ignore

    for got, wanted in zip(step(Checkpointed(), x), step(model, x), strict=True):
        assert got is not None and wanted is not None
        assert torch.equal(got, wanted)


@versions.shares
def test_the_mask_is_kept_once() -> None:
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.dtype == torch.uint8:
                sizes[t.untyped_storage().data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            alive = model(torch.randn(4, 8, 12, dtype=torch.float64, requires_grad=True))
        del alive
        return sum(sizes.values())

    model, bits = adapted(p=0.3), 4 * 8 * 12 // 8
    assert kept(model) == 2 * bits  # one for q, k and v, one for o
    assert kept(alone(model)) == 4 * bits


@versions.shares
def test_hooks_on_a_sibling_keep_it_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook may have to fetch the factors before the call, as sharding does."""
    model, x = adapted(), torch.randn(2, 5, 12, dtype=torch.float64)
    linears(model)["k_proj"].register_forward_pre_hook(lambda module, args: None)
    seen = calls(monkeypatch)
    step(model, x)
    assert seen == [2, 3]  # q and v; then k, hooked itself, with the two others, in vain


def test_other_adapters_and_dropouts() -> None:
    model = adapted()
    model.add_adapter("wet", MSPLoraConfig(r=4, lora_dropout=0.5, target_modules=["v_proj"], init_weights=False))
    model.base_model.set_adapter(["default", "wet"])
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert_equal(step(model, x), step(alone(model), x))


@versions.shares
def test_copies_and_pickles_share_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), torch.randn(2, 5, 12, dtype=torch.float64)
    linears(model)["q_proj"](x * 1.0)  # its siblings' products are in flight
    seen = calls(monkeypatch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = linears(other)
        group: Siblings = layers["q_proj"].__dict__[SIBLINGS]
        assert all(any(member is mine for mine in layers.values()) for member in group.members)
        seen.clear()
        assert_equal(step(other, x), step(alone(model), x))
        assert seen == [3]


def test_a_method_with_an_update_of_its_own_shares_nothing() -> None:
    assert not any(SIBLINGS in linear.__dict__ for linear in linears(adapted(AdapterDropConfig)).values())


@pytest.mark.parametrize("circumstances", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_query_without_a_graph_gives_the_key_none(config: type, circumstances: Any) -> None:
    parts, x = linears(adapted(config)), torch.randn(3, 12, dtype=torch.float64)

    def slope(key: AdaptedLinear, first: AdaptedLinear | None) -> Tensor:
        leaf = x.clone().requires_grad_()
        read = leaf * 1.0
        if first is not None:
            with circumstances():
                first(read)
        key(read).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(slope(parts["k_proj"], parts["q_proj"]), slope(parts["k_proj"], None), **DOUBLE)


def test_autocast_on_one_linear_alone() -> None:
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": [*QKV], "init_weights": False}
    parts = linears(get_peft_model(Model(), MSPLoraConfig(**settings)).train())
    x = torch.randn(3, 12)
    wanted = parts["k_proj"](x)
    with torch.autocast("cpu", torch.bfloat16):
        parts["q_proj"](x)
    assert torch.equal(parts["k_proj"](x), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_one_linear_checkpointed_alone(config: type, use_reentrant: bool) -> None:
    """The gradient is that of the value, whose masks the recomputation must draw again."""
    parts = linears(adapted(config, p=0.5))

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        read = x * 1.0
        key = torch.utils.checkpoint.checkpoint(parts["k_proj"], read, use_reentrant=use_reentrant)
        return (parts["q_proj"](read) * key + parts["v_proj"](read)).sum()

    def value_query_first(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        read = x * 1.0
        query = parts["q_proj"](read)
        return (query * torch.utils.checkpoint.checkpoint(parts["k_proj"], read, use_reentrant=use_reentrant)).sum()

    for function in (value, value_query_first):
        x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
        direction, step_size = torch.randn_like(x), 1e-6
        function(x).backward()
        ahead, behind = (function((x + sign * step_size * direction).detach().requires_grad_()) for sign in (1, -1))
        assert x.grad is not None
        expected = (ahead - behind).detach() / (2 * step_size)
        torch.testing.assert_close((x.grad * direction).sum(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [*CONFIGS, DyLoRAConfig])
def test_factors_changed_in_between_are_seen(config: type) -> None:
    model = adapted(config)
    parts, x = linears(model), torch.randn(3, 12, dtype=torch.float64)
    parts["q_proj"](x)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    key = parts["k_proj"]
    actual = key(x)  # before effective_pair is asked for: DyLoRA cuts both alike
    A, B = key.effective_pair("default")
    torch.testing.assert_close(actual, key.base_layer(x) + x @ A.T @ B.T, **DOUBLE)


@versions.shares
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("first", ["before the next runs", "after"])
def test_a_gradient_through_one_linear_leaves_the_others_theirs(first: str, p: float) -> None:
    model = adapted(p=p)
    attention = model.get_submodule("base_model.model.self_attn")
    given = torch.randn(2, 3, 12, dtype=torch.double, requires_grad=True)
    gradients = []
    for inner in (True, False):
        torch.manual_seed(0)
        model.zero_grad()
        x, given.grad = given * 1, None
        q = attention.q_proj(x)
        k = attention.k_proj(x) if first == "after" else None
        through_q = torch.autograd.grad(q.sum(), x)[0] if inner else None
        k = attention.k_proj(x) if k is None else k
        (k.sum() + attention.v_proj(x).square().sum()).backward()
        assert through_q is None or torch.isfinite(through_q).all()
        gradients.append([given.grad, *(t.grad for t in model.parameters() if t.grad is not None)])
    for with_inner, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_inner, without, **DOUBLE)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_input_that_was_changed_before_the_backward_is_refused_in_plain_words(dropout: float) -> None:
    model = adapted(p=dropout)
    x = torch.randn(2, 3, 12, dtype=torch.double, requires_grad=True) * 1
    q = model.get_submodule("base_model.model.self_attn").q_proj(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"x = x \+ y for x \+= y"):
        q.sum().backward()


@versions.shares
def test_what_changes_between_two_backward_passes_is_refused() -> None:
    model = adapted()
    attention = model.get_submodule("base_model.model.self_attn")
    x = torch.randn(2, 3, 12, dtype=torch.double, requires_grad=True) * 1
    q, k = attention.q_proj(x), attention.k_proj(x)
    torch.autograd.grad(q.sum(), x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between two backward passes"):
        k.sum().backward()


@pytest.fixture
def wholes(way: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linear layers compute their whole outputs together, call by call."""
    if way == "down":
        pytest.skip("nothing is computed whole")
    seen: list[int] = []
    whole = siblings.whole
    monkeypatch.setattr(siblings, "whole", lambda x, *given: seen.append(len(given[0])) or whole(x, *given))
    return seen


@versions.shares
@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_that_nobody_takes_are_computed_once_only(config: type, wholes: list[int]) -> None:
    """Keys and values of another input where the name doesn't tell: after one pass the layers only go down together."""
    model = adapted(config)
    x, other = torch.randn(2, 2, 5, 12, dtype=torch.float64)
    first = step(model, x, other)
    assert max(wholes) == 3
    assert_equal(first, step(alone(model), x, other))
    wholes.clear()
    assert_equal(first, step(model, x, other))
    assert not wholes


@versions.shares
def test_a_query_called_by_itself_costs_the_others_once(wholes: list[int]) -> None:
    parts = linears(adapted())
    for _ in range(3):
        parts["q_proj"](torch.randn(2, 5, 12, dtype=torch.float64))
    assert wholes == [3]


@versions.shares
def test_a_sibling_with_two_active_adapters_computes_both() -> None:
    """The key adds two adapters, the query one: what they share is one adapter's product at most."""
    model, x = adapted(), torch.randn(2, 5, 12, dtype=torch.float64)
    config = MSPLoraConfig(r=4, target_modules=["k_proj"], init_weights=False)
    model.add_adapter("second", config)
    model.double().base_model.set_adapter(["default", "second"])
    assert linears(model)["k_proj"].acting() == ["default", "second"]
    assert_equal(step(model, x), step(alone(model), x))


@versions.shares
def test_a_key_of_another_width_stays_apart() -> None:
    """Siblings by name, of which one reads another width than the query's input has."""

    class Across(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.k_proj = nn.Linear(6, 12)

    base = Model()
    base.self_attn = Across()
    config = MSPLoraConfig(r=4, target_modules=["q_proj", "v_proj", "k_proj"], init_weights=False)
    model = get_peft_model(base, config).double().train()
    x, other = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    parts = linears(model)
    for name, of in zip(("q_proj", "k_proj", "v_proj"), (x, other, x), strict=True):
        A, B = parts[name].effective_pair("default")
        torch.testing.assert_close(parts[name](of), parts[name].base_layer(of) + of @ A.T @ B.T, **DOUBLE)


@versions.shares
def test_a_merged_sibling_stays_apart() -> None:
    model, x = adapted(), torch.randn(2, 5, 12, dtype=torch.float64)
    want = step(model, x)[0]
    linears(model)["k_proj"].merge()
    assert want is not None
    torch.testing.assert_close(step(model, x)[0], want, **DOUBLE)


@versions.shares
@pytest.mark.parametrize("reached", ["output", "gradient"])
def test_a_hook_on_a_siblings_frozen_layer_is_called_once(reached: str) -> None:
    """Forward hooks collect activations, backward hooks gradients: each sees one call, of the frozen product alone."""
    model, x = adapted(), torch.randn(2, 5, 12, dtype=torch.float64)
    base = linears(model)["k_proj"].base_layer
    seen: list[Tensor] = []
    if reached == "output":
        base.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    else:
        base.register_full_backward_hook(lambda module, inner, outer: seen.append(outer[0]))
    step(model, x)
    assert len(seen) == 1
    if reached == "output":
        assert torch.equal(seen[0], nn.functional.linear(x, base.weight, base.bias))


@versions.shares
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_leaves_costs_nothing_outside_it(use_reentrant: bool, wholes: list[int]) -> None:
    """A checkpoint stops computing as soon as it has what the backward needs, before a last key is called."""
    model, x = adapted(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    parts = linears(model)

    def query_then_key(x: Tensor) -> Tensor:
        return parts["q_proj"](x).tanh() + parts["k_proj"](x) + parts["v_proj"](x)

    torch.utils.checkpoint.checkpoint(query_then_key, x * 1.0, use_reentrant=use_reentrant).sum().backward()  # type: ignore
    query_then_key(x * 1.0)
    query_then_key(x * 1.0)
    assert wholes == 4 * [3]


@versions.shares
def test_tools_that_only_observe_what_is_kept_change_nothing(wholes: list[int]) -> None:
    parts = linears(adapted())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unchanged):
        parts["q_proj"](torch.randn(2, 5, 12, dtype=torch.float64))
    parts["q_proj"](torch.randn(2, 5, 12, dtype=torch.float64))
    assert wholes == [3]


@versions.shares
def test_one_query_again_and_again_is_seen(wholes: list[int]) -> None:
    parts, x = linears(adapted()), torch.randn(2, 5, 12, dtype=torch.float64)
    for _ in range(3):
        parts["q_proj"](x)
    assert wholes == [3, 3]  # the second call finds that nobody took what the first computed


@versions.shares
def test_narrow_keys_go_with_the_query_whatever_their_size(wholes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are few for the key alone, and not for the query, as with fewer heads of keys than of queries."""

    class Narrow(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.k_proj, self.v_proj = nn.Linear(12, 4), nn.Linear(12, 4)

    base = Model()
    base.self_attn = Narrow()
    config = MSPLoraConfig(r=4, target_modules=list(QKV), init_weights=False)
    model = get_peft_model(base, config).double().train()
    parts = linears(model)
    monkeypatch.setattr("ziggurat.host.linear.FEW", 10 * (12 + 8))
    for _ in range(2):
        for order in (QKV, QKV[::-1]):
            x = torch.randn(2, 5, 12, dtype=torch.float64)
            for name in order:
                parts[name](x)
    assert wholes == 4 * [3]


@versions.shares
@pytest.mark.parametrize("change", ["data", "in place", "hook"])
def test_a_frozen_layer_changed_in_between_is_seen(change: str) -> None:
    """Between the query's call and the value's: the value computes with what is there at its own call."""
    parts, x = linears(adapted()), torch.randn(2, 5, 12, dtype=torch.float64)
    base, seen = parts["v_proj"].base_layer, []
    parts["q_proj"](x)
    if change == "data":
        base.weight.data = base.weight.data + 1
    elif change == "in place":
        base.weight.add_(1)
    else:
        base.register_forward_hook(lambda module, args, out: seen.append(out))
    A, B = parts["v_proj"].effective_pair("default")
    torch.testing.assert_close(
        parts["v_proj"](x), nn.functional.linear(x, base.weight, base.bias) + x @ A.T @ B.T, **DOUBLE
    )
    assert len(seen) == (change == "hook")
