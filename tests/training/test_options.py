"""Options that people bring from elsewhere: optimiser, early stopping, class weights, attention, going on."""

from pathlib import Path
from typing import Any

import pytest
from training_tables import reviews, tiny_recipe, write_csv
from transformers import TrainerCallback

from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.recipe import load_recipe, make_recipe
from ziggurat.training.answers.predict import predict, seen_with
from ziggurat.training.loop.classes import weights_of
from ziggurat.training.loop.result import Result
from ziggurat.training.loop.run import train


class Seen(TrainerCallback):
    """What optimiser and attention a run has."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = type(getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])).__name__
        self.attention = kwargs["model"].config._attn_implementation


@pytest.fixture(scope="module")
def first(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result, Seen]:
    """A run with Adafactor and eager attention in which rows of one class count nothing."""
    folder, seen = tmp_path_factory.mktemp("options"), Seen()
    data = write_csv(folder / "a.csv", reviews(48))  # type: ignore[arg-type]
    how = {"train__optimizer": "adafactor", "attn_implementation": "eager", "train__class_weights": {"pos": 0.0}}
    result = train(tiny_recipe(tiny_bert, data, folder / "first", **how), callbacks=[seen])
    return folder, data, result, seen


def test_numbers_and_dtypes_as_people_write_them() -> None:
    words = ["train.lr=2e-4", "train.weight_decay=1E-2", "dtype=bf16", "train.precision=bfloat16"]
    recipe = load_recipe("default", words)
    assert (recipe.train.lr, recipe.train.weight_decay, recipe.dtype) == (2e-4, 1e-2, "bfloat16")
    rewards = load_recipe("grpo-sums", ["rewards.weights=[1e-1]"]).rewards
    assert recipe.train.precision == "bf16" and rewards.weights == [0.1]


def test_what_contradicts_itself_is_refused() -> None:
    values = {"model": "m", "data.train": "a.csv", "method.name": "lora", "train.patience": 2, "task": "regression"}
    with pytest.raises(RecipeError) as error:
        make_recipe(values | {"train.optimizer": "adamw_8bits", "train.class_weights": "balanced"})
    for message in (
        "train.patience: needs train.best: true",
        "train.optimizer: 'adamw_8bits' is no optimiser for adapters, did you mean adamw_8bit?",
        "train.class_weights: has no meaning with task: regression",
    ):
        assert message in str(error.value)


def test_optimiser_attention_and_class_weights_act(first: tuple[Path, Path, Result, Seen]) -> None:
    _, _, result, seen = first
    assert (seen.optimizer, seen.attention) == ("Adafactor", "eager")
    recall = {row["name"]: row["recall"] for row in result.by_class["classes"]}
    assert recall == {"neg": 100.0, "pos": 0.0}
    card = (result.folder / "README.md").read_text(encoding="utf-8")
    assert ", num_labels=2)\n" in card and "More Information Needed" not in card
    picture = Path(__file__).parents[1] / "forms" / "images" / "blue-32x32.png"
    with pytest.raises(DataError, match="trained on texts alone: it takes no images"):
        predict(result.folder, [seen_with("what is it", [picture])])


def test_weights_of_classes() -> None:
    values = {"model": "m", "data.train": "a.csv", "method.name": "lora", "train.class_weights": "balanced"}
    weights = weights_of(make_recipe(values), [0, 0, 0, 1], ["a", "b"])
    assert weights.tolist() == pytest.approx([4 / 6, 2.0])
    with pytest.raises(DataError, match="no class is called c; there are a, b"):
        weights_of(make_recipe(values | {"train.class_weights": {"c": 2.0}}), [0, 1], ["a", "b"])


def test_going_on_from_an_adapter(tiny_bert: Path, first: tuple[Path, Path, Result, Seen], tmp_path: Path) -> None:
    folder, data, result, _ = first
    saved = (result.folder / "adapter_model.safetensors").read_bytes()
    how: dict[str, Any] = {"adapter": str(result.folder), "train__epochs": 2, "train__lr": 1e-2}
    again = train(tiny_recipe(tiny_bert, data, folder / "again", **how))
    assert again.before["loss"] == pytest.approx(result.after["loss"], rel=1e-5)  # attention was another
    assert again.after["loss"] < again.before["loss"]
    assert f"training goes on from the adapter in {result.folder}" in again.notes
    assert again.counts == result.counts and (result.folder / "adapter_model.safetensors").read_bytes() == saved
    with pytest.raises(RecipeError, match=r"other settings than the recipe; leave out method\.r: 2, not 4"):
        train(tiny_recipe(tiny_bert, data, tmp_path / "a", **how, method__r=2))
    with pytest.raises(RecipeError, match=r"was trained with method\.name: msplora, not lora"):
        train(tiny_recipe(tiny_bert, data, tmp_path / "a", **how, method__name="lora"))
    other = write_csv(tmp_path / "b.csv", [{**row, "label": row["label"].upper()} for row in reviews(48)])
    with pytest.raises(RecipeError, match="knows the classes neg, pos, and the data have NEG, POS"):
        train(tiny_recipe(tiny_bert, other, tmp_path / "a", **how))
    with pytest.raises(RecipeError, match="adapter: there is no folder"):
        train(tiny_recipe(tiny_bert, data, tmp_path / "a", adapter=str(tmp_path / "none")))


def test_a_run_that_gets_no_better_stops(
    tiny_bert: Path, first: tuple[Path, Path, Result, Seen], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"train__patience": 2, "train__best": True, "train__evaluate": 1, "train__save": 1}
    result = train(tiny_recipe(tiny_bert, first[1], tmp_path / "out", **how, train__lr=1e-9, train__max_steps=9))
    assert result.steps == 3 and "stopped after step 3: 2 scorings without a better accuracy" in result.notes
