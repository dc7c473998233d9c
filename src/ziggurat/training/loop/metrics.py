"""Scores of validation data, and the majority-class or mean baseline."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from ziggurat.recipe.schema import Recipe


def score(recipe: Recipe, predictions: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Scores of the validation data, in per cent except the root mean squared error.

    `classes`: the number of the adapter's classes, even if some don't occur here; ignored for regression.
    classification: accuracy, f1 (of class 1 with two classes, else the mean over those that occur), matthews.
    multilabel: f1_micro (of all labels of all rows together), f1_macro (mean over the classes that occur) and
    subset_accuracy (rows whose labels are all right); a class is predicted where its score is above 0, p > 1/2.
    regression: pearson, spearman, rmse. A constant prediction has no correlation and scores 0.
    """
    if recipe.task == "regression":
        from scipy import stats

        flat, truth = predictions.reshape(-1).astype(np.float64), labels.astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            pearson = float(stats.pearsonr(flat, truth)[0]) if len(truth) > 1 else 0.0  # type: ignore[arg-type]
            spearman = float(stats.spearmanr(flat, truth)[0]) if len(truth) > 1 else 0.0  # type: ignore[arg-type]
        rmse = math.sqrt(float(np.mean((flat - truth) ** 2)))
        return {"pearson": _percent(pearson), "spearman": _percent(spearman), "rmse": rmse}
    if recipe.task == "multilabel":
        return _of_sets(predictions > 0, labels > 0)
    return _of_classes(predictions.argmax(-1) if predictions.ndim > 1 else predictions, labels, classes)


def _of_classes(answers: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, float]:
    """Scores of classes, faster than scikit-learn's: intervals draw rows 1,000 times.

    With a_k rows of class k, p_k answers k, h_k of them right, and N rows: F1_k = 2 h_k / (p_k + a_k), and Matthews =
    (N sum_k h_k - sum_k p_k a_k) / sqrt((N^2 - sum_k p_k^2) (N^2 - sum_k a_k^2)) [Gorodkin 2004].
    """
    answers, truth, rows = answers.astype(np.int64), truth.astype(np.int64), len(truth)  # GLUE's answers are floats
    many = max(classes, 2, 1 + int(max(answers.max(), truth.max())))
    hits, actual, predicted = (np.bincount(of, minlength=many) for of in (truth[truth == answers], truth, answers))
    occurs = actual + predicted > 0
    f1 = 2 * hits / np.maximum(actual + predicted, 1)
    spread = float(rows**2 - predicted @ predicted) * float(rows**2 - actual @ actual)
    matthews = float(rows * hits.sum() - predicted @ actual) / math.sqrt(spread) if spread else 0.0
    return {
        "accuracy": _percent(float(hits.sum()) / rows),
        "f1": _percent(float(f1[1] if classes <= 2 else f1[occurs].mean())),
        "matthews": _percent(matthews),
    }


def _of_sets(answers: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Scores of sets of classes, (rows, classes), faster than scikit-learn's: intervals draw rows 1,000 times.

    F1 = 2 hits / (predicted + actual), of all classes together or of each one that is predicted or occurs.
    """
    hits, either = (answers & truth).sum(0), answers.sum(0) + truth.sum(0)
    occurs = either > 0
    return {
        "f1_micro": _percent(2 * float(hits.sum()) / float(either.sum())) if occurs.any() else 0.0,
        "f1_macro": _percent(float(np.mean(2 * hits[occurs] / either[occurs]))) if occurs.any() else 0.0,
        "subset_accuracy": _percent(float(np.mean((answers == truth).all(1)))),
    }


def outputs_of(predictions: Any) -> np.ndarray:
    """The model's scores, the first of its outputs: (rows, classes) or (rows, 1)."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def mean_loss(predictions: Any, labels: Any) -> float:
    """The mean over all rows of the training loss: cross-entropy, or squared error of a single output.

    L = mean_i (ln sum_c exp z_ic - z_iy), or mean_i (z_i - y_i)^2; of labels for each class, 0 or 1, binary
    cross-entropy mean_ic (ln(1 + exp z_ic) - y_ic z_ic).
    """
    scores, truth = torch.from_numpy(outputs_of(predictions)).double(), torch.from_numpy(np.asarray(labels))
    if scores.ndim == truth.ndim == 2:
        return float(binary_cross_entropy_with_logits(scores, truth.double()))
    if scores.ndim == 1 or scores.shape[1:] == (1,):
        return float(mse_loss(scores.flatten(), truth.double()))
    return float(cross_entropy(scores.flatten(0, -2), truth.long().flatten()))  # of tokens some have no label: -100


def guessing(recipe: Recipe, train: Sequence[Any], validation: Sequence[Any], classes: int) -> dict[str, float]:
    """Scores of the majority-class baseline, or of the mean baseline (regression), from the labels of both parts.

    Empty for tokens, most of which are in no entity: the baseline would predict none.
    """
    if recipe.task == "tokens":
        return {}
    train_labels, labels = np.asarray(train), np.asarray(validation)
    if recipe.task == "regression":
        return score(recipe, np.full(len(labels), float(np.mean(train_labels))), labels, classes)
    if recipe.task == "multilabel":  # each class as most training rows have it
        return score(recipe, np.tile(train_labels.mean(0) - 0.5, (len(labels), 1)), labels, classes)
    values, counts = np.unique(train_labels, return_counts=True)
    return score(recipe, np.full(len(labels), values[counts.argmax()]), labels, classes)


_LOWER = ("divergence", "rmse", "mse", "mae", "loss", "bits_per_byte", "brier_score", "ter", "wer", "cer")


def lower_is_better(metric: str) -> bool:
    """Whether `metric` improves as it falls; lm-eval's names count, too: word_perplexity, bits_per_byte, ter, ..."""
    return metric.endswith("perplexity") or metric in _LOWER


def perplexity(loss: float) -> float:
    """exp of the mean loss per token; infinite where this would overflow."""
    return math.inf if loss >= 700 else math.exp(loss)


def _percent(value: float) -> float:
    return 0.0 if math.isnan(value) else 100.0 * value
