"""The duties of every method to a PEFT user, on an encoder, two decoders, a model of two stacks and a plain one."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import versions
from methods_table import METHODS, Method, logits, zoo_config
from plain_models import WIDTH
from tolerance import assert_models_agree, assert_sums_agree
from ziggurat.host.method_layer import MethodLayer
from ziggurat.lowrank.pair import delta
from zoo import ZOO

MODELS = ["bert", "gpt2", "llama", "t5", "plain_list"]
#: Two stacks, and a model that isn't transformers'.
KIT_MODELS = ["t5", "plain_list"]


def on_models(which: Callable[[Method], bool]) -> pytest.MarkDecorator:
    """The methods of which `which` is true, each on its models."""
    pairs = [
        (name, model) for model in MODELS for name, row in METHODS.items()
        if which(row) and (model in KIT_MODELS or not row.kit)
    ]  # fmt: skip
    return pytest.mark.parametrize(("method", "model"), pairs)


every_method = pytest.mark.parametrize("method", METHODS)
merging = pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.merges])
combining = pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.combines])
targeting = pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.takes_targets])
every_method_on_models = on_models(lambda row: True)


def own_parameters(model: nn.Module, method: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if METHODS[method].prefix in n}


def active(method: str, model: str, seed: int = 0) -> tuple[PeftModel, dict]:
    """A model with an adapter that changes its output, and inputs."""
    torch.manual_seed(seed)
    return get_peft_model(ZOO[model].build(), zoo_config(method, model, init_weights=False)).eval(), ZOO[model].inputs()


@every_method_on_models
def test_a_fresh_adapter_changes_nothing(method: str, model: str) -> None:
    base, inputs = ZOO[model].build(), ZOO[model].inputs()
    before = logits(base, inputs)
    adapted = get_peft_model(base, zoo_config(method, model)).eval()
    assert torch.equal(logits(adapted, inputs), before)


@every_method_on_models
def test_an_adapter_reloads_bitwise(method: str, model: str, tmp_path: Path) -> None:
    adapted, inputs = active(method, model)
    expected = logits(adapted, inputs)
    assert not torch.equal(expected, logits(ZOO[model].build(), inputs))
    adapted.save_pretrained(str(tmp_path))
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            ZOO[model].build(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(loaded, inputs), expected)


@every_method_on_models
def test_the_file_holds_each_number_once(method: str, model: str, tmp_path: Path) -> None:
    adapted, _ = active(method, model)
    adapted.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    stored = sum(t.numel() for n, t in tensors.items() if METHODS[method].prefix in n)
    frozen = [buffer for name, buffer in adapted.named_buffers() if METHODS[method].prefix in name]
    assert stored == sum(tensor.numel() for tensor in [*own_parameters(adapted, method).values(), *frozen])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@every_method
def test_a_config_shows_its_fields_and_is_equal_by_them(method: str) -> None:
    config, other = zoo_config(method, "llama"), zoo_config(method, "llama")
    shown = [item.name for item in dataclasses.fields(config) if item.repr]
    assert repr(config).startswith(f"{type(config).__name__}(")
    assert all(f"{name}={getattr(config, name)!r}" in repr(config) for name in shown)
    assert config == other
    assert config == copy.copy(config)
    assert config != dataclasses.asdict(config)
    for name in ("lora_alpha", "target_modules"):
        changed = copy.copy(other)
        setattr(changed, name, None if getattr(other, name) is not None else ["q_proj"])
        assert config != changed
    config.lora_dropout = math.nan  # fields are equal if they are one object, as those of every dataclass
    assert config == copy.copy(config)
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


@every_method
def test_the_model_card_says_how_to_load(method: str, tmp_path: Path) -> None:
    adapted, _ = active(method, "bert")
    for _ in range(2):
        adapted.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert card.count("import ziggurat") == 1
    assert card.count("@article") + card.count("@misc") == 1
    for task, says in (
        (None, "AutoModel  # or"),
        (TaskType.SEQ_CLS, "ForSequenceClassification\n"),
        ("SEQ_CLS", "els=2)"),
    ):
        config = adapted.peft_config["default"]
        config.task_type = task
        config.save_pretrained(str(tmp_path))
        snippet = (tmp_path / "README.md").read_text().partition("```python")[2].partition("```")[0]
        compile(snippet, "README.md", "exec")
        # Whatever the folder was called while it was written, the reader has it under a name of their own.
        assert says in snippet and tmp_path.name not in snippet
    config.auto_mapping = {"base_model_class": "MeanPooledClassifier", "parent_library": "ziggurat.training.heads"}
    config.save_pretrained(str(tmp_path))
    assert 'load_adapter_model("path/to/this/folder").model' in (tmp_path / "README.md").read_text()


@versions.transformers_calls
@every_method
def test_transformers_own_calls(method: str, tmp_path: Path) -> None:
    adapted, inputs = active(method, "llama")
    expected = logits(adapted, inputs)
    adapted.save_pretrained(str(tmp_path))
    model = ZOO["llama"].build()
    bare = logits(model, inputs)
    model.load_adapter(str(tmp_path), adapter_name="first")
    assert torch.equal(logits(model, inputs), expected)
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), bare)
    model.enable_adapters()
    model.add_adapter(zoo_config(method, "llama"), "second")
    model.set_adapter("second")
    assert torch.equal(logits(model, inputs), bare)
    model.set_adapter("first")
    assert torch.equal(logits(model, inputs), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), expected)


@every_method
@pytest.mark.parametrize(
    ("model", "auto", "fields"),
    [("bert", AutoPeftModelForSequenceClassification, {"num_labels": 3}), ("llama", AutoPeftModelForCausalLM, {})],
)
def test_pefts_auto_classes(method: str, model: str, auto: Any, fields: dict[str, int], tmp_path: Path) -> None:
    ZOO[model].build().save_pretrained(str(tmp_path / "base"))
    base = auto._target_class.from_pretrained(str(tmp_path / "base"))
    adapted, inputs = get_peft_model(base, zoo_config(method, model, init_weights=False)).eval(), ZOO[model].inputs()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    loaded = auto.from_pretrained(str(tmp_path / "adapter"), **fields).eval()
    assert torch.equal(logits(loaded, inputs), logits(adapted, inputs))


@versions.transformers_calls
@every_method
def test_adapters_saved_by_transformers_load_in_peft(method: str, tmp_path: Path) -> None:
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs()
    model.add_adapter(zoo_config(method, "llama", init_weights=False))
    expected = logits(model.eval(), inputs)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(ZOO["llama"].build(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, inputs), expected)


@every_method_on_models
def test_injection_without_a_peft_model(method: str, model: str) -> None:
    adapted, inputs = active(method, model)
    for given in (None, get_peft_model_state_dict(adapted)):  # diffusers hands PEFT the tensors, too
        torch.manual_seed(0)
        config = zoo_config(method, model, init_weights=False)
        base = inject_adapter_in_model(config, ZOO[model].build(), state_dict=given).eval()
        assert torch.equal(logits(base, inputs), logits(adapted, inputs))


@every_method_on_models
def test_several_adapters_stay_apart(method: str, model: str, tmp_path: Path) -> None:
    adapted, inputs = active(method, model)
    first = logits(adapted, inputs)
    adapted.save_pretrained(str(tmp_path))
    adapted.add_adapter("second", zoo_config(method, model, init_weights=False))
    assert torch.equal(logits(adapted, inputs), first)
    adapted.load_adapter(str(tmp_path), "third")
    adapted.set_adapter("second")
    second = logits(adapted, inputs)
    assert not torch.equal(second, first)
    adapted.set_adapter("third")
    assert torch.equal(logits(adapted, inputs), first)
    adapted.delete_adapter("default")
    adapted.set_adapter("second")
    assert torch.equal(logits(adapted, inputs), second)
    assert not any(".default" in name for name in own_parameters(adapted, method))
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): default"):
        adapted(**inputs, adapter_names=["default"] * len(next(iter(inputs.values()))))


@every_method
def test_only_the_active_adapter_trains(method: str) -> None:
    adapted, _ = active(method, "bert")
    adapted.add_adapter("second", zoo_config(method, "bert"))

    def training() -> set[str]:
        return {n.split(".")[-2] for n, p in own_parameters(adapted, method).items() if p.requires_grad} & {
            "default",
            "second",
        } or {n.split(".")[-1] for n, p in own_parameters(adapted, method).items() if p.requires_grad}

    assert training() == {"default"}
    adapted.set_adapter("second")
    assert training() == {"second"}
    backbone = [n for n, p in adapted.named_parameters() if p.requires_grad and METHODS[method].prefix not in n]
    assert all("modules_to_save.second" in name for name in backbone)


@every_method_on_models
def test_disabling_gives_the_base_model(method: str, model: str) -> None:
    adapted, inputs = active(method, model)
    expected = logits(adapted, inputs)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, inputs), logits(ZOO[model].build(), inputs))
    assert torch.equal(logits(adapted, inputs), expected)


@every_method_on_models
def test_a_copy_shares_nothing_with_the_original(method: str, model: str) -> None:
    adapted, inputs = active(method, model)
    expected = logits(adapted, inputs)
    twin = copy.deepcopy(adapted)
    assert torch.equal(logits(twin, inputs), expected)
    with torch.no_grad():
        for parameter in own_parameters(twin, method).values():
            parameter.add_(1.0)
    assert not torch.equal(logits(twin, inputs), expected)
    assert torch.equal(logits(adapted, inputs), expected)


@every_method_on_models
def test_unload_gives_the_base_model_back(method: str, model: str) -> None:
    adapted, inputs = active(method, model)
    bare = adapted.unload()
    assert torch.equal(logits(bare, inputs), logits(ZOO[model].build(), inputs))
    assert not any(isinstance(module, BaseTunerLayer) for module in bare.modules())
    assert list(bare.state_dict()) == list(ZOO[model].build().state_dict())


@every_method_on_models
def test_status_is_regular(method: str, model: str) -> None:
    adapted, _ = active(method, model)
    status = adapted.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True}
    assert status.merged_adapters == []
    assert status.peft_types == {"default": METHODS[method].prefix.removesuffix("_").upper()}
    assert status.trainable_params == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert all(layer.enabled for layer in adapted.get_layer_status())


def status_of_merged_lora(model: str) -> list[str] | str:
    """What PEFT reports of its own LoRA: a head that is saved whole never counts as merged."""
    task = None if ZOO[model].task_type == "SEQ_2_SEQ_LM" else ZOO[model].task_type  # which some PEFTs can't build
    config = LoraConfig(target_modules=ZOO[model].targets, task_type=task)
    lora = get_peft_model(ZOO[model].build(), config)
    lora.merge_adapter()
    return lora.get_model_status().merged_adapters


@on_models(lambda row: row.merges)
def test_merging_keeps_the_output(method: str, model: str) -> None:
    adapted, inputs = active(method, model)
    expected = logits(adapted, inputs)
    adapted.merge_adapter(safe_merge=True)
    assert adapted.get_model_status().merged_adapters == status_of_merged_lora(model)
    assert_models_agree(logits(adapted, inputs), expected, sum(ZOO[model].stacks.values()))
    adapted.unmerge_adapter()
    assert adapted.get_model_status().merged_adapters == []
    assert_models_agree(logits(adapted, inputs), expected, sum(ZOO[model].stacks.values()))
    merged = adapted.merge_and_unload()
    assert_models_agree(logits(merged, inputs), expected, sum(ZOO[model].stacks.values()))
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert list(merged.state_dict()) == list(ZOO[model].build().state_dict())


@merging
def test_merging_is_exact_in_float64(method: str) -> None:
    adapted, inputs = active(method, "llama")
    adapted = adapted.double()
    expected = logits(adapted, inputs)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), inputs), expected, rtol=1e-10, atol=1e-10)


@merging
def test_a_broken_adapter_is_not_merged(method: str) -> None:
    adapted, _ = active(method, "bert")
    with torch.no_grad():
        for parameter in own_parameters(adapted, method).values():
            parameter.fill_(float("nan"))
    before = {n: p.clone() for n, p in adapted.named_parameters() if "base_layer" in n}
    with pytest.raises(ValueError, match="NaNs detected"):
        adapted.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[n]) for n, p in adapted.named_parameters() if "base_layer" in n)


@every_method
def test_each_sample_with_its_own_adapter(method: str) -> None:
    adapted, inputs = active(method, "bert")
    adapted.add_adapter("second", zoo_config(method, "bert", init_weights=False))
    rows = {}
    for name in ("default", "second"):
        adapted.set_adapter(name)
        rows[name] = logits(adapted, inputs)
    with adapted.disable_adapter():
        rows["__base__"] = logits(adapted, inputs)
    for names in (["default", "second"], ["second", "__base__"], ["__base__", "__base__"]):
        mixed = logits(adapted, {**inputs, "adapter_names": names})
        expected = torch.stack([rows[name][i] for i, name in enumerate(names)])
        assert_models_agree(mixed, expected)


@every_method
def test_mixed_batches_refuse_what_cannot_be(method: str) -> None:
    adapted, inputs = active(method, "bert")
    with pytest.raises(ValueError, match="non-existing adapter"):
        adapted(**inputs, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="one name a sample"):
        adapted(**inputs, adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        adapted.train()(**inputs, adapter_names=["default", "default"])


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, MethodLayer) and "default" in m.adapters]


@on_models(lambda row: row.combines)
def test_weighted_sums_are_exact(method: str, model: str, tmp_path: Path) -> None:
    adapted, inputs = active(method, model)
    adapted.add_adapter("second", zoo_config(method, model, init_weights=False))
    adapted.add_weighted_adapter(["default", "second"], [0.3, -2.0], "sum", combination_type="linear")
    assert layers_of(adapted)
    for layer in layers_of(adapted):
        first, second = (delta(layer.effective_pair(name)).double() for name in ("default", "second"))
        # The sum was made in float32.
        assert_sums_agree(
            delta(layer.effective_pair("sum")).double(), 0.3 * first - 2.0 * second, WIDTH, dtype=torch.float32
        )
    adapted.set_adapter("sum")
    expected = logits(adapted, inputs)
    assert torch.isfinite(expected).all()
    adapted.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    again = PeftModel.from_pretrained(ZOO[model].build(), str(tmp_path / "sum")).eval()
    assert torch.equal(logits(again, inputs), expected)
    again.save_pretrained(str(tmp_path / "again"))  # without the adapters that it is the sum of
    once_more = PeftModel.from_pretrained(ZOO[model].build(), str(tmp_path / "again")).eval()
    assert torch.equal(logits(once_more, inputs), expected)


@combining
@pytest.mark.parametrize("kind", ["svd", "ties", "ties_svd", "dare_linear", "dare_ties_svd", "magnitude_prune"])
def test_combinations_are_pefts(method: str, kind: str) -> None:
    """PEFT's functions on the dense updates; at full rank nothing else is lost."""
    adapted, _ = active(method, "llama")
    adapted.add_adapter("second", zoo_config(method, "llama", init_weights=False))
    weights = torch.tensor([0.3, -2.0])
    more = {} if kind == "svd" else {"density": 0.5}
    torch.manual_seed(0)  # dare draws which entries it drops
    adapted.add_weighted_adapter(["default", "second"], weights.tolist(), "sum", kind, svd_rank=WIDTH, **more)
    torch.manual_seed(0)
    for layer in layers_of(adapted):
        both = [delta(layer.effective_pair(name)).detach() for name in ("default", "second")]
        name = "task_arithmetic" if kind == "svd" else kind.removesuffix("_svd")
        expected = getattr(merge_utils, name)(both, weights, **more)
        # Two decompositions and as many products.
        assert_sums_agree(delta(layer.effective_pair("sum")), expected, 8 * WIDTH, dtype=torch.float32)


