"""A trained adapter on a labelled file: the scores of its run's task, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ziggurat.errors import DataError, RecipeError
from ziggurat.extras import require
from ziggurat.nearest import missing_path
from ziggurat.recipe.schema import Recipe
from ziggurat.training.loop.metrics import perplexity, score

from .intervals import FACTORS, correlation_interval, drawn_intervals, means_of, share_interval
from .logs import answer_logs, seen_logs
from .preferences import judged, preferences

if TYPE_CHECKING:
    from datasets import Dataset

    from ziggurat.training.answers.load import Loaded
    from ziggurat.training.model.base import HeadSpec


@dataclass(frozen=True)
class OwnScores:
    """Scores of `rows` rows, and 95% intervals if they have one; both in per cent for those in `per_cent`.

    `by_class`: see `training.loop.classes.by_class`.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_cent: tuple[str, ...]
    rows: int
    notes: list[str]
    by_class: dict[str, Any] = field(default_factory=dict)


def read_file(recipe: Recipe, head: HeadSpec, file: str | Path, limit: int | None = None) -> tuple[Dataset, list[str]]:
    """The rows of `file` in the form of the run's own data, and notes; before a model is loaded.

    Raises:
        DataError: no such file, or rows that can't be scored, all listed at once.
        RecipeError: the run's task isn't scored on files.
        MissingExtraError: packages are missing.
    """
    from ziggurat.training.data.examples import load_scored

    if recipe.task not in _SCORERS:
        raise RecipeError(
            f"--data: a run of task {recipe.task} is not scored on a file; those of {', '.join(_SCORERS)} are"
        )
    if not Path(file).expanduser().is_file():
        raise DataError(f"--data: {missing_path(file)}")
    require(f"scoring {file}", "datasets", recipe.kind.package)
    table, _, notes = load_scored(recipe, str(file), [str(name) for name in head.label_names])
    return (table.select(range(min(limit, len(table)))) if limit else table), notes


def score_rows(loaded: Loaded, file: str | Path, table: Dataset, notes: Sequence[str], *, batch: int = 8) -> OwnScores:
    """The scores of rows that `read_file` has read, by the run's task. Raises DataError for rows that don't fit."""
    data = loaded.recipe.data.model_copy(update={"train": str(file)})  # errors name the file of a row
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"data": data}))
    scores = _SCORERS[loaded.recipe.task](loaded, table, batch)
    return OwnScores(**{**scores, "notes": [*notes, *scores.get("notes", [])], "rows": len(table)})


