"""A trained adapter on a labelled file of one's own: the scores of its run's task, with their intervals."""

from __future__ import annotations

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

from .intervals import FACTORS, correlation_interval, drawn_interval, share_interval

if TYPE_CHECKING:
    from datasets import Dataset

    from ziggurat.training.answers.load import Loaded
    from ziggurat.training.model.base import HeadSpec


@dataclass(frozen=True)
class OwnScores:
    """Scores of `rows` rows, and the 95% intervals of those that have one; both in per cent for those in `per_cent`.

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
        DataError: no such file, or rows that can't be scored: all at once.
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
    data = loaded.recipe.data.model_copy(update={"train": str(file)})  # for errors, which name where a row stands
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"data": data}))
    found = _SCORERS[loaded.recipe.task](loaded, table, batch)
    return OwnScores(**{**found, "notes": [*notes, *found.get("notes", [])], "rows": len(table)})


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
    metric, rows = loaded.recipe.main_metric, len(labels)

    def of_rows(drawn: np.ndarray) -> float:
        return score(loaded.recipe, outputs[drawn], labels[drawn], len(names))[metric]

    if not names:
        intervals = {name: correlation_interval(name, scores[name], rows) for name in FACTORS if rows > 3}
    else:
        share = "subset_accuracy" if loaded.recipe.task == "multilabel" else "accuracy"
        intervals = {share: share_interval(round(scores[share] * rows / 100), rows)}
        intervals |= {metric: drawn_interval(of_rows, rows)} if metric != share else {}
    per_cent = tuple(name for name in scores if name != "rmse")
    return {"scores": scores, "intervals": intervals, "per_cent": per_cent, "by_class": classes}


def _tagged(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """Scores of entities; words behind the longest length count as words in none."""
    from ziggurat.training.answers.entities import tags_of
    from ziggurat.training.loop.entities import entity_counts, entity_f1, entity_scores

    names = [str(name) for name in loaded.head.label_names]
    truth = [[names[place] for place in row] for row in table["label"]]
    answers = list(tags_of(loaded, list(table["tokens"]), batch))
    counts, scores = entity_counts(truth, answers), entity_scores(truth, answers)
    intervals = {"entity_f1": drawn_interval(lambda rows: entity_f1(counts[rows]), len(counts))}
    return {"scores": scores, "intervals": intervals, "per_cent": tuple(scores)}


def _answers(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """Perplexity of the answers, and the share of rows whose answer is written word for word (greedily)."""
    from ziggurat.training.data.encode import positions
    from ziggurat.training.data.template import question_of
    from ziggurat.training.data.tokens import tokens_of
    from ziggurat.training.model.generate import Sampling, generate

    notes: list[str] = []
    if loaded.processor is None:
        rows = tokens_of(loaded.recipe, loaded.tokenizer, table, "scored", notes)
        logs, counts = _answer_logs(loaded, rows, batch, notes)
        asked = [question_of(loaded.tokenizer, row) for row in table]  # type: ignore[arg-type]
    else:
        from ziggurat.training.model import seeing

        logs, counts = _seen_logs(loaded, table, batch, notes)
        asked = [seeing.question_of(loaded.writer, row) for row in table]  # type: ignore[arg-type]
    loss = -logs.sum() / counts.sum()
    scores = {"perplexity": perplexity(float(loss)), "loss": float(loss)}

    def of_rows(drawn: np.ndarray) -> float:
        return perplexity(float(-logs[drawn].sum() / counts[drawn].sum()))

    intervals = {"perplexity": drawn_interval(of_rows, len(logs))}
    asked = [question for question in asked if question is not None]
    if not asked:
        return {"scores": scores, "intervals": intervals, "per_cent": (), "notes": notes}
    most = positions(loaded.model.config) if loaded.processor is None else None
    fitting = [question for question in asked if most is None or len(question[0]) < most]
    if len(fitting) < len(asked):
        left_out = len(asked) - len(fitting)
        notes.append(f"{left_out} questions fill all {most} positions of the model: their answers count as wrong")
    prompts, answers = [ids for ids, _, _ in fitting], [answer.strip() for _, _, answer in fitting]
    longest = max((len(loaded.tokenizer(answer)["input_ids"]) for answer in answers), default=0)  # type: ignore[arg-type]
    wanted = Sampling(tokens=min(longest + 8, 512))
    if loaded.processor is None:
        written = generate(loaded.model, loaded.tokenizer, prompts, wanted, batch=batch, name=loaded.recipe.model)
    else:
        written = seeing.answers(loaded.model, loaded.processor, prompts, wanted, batch=batch)
    hits = sum(text == answer for text, answer in zip(written, answers, strict=True))
    scores["exact_match"] = 100.0 * hits / len(asked)
    intervals["exact_match"] = share_interval(hits, len(asked))
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
    asked = source_ids(recipe, tokenizer, table["source"])
    if cut := sum(len(ids) > length for ids in asked):
        notes.append(f"{cut} of {len(asked)} sources are longer than {length} tokens and were cut")
        asked = source_ids(recipe, tokenizer, table["source"], length)
    needed = max(map(len, target_ids(recipe, tokenizer, targets)))
    wanted = Sampling(tokens=min(recipe.data.max_target or needed, MOST_LENGTH))
    written = list(generate(loaded.model, tokenizer, asked, wanted, batch=batch, name=recipe.model))
    rows = text_scores(written, targets)
    intervals = {name: drawn_interval(partial(_mean, of), len(of)) for name, of in rows.items()}
    intervals["exact_match"] = share_interval(int((rows["exact_match"] > 0).sum()), len(written))
    scores = {name: float(of.mean()) for name, of in rows.items()}
    return {"scores": scores, "intervals": intervals, "per_cent": tuple(scores), "notes": notes}


def _mean(scores: np.ndarray, rows: np.ndarray) -> float:
    return float(scores[rows].mean())


def _preferences(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """Share of pairs whose better answer has the greater reward beta ln p(y | x) / p_ref(y | x), and the distance."""
    from ziggurat.training.data.prefer import WORSE
    from ziggurat.training.data.tokens import tokens_of

    notes: list[str] = []
    worse = table.select_columns([name for name in table.column_names if name.endswith(WORSE) or name == "row"])
    worse = worse.rename_columns({name: name.removesuffix(WORSE) for name in worse.column_names if name != "row"})
    notes += _of_reference(loaded)
    better, lesser = (
        _rewards(loaded, tokens_of(loaded.recipe, loaded.tokenizer, part, "scored", notes), batch, notes)
        for part in (table, worse)
    )
    gaps = better - lesser
    hits = int((gaps > 0).sum())
    return {
        "scores": {"accuracy": 100.0 * hits / len(gaps), "margin": float(gaps.mean())},
        "intervals": {
            "accuracy": share_interval(hits, len(gaps)),
            "margin": drawn_interval(partial(_mean, gaps), len(gaps)),
        },
        "per_cent": ("accuracy",),
        "notes": list(dict.fromkeys(notes)),
    }


def _judged(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """The distance between the mean rewards of good and of bad answers."""
    from ziggurat.training.data.tokens import tokens_of

    notes: list[str] = []
    good = np.asarray(table["good"], dtype=bool)
    if good.all() or not good.any():
        kind = "good" if good.all() else "bad"
        raise DataError(f"--data: all {len(good)} answers are {kind}, and their distance needs both; raise --limit")
    rows = tokens_of(loaded.recipe, loaded.tokenizer, table, "scored", notes)
    notes += _of_reference(loaded)
    rewards = _rewards(loaded, rows, batch, notes)
    margin = float(rewards[good].mean() - rewards[~good].mean())
    return {"scores": {"margin": margin}, "intervals": {}, "per_cent": (), "notes": notes}


#: Task -> what scores its rows.
_SCORERS: dict[str, Callable[[Loaded, Dataset, int], dict[str, Any]]] = {
    "classification": _labelled,
    "multilabel": _labelled,
    "tokens": _tagged,
    "regression": _labelled,
    "instruct": _answers,
    "seq2seq": _sequences,
    "dpo": _preferences,
    "kto": _judged,
}


def _of_reference(loaded: Loaded) -> list[str]:
    """A note where the run's own rewards were differences to another model than the one without an adapter."""
    if loaded.recipe.adapter is None:
        return []
    return ["rewards are differences to the model without an adapter; those of the run, to the adapter it went on from"]


