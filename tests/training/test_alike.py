"""A model that gives every row the same answer is told; one that tells them apart, and one that needn't, are not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from training_tables import reviews, save_still_bert, tiny_recipe, write_csv

from ziggurat.training.loop.alike import SPREAD, same_answer
from ziggurat.training.loop.run import train

NAMES = ["no", "yes"]
ONE, OTHER = [2.0, -1.0], [-1.0, 2.0]
MANY, FEW = 5, 4
NUMBERS = np.linspace(0.0, 100.0, 20)
#: Task, outputs, labels, the answer that all rows have.
CASES: dict[str, tuple[str, Any, Any, str | None]] = {
    "one class": ("classification", [ONE] * 9, [0] * 4 + [1] * MANY, '"no"'),
    "two classes": ("classification", [ONE, OTHER] * 5, [0, 0] * 5, None),
    "rightly one class": ("classification", [ONE] * 9, [0] * 9, None),
    "few rows of a second class": ("classification", [ONE] * 9, [0] * 5 + [1] * FEW, None),
    "one set": ("multilabel", [[1.0, 3.0], [2.0, 1.0]] * 5, [[1, 1], [0, 1]] * 5, '"no", "yes"'),
    "no set": ("multilabel", [[-1.0, -3.0], [-2.0, -1.0]] * 5, [[1, 1], [0, 1]] * 5, "no label"),
    "two sets": ("multilabel", [ONE, OTHER] * 5, [[1, 0], [1, 0]] * 5, None),
    "rightly one set": ("multilabel", [ONE, ONE] * 5, [[1, 0], [1, 0]] * 5, None),
    "one tag": ("tokens", [[ONE, OTHER], [ONE, ONE]] * 5, [[0, -100], [1, 0]] * 5, '"no"'),
    "no labelled word": ("tokens", [[ONE, OTHER]], [[-100, -100]], None),
    "two tags": ("tokens", [[ONE, OTHER], [ONE, ONE]] * 5, [[0, 1], [1, 0]] * 5, None),
    "one number": ("regression", [[50.0]] * 20, NUMBERS, "about 50"),
    "nearly one number": ("regression", [[50.0], [50.0 + SPREAD]] * 10, NUMBERS, "about 50"),
    "small numbers that follow": ("regression", (50.0 + 0.02 * NUMBERS)[:, None], NUMBERS, None),
    "two numbers": ("regression", [[50.0], [50.0 + 100 * SPREAD]] * 10, NUMBERS, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_answer(name: str) -> None:
    task, outputs, labels, answer = CASES[name]
    recipe: Any = SimpleNamespace(task=task)
    assert same_answer(recipe, np.asarray(outputs), np.asarray(labels), NAMES) == answer


def test_a_run_that_learns_and_one_that_cannot(tmp_path: Path) -> None:
    """Texts without a difference have one answer, whatever the model has learned."""
    save_still_bert(tmp_path / "bert")
    learnt = write_csv(tmp_path / "train.csv", reviews(64))
    alike = write_csv(tmp_path / "alike.csv", [{**row, "text": "the film"} for row in reviews(12)])
    for validation, warned in ((learnt, False), (alike, True)):
        own = {"data__validation_rows": None, "data__validation": str(validation)}
        result = train(tiny_recipe(tmp_path / "bert", learnt, tmp_path / f"{validation.stem}-run", **own))
        told = [text for text in result.warnings if text.startswith("the model answers ")]
        noted = json.loads((result.folder / "run.json").read_text())
        assert noted["warnings"] == result.warnings and set(result.warnings) <= set(result.notes)
        assert len(told) == warned, (result.after, result.warnings)
        if warned:
            assert told[0].startswith(tuple(f'the model answers "{name}" to all 12 rows' for name in ("neg", "pos")))
            assert "train.lr (0.03) is too high" in told[0] and "train.class_weights=balanced" in told[0]
