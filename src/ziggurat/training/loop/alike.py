"""Whether a model gives every row the same answer, as one does that has learned nothing."""

from collections.abc import Sequence

import numpy as np

from ziggurat.recipe.schema import Recipe

#: Numbers whose standard deviation is below this share of their labels' are the same answer, unless they correlate.
SPREAD, CORRELATION = 0.03, 0.1
#: Fewer rows with another answer than the model's may be missed by a good model, too.
LEAST = 5


def same_answer(recipe: Recipe, outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str | None:
    """The answer that a model gives to every row, in words; None if its answers differ, or hardly a label does.

    `outputs`: (rows, classes), of tokens (rows, tokens, tags), of regression (rows, 1). `labels`: places among `names`,
    below 0 where a token has none; of sets (rows, classes), 0 or 1.
    """
    if recipe.task == "regression":
        answers, truth = outputs.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)
        if len(truth) < LEAST or answers.std() >= SPREAD * truth.std():
            return None
        follows = answers.std() > 0 and abs(np.corrcoef(answers, truth)[0, 1]) > CORRELATION
        return None if follows else f"about {answers.mean():.3g}"
    if recipe.task == "multilabel":
        answers, truth = outputs > 0, labels > 0
        words = ", ".join(f'"{name}"' for name, chosen in zip(names, answers[0], strict=True) if chosen) or "no label"
    else:
        labelled = labels >= 0
        answers, truth = outputs.argmax(-1)[labelled][:, None], labels[labelled][:, None]
        if not len(answers):
            return None
        words = f'"{names[answers[0, 0]]}"'
    differs = (truth != answers[0]).any(1).sum()
    return words if (answers == answers[0]).all() and differs >= LEAST else None


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
