"""Adapters of fused experts: the equation against a loop over experts, and every method's duties to a PEFT user."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

import versions
from methods_table import logits
from moe_models import EXPERTS, MIXTURES, ROUTERS, mixture, tokens
from tolerance import assert_models_agree
from ziggurat import (
    AdapterDropConfig,
    ASLoRAConfig,
    DyLoRAConfig,
    LoR2CConfig,
    LoRA2Config,
    LoRAXSConfig,
    MSPLoraConfig,
    ShareLoRAConfig,
    TiedLoRAConfig,
)
from ziggurat.analysis import experts, figures, sharing, write
from ziggurat.analysis.collect import collect
from ziggurat.errors import ConfigError
from ziggurat.export import export_model
from ziggurat.host.count import count
from ziggurat.host.experts.layer import ParameterLayer
from ziggurat.host.linear import AdaptedLinear
from ziggurat.lowrank.grouped import _has_kernel, _padded, grouped
from ziggurat.plan.planner import plan

pytestmark = versions.saves_whole

every_mixture = pytest.mark.parametrize("name", MIXTURES)
#: A pair for all experts of all layers, of a layer, of two groups of experts in a layer, and of each expert.
TIERS = [
    {"name": "global", "groups": 1, "r": 3},
    {"name": "layer", "groups": "layers", "r": 2},
    {"name": "half", "groups": 1, "expert_groups": [0, 3], "r": 2},
    {"name": "third", "groups": "layers", "expert_groups": 3, "r": 1},
    {"name": "expert", "groups": "layers", "expert_groups": "experts", "r": 1},
]
METHODS: dict[str, Any] = {
    "msplora": lambda **f: MSPLoraConfig(**{"r": 4, **f}),
    "msplora tiers": lambda **f: MSPLoraConfig(tiers=TIERS, **f),
    "dylora": lambda **f: DyLoRAConfig(**{"r": 3, "inference_rank": 2, **f}),
    "sharelora": lambda **f: ShareLoRAConfig(**{"r": 3, **f}),
    "tiedlora": lambda **f: TiedLoRAConfig(**{"r": 3, **f}),
    "lora2": lambda **f: LoRA2Config(**{"r": 3, "outer_rank": 4, **f}),
}
#: Those whose layers need no test of their own beside the equation.
ALIKE: dict[str, Any] = {
    "loraxs": lambda **f: LoRAXSConfig(**{"r": 3, **f}),
    "aslora": lambda **f: ASLoRAConfig(**{"r": 3, "groups": 1, **f}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def adapted(name: str, config: Any, base: nn.Module | None = None) -> Any:
    """The mixture with an adapter, in evaluation, drawn from one seed."""
    base = mixture(name) if base is None else base
    torch.manual_seed(2)
    return get_peft_model(base, config).eval()


def parameter_layers(model: nn.Module) -> dict[str, ParameterLayer]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, ParameterLayer)}


def routers(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, AdaptedLinear) and layer.routes}


def factor_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# The equation


def update_of_expert(layer: ParameterLayer, expert: int) -> Tensor:
    """B_e A_e of one expert, from the stored tensors by MSPLoRA's equation written out tier by tier."""
    config, site, t = layer.configs["default"], layer.sites["default"], layer.stored("default")
    update = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
    for tier in config.tiers:
        A, B = t[f"A_{tier['name']}"], t[f"B_{tier['name']}"]
        groups = tier.get("expert_groups", 1)
        if A.dim() == 3:
            count = site.num_experts if groups == "experts" else groups
            group = (
                sum(expert >= s for s in groups) - 1 if isinstance(groups, list) else expert * count // site.num_experts
            )
            A, B = A[group], B[group]
        update = update + config.lora_alpha / tier["r"] * B @ A
    return update


