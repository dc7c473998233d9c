"""Any value in any field of a config: the adapter loads and works, or one clear error names the fault."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_values import check_error, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from methods_table import METHODS, logits, zoo_config
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
from ziggurat.errors import ConfigError
from zoo import ZOO

CONFIGS = {
    "msplora": MSPLoraConfig,
    "lor2c": LoR2CConfig,
    "lora2": LoRA2Config,
    "dylora": DyLoRAConfig,
    "sharelora": ShareLoRAConfig,
    "tiedlora": TiedLoRAConfig,
    "loraxs": LoRAXSConfig,
    "aslora": ASLoRAConfig,
    "adapterdrop": AdapterDropConfig,
}
every_method = pytest.mark.parametrize("method", METHODS)
MODEL = "plain_list"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folders = {}
    for method in METHODS:
        fields = {"merges": 1} if method == "lor2c" else {}
        model = get_peft_model(ZOO[MODEL].build(), zoo_config(method, MODEL, init_weights=False, **fields))
        folders[method] = tmp_path_factory.mktemp(method)
        model.save_pretrained(str(folders[method]))
    yield folders


def try_to_load(folder: Path) -> None:
    """Load the adapter in `folder` and run it; any error must be a clear one."""
    try:
        model = PeftModel.from_pretrained(ZOO[MODEL].build(), str(folder)).eval()
        outputs = logits(model, ZOO[MODEL].inputs())
    except Exception as error:
        check_error(error)
    else:
        assert outputs.shape == logits(ZOO[MODEL].build(), ZOO[MODEL].inputs()).shape


@every_method
@settings(max_examples=40, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_value_in_any_field(method: str, saved: dict[str, Path], data: st.DataObject) -> None:
    content = json.loads((saved[method] / "adapter_config.json").read_text(encoding="utf-8"))
    fields = sorted(set(content) - {"peft_type"})
    for field in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2, unique=True)):
        content[field] = data.draw(values, label=field)
    # As a file could say it: what JSON can't, a stranger can't either.
    try:
        content = json.loads(json.dumps(content))
    except ValueError:
        return
    content.pop("peft_type")
    try:
        config = CONFIGS[method](**content)
        model = get_peft_model(ZOO[MODEL].build(), config).eval()
        logits(model, ZOO[MODEL].inputs())
    except Exception as error:
        check_error(error)


@every_method
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 10**9),
        ("r", 8.0),
        ("r", "8"),
        ("r", True),
        ("r", 10**400),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("lora_dropout", float("nan")),
        ("lora_dropout", True),
        ("use_rslora", "no"),
        ("fan_in_fan_out", "false"),
        ("inference_mode", "false"),
        ("bias", "lora_only"),
        ("bias", None),
        ("init_weights", 1),
        ("target_modules", {"query": 1}),
        ("target_modules", [1, 2]),
        ("target_modules", "(a+)+$"),
        ("target_modules", "(a|aa)*$"),
        ("target_modules", ".*.*.*.*.*x"),
        ("exclude_modules", 7),
        ("modules_to_save", "classifier"),
        ("layers_to_transform", [0.5]),
        ("layers_to_transform", list(range(10**6))),
        ("layers_pattern", ["(", 3]),
        ("base_model_name_or_path", ["a"]),
        ("auto_mapping", "transformers"),
    ],
)
def test_what_no_method_takes(method: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        CONFIGS[method](**{field: value})
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("method", METHODS)
def test_each_method_knows_its_own_bias(method: str) -> None:
    for bias in ("none", "all", f"{method}_only"):
        assert CONFIGS[method](bias=bias).bias == bias
    other = "lora2_only" if method != "lora2" else "msplora_only"
    with pytest.raises(ConfigError, match=f"'none', 'all' or '{method}_only'"):
        CONFIGS[method](bias=other)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (MSPLoraConfig, {"tiers": [{"name": f"t{n}x", "groups": 1} for n in range(10**6)]}),
        (MSPLoraConfig, {"tiers": [["name", "groups"]]}),
        (MSPLoraConfig, {"tiers": [{"name": 7, "groups": 1}]}),
        (MSPLoraConfig, {"tiers": [{"name": "a/../b", "groups": 1}]}),
        (MSPLoraConfig, {"tiers": [{"name": "x" * 10**6, "groups": 1}]}),
        (MSPLoraConfig, {"tiers": [{"name": "a", "groups": 1, "r": 10**9}]}),
        (MSPLoraConfig, {"tiers": [{"name": "a", "groups": 1, "lora_alpha": float("nan")}]}),
        (MSPLoraConfig, {"tiers": {"name": "a"}}),
        (MSPLoraConfig, {"group_starts": [0, 10**9]}),
        (MSPLoraConfig, {"group_starts": [0, True]}),
        (MSPLoraConfig, {"group_starts": 3}),
        (MSPLoraConfig, {"num_groups": 1.5}),
        (MSPLoraConfig, {"ranks": [8, 4, 10**9]}),
        (MSPLoraConfig, {"ranks": "842"}),
        (MSPLoraConfig, {"rank_pattern": {"value": [8, 4, 10**9]}}),
        (MSPLoraConfig, {"rank_pattern": {7: [8, 4, 2]}}),
        (MSPLoraConfig, {"rank_pattern": {"x" * 10**6: [8, 4, True]}}),
        (MSPLoraConfig, {"rank_decay": 10**400}),
        (MSPLoraConfig, {"train_in_stages": "yes"}),
        (LoR2CConfig, {"spans": "all"}),
        (LoR2CConfig, {"spans": [[0, 0]] * 10**6}),
        (LoR2CConfig, {"merges": 10**9}),
        (LoR2CConfig, {"inject_r": 10**7}),
        (LoR2CConfig, {"share": "no"}),
        (LoR2CConfig, {"structure": ["spans"]}),
        (LoRA2Config, {"outer_rank": 10**9}),
        (LoRA2Config, {"rank_pattern": {"query": 10**9}}),
        (LoRA2Config, {"rank_pattern": [4]}),
        (LoRA2Config, {"rank_pattern": {3: 4}}),
        (LoRA2Config, {"orthogonality": float("inf")}),
        (LoRA2Config, {"orthogonality": 10**400}),
        (DyLoRAConfig, {"min_rank": None}),
        (DyLoRAConfig, {"frozen": 1}),
        (AdapterDropConfig, {"robust_drop": 10**9}),
    ],
)
def test_what_the_method_itself_refuses(config: type, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("method", "fields", "says"),
    [
        ("lora2", {"r": 300}, "r=300 is above the matrix: .* maps 16 to 16"),
        ("adapterdrop", {"r": 300}, "r=300 is above the matrix"),
        ("msplora", {"r": 64}, "rank 64 of tier 'global' is above the matrix"),
        ("dylora", {"r": 64}, "r=64 is above the matrix"),
        ("lor2c", {"r": 64}, "r=64 is above the width"),
        ("lor2c", {"hidden_size": 60_000}, "hidden_size=60000, but no weight in layer 'blocks.0' has such a side"),
        ("lor2c", {"spans": [[-3, 2]]}, r"spans\[0\]=\(-3, 2\): needs 0 <= first"),
        ("lor2c", {"spans": [[0, 10**9]]}, "needs 0 <= first <= last <= 3"),
        ("lor2c", {"structure": {"stacks": {}, "done": -1}, "merges": 1}, "isn't one that LoR2C has written"),
    ],
)
def test_what_a_model_has_no_room_for(method: str, fields: dict[str, Any], says: str) -> None:
    base = ZOO[MODEL].build()
    names = list(base.state_dict())
    with pytest.raises(ConfigError, match=says):
        get_peft_model(base, zoo_config(method, MODEL, **fields))
    assert method == "lor2c" or list(base.state_dict()) == names


def test_outside_of_a_stack_a_rank_is_bounded_too() -> None:
    with pytest.raises(ConfigError, match=r"rank 1024 of tier 'global' is above the matrix: 'lin0'"):
        get_peft_model(ZOO["no_stack"].build(), MSPLoraConfig(r=1024, target_modules=["lin0"]))


def test_unknown_fields_are_left_out_with_a_warning(saved: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's contract, by which adapters of a later version still load."""
    folder = tmp_path / "later"
    shutil.copytree(saved["msplora"], folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, "of_the_future": [1], "__class__": "os.system"}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        model = PeftModel.from_pretrained(ZOO[MODEL].build(), str(folder)).eval()
    expected = PeftModel.from_pretrained(ZOO[MODEL].build(), str(saved["msplora"])).eval()
    assert torch.equal(logits(model, ZOO[MODEL].inputs()), logits(expected, ZOO[MODEL].inputs()))