def _labelled(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    from ziggurat.training.answers.predict import predict
    from ziggurat.training.loop.classes import by_class, shown_texts

    second = list(table["text_pair"]) if "text_pair" in table.column_names else None
    answers = predict(loaded, list(table["text"]), second, batch=batch)
    labels, names = np.asarray(list(table["label"])), [str(name) for name in loaded.head.label_names]
    if not names:
        outputs, classes = np.asarray([answer.answer for answer in answers], dtype=np.float64), {}
    else:
        outputs, classes = np.asarray([[(answer.shares or {})[name] for name in names] for answer in answers]), {}
        if loaded.recipe.task == "multilabel":
            outputs = outputs - 0.5
        else:
            classes = by_class(outputs, labels, names, shown_texts(table))
    scores = score(loaded.recipe, outputs, labels, len(names))
    rows = len(labels)
    if not names:
        squares = (outputs.reshape(-1) - labels) ** 2
        intervals = {name: correlation_interval(name, scores[name], rows) for name in FACTORS if rows > 3}
        intervals |= drawn_intervals(lambda drawn: {"rmse": float(np.sqrt(squares[drawn].mean()))}, rows)
    else:
        share = "subset_accuracy" if loaded.recipe.task == "multilabel" else "accuracy"

        def of_rows(drawn: np.ndarray) -> dict[str, float]:
            scores = score(loaded.recipe, outputs[drawn], labels[drawn], len(names))
            # Rows of one class alone tell nothing of how classes are told apart, and would score 0.
            if labels.ndim == 1 and len(np.unique(labels[drawn])) == 1 < len(np.unique(labels)):
                return dict.fromkeys(scores, math.nan)
            return scores

        intervals = drawn_intervals(of_rows, rows)
        intervals[share] = share_interval(round(scores[share] * rows / 100), rows)
    per_cent = tuple(name for name in scores if name != "rmse")
    return {"scores": scores, "intervals": intervals, "per_cent": per_cent, "by_class": classes}


def _tagged(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """Scores of entities; words beyond the maximum length count as outside of entities."""
    from ziggurat.training.answers.entities import tags_of
    from ziggurat.training.loop.entities import entity_counts, scores_of_counts

    names = [str(name) for name in loaded.head.label_names]
    truth = [[names[place] for place in row] for row in table["label"]]
    answers = list(tags_of(loaded, list(table["tokens"]), batch))
    counts = entity_counts(truth, answers)
    scores = scores_of_counts(counts)
    intervals = drawn_intervals(lambda rows: scores_of_counts(counts[rows]), len(counts))
    return {"scores": scores, "intervals": intervals, "per_cent": tuple(scores)}


def _answers(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """Perplexity of the answers, and the share of rows whose answer is written word for word (greedily)."""
    from ziggurat.training.data.encode import positions
    from ziggurat.training.data.tokens import tokens_of
    from ziggurat.training.model.generate import Sampling, generate
    from ziggurat.training.model.seeing import question_of

    notes: list[str] = []
    if loaded.processor is None:
        rows = tokens_of(loaded.recipe, loaded.tokenizer, table, "scored", notes)
        logs, counts = answer_logs(loaded, rows, batch, notes)
    else:
        logs, counts = seen_logs(loaded, table, batch, notes)

    def of_rows(drawn: np.ndarray) -> dict[str, float]:
        loss = float(-logs[drawn].sum() / counts[drawn].sum())
        return {"perplexity": perplexity(loss), "loss": loss}

    scores = of_rows(np.arange(len(logs)))
    intervals = drawn_intervals(of_rows, len(logs))
    writer = loaded.writer
    questions = [question for row in table if (question := question_of(writer, row)) is not None]  # type: ignore[arg-type]
    if not questions:
        return {"scores": scores, "intervals": intervals, "per_cent": (), "notes": notes}
    most = positions(loaded.model.config) if loaded.processor is None else None
    fitting = [question for question in questions if most is None or len(question[0]) < most]
    if len(fitting) < len(questions):
        left_out = len(questions) - len(fitting)
        notes.append(f"{left_out} questions fill all {most} positions of the model: their answers count as wrong")
    prompts, answers = [ids for ids, _, _ in fitting], [answer.strip() for _, _, answer in fitting]
    longest = max((len(loaded.tokenizer(answer)["input_ids"]) for answer in answers), default=0)
    sampling = Sampling(tokens=min(longest + 8, 512))
    written = generate(loaded.model, writer, prompts, sampling, batch=batch, name=loaded.recipe.model)
    hits = sum(text == answer for text, answer in zip(written, answers, strict=True))
    scores["exact_match"] = 100.0 * hits / len(questions)
    intervals["exact_match"] = share_interval(hits, len(questions))
    return {"scores": scores, "intervals": intervals, "per_cent": ("exact_match",), "notes": notes}


def _sequences(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """ROUGE and exact match of the likeliest texts, sources cut as in training."""
    from ziggurat.recipe.schema import MOST_LENGTH
    from ziggurat.training.data.encode import longest
    from ziggurat.training.data.sources import source_ids, target_ids
    from ziggurat.training.loop.sequences import text_scores
    from ziggurat.training.model.generate import Sampling, generate

    recipe, tokenizer, targets, notes = loaded.recipe, loaded.tokenizer, list(table["target"]), list[str]()
    length = longest(tokenizer, loaded.model.config, recipe.data.max_length or MOST_LENGTH)
    sources = source_ids(recipe, tokenizer, table["source"])
    if cut := sum(len(ids) > length for ids in sources):
        notes.append(f"{cut} of {len(sources)} sources are longer than {length} tokens and were cut")
        sources = source_ids(recipe, tokenizer, table["source"], length)
    needed = max(map(len, target_ids(recipe, tokenizer, targets)))
    sampling = Sampling(tokens=min(recipe.data.max_target or needed, MOST_LENGTH))
    written = list(generate(loaded.model, tokenizer, sources, sampling, batch=batch, name=recipe.model))
    rows = text_scores(written, targets)
    intervals = drawn_intervals(partial(means_of, rows), len(written))
    intervals["exact_match"] = share_interval(int((rows["exact_match"] > 0).sum()), len(written))
    scores = {name: float(of.mean()) for name, of in rows.items()}
    return {"scores": scores, "intervals": intervals, "per_cent": tuple(scores), "notes": notes}


#: Task -> the function that scores its rows.
_SCORERS: dict[str, Callable[[Loaded, Dataset, int], dict[str, Any]]] = {
    **dict.fromkeys(("classification", "multilabel", "regression"), _labelled),
    "tokens": _tagged,
    "instruct": _answers,
    "seq2seq": _sequences,
    **dict.fromkeys(("dpo", "orpo", "reward"), preferences),
    "kto": judged,
}