@every_mixture
def test_the_equation_and_its_gradients_against_a_loop_over_experts(name: str) -> None:
    named = [*EXPERTS, ROUTERS[name]]
    config = MSPLoraConfig(tiers=TIERS, lora_alpha=3, target_parameters=named, init_weights=False)
    model = adapted(name, config).double()
    labels = {"labels": tokens()["input_ids"]}
    out = model(**tokens(), **labels)
    out.loss.backward()
    gradients = {path: g.clone() for path, g in factor_gradients(model).items()}
    model.zero_grad()

    naive = mixture(name, experts_implementation="eager").double()  # transformers' own loop over experts
    weights: dict[str, Tensor] = {}
    for path, layer in parameter_layers(model).items():
        updates = torch.stack([update_of_expert(layer, e) for e in range(layer.parameter.shape[0])])
        transposed = name == "gpt_oss"
        weights[path.removeprefix("base_model.model.")] = layer.parameter + (updates.mT if transposed else updates)
    for path, layer in routers(model).items():
        A, B = layer.effective_pair("default")
        weights[f"{path.removeprefix('base_model.model.')}.weight"] = layer.get_base_layer().weight + B @ A
    assert len(weights) == 6
    expected = functional_call(naive, weights, kwargs=tokens() | labels)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-10, atol=1e-10)
    expected.loss.backward()
    assert gradients and factor_gradients(model).keys() == gradients.keys()
    for path, gradient in factor_gradients(model).items():
        assert gradient.any()
        torch.testing.assert_close(gradients[path], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", METHODS | ALIKE)
def test_each_method_computes_what_its_pairs_say(method: str) -> None:
    model = adapted("qwen3_moe", (METHODS | ALIKE)[method](target_parameters=EXPERTS, init_weights=False)).double()
    out = logits(model, tokens())
    naive = mixture("qwen3_moe", experts_implementation="eager").double()
    weights = {}
    for path, layer in parameter_layers(model).items():
        A, B = layer.effective_pair("default")
        assert A.shape[0] == B.shape[0] == 6
        updates = torch.stack([B[e] @ A[e] for e in range(6)])
        weights[path.removeprefix("base_model.model.")] = layer.parameter + updates
    with torch.no_grad():
        expected = functional_call(naive, weights, kwargs=tokens()).logits
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_lora2_regularises_prunes_and_compacts_the_directions_of_every_expert(tmp_path: Path) -> None:
    schedule = {"initial_warmup": 0, "final_warmup": 1, "mask_interval": 1}
    config = LoRA2Config(r=4, outer_rank=3, target_rank=1, target_parameters=EXPERTS, init_weights=False, **schedule)
    model = adapted("mixtral", config).train()
    layers = [layer for layer in model.modules() if isinstance(layer, ParameterLayer)]
    off = []
    for layer in layers:
        for factors in layer.stored("default").values():
            for factor in factors if factors.dim() == 3 else ():
                wide = factor if factor.shape[0] <= factor.shape[1] else factor.T
                off.append((wide @ wide.T - torch.eye(len(wide))).norm().item())
    assert model.orthogonality() == pytest.approx(sum(off) / len(off), rel=1e-5)
    before = model.eval()(**tokens(), labels=tokens()["input_ids"]).loss
    loss = model.train()(**tokens(), labels=tokens()["input_ids"]).loss
    assert loss.item() == pytest.approx(before.item() + 0.1 * model.orthogonality(), rel=1e-4)
    for step in (1, 2):
        model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
        budget = model.prune(step, 2)
        model.zero_grad()
    assert budget == 16
    alive = torch.stack([layer.stored("default")["E"] != 0 for layer in layers])
    assert alive.shape == (4, 4, 4) and alive.sum() == 16  # parameters, experts, directions; one each on average
    state = model.pruning_state()
    model.load_pruning_state(state)
    expected = logits(model.eval(), tokens())
    ranks = model.compact()
    assert list(ranks.values()) == alive.sum(-1).amax(-1).tolist()
    assert_models_agree(logits(model, tokens()), expected)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(mixture("mixtral"), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_one_dropout_on_a_tokens_input_serves_all_its_experts() -> None:
    config = MSPLoraConfig(tiers=TIERS, target_parameters=EXPERTS[:1], init_weights=False, lora_dropout=0.5)
    model = adapted("mixtral", config).double()
    layer = next(iter(parameter_layers(model).values()))
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts").train()
    x, index = torch.randn(7, 16, dtype=torch.float64), torch.randint(0, 4, (7, 2))
    weights = torch.rand(7, 2, dtype=torch.float64)
    torch.manual_seed(5)
    out = experts(x, index, weights)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    A, B = layer.effective_pair("default")
    base, expected = experts.base_layer, torch.zeros_like(x)
    for token in range(7):
        for expert, weight in zip(index[token], weights[token], strict=True):
            both = base.gate_up_proj[expert] @ x[token] + B[expert] @ (A[expert] @ dropped[token])
            gate, up = both.chunk(2)
            expected[token] += weight * base.down_proj[expert] @ (nn.functional.silu(gate) * up)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_the_kernel_is_looked_for_whatever_mode_asks_first() -> None:
    _has_kernel.cache_clear()
    with torch.inference_mode():
        asked_in_inference = _has_kernel("cpu", torch.float32)
    _has_kernel.cache_clear()
    assert asked_in_inference == _has_kernel("cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_products_leave_empty_groups_out(dtype: torch.dtype) -> None:
    ends = torch.tensor([3, 3, 7, 10], dtype=torch.int32)
    for d_out in (8, 3):  # with the size that torch's kernel wants, and without
        x, W = torch.randn(10, 16, dtype=dtype), torch.randn(4, 16, d_out, dtype=dtype)
        expected = torch.cat([x[a:b] @ W[i] for i, (a, b) in enumerate(pairwise([0, *ends.tolist()]))])
        for product in (grouped, _padded):
            torch.testing.assert_close(product(x, W, ends), expected)


def test_analysis_sees_tiers_by_the_experts_that_share_them(tmp_path: Path) -> None:
    model = adapted("mixtral", MSPLoraConfig(tiers=TIERS, target_parameters=EXPERTS, init_weights=False))
    model.save_pretrained(str(tmp_path))
    for collected in (collect(model), collect(tmp_path)):
        roles = {
            part: [c.role.rpartition(".")[2] for c in collected.of(part) if "gate_up" in c.role]
            for part in collected.parts
        }
        assert roles["global"] == ["gate_up_proj"] and roles["layer"] == 2 * ["gate_up_proj"]
        assert roles["half"] == ["gate_up_proj[0-2]", "gate_up_proj[3]"]
        assert sorted(set(roles["third"])) == ["gate_up_proj[0-1]", "gate_up_proj[2]", "gate_up_proj[3]"]
        assert len(roles["expert"]) == len(roles["update"]) == 8
        stored = {name: number for c in collected.components for name, number in c.tensors.items()}
        assert sum(stored.values()) == count(mixture("mixtral"), model.peft_config["default"])
        layer = parameter_layers(model)["base_model.model.model.layers.1.mlp.experts.gate_up_proj"]
        pair = next(c for c in collected.of("update") if c.role.endswith("gate_up_proj[2]") and c.layers == (1,)).pair
        torch.testing.assert_close(pair.B @ pair.A, update_of_expert(layer, 2).float())
        at = experts.maps(collected)["mlp.experts.gate_up_proj"]
        assert at["norm"].shape == at["shared"].shape == (2, 4)
        assert at["norm"][1, 2] == pytest.approx(float(update_of_expert(layer, 2).norm()), rel=1e-5)
        t = layer.stored("default")
        energies = {}
        for tier in TIERS:
            A, B = t[f"A_{tier['name']}"], t[f"B_{tier['name']}"]
            group = {"third": 1, "half": 0, "expert": 2}.get(tier["name"], ...)
            energies[tier["name"]] = float((B[group] @ A[group]).square().sum()) / tier["r"] ** 2
        # Of the thirds, experts 0 and 1 have one; 2 and 3 have each its own.
        private = energies["third"] + energies["expert"]
        assert at["shared"][1, 2] == pytest.approx(1 - private / sum(energies.values()), rel=1e-5)
        assert len(experts.rows(collected)) == 2 * 2 * 4
        (norms, shares) = figures.expert_maps(collected, "mlp.experts.gate_up_proj")
        assert norms.images[0].get_array().shape == shares.images[0].get_array().shape == (2, 4)
    assert "experts-gate_up_proj" in dict(write.pictures_of(collected))
    assert {line.over for line in sharing.shared(sharing.updates([collected]))} >= {"depth", "expert"}


# What every adapter owes


@every_mixture
def test_fresh_saved_merged_exported(name: str, tmp_path: Path) -> None:
    config = MSPLoraConfig(r=4, target_parameters=EXPERTS, target_modules=["o_proj"], task_type="CAUSAL_LM")
    before = logits(mixture(name), tokens())
    assert torch.equal(logits(adapted(name, config), tokens()), before)
    named = [*EXPERTS, ROUTERS[name]]
    config = MSPLoraConfig(r=4, target_parameters=named, target_modules=["o_proj"], init_weights=False)
    model = adapted(name, config)
    expected = logits(model, tokens())
    assert not torch.allclose(expected, before, rtol=0.1, atol=0.1)
    model.save_pretrained(str(tmp_path / "saved"))
    for low_cpu_mem_usage in (False, True):
        kwargs: Any = {"low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(mixture(name), str(tmp_path / "saved"), **kwargs).eval()
        assert torch.equal(logits(loaded, tokens()), expected)
    export_model(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(mixture(name), str(tmp_path / "plain")).eval()
    assert plain.peft_config["default"].peft_type == "LORA"
    assert_models_agree(logits(plain, tokens()), expected)
    model.merge_adapter()
    assert_models_agree(logits(model, tokens()), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens()), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), before)
    merged = model.merge_and_unload()
    assert_models_agree(logits(merged, tokens()), expected)
    assert merged.state_dict().keys() == mixture(name).state_dict().keys()


@every_method
def test_methods_are_counted_saved_merged_and_exported(method: str, tmp_path: Path) -> None:
    config = METHODS[method](target_parameters=EXPERTS, init_weights=False)
    model = adapted("qwen3_moe", config)
    expected = logits(model, tokens())
    built = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad)
    assert count(mixture("qwen3_moe"), METHODS[method](target_parameters=EXPERTS)) == built
    model.save_pretrained(str(tmp_path / "saved"))
    assert sum(t.numel() for t in load_file(tmp_path / "saved" / "adapter_model.safetensors").values()) == built
    loaded = PeftModel.from_pretrained(mixture("qwen3_moe"), str(tmp_path / "saved")).eval()
    assert torch.equal(logits(loaded, tokens()), expected)
    export_model(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(mixture("qwen3_moe"), str(tmp_path / "plain")).eval()
    assert_models_agree(logits(plain, tokens()), expected)
    assert_models_agree(logits(model.merge_and_unload(), tokens()), expected)


def test_the_number_of_parameters_is_that_of_the_tiers() -> None:
    layers, experts, d, ff, r = 2, 6, 16, 8, 4
    config = MSPLoraConfig(r=r, target_parameters=EXPERTS)
    ranks = r + layers * r // 2 + layers * experts * r // 4  # global, layer, expert
    assert count(mixture("qwen3_moe"), config) == ranks * ((d + 2 * ff) + (ff + d))


def test_experts_that_stay_frozen_are_told(caplog: pytest.LogCaptureFixture) -> None:
    for fields, given in (
        ({"target_modules": "all-linear"}, "target_modules='all-linear'"),
        ({"target_parameters": EXPERTS[:1]}, f"target_parameters={EXPERTS[:1]}"),
    ):
        caplog.clear()
        adapted("qwen3_moe", MSPLoraConfig(tiers=TIERS, **fields))
        (record,) = caplog.records
        assert record.getMessage().startswith(f"{given} leaves ") and "are no linear layers (" in record.getMessage()


def test_two_adapters_on_the_same_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = MSPLoraConfig(r=4, target_parameters=EXPERTS[1:], init_weights=False)
    model = adapted("gpt_oss", first)
    expected = logits(model, tokens())
    caplog.clear()
    model.add_adapter("second", MSPLoraConfig(tiers=TIERS, target_parameters=EXPERTS, init_weights=False))
    assert not caplog.records  # the first adapter's tensors are no experts that stay frozen
    assert torch.equal(logits(model, tokens()), expected)
    model.set_adapter("second")
    second = logits(model, tokens())
    export_model(model, tmp_path / "plain", "second")  # gate_up_proj joined after down_proj
    plain = PeftModel.from_pretrained(mixture("gpt_oss"), str(tmp_path / "plain")).eval()
    assert_models_agree(logits(plain, tokens()), second)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, tokens())
    model.merge_adapter(["default", "second"])
    assert_models_agree(logits(model, tokens()), both)
    model.unmerge_adapter()
    model.set_adapter("second")
    model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, tokens()), expected)


