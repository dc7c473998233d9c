"""The names of recipe keys in other programs."""

from pathlib import Path

import pytest

from pages import names
from ziggurat.errors import RecipeError
from ziggurat.recipe.methods import METHODS, method_fields
from ziggurat.recipe.names import tables
from ziggurat.recipe.recipe import make_recipe
from ziggurat.recipe.schema import keys

NAMES = [name for names in tables().values() for name in names]
OURS = sorted({ours for names in tables().values() for ours in names.values() if ours})


def refusal(key: str, value: object) -> str:
    with pytest.raises(RecipeError) as error:
        make_recipe({"model": "m", "data.train": "a.csv", "method.name": "lora", key: value})
    return str(error.value)


def test_the_page_is_written_by_the_table() -> None:
    assert (Path(__file__).parents[2] / "docs" / "names.md").read_text(encoding="utf-8") == names()


@pytest.mark.parametrize("ours", [ours for ours in OURS if "." in ours.split()[0] or " " not in ours])
def test_every_answer_is_a_key(ours: str) -> None:
    key = ours.split()[0].rstrip(":,")
    fields = {f"method.{field}" for method in METHODS for field in method_fields(method)}
    sections = {item.rpartition(".")[0] for item in keys()}
    assert key in {*keys(), *fields, *sections, "method.name"}


def test_every_name_is_answered() -> None:
    """All at once, as a recipe from elsewhere has them; those that are keys here too need no answer."""
    given = {name: None for name in NAMES if name not in keys() and f"method.{name}" not in NAMES}
    lines = [line.strip() for line in refusal("train.nothing", 1).splitlines()[1:]]
    assert len(lines) == 1
    with pytest.raises(RecipeError) as error:
        make_recipe({"model": "m", "data.train": "a.csv", "method.name": "lora", **given})
    answers = dict(line.strip().split(": ", 1) for line in str(error.value).splitlines()[1:])
    assert [name for name in given if "lists the keys" in answers[name]] == []
    assert answers["lora_r"] == "unknown, did you mean method.r?"
    assert answers["stage"] == "unknown, did you mean task?"
    assert answers["adam_beta1"] == "unknown; Hugging Face has it, and no key stands for it here"
    assert answers["sequence_len"] == "unknown, did you mean data.max_length?"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("fsdp", "fsdp: unknown; here it is accelerate launch with a file of `ziggurat launch-config`"),
        ("load_in_4bit", "load_in_4bit: unknown; here it is method.name: qlora"),
        ("method.lora_target", "method.lora_target: unknown, did you mean method.target_modules?"),
        ("train.micro_batch_size", "train.micro_batch_size: unknown, did you mean train.batch?"),
        ("bf16", "bf16: unknown; here it is train.precision: bf16"),
        ("pad_to_sequence_len", "pad_to_sequence_len: unknown; leave it out: batches are padded to their longest row"),
    ],
)
def test_names_with_a_section_too(key: str, message: str) -> None:
    assert message in refusal(key, True)


def test_an_adapter_named_by_its_method() -> None:
    assert "adapter: is the folder of an adapter to go on from; the method is method.name: lora" in refusal(
        "adapter", "lora"
    )
