"""MSPLoRA against its equations, written naively in float64 (arXiv 2503.21838)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from methods_table import logits
from ziggurat import MSPLoraConfig
from ziggurat.host.bank import Bank
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.site import Site, body_prefix
from ziggurat.methods.msplora.equations import tensors
from ziggurat.methods.msplora.pyramid import Tier
from zoo import ZOO


def pyramid_of(model: nn.Module) -> Bank:
    return next(module for module in model.modules() if isinstance(module, Bank))


def adapted(name: str = "bert", **fields: object):
    torch.manual_seed(0)
    config = MSPLoraConfig(**{"r": 8, "target_modules": ZOO[name].targets, "init_weights": False, **fields})
    return get_peft_model(ZOO[name].build(), config).eval()


@pytest.mark.parametrize("even_scales", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_is_base_plus_the_three_tiers(use_rslora: bool, even_scales: bool) -> None:
    """y = W x + b + sum over tiers of (alpha / rank) B A x, the factors taken from the saved names (Eq. 3, 4)."""
    model = adapted(lora_alpha=12, use_rslora=use_rslora, even_scales=even_scales).double()
    tensors = {name.rpartition(".")[2]: p for name, p in model.named_parameters() if "msplora_" in name}
    groups = {0: 0, 1: 0, 2: 1, 3: 2}  # floor(n * 3 / 4)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    checked = 0
    for path, linear in model.named_modules():
        if not isinstance(linear, AdaptedLinear):
            continue
        layer = int(path.split(".layer.")[1].split(".")[0])
        role = path.rpartition("attention.")[2].replace(".", "/")
        expected = x @ linear.weight.T + linear.bias
        for tier, group, rank in (("global", 0, 8), ("mid", groups[layer], 4), ("layer", layer, 2)):
            stem = f"encoder/layer:attention/{role}:16x16:{group}"
            a, b = tensors[f"{stem}:A_{tier}"], tensors[f"{stem}:B_{tier}"]
            assert a.shape == (rank, 16)
            assert b.shape == (16, rank)
            counts = 8 if even_scales else rank
            scale = 12 / (math.sqrt(counts) if use_rslora else counts)
            expected = expected + scale * torch.einsum("bti,ri,or->bto", x, a, b)
        torch.testing.assert_close(linear(x), expected, rtol=1e-10, atol=1e-10)
        delta = linear.get_delta_weight("default")
        torch.testing.assert_close(linear(x) - x @ linear.weight.T - linear.bias, x @ delta.T, rtol=1e-10, atol=1e-10)
        checked += 1
    assert checked == 8


def test_conv1d_keeps_its_layout() -> None:
    model = adapted("gpt2").double()
    linear = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    x = torch.randn(2, 3, linear.in_features, dtype=torch.float64)
    merged = x @ (linear.weight + linear.get_delta_weight("default")) + linear.bias
    torch.testing.assert_close(linear(x), merged, rtol=1e-10, atol=1e-10)


def test_moving_a_shared_factor_moves_its_members_and_nobody_else() -> None:
    model = adapted("t5")
    linears = {p: m for p, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    names = pyramid_of(model).factors("default").names()
    assert {name.partition(":")[0] for name in names} == {"encoder/block", "decoder/block"}
    for name in names:
        before = {path: m.get_delta_weight("default").clone() for path, m in linears.items()}
        with torch.no_grad():
            pyramid_of(model).factors("default")[name].add_(1.0)
        moved = {path for path, m in linears.items() if not torch.equal(m.get_delta_weight("default"), before[path])}
        members = {p for p, m in linears.items() if name in [leaf for _, leaf in m.leaves["default"].values()]}
        assert moved == members
        stack, role, _, _, key = name.split(":")
        number = {"g": 12, "m": 12, "l": 1}[key[2]]
        assert 1 <= len(members) <= number
        assert all(stack.replace("/", ".") in path and path.endswith(role.replace("/", ".")) for path in members)


def test_a_role_splits_by_shape() -> None:
    """Linears of one role and different shapes don't share: one pyramid for each shape."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up = nn.Linear(8, width)
            self.norm = nn.LayerNorm(8)
            self.down = nn.Linear(width, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x + self.down(self.up(x)))

    blocks = nn.Sequential(Block(8), Block(16), Block(8), Block(16))
    model = get_peft_model(blocks, MSPLoraConfig(r=4, target_modules=["up"]))
    names = [n for n in pyramid_of(model).factors("default").names() if n.endswith(":A_global")]
    assert sorted(n.split(":")[2] for n in names) == ["16x8", "8x8"]