def test_experts_train_beside_a_frozen_router() -> None:
    model = adapted("olmoe", MSPLoraConfig(r=4, target_parameters=EXPERTS, init_weights="gaussian")).train()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "msplora_" not in name]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**tokens(), labels=tokens()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@versions.compiles_experts
def test_a_compiled_mixture_has_no_graph_breaks() -> None:
    tiers = [*TIERS[:1], *TIERS[3:]]
    model = adapted(
        "qwen3_moe", MSPLoraConfig(tiers=tiers, target_parameters=[*EXPERTS, "gate.weight"], init_weights=False)
    )
    block = model.get_submodule("base_model.model.model.layers.0.mlp")
    for dtype in (torch.float32, torch.bfloat16):  # torch's kernel can be compiled in the latter alone
        model.to(dtype).zero_grad()
        x = torch.randn(2, 9, 16, dtype=dtype)
        outputs = [block(x), torch.compile(block, backend="aot_eager", fullgraph=True)(x)]
        gradients = []
        for y in outputs:
            y.float().square().sum().backward()
            gradients.append({name: g.clone() for name, g in factor_gradients(model).items()})
            model.zero_grad()
        assert_models_agree(*outputs)
        assert gradients[0] and gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert_models_agree(gradients[1][name], gradient)


def test_checkpoints_and_bfloat16_give_the_gradients_of_a_plain_run() -> None:
    config = MSPLoraConfig(tiers=TIERS, target_parameters=[*EXPERTS, "gate.weight"], init_weights=False)
    model = adapted("qwen3_moe", config).train()

    def gradients(autocast: bool = False) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**tokens(), labels=tokens()["input_ids"]).loss
        loss.backward()
        return {name: g.clone() for name, g in factor_gradients(model).items()}

    plain, rounded = gradients(), gradients(autocast=True)
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() == rounded.keys()
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient)
        # bfloat16 rounds by up to 2^-9, and may send tokens to other experts.
        assert nn.functional.cosine_similarity(rounded[name].flatten(), gradient.flatten(), dim=0) > 0.9