def _rewards(loaded: Loaded, rows: Sequence[Any], batch: int, notes: list[str]) -> np.ndarray:
    """beta (ln p(y | x) - ln p_ref(y | x)) of every row; the reference is the model without its adapter."""
    without: Any = getattr(loaded.model, "disable_adapter", None)
    if without is None:
        raise RecipeError("--data: rewards are differences to the model without its adapter, and this run has none")
    logs, _ = _answer_logs(loaded, rows, batch, notes)
    with without():
        before, _ = _answer_logs(loaded, rows, batch, [])
    return loaded.recipe.train.beta * (logs - before)


def _answer_logs(loaded: Loaded, rows: Sequence[Any], batch: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of ln p over the answer's tokens of every row, and their number; rows are cut as in training."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    from ziggurat.recipe.schema import MOST_LENGTH
    from ziggurat.training.data.encode import longest

    length = longest(loaded.tokenizer, loaded.model.config, loaded.recipe.data.max_length or MOST_LENGTH)
    if cut := sum(len(ids) > length for ids, _ in rows):
        notes.append(f"{cut} of {len(rows)} rows are longer than {length} tokens and were cut")
    device = next(loaded.model.parameters()).device
    logs, counts = [], []
    for start in range(0, len(rows), batch):
        part = [(torch.tensor(ids[:length]), torch.tensor(mask[:length])) for ids, mask in rows[start : start + batch]]
        ids = pad_sequence([row for row, _ in part], batch_first=True).to(device)
        learned = pad_sequence([mask for _, mask in part], batch_first=True).to(device)[:, 1:]
        there = pad_sequence([torch.ones_like(mask) for _, mask in part], batch_first=True).to(device)
        with torch.no_grad():
            outputs = loaded.model(input_ids=ids, attention_mask=there).logits[:, :-1].float()
        losses = cross_entropy(outputs.transpose(1, 2), ids[:, 1:], reduction="none") * learned
        logs.append(-losses.sum(-1).double().cpu().numpy())
        counts.append(learned.sum(-1).cpu().numpy())
    total = np.concatenate(counts)
    if not total.any():
        raise DataError(f"--data: no row has an answer within {length} tokens")
    return np.concatenate(logs), total


def _seen_logs(loaded: Loaded, table: Dataset, batch: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """`_answer_logs` of conversations with images, whole."""
    import torch
    from torch.nn.functional import cross_entropy

    from ziggurat.training.model.seeing import ImageCollator, expanded, text_of

    writer, device = loaded.writer, next(loaded.model.parameters()).device
    rows = [
        {"labels": [token if on else -100 for token, on in zip(*learned, strict=True)], "text": text_of(writer, row),
         "images": row.get("images") or []}  # type: ignore[union-attr]
        for row, learned in zip(table, expanded(loaded.recipe, writer, table, "scored", notes), strict=True)
    ]  # fmt: skip
    logs, counts = [], []
    for start in range(0, len(rows), batch):
        inputs = {name: value.to(device) for name, value in ImageCollator(writer)(rows[start : start + batch]).items()}
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            outputs = loaded.model(**inputs).logits[:, :-1].float()
        losses = cross_entropy(outputs.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        logs.append(-losses.sum(-1).double().cpu().numpy())
        counts.append(labels.ne(-100).sum(-1).cpu().numpy())
    return np.concatenate(logs), np.concatenate(counts)
