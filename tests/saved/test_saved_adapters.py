"""Adapters that were saved load ever after: every tensor bitwise, and with the outputs they gave when they were saved.

What lies beside this file was written by make.py at one version and is never written again.
"""

from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import versions
from saved.make import ADAPTERS, CASES, base, outputs
from tolerance import assert_models_agree, model_rounding
from zoo import ZOO

FOLDERS = sorted(path.name for path in ADAPTERS.iterdir())
BY_TRANSFORMERS = [name for name, case in CASES.items() if case.by_transformers]
BIASES = "msplora-stages"
#: load_adapter is one of the calls that a limited pair of versions hasn't.
LOADABLE = [
    pytest.param(name, marks=versions.transformers_calls if name in BY_TRANSFORMERS else ())
    for name in FOLDERS
    if name != BIASES or versions.Version("0.21") <= versions.PEFT
]
#: Loaded by PEFT; before 0.21 it leaves out the structure that lies beside LoR2C's factors, and biases.
WHOLE_NAMES = [name for name in FOLDERS if name not in BY_TRANSFORMERS]
WHOLE = [
    pytest.param(name, marks=versions.saves_whole if name == BIASES or "lor2c-merged" in name else ())
    for name in FOLDERS
    if name not in BY_TRANSFORMERS
]


def bits(tensors: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """Each tensor's dtype, shape and bytes, whatever its name: which is which, the outputs tell."""
    return sorted(
        (str(t.dtype), tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for t in tensors.values()
    )


def load(name: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Model with the adapter `name`, its inputs, and the output it gave."""
    held = load_file(ADAPTERS / name / "expected.safetensors")
    inputs = {key.removeprefix("input."): value for key, value in held.items() if key.startswith("input.")}
    case = CASES[name]
    model = base(case.base).to(case.dtype)
    if case.by_transformers:
        model.load_adapter(str(ADAPTERS / name))
    else:
        model = PeftModel.from_pretrained(model, ADAPTERS / name, **case.get)
    return model.eval(), inputs, held["output"]


def layers(name: str) -> int:
    return sum(ZOO[CASES[name].base].stacks.values())


def test_every_method_has_at_least_two() -> None:
    methods = [name.partition("-")[0] for name in FOLDERS]
    assert {method for method in methods if methods.count(method) >= 2} == {
        "adapterdrop", "dylora", "lor2c", "lora2", "msplora"
    }  # fmt: skip
    assert set(FOLDERS) == set(CASES)


@pytest.mark.parametrize("name", WHOLE)
def test_its_tensors_load_bitwise(name: str) -> None:
    model, _, _ = load(name)
    assert bits(get_peft_model_state_dict(model)) == bits(load_file(ADAPTERS / name / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", LOADABLE)
def test_it_gives_the_outputs_it_gave(name: str) -> None:
    model, inputs, wanted = load(name)
    depth = layers(name)
    assert_models_agree(outputs(model, inputs), wanted, depth)
    # The comparison means something: without the adapter the output is another one.
    without = outputs(base(CASES[name].base), inputs)
    assert (without - wanted).abs().max() > 120 * model_rounding(depth) * wanted.abs().max()


@versions.transformers_calls
@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_what_transformers_saved_loads_by_peft_too(name: str) -> None:
    _, inputs, wanted = load(name)
    model = PeftModel.from_pretrained(base(CASES[name].base), ADAPTERS / name).eval()
    assert bits(get_peft_model_state_dict(model)) == bits(load_file(ADAPTERS / name / "adapter_model.safetensors"))
    assert_models_agree(outputs(model, inputs), wanted, layers(name))


def test_lor2c_comes_back_with_the_structure_that_training_gave_it() -> None:
    model, _, _ = load("lor2c-merged-and-injected")
    structure = model.peft_config["default"].structure
    (state,) = structure["stacks"].values()
    assert structure["done"] == 2 and state["injected"] and [last - first for first, last in state["spans"]].count(1)


@versions.transformers_calls
@pytest.mark.parametrize("name", [name for name in FOLDERS if CASES[name].base == "llama"])
def test_its_body_without_a_head_loads_it_too(name: str) -> None:
    """By transformers' own way, with the outputs of the model with its head; old names hold the head's prefix."""
    model, inputs, _ = load(name)
    body = base("llama").to(CASES[name].dtype).model
    body.load_adapter(str(ADAPTERS / name))
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(body.eval()(**inputs).last_hidden_state, whole)


@pytest.mark.parametrize("name", [name for name in WHOLE_NAMES if not CASES[name].get and name != BIASES])
def test_a_plain_state_dict_of_an_earlier_version_loads(name: str) -> None:
    """As loops other than PEFT's keep one: all tensors of the adapter, with its name in theirs."""
    model, inputs, _ = load(name)
    expected = outputs(model, inputs)
    stored = load_file(ADAPTERS / name / "adapter_model.safetensors")
    prefix = model.base_model.prefix
    old = {}
    for key, tensor in stored.items():
        front, at, leaf = key.rpartition(f".{prefix}")
        head, dot, tail = leaf.partition(".")
        if at and "structure" not in leaf:
            old[f"{front}{at}{head}.default{dot}{tail}"] = tensor
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if prefix in key:
                parameter.zero_()
    result = model.load_state_dict(old, strict=False)
    assert not [key for key in result.unexpected_keys if prefix in key]
    assert torch.equal(outputs(model, inputs), expected)