def test_plan_counts_experts_by_tier() -> None:
    config = MSPLoraConfig(r=4, target_parameters=EXPERTS)
    with torch.device("meta"):
        base = mixture("qwen3_moe")
    planned = plan(base, config, method="msplora", task="instruct", batch=2, length=9)
    assert planned.adapter == count(mixture("qwen3_moe"), config)
    sizes = {(part.part, part.role.rpartition(".")[2]): (part.pairs, part.parameters) for part in planned.parts}
    assert sizes["expert", "down_proj"] == (12, 2 * 6 * (8 + 16))
    assert sizes["global", "gate_up_proj"] == (1, 4 * (16 + 16))
    lora = get_peft_model(mixture("qwen3_moe"), LoraConfig(r=4, target_parameters=EXPERTS, target_modules=[]))
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert next(other.parameters for other in planned.beside if (other.method, other.kind) == ("lora", "r")) == trained
    assert planned.memory is not None and planned.memory.activations


def test_a_router_is_left_alone_unless_it_is_named() -> None:
    assert not routers(adapted("olmoe", MSPLoraConfig(r=4, target_modules="all-linear", target_parameters=EXPERTS)))
    for named in ({"target_modules": ["gate"]}, {"target_modules": ["gate"], "target_parameters": ["gate.weight"]}):
        model = adapted("olmoe", MSPLoraConfig(r=4, **named))
        assert len(routers(model)) == 2
        model.add_adapter("second", MSPLoraConfig(r=2, target_parameters=["gate.weight"]))
        assert [layer.adapters for layer in routers(model).values()] == 2 * [["default", "second"]]


