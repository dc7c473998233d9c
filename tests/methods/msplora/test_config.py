"""The settings of a pyramid and its refusals, which change nothing."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import versions
from methods_table import logits
from plain_models import WIDTH
from tolerance import assert_sums_agree
from ziggurat import MSPLoraConfig
from ziggurat.analysis import collect
from ziggurat.errors import AnatomyError, ConfigError
from ziggurat.host.count import count
from ziggurat.host.tensors import tier_of
from zoo import ZOO


def pairs_of(model: nn.Module) -> list[str]:
    """Tier and group of every pair of the pyramid, in the order of their creation."""
    leaves = model.bank_msplora.factors("default").names()
    return [f"{tier_of(leaf)}{leaf.split(':')[3]}" for leaf in leaves if leaf.rpartition(":")[2].startswith("A_")]


def ranks(**fields: object) -> list[int]:
    return [tier.r for tier in MSPLoraConfig(**fields).pyramid()]


def test_ranks() -> None:
    assert ranks() == [8, 4, 2]
    assert ranks(r=64) == [64, 32, 16]
    assert ranks(r=9, rank_decay=3) == [9, 3, 1]
    assert ranks(r=5, rank_decay=1) == [5, 5, 5]
    assert ranks(ranks=[3, 7, 1]) == [3, 7, 1]
    assert ranks(r=2) == [2, 1, 1]
    assert [tier.scale for tier in MSPLoraConfig(r=8, lora_alpha=16).pyramid()] == [2, 4, 8]


def test_even_scales() -> None:
    def scales(**fields: object) -> list[float]:
        return [tier.scale for tier in MSPLoraConfig(even_scales=True, **fields).pyramid()]

    assert scales(r=8, lora_alpha=16) == [2, 2, 2]
    assert scales(ranks=[3, 7, 1], lora_alpha=6) == pytest.approx([2, 2, 2])
    assert scales(r=16, lora_alpha=8, use_rslora=True) == pytest.approx([2, 2, 2])
    tiers = [{"name": "all", "groups": 1, "r": 6}, {"name": "own", "groups": "layers", "r": 1}]
    assert scales(r=3, lora_alpha=9, tiers=tiers) == pytest.approx([1.5, 1.5])


def test_ranks_by_role() -> None:
    pattern = {"query": [3, 2, 1], "self.value": [1, 1, 4]}
    config = MSPLoraConfig(r=8, lora_alpha=16, rank_pattern=pattern, target_modules=["query", "value", "key"])
    model = get_peft_model(ZOO["bert"].build(), config)
    pairs = {n: m.effective_pair("default") for n, m in model.named_modules() if hasattr(m, "effective_pair")}
    wanted = {"query": 6, "value": 6, "key": 14}
    assert pairs and all(pair.A.shape[0] == wanted[name.rpartition(".")[2]] for name, pair in pairs.items())
    scales = {role: [tier.scale for tier in config.pyramid(f"attention.self.{role}")] for role in wanted}
    assert scales == {"query": [16 / 3, 8, 16], "value": [16, 16, 4], "key": [2, 4, 8]}
    assert adapter_numbers(ZOO["bert"].build(), config) == sum(
        p.numel() for n, p in model.named_parameters() if "msplora_" in n
    )
    config.rank_pattern["value"] = [9, 9, 9]
    assert [tier.r for tier in config.pyramid("attention.self.value")] == [1, 1, 4]  # the longest key that fits
    config.even_scales = True
    assert [tier.scale for tier in config.pyramid("attention.self.value")] == [2, 2, 2]


def _at(role: str) -> str:
    return f"base_model.model.bert.encoder.layer.0.attention.self.{role}"


def adapter_numbers(model: nn.Module, config: MSPLoraConfig) -> int:
    return count(model, config)


def test_ranks_by_role_are_read_back(tmp_path: Path) -> None:
    config = MSPLoraConfig(
        r=4, rank_pattern={"value": [1, 2, 3]}, target_modules=["query", "value"], init_weights=False
    )
    model = get_peft_model(ZOO["bert"].build(), config).eval()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path)).eval()
    assert torch.equal(logits(again, ZOO["bert"].inputs()), logits(model, ZOO["bert"].inputs()))
    ranks = {(c.part, c.role.rpartition(".")[2]): c.rank for c in collect(tmp_path).components if c.stored}
    assert {part: ranks[part, "value"] for part in ("global", "mid", "layer")} == {"global": 1, "mid": 2, "layer": 3}
    for component in collect(tmp_path).components:
        if not component.stored:  # the update that was read is the one that acts
            path = f"base_model.model.{component.stack}.{component.layers[0]}.{component.role}"
            assert_sums_agree(component.B @ component.A, model.get_submodule(path).get_delta_weight("default"), WIDTH)


def test_more_or_fewer_tiers() -> None:
    tiers = [
        {"name": "all", "groups": 1, "r": 6},
        {"name": "halves", "groups": 2},
        {"name": "thirds", "groups": [0, 2, 3], "lora_alpha": 1},
        {"name": "own", "groups": "layers", "r": 1},
    ]
    model = get_peft_model(ZOO["bert"].build(), MSPLoraConfig(r=3, lora_alpha=9, tiers=tiers, target_modules=["query"]))
    names = pairs_of(model)
    assert sorted(names) == [
        "all0",
        "halves0",
        "halves1",
        "own0",
        "own1",
        "own2",
        "own3",
        "thirds0",
        "thirds1",
        "thirds2",
    ]
    layer = model.get_submodule("base_model.model.bert.encoder.layer.2.attention.self.query")
    assert list(layer.leaves["default"]) == [f"{half}_{t}" for t in ("all", "halves", "thirds", "own") for half in "AB"]
    groups = [leaf.split(":")[3] for _, leaf in layer.leaves["default"].values()][::2]
    scales = [tier.scale for tier in layer.configs["default"].pyramid(layer.sites["default"].role)]
    assert list(zip(groups, scales, strict=True)) == [("0", 1.5), ("1", 3.0), ("1", 1 / 3), ("2", 9.0)]


def test_fewer_layers_than_the_default_groups() -> None:
    """The default of three groups becomes one a layer on a shallower stack; a number that was given doesn't."""
    base = ZOO["albert"].build()
    model = get_peft_model(base, MSPLoraConfig(r=4, target_modules=["query"]))
    assert pairs_of(model) == ["global0", "mid0", "layer0"]


