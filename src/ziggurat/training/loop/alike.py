"""Whether a model gives every row the same answer, as one does that has learned nothing."""

from collections.abc import Sequence

import numpy as np

from ziggurat.recipe.schema import Recipe

#: Numbers whose standard deviation is below this share of their labels' are the same answer: they explain less than a
#: thousandth of the labels' variance.
SPREAD = 0.03


def same_answer(recipe: Recipe, outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str | None:
    """The answer that a model gives to every row, in words; None if its answers differ, or their labels don't.

    `outputs`: (rows, classes), of tokens (rows, tokens, tags), of regression (rows, 1). `labels`: places among `names`,
    below 0 where a token has none; of sets (rows, classes), 0 or 1.
    """
    if recipe.task == "regression":
        answers, truth = outputs.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)
        return f"about {answers.mean():.3g}" if answers.std() < SPREAD * truth.std() else None
    if recipe.task == "multilabel":
        chosen = outputs > 0
        if (chosen != chosen[0]).any() or (labels == labels[0]).all():
            return None
        return ", ".join(f'"{name}"' for name, one in zip(names, chosen[0], strict=True) if one) or "no label"
    labelled = labels >= 0
    answers, truth = np.unique(outputs.argmax(-1)[labelled]), np.unique(labels[labelled])
    return f'"{names[answers[0]]}"' if len(answers) == 1 < len(truth) else None


def warning(recipe: Recipe, answer: str, labels: np.ndarray) -> str:
    """What a user reads, and can do about it, where all rows with these labels have the same answer."""
    parts = [f"train.lr ({recipe.train.lr:g}) is too high for this method, or the run is too short"]
    if recipe.task == "classification" and recipe.train.class_weights is None:
        parts.append("or some classes are too rare (train.class_weights=balanced)")
    rows = f"{(labels >= 0).sum():,} words" if recipe.task == "tokens" else f"{len(labels):,} rows"
    return (
        f"the model answers {answer} to all {rows} of the validation data: it has learned nothing that tells them "
        f"apart. Most likely {', '.join(parts)}."
    )