@every_method
def test_a_tensor_that_is_missing(method: str, saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved[method] / "adapter_model.safetensors")
    for number, name in enumerate(sorted(name for name in tensors if not name.endswith("structure"))[:4]):
        folder = tmp_path / str(number)
        shutil.copytree(saved[method], folder)
        save_file({n: t for n, t in tensors.items() if n != name}, folder / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=r"adapter 'default' lacks 1 of the \d+ tensors its config asks for"):
            PeftModel.from_pretrained(ZOO[MODEL].build(), str(folder))


@every_method
def test_a_tensor_of_another_shape_or_kind(method: str, saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved[method] / "adapter_model.safetensors")
    name = min(name for name, tensor in tensors.items() if tensor.dim() == 2)
    for label, tensor, error, says in (
        ("long", torch.zeros(len(tensors[name]) + 1, tensors[name].shape[1]), RuntimeError, "size mismatch"),
        ("flat", tensors[name].flatten(), RuntimeError, "size mismatch"),
        ("whole", tensors[name].to(torch.int32), ConfigError, "factors are floating-point numbers"),
    ):
        folder = tmp_path / label
        shutil.copytree(saved[method], folder)
        save_file(tensors | {name: tensor}, folder / "adapter_model.safetensors")
        with pytest.raises(error, match=says):
            PeftModel.from_pretrained(ZOO[MODEL].build(), str(folder))