@pytest.mark.parametrize(
    ("architecture", "config", "msplora", "lora", "r"),
    [
        ("RobertaConfig", {"num_hidden_layers": 12, "hidden_size": 768}, 135_168, 294_912, 8),
        (
            "LlamaConfig",
            {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008},
            11_010_048,
            33_554_432,
            64,
        ),
    ],
)
def test_published_parameter_counts(architecture: str, config: dict, msplora: int, lora: int, r: int) -> None:
    """(10 + N) r d against 4 N r d (Eq. 7, 5), on the real shapes."""
    import transformers

    made = getattr(transformers, architecture)(**config)
    auto = AutoModelForCausalLM if architecture == "LlamaConfig" else AutoModelForSequenceClassification
    targets = ["q_proj", "v_proj"] if architecture == "LlamaConfig" else ["query", "value"]
    n, d = made.num_hidden_layers, made.hidden_size
    assert (msplora, lora) == ((10 + n) * r * d, 4 * n * r * d)
    for method, expected in ((MSPLoraConfig, msplora), (LoraConfig, lora)):
        with torch.device("meta"):
            model = get_peft_model(auto.from_config(made), method(r=r, target_modules=targets))
        assert model.get_nb_trainable_parameters()[0] == expected


def test_32_layers_fall_into_11_11_10() -> None:
    tier = Tier("mid", 3, 4, 16.0)
    sizes = [sum(tier.group_of(n, 32) == g for n in range(32)) for g in range(3)]
    assert sizes == [11, 11, 10]
    assert [tier.group_of(n, 12) for n in range(12)] == [0] * 4 + [1] * 4 + [2] * 4


@given(depth=st.integers(1, 96), groups=st.integers(1, 96))
def test_groups_are_contiguous_complete_and_equal(depth: int, groups: int) -> None:
    groups = min(groups, depth)
    of = [Tier("mid", groups, 1, 1.0).group_of(n, depth) for n in range(depth)]
    assert of == sorted(of)
    assert set(of) == set(range(groups))
    sizes = [of.count(g) for g in range(groups)]
    assert max(sizes) - min(sizes) <= 1


@given(
    starts=st.sets(st.integers(1, 30), max_size=6),
    depth=st.integers(31, 60),
)
def test_explicit_boundaries_begin_where_they_say(starts: set[int], depth: int) -> None:
    boundaries = (0, *sorted(starts))
    tier = Tier("mid", boundaries, 1, 1.0)
    of = [tier.group_of(n, depth) for n in range(depth)]
    assert [n for n in range(depth) if n == 0 or of[n] != of[n - 1]] == list(boundaries)


def test_names_tell_pairs_apart() -> None:
    config = MSPLoraConfig(tiers=[{"name": "layer", "groups": "layers", "r": 1}])
    sites = [Site("", s, n, 4, r, d, 8) for s in ("a.b", "c") for n in range(4) for r in ("q", "k.v") for d in (8, 16)]
    names = {spec.leaf(key) for site in sites for key, spec in tensors(config, site).items() if key[0] == "A"}
    assert len(names) == len(sites)
    assert not any("." in name or "msplora_" in name for name in names)


def test_every_architecture_shares_as_its_stacks_say() -> None:
    """Pairs in a model, per role and stack: one global, at most min(3, N) mid, at most N layer."""
    for name, entry in ZOO.items():
        base = entry.build()
        expected_output = logits(base, entry.inputs())
        model = get_peft_model(base, MSPLoraConfig(r=4, target_modules=entry.targets)).eval()
        assert torch.equal(logits(model, entry.inputs()), expected_output), name
        tiers = [n.split(":") for n in pyramid_of(model).factors("default").names()]
        for stack, depth in entry.stacks.items():
            stack = stack.removeprefix(body_prefix(base))
            roles = {tuple(t[1:3]) for t in tiers if t[0] == stack.replace(".", "/")}
            assert roles, name
            for role in roles:
                mine = [
                    t[4][2:]
                    for t in tiers
                    if t[4][0] == "A" and t[0] == stack.replace(".", "/") and tuple(t[1:3]) == role
                ]
                assert mine.count("global") == 1, name
                assert 1 <= mine.count("mid") <= min(3, depth), name
                assert 1 <= mine.count("layer") <= depth, name


def test_default_targets_are_those_of_lora() -> None:
    """The default targets are found by model type, as PEFT's LoRA has them."""
    for name in ("bert", "gpt2", "llama", "t5"):
        model = get_peft_model(ZOO[name].build(), MSPLoraConfig(r=4))
        lora = get_peft_model(ZOO[name].build(), LoraConfig(r=4))
        assert set(model.targeted_module_names) == set(lora.targeted_module_names)
