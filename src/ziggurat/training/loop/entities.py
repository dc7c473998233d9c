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
    """For each row: entities predicted with the right kind and ends, entities predicted, true entities; (rows, 3)."""
    spans = [(entities(right), entities(answer)) for right, answer in zip(truth, answers, strict=True)]
    return np.asarray([[len(right & answer), len(answer), len(right)] for right, answer in spans])


def entity_f1(counts: np.ndarray) -> float:
    """F1 = 2 hits / (predicted + true), summed over all rows and kinds, in per cent; 0 if there are none."""
    hits, predicted, actual = counts.sum(0).tolist()
    return 200.0 * hits / (predicted + actual) if predicted + actual else 0.0


def entity_scores(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """entity_f1, entity_precision and entity_recall, and token_accuracy, the share of words with the right tag."""
    counts = entity_counts(truth, answers)
    hits, predicted, actual = counts.sum(0).tolist()
    pairs = [pair for row in zip(truth, answers, strict=True) for pair in zip(*row, strict=True)]
    return {
        "entity_f1": entity_f1(counts),
        "entity_precision": 100.0 * hits / predicted if predicted else 0.0,
        "entity_recall": 100.0 * hits / actual if actual else 0.0,
        "token_accuracy": 100.0 * sum(right == answer for right, answer in pairs) / max(len(pairs), 1),
    }


def scores_of(names: Sequence[str], outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The same from scores (rows, tokens, tags) and places among the tags (rows, tokens), where these are labelled."""
    answers, masks = outputs.argmax(-1), labels != UNLABELLED
    rows = zip(labels, answers, masks, strict=True)
    pairs: list[tuple[Any, Any]] = [
        ([names[p] for p in right[mask]], [names[p] for p in answer[mask]]) for right, answer, mask in rows
    ]
    return entity_scores([right for right, _ in pairs], [answer for _, answer in pairs])
