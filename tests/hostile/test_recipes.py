"""Recipes from anybody: any text gives a checked recipe or one list of its faults."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziggurat.errors import RecipeError
from ziggurat.recipe.recipe import load_recipe, make_recipe, recipe_of
from ziggurat.recipe.schema import Recipe

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
TEXTS = {
    "laughs": LAUGHS,
    "a list within itself": "method.ranks: &a [*a, *a]",
    "a mapping within itself": "method: &a {name: *a}",
    "code": "method: !!python/object/apply:os.system ['touch ran']",
    "code in a key": "? !!python/object/apply:os.system ['touch ran']\n: 1",
    "a class": "name: !!python/name:os.system",
    "a module": "name: !!python/module:os",
    "an unknown tag": "name: !include /etc/passwd",
    "deep lists": "method.ranks: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "method.ranks: " + "{a: " * 200 + "1" + "}" * 200,
    "a list as key": "? [a, b]\n: 1",
    "a list as inner key": "method: {? [a] : 1}",
    "a list as innermost key": "method.tiers: {? [a] : 1}",
    "no date": "name: 2001-99-99",
    "digits": "seed: " + "9" * 5000,
    "binary": "name: !!binary '@@@'",
    "a null byte": "name: 'a\0b'",
    "many documents": "name: a\n---\nname: b",
    "long": "about: " + "x" * (2**16 + 1),
    "many keys": "\n".join(f"k{n}: 1" for n in range(5_000)),
    "merge keys": "<<: {name: x}\nmethod: {<<: {name: lora}}",
    "out of the folder": "name: ../../etc",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text(TEXTS[name], encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "evil.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["evil.yaml"]


_KEYS = ["name", "model", "seed", "task", "data.train", "data", "method", "method.r", "method.name", "method.tiers"]
_KEYS += ["train", "train.lr", "train.epochs", "head.pooling", "output", "resume", "gguf_file", "spectra", "<<", "../x"]
_plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
_values = st.recursive(
    _plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(_KEYS), inner),
    max_leaves=8,
)


@settings(max_examples=60, derandomize=True)
@given(st.dictionaries(st.sampled_from(_KEYS), _values, max_size=5))
def test_any_values(values: dict) -> None:
    whole = {"model": "m", "data.train": "d.csv", "method.name": "msplora", **values}
    try:
        assert isinstance(make_recipe(whole), Recipe)
    except RecipeError as error:
        assert "problem" in str(error)


@settings(max_examples=60, derandomize=True)
@given(st.text(alphabet="abmx:-[]{},&*!|>'\"#?% \n\t0123456789.~\u00e9", max_size=60))
def test_any_text(text: str) -> None:
    for whole in (text, f"model: m\ndata.train: d.csv\nmethod.name: lor2c\nmethod.spans: {text}\n"):
        try:
            assert isinstance(recipe_of(whole, label="fuzz"), Recipe)
        except RecipeError as error:
            assert "problem" in str(error)


@settings(max_examples=40, derandomize=True)
@given(st.lists(st.text(max_size=20) | st.sampled_from(["method.r=1e999", "train={", "seed=2001-99-99"]), max_size=3))
def test_any_words_on_the_command_line(words: list[str]) -> None:
    try:
        assert isinstance(load_recipe("default", words), Recipe)
    except RecipeError as error:
        assert "problem" in str(error)
