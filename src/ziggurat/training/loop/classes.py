"""A classifier's scores by class, its confusion matrix, and its most confident mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

#: The most mistakes that are kept, and the most characters of each one's text.
MISTAKES, SHOWN = 20, 300


def weights_of(recipe: Recipe, labels: Sequence[int], names: Sequence[str]) -> torch.Tensor:
    """The weight of each class in the loss, by `train.class_weights`; `labels`: indices into `names`.

    balanced: w_c = N / (K n_c) for n_c of N examples in K classes, so that the mean over all examples is 1. Raises
    DataError for unknown names.
    """
    weights = recipe.train.class_weights
    if weights == "balanced":
        counts = np.bincount(np.asarray(labels), minlength=len(names))
        return torch.tensor(len(labels) / (len(names) * np.maximum(counts, 1)), dtype=torch.float32)
    assert isinstance(weights, dict)
    if unknown := [name for name in weights if name not in names]:
        raise DataError(f"train.class_weights: no class is called {', '.join(unknown)}; there are {', '.join(names)}")
    return torch.tensor([weights.get(name, 1.0) for name in names])


def by_class(
    probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str], texts: Sequence[str]
) -> dict[str, Any]:
    """Counts and scores of each class, the confusion matrix, and the most confident mistakes.

    `probabilities`: (rows, classes); `labels`: indices into the classes `names`. precision_c = hits_c / answered_c,
    recall_c = hits_c / rows_c, F1 their harmonic mean, in per cent, 0 where the divisor is 0. Row i, column j of
    `confusion` counts the rows of class i that were answered j.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    places, answers = range(len(names)), probabilities.argmax(-1)
    options: Any = {"labels": list(places), "zero_division": 0}
    precision, recall, f1, rows = precision_recall_fscore_support(labels, answers, **options)
    scores: Any = zip(names, rows, precision, recall, f1, strict=True)  # type: ignore[arg-type]
    sure = probabilities.max(-1)
    wrong = sorted(np.flatnonzero(answers != labels).tolist(), key=lambda row: -float(sure[row]))
    return {
        "classes": [
            {"name": n, "rows": int(count), "precision": 100.0 * p, "recall": 100.0 * r, "f1": 100.0 * f}
            for n, count, p, r, f in scores
        ],
        "confusion": confusion_matrix(labels, answers, labels=list(places)).tolist(),
        "mistakes": [
            {
                "text": texts[row][:SHOWN],
                "label": names[int(labels[row])],
                "answer": names[int(answers[row])],
                "probability": float(sure[row]),
            }
            for row in wrong[:MISTAKES]
        ],
    }


def shown_texts(table: Dataset) -> list[str]:
    """The text of each row; two texts with a bar between them."""
    if "text_pair" not in table.column_names:
        return list(table["text"])
    return [f"{first} | {second}" for first, second in zip(table["text"], table["text_pair"], strict=True)]