@every_method
def test_tensors_that_nobody_asked_for(method: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(saved[method], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.nobody.weight": torch.ones(3)}, folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(ZOO[MODEL].build(), str(folder)).eval()
    expected = PeftModel.from_pretrained(ZOO[MODEL].build(), str(saved[method])).eval()
    assert torch.equal(logits(model, ZOO[MODEL].inputs()), logits(expected, ZOO[MODEL].inputs()))


def test_a_config_that_asks_for_more_than_its_file_holds(saved: dict[str, Path], tmp_path: Path) -> None:
    """64 tiers of full rank on one wide layer are 268 million numbers, 1 GiB; refused before the first is made."""
    from plain_models import Block, PlainList

    folder = tmp_path / "huge"
    shutil.copytree(saved["msplora"], folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    tiers = [{"name": "t" + "x" * n, "groups": 1, "r": 1024} for n in range(64)]
    (folder / "adapter_config.json").write_text(json.dumps({**content, "tiers": tiers}))
    with torch.device("meta"):
        wide = PlainList([Block(1024) for _ in range(2)])
    with pytest.raises(ConfigError, match=r"asks for 268,435,456 parameters in this model, and its file holds [\d,]+"):
        PeftModel.from_pretrained(wide, str(folder))


@settings(max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_bytes_in_the_structure_that_training_saved(saved: dict[str, Path], tmp_path: Path, data: Any) -> None:
    tensors = load_file(saved["lor2c"] / "adapter_model.safetensors")
    key = next(name for name in tensors if name.endswith("lor2c_structure"))
    content = json.loads(bytes(tensors[key].tolist()))
    place = data.draw(st.sampled_from(["structure", "log", "stacks", "blocks", "spans", "injected", "done"]))
    value = data.draw(values)
    if place in content:
        content[place] = value
    elif place in content["structure"]:
        content["structure"][place] = value
    elif place == "blocks":
        content["structure"]["stacks"][place] = value
    else:
        content["structure"]["stacks"]["blocks"][place] = value
    try:
        text = json.dumps(content)[: data.draw(st.integers(1, 400) | st.just(10**9))].encode()
    except ValueError:
        return
    folder = tmp_path / "adapter"
    shutil.copytree(saved["lor2c"], folder, dirs_exist_ok=True)
    coded = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file({**tensors, key: coded}, folder / "adapter_model.safetensors")
    try_to_load(folder)