@combining
def test_a_combination_that_cannot_be_leaves_nothing(method: str) -> None:
    adapted, _ = active(method, "llama")
    names = list(adapted.state_dict())
    for more in (
        {"combination_type": "ties"},
        {"combination_type": "sum"},
        {"combination_type": "ties", "density": 2},
    ):
        with pytest.raises(ValueError, match=r"density|Invalid combination_type"):
            adapted.add_weighted_adapter(["default"], [1.0], "sum", **more)
    with pytest.raises(ValueError, match="does not exist"):
        adapted.add_weighted_adapter(["default", "nobody"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="one weight for each"):
        adapted.add_weighted_adapter(["default"], [1.0, 1.0], "sum")
    adapted.peft_config["default"].bias = "all"
    with pytest.raises(ValueError, match="trains bias, which a combination"):
        adapted.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(adapted.peft_config) == ["default"] and list(adapted.state_dict()) == names


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_get_float32_adapters(method: str, dtype: torch.dtype) -> None:
    model, inputs = ZOO["llama"].build().to(dtype), ZOO["llama"].inputs()
    bare = logits(model, inputs)
    adapted = get_peft_model(model, zoo_config(method, "llama")).eval()
    assert {p.dtype for p in own_parameters(adapted, method).values()} == {torch.float32}
    assert torch.equal(logits(adapted, inputs), bare)
    kept = get_peft_model(ZOO["llama"].build().to(dtype), zoo_config(method, "llama"), autocast_adapter_dtype=False)
    assert {p.dtype for p in own_parameters(kept, method).values()} == {dtype}


@targeting
def test_targets_that_match_nothing(method: str) -> None:
    base = ZOO["bert"].build()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"Nearest names in this model: query"):
        get_peft_model(base, zoo_config(method, "bert", target_modules=["qeury"]))
    assert [name for name, _ in base.named_modules()] == names


@every_method
def test_embeddings_that_were_resized_are_saved_along(method: str, tmp_path: Path) -> None:
    ZOO["llama"].build().save_pretrained(tmp_path / "base")

    def resized() -> Any:
        model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
        model.resize_token_embeddings(model.config.vocab_size + 4)
        return model.eval()

    base, inputs = resized(), ZOO["llama"].inputs()
    with torch.no_grad():
        base.get_input_embeddings().weight[-4:] = 0.5
    adapted = get_peft_model(base, zoo_config(method, "llama", init_weights=False)).eval()
    inputs["input_ids"][:, -1] = base.config.vocab_size - 1
    expected = logits(adapted, inputs)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        adapted.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(resized(), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded, inputs), expected)