def test_some_layers_only() -> None:
    model = get_peft_model(
        ZOO["llama"].build(), MSPLoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0, 3])
    )
    names = pairs_of(model)
    assert names == ["global0", "mid0", "layer0", "mid2", "layer3"]


@pytest.mark.parametrize(
    ("targets", "number"), [("all-linear", 28), (r".*\.(q|k)_proj", 8), (["q_proj"], 4), (["self_attn.v_proj"], 4)]
)
def test_targets(targets: list[str] | str, number: int) -> None:
    model = get_peft_model(ZOO["llama"].build(), MSPLoraConfig(r=4, target_modules=targets))
    assert len(model.targeted_module_names) == number


@versions.saves_whole
def test_excluded_modules_and_biases() -> None:
    config = MSPLoraConfig(r=4, target_modules=["query", "value"], exclude_modules=["value"], bias="msplora_only")
    model = get_peft_model(ZOO["bert"].build(), config)
    assert all(name.endswith("query") for name in model.targeted_module_names)
    biases = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert biases
    assert all(n.endswith("query.base_layer.bias") for n in biases)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 6}, "r=6 with rank_decay=2.*Use r=4 or 8"),
        ({"r": 0}, "r=0: the rank must be a whole number"),
        ({"r": 8.0}, "r=8.0"),
        ({"rank_decay": 0}, "rank_decay"),
        ({"ranks": [8, 4]}, "three ranks"),
        ({"ranks": [8, 4, 0]}, "rank 0 of tier 'layer'"),
        ({"num_groups": 0}, "groups=0 of tier 'mid'"),
        ({"num_groups": 3, "group_starts": [0, 2]}, "give one of them"),
        ({"group_starts": [1, 2]}, "from 0 and rising"),
        ({"group_starts": [0, 3, 2]}, "from 0 and rising"),
        ({"tiers": []}, "at least one tier"),
        ({"tiers": [{"name": "a", "group": 1}]}, "unknown field 'group'"),
        ({"tiers": [{"name": "a"}]}, "name and groups are needed"),
        ({"tiers": [{"name": "a1", "groups": 1}]}, "tier name 'a1'"),
        ({"tiers": [{"name": "a.b", "groups": 1}]}, "tier name 'a.b'"),
        ({"tiers": [{"name": "a", "groups": 1}] * 2}, "used once"),
        ({"tiers": [{"name": "a", "groups": "all"}]}, "groups='all'"),
        ({"tiers": [{"name": "a", "groups": 1}], "num_groups": 2}, "can't be given beside it"),
        ({"tiers": [{"name": f"t{'x' * i}", "groups": 1} for i in range(100)]}, "at most 64"),
        ({"rank_pattern": ["value"]}, "roles with the ranks"),
        ({"rank_pattern": {"value": [1, 2]}}, "3 whole numbers of at least 1"),
        ({"rank_pattern": {"value": [1, 2, 0]}}, "3 whole numbers of at least 1"),
        ({"rank_pattern": {f"role{n}": [1, 1, 1] for n in range(1001)}}, "at most 1,000"),
        ({"rank_pattern": {"value": 8}}, "3 whole numbers of at least 1"),
        ({"even_scales": "yes"}, "even_scales='yes'"),
        ({"even_scales": True, "ranks": [0, 4, 2]}, "rank 0 of tier 'global'"),
        ({"even_scales": True, "tiers": [{"name": "a", "groups": 1, "lora_alpha": 8}]}, "leave lora_alpha out"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: a finite number above 0"),
        ({"lora_alpha": 0}, "above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"init_weights": "kaiming"}, "init_weights='kaiming'"),
        ({"target_modules": "(", "r": 4}, "not a regular expression"),
        ({"target_modules": "x", "layers_to_transform": [0]}, "cannot be used when `target_modules` is a str"),
    ],
)
def test_impossible_configs(fields: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MSPLoraConfig(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "error", "says"),
    [
        (
            "bert",
            {"num_groups": 5},
            ConfigError,
            "num_groups=5, but the stack 'bert.encoder.layer' has 4 layers: at most 4",
        ),
        (
            "bert",
            {"num_groups": 10**12},
            ConfigError,
            "num_groups=1000000000000, but the stack .* has 4 layers: at most 4",
        ),
        ("bert", {"group_starts": [0, 4]}, ConfigError, "would begin at layer 4"),
        ("bert", {"r": 32}, ConfigError, "rank 32 of tier 'global' is above the matrix.*maps 16 to 16"),
        ("bert", {"rank_pattern": {"valeu": [1, 1, 1]}}, ConfigError, "'valeu'.*no adapted linear layer has this role"),
        ("bert", {"rank_pattern": {"value": [4, 32, 1]}}, ConfigError, "rank 32 of tier 'mid' is above the matrix"),
        ("bert", {"target_modules": ["LayerNorm"]}, ConfigError, "is a LayerNorm, which is not supported"),
        ("no_stack", {"num_groups": 2}, AnatomyError, "no stack of layers.*layers_pattern"),
        ("bert", {"target_modules": ["query"], "layers_pattern": "blocks"}, AnatomyError, "matches no list of layers"),
    ],
)
def test_what_a_model_refuses(name: str, fields: dict, error: type[Exception], says: str) -> None:
    base = ZOO[name].build()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(error, match=says):
        get_peft_model(base, MSPLoraConfig(**{"r": 4, "target_modules": ZOO[name].targets, **fields}))
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())