def test_an_adapted_bfloat16_router_is_the_merged_one_to_the_bit() -> None:
    config = MSPLoraConfig(r=4, target_parameters=["gate.weight"], init_weights=False)
    model = adapted("olmoe", config, mixture("olmoe").bfloat16())
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    outputs = {path: layer(x) for path, layer in routers(model).items()}
    sum(output[0].float().square().sum() for output in outputs.values()).backward()
    factors = [p for name, p in model.named_parameters() if "_factors" in name]
    assert factors and all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)
    model.merge_adapter()
    for path, layer in routers(model).items():
        assert layer.merged and layer.base_layer.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
        assert all(torch.equal(a, b) for a, b in zip(layer(x), outputs[path], strict=True))


# What is refused


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            MSPLoraConfig(r=4, target_parameters=["down_proj", "experts.gate"]),
            r"\['experts.gate'\] matches no parameter.*experts\.gate_up_proj, exp",
        ),
        (MSPLoraConfig(r=4, target_parameters=["norm.weight"]), r"RMSNorm, and only.*trained whole when modules_to"),
        (
            MSPLoraConfig(r=4, target_modules=["gate"], lora_dropout=0.1),
            r"lora_dropout=0.1, and 'model.layers.0.mlp.gate' is a router.*no input can be dropped",
        ),
        (
            MSPLoraConfig(tiers=[{"name": "e", "groups": 1, "expert_groups": 9, "r": 1}], target_parameters=EXPERTS),
            r"expert_groups=9 of tier 'e'.*has the experts 0 to 3. Give at most 4",
        ),
        (
            MSPLoraConfig(
                tiers=[{"name": "e", "groups": 1, "expert_groups": 10**12, "r": 1}], target_parameters=EXPERTS
            ),
            r"expert_groups=1000000000000 of tier 'e'.*has the experts 0 to 3. Give at most 4",
        ),
        (
            MSPLoraConfig(
                tiers=[{"name": "e", "groups": 1, "expert_groups": 2}],
                target_parameters=EXPERTS,
                target_modules=["o_proj"],
            ),
            r"every tier has several groups of experts, and '.*o_proj' is none",
        ),
        (LoR2CConfig(r=4, target_parameters=EXPERTS), r"LoR2C makes no low-rank update of weights"),
        (
            AdapterDropConfig(r=4, target_parameters=EXPERTS, target_modules=["o_proj"]),
            r"makes no low-rank update of w",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_change(config: Any, says: str) -> None:
    base = mixture("mixtral")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ConfigError, match=says):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize("groups", [0, [1, 2], [0, 0], "all", 1.5])
