"""Entities in BIO tags, and their scores as seqeval and the CoNLL shared tasks count them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.tags import OUTSIDE, UNLABELLED


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first word and end (excluded) of each entity.

    An entity begins at B-, and at an I- that doesn't continue an entity of its kind, which a model may predict.
    """
    spans, kind, start = set(), None, 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, _, name = tag.partition("-")
        if kind is not None and (mark != "I" or name != kind):
            spans.add((kind, start, place))
            kind = None
        if kind is None and mark != OUTSIDE:
            kind, start = name, place
    return spans


def entity_counts(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """For each row (rows, 5): entities predicted with the right kind and ends, entities predicted, true entities; words
    with the right tag, words."""
    counts = []
    for right, answer in zip(truth, answers, strict=True):
        real, predicted = entities(right), entities(answer)
        words = sum(one == other for one, other in zip(right, answer, strict=True))
        counts.append([len(real & predicted), len(predicted), len(real), words, len(right)])
    return np.asarray(counts).reshape(-1, 5)


def scores_of_counts(counts: np.ndarray) -> dict[str, float]:
    """entity_f1, entity_precision and entity_recall, and token_accuracy, the share of words with the right tag.

    F1 = 2 hits / (predicted + true), summed over all rows and kinds, in per cent; 0 if there are none.
    """
    hits, predicted, actual, right, words = counts.sum(0).tolist()
    return {
        "entity_f1": 200.0 * hits / max(predicted + actual, 1),
        "entity_precision": 100.0 * hits / max(predicted, 1),
        "entity_recall": 100.0 * hits / max(actual, 1),
        "token_accuracy": 100.0 * right / max(words, 1),
    }


def entity_scores(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of the predicted tags of all rows."""
    return scores_of_counts(entity_counts(truth, answers))


def scores_of(names: Sequence[str], outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The same from scores (rows, tokens, tags) and places among the tags (rows, tokens), where these are labelled."""
    answers, masks = outputs.argmax(-1), labels != UNLABELLED
    rows = zip(labels, answers, masks, strict=True)
    pairs: list[tuple[Any, Any]] = [
        ([names[p] for p in right[mask]], [names[p] for p in answer[mask]]) for right, answer, mask in rows
    ]
    return entity_scores([right for right, _ in pairs], [answer for _, answer in pairs])