def test_a_refused_second_adapter_leaves_the_first(tmp_path: Path) -> None:
    model = get_peft_model(ZOO["bert"].build(), MSPLoraConfig(r=4, target_modules=["query"]))
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match="num_groups=9"):
        model.add_adapter("second", MSPLoraConfig(r=4, target_modules=["query"], num_groups=9))
    assert list(model.peft_config) == ["default"]
    assert [n for n, _ in model.named_parameters()] == names
    model.add_adapter("third", MSPLoraConfig(r=8, target_modules=["value"]))


def test_weighted_sums_of_even_scales_are_exact() -> None:
    def config() -> MSPLoraConfig:
        return MSPLoraConfig(r=4, lora_alpha=8, even_scales=True, target_modules=["query"], init_weights=False)

    model = get_peft_model(ZOO["bert"].build(), config())
    model.add_adapter("other", config())
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    linear = model.get_submodule(_at("query"))
    wanted = 0.5 * linear.get_delta_weight("default") + 2.0 * linear.get_delta_weight("other")
    assert_sums_agree(linear.get_delta_weight("sum"), wanted, WIDTH)


@pytest.mark.parametrize(
    "fields",
    [{"num_groups": 2}, {"r": 8, "target_modules": ["query", "value"]}, {"rank_pattern": {"query": [1, 2, 3]}}],
)
def test_sums_of_different_pyramids_are_exact_and_share_nothing(fields: dict) -> None:
    plain = {"r": 4, "target_modules": ["query"], "init_weights": False}
    model = get_peft_model(ZOO["bert"].build(), MSPLoraConfig(**plain))
    model.add_adapter("other", MSPLoraConfig(**{**plain, **fields}))
    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "sum")
    linear = model.get_submodule(_at("query"))
    wanted = linear.get_delta_weight("default") - 0.5 * linear.get_delta_weight("other")
    assert_sums_agree(linear.get_delta_weight("sum"), wanted, WIDTH)
    if "target_modules" in fields:
        value = model.get_submodule(_at("value"))
        assert_sums_agree(value.get_delta_weight("sum"), -0.5 * value.get_delta_weight("other"), WIDTH)
    assert not any(".sum." in name for name, _ in model.named_parameters() if "bank_msplora" in name)


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    tiers = [{"name": "a", "groups": [0, 2]}, {"name": "b", "groups": "layers", "r": 1}]
    config = MSPLoraConfig(r=4, tiers=tiers, even_scales=True, target_modules=["q"])
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MSPLORA"
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, MSPLoraConfig)
    assert loaded.pyramid() == config.pyramid()


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    model = get_peft_model(ZOO["bert"].build(), MSPLoraConfig(r=4))
    model.save_pretrained(str(tmp_path))
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="a pickle, which can run code"):
        PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path))