def test_groups_of_experts_that_cannot_be(groups: Any) -> None:
    with pytest.raises(ConfigError, match=r'expert_groups=.* of tier \'e\': a number.*or "experts" for one group'):
        MSPLoraConfig(tiers=[{"name": "e", "groups": 1, "expert_groups": groups}])


@pytest.mark.parametrize(("named", "path"), [("gate.weight", r"mlp\.gate"), ("down_proj", r"mlp\.experts")])
def test_offloaded_routers_and_experts_are_refused(named: str, path: str) -> None:
    says = rf"'model\.layers\.0\.{path}' .*is offloaded by accelerate.*Load the model with a dev.*or leave it out"
    config = MSPLoraConfig(r=4, target_parameters=[named])
    with pytest.raises(ConfigError, match=says):
        adapted("olmoe", config, cpu_offload(mixture("olmoe"), torch.device("cpu")))
    later = cpu_offload(adapted("olmoe", config), torch.device("cpu"))
    with pytest.raises(ConfigError, match=says):
        later(**tokens())
    with later.disable_adapter():
        assert torch.equal(logits(later, tokens()), logits(mixture("olmoe"), tokens()))


def test_adapters_that_leave_router_and_experts_alone_take_mixed_batches_beside_those_that_dont() -> None:
    model = adapted("olmoe", MSPLoraConfig(r=4, target_parameters=[*EXPERTS, "gate.weight"], init_weights=False))
    model.add_adapter("attention", MSPLoraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    mixed = logits(model, {**tokens(), "adapter_names": ["attention", "__base__"]})
    model.set_adapter("attention")
    assert_models_agree(mixed[0], logits(model, tokens())[0])
    assert_models_agree(mixed[1], logits(mixture("olmoe"), tokens())[1])


def test_other_refusals() -> None:
    model = adapted("mixtral", MSPLoraConfig(r=4, target_parameters=EXPERTS))
    with pytest.raises(ValueError, match="come sorted by expert, not by sample"):
        model(**tokens(), adapter_names=["default", "default"])
    routed = adapted("mixtral", MSPLoraConfig(r=4, target_modules=["gate"]))
    with pytest.raises(ValueError, match="an adapter of a router, which computes with one weight for all samples"):
        routed(**tokens(), adapter_names=["default", "default"])
    with pytest.raises(ValueError, match="can't be combined with weights"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ConfigError, match=r"train_in_stages with target_parameters needs tiers"):
        MSPLoraConfig(train_in_stages=True, target_parameters=EXPERTS)
    lora = get_peft_model(mixture("mixtral"), LoraConfig(target_parameters=EXPERTS, target_modules=[]))
    with pytest.raises(ConfigError, match=r"have an adapter of another method already \(ParamWrapper\)"):
        get_peft_model(lora.base_model.model, MSPLoraConfig(r=4, target_parameters=EXPERTS))
