"""Adapters in models other than their own, and beside adapters that a model has already: exact, told, or refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ziggurat
from versions import saves_whole, transformers_calls
from ziggurat import ASLoRAConfig, LoR2CConfig, LoRA2Config, MSPLoraConfig, ShareLoRAConfig
from ziggurat.analysis.collect import collect
from ziggurat.analysis.components import UPDATE
from ziggurat.errors import ConfigError

TARGETS = ["q_proj", "v_proj"]
IDS = torch.arange(9)[None]


def llama(layers: int = 4, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 99}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **size)).to(dtype).eval()


def filled(model: nn.Module) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def config_of(kind: Any, **fields: Any) -> Any:
    return kind(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields})


def update(model: Any, layer: int, adapter: str = "default") -> Tensor:
    return model.get_base_model().model.layers[layer].self_attn.v_proj.get_delta_weight(adapter)


ONE_LAYER_SCALED = {"layers.3.self_attn.v_proj": 160}


@pytest.mark.parametrize(
    "kind", [MSPLoraConfig, LoRA2Config, ShareLoRAConfig, pytest.param(ASLoRAConfig, marks=saves_whole)]
)
def test_a_sum_is_exact_where_one_layer_has_a_scale_of_its_own(kind: Any) -> None:
    model = filled(get_peft_model(llama(), config_of(kind, alpha_pattern=ONE_LAYER_SCALED)))
    model.add_adapter("other", config_of(kind))
    model.set_adapter("other")
    filled(model)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "sum")
    for layer in range(4):
        expected = 0.5 * update(model, layer) + 0.25 * update(model, layer, "other")
        assert torch.allclose(update(model, layer, "sum"), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [MSPLoraConfig, ShareLoRAConfig])
def test_the_analysis_knows_the_scale_that_one_layer_has(kind: Any) -> None:
    share = {"share": "AB"} if kind is ShareLoRAConfig else {}
    model = filled(get_peft_model(llama(), config_of(kind, alpha_pattern=ONE_LAYER_SCALED, **share)))
    of_parts: dict[int, float] = {}
    for component in collect(model).components:
        if component.part != UPDATE and component.role.endswith("v_proj") and component.part in ("global", "sharelora"):
            for layer in component.layers:
                of_parts[layer] = float((component.B @ component.A).norm())
    scales = [of_parts[layer] / of_parts[0] for layer in (1, 3)] if kind is MSPLoraConfig else [1.0, 10.0]
    assert set(of_parts) == {0, 1, 2, 3} and scales == pytest.approx([1.0, 10.0], rel=1e-4)
    if kind is ShareLoRAConfig:
        for layer, norm in of_parts.items():
            assert norm == pytest.approx(float(update(model, layer).norm()), rel=1e-4)


LAYERS = [0, 1, 2, 3]
TOLD = "trained in 4 layers 'layers', and this model has {depth}: MSPLoRA shares tensors by depth"


@pytest.mark.parametrize("depth", [3, 6])
def test_a_stack_of_another_depth_gets_no_other_updates(
    depth: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(get_peft_model(llama(), config_of(MSPLoraConfig, layers_to_transform=LAYERS))).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=TOLD.format(depth=depth)):
        PeftModel.from_pretrained(llama(depth), str(tmp_path))
    if depth == 3:  # a fresh adapter of the same config is its own
        fresh = get_peft_model(llama(depth), MSPLoraConfig.from_pretrained(str(tmp_path)))
        assert fresh.peft_config["default"].sites["layers"]["layers"] == 3
    model = filled(get_peft_model(llama(), config_of(LoRA2Config, layers_to_transform=LAYERS)))
    model.save_pretrained(tmp_path / "own")
    with caplog.at_level(logging.WARNING):
        again = PeftModel.from_pretrained(llama(depth), str(tmp_path / "own"))
    assert all(torch.equal(update(again, layer), update(model, layer)) for layer in range(3))
    told = "this model lacks 2 of the 8 places that the adapter was trained at"
    assert (told in caplog.text) == (depth == 3)


@transformers_calls
@pytest.mark.parametrize("depth", [3, 6])
def test_nor_by_the_load_adapter_of_transformers(depth: int, tmp_path: Path) -> None:
    filled(get_peft_model(llama(), config_of(MSPLoraConfig, layers_to_transform=LAYERS))).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=TOLD.format(depth=depth)):
        llama(depth).load_adapter(str(tmp_path))


@transformers_calls
def test_an_adapter_that_lay_inside_another_loads_alone(tmp_path: Path) -> None:
    model: Any = llama()
    model.add_adapter(config_of(LoRA2Config), "inner")
    model.add_adapter(config_of(MSPLoraConfig), "outer")
    model.set_adapter("inner")
    filled(model).save_pretrained(tmp_path)
    alone: Any = llama()
    alone.load_adapter(str(tmp_path), "inner")
    assert torch.equal(alone(IDS).logits, model(IDS).logits)
    assert not torch.equal(alone(IDS).logits, llama()(IDS).logits)


@transformers_calls
def test_lora_inside_another_method_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "inner")
    with caplog.at_level(logging.WARNING):
        model.add_adapter(config_of(MSPLoraConfig), "outer")
    assert (
        "4 of the linear layers (model.layers.0.self_attn.q_proj, ...) have an adapter already (Linear)" in caplog.text
    )


@pytest.mark.parametrize("kind", [MSPLoraConfig, LoRA2Config])
def test_a_sum_in_a_model_of_16_bits_is_not_rounded_to_them(kind: Any) -> None:
    model = filled(get_peft_model(llama(dtype=torch.bfloat16), config_of(kind)))
    model.add_adapter("other", config_of(kind))
    model.add_weighted_adapter(["default", "other"], [0.7, 0.1], "sum")
    expected = 0.7 * update(model, 2) + 0.1 * update(model, 2, "other")
    assert expected.dtype == torch.float32
    assert float((update(model, 2, "sum") - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("weights", "rank", "told"),
    [
        ([0.5, float("nan")], None, "nan is no finite number"),
        ([0.5, 0.5], -3, "svd_rank=-3: a whole number above 0"),
        ([0.5, 0.5], 2.5, "svd_rank=2.5: a whole number above 0"),
        ([0.5, 0.5], 0, "svd_rank=0: a whole number above 0"),
    ],
)
def test_weights_and_ranks_of_a_sum_that_are_none(weights: list[float], rank: Any, told: str) -> None:
    model = filled(get_peft_model(llama(1), config_of(MSPLoraConfig)))
    model.add_adapter("other", config_of(MSPLoraConfig))
    with pytest.raises(ValueError, match=told):
        model.add_weighted_adapter(["default", "other"], weights, "sum", combination_type="svd", svd_rank=rank)
    assert set(model.peft_config) == {"default", "other"}


@pytest.mark.parametrize("name", ["layers.1", "model"])
def test_a_layer_that_is_trained_whole_gets_no_path(name: str) -> None:
    base = llama()
    with pytest.raises(ConfigError, match=f"modules_to_save: '{name}' trains layer 'model.layers.[01]' whole"):
        get_peft_model(base, LoR2CConfig(r=4, modules_to_save=[name], task_type="CAUSAL_LM"))
    assert not any("lor2c" in key for key in base.state_dict())


@pytest.mark.parametrize("arguments", [(25, 20), (-1, 20), (0, 0), (3.0, 20), ("1", 2), (True, 2), (20, 3)])
@pytest.mark.parametrize(
    "config",
    [
        config_of(MSPLoraConfig, train_in_stages=True),
        pytest.param(config_of(ASLoRAConfig, groups=2), marks=saves_whole),
        pytest.param(LoR2CConfig(r=4, merges=1, task_type="CAUSAL_LM"), marks=saves_whole),
    ],
    ids=["MSPLoRA", "ASLoRA", "LoR2C"],
)
def test_a_step_outside_a_run(config: Any, arguments: tuple[Any, Any]) -> None:
    model = get_peft_model(llama(), config)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=rf"step {arguments[0]!r} of {arguments[1]!r}: whole numbers are needed"):
        ziggurat.step(model, *arguments)
    if isinstance(config, LoR2CConfig):
        with pytest.raises(ConfigError, match="whole numbers are needed"):
            model.base_model.restructure(*arguments)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_a_stage_outside_a_run_and_an_unknown_adapter() -> None:
    tuner = get_peft_model(llama(), config_of(MSPLoraConfig, train_in_stages=True)).base_model
    for progress in (-3, 7, "half", float("nan")):
        with pytest.raises(ConfigError, match="the share of the run, 0 to 1, is needed"):
            tuner.set_stage(progress)
    with pytest.raises(ValueError, match="Adapter zz does not exist"):
        tuner.end_stages("zz")


@pytest.mark.parametrize("rows", [[200], [-1], [1.5], [True], "a", {"embed_tokens": [200]}, {1: [1]}])
def test_rows_that_an_embedding_lacks(rows: Any) -> None:
    base = llama(1)
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        get_peft_model(base, config_of(MSPLoraConfig, trainable_token_indices=rows))
    assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")
    get_peft_model(base, config_of(MSPLoraConfig, trainable_token_indices=[0, 98]))
    get_peft_model(llama(1), config_of(MSPLoraConfig, trainable_token_indices=[]))  # as an earlier version took it


def test_rows_beside_modules_without_a_weight() -> None:
    """A norm that learns nothing, and the bank of an earlier adapter, have a weight of None."""
    base = llama(1)
    base.model.norm = nn.LayerNorm(32, elementwise_affine=False)
    model = get_peft_model(base, config_of(MSPLoraConfig))
    model.add_adapter("rows", config_of(MSPLoraConfig, trainable_token_indices=[0, 98]))
    assert set(model.peft_config) == {"default", "rows"}


def test_names_that_match_nothing_and_texts_that_are_no_paths(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"Text is a regular expression for whole paths: give a list, .*\['q_proj'\]"):
        get_peft_model(llama(1), config_of(MSPLoraConfig, target_modules="q_proj"))
    with pytest.raises(ValueError, match="layers_to_transform, layers_pattern or exclude_modules bar them"):
        get_peft_model(llama(1), config_of(MSPLoraConfig, layers_to_transform=[9]))
    with caplog.at_level(logging.WARNING):
        get_peft_model(llama(1), config_of(MSPLoraConfig, target_modules=["q_proj", "nope"]))
    assert "target_modules names nope, and no module of this model is called so" in caplog.text
    caplog.clear()
    for fields in ({"target_modules": "all-linear"}, {"target_modules": ["q_proj", "o_proj"]}):
        get_peft_model(llama(1), config_of(MSPLoraConfig, exclude_modules=["o_proj"], **fields))
    assert "is called so" not in caplog.text
