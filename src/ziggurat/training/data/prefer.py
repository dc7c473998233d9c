"""Preference data: pairs of a better and a worse answer, and answers that are judged good or bad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from .chat import as_messages
from .faults import Faults, RowFault
from .instruct import RowReader, cells_of, column_of, joined_bare, to_rows, unread_note
from .tables import require_column
from .template import common_start

if TYPE_CHECKING:
    from datasets import Dataset

#: The suffix of the columns of the worse answer.
WORSE = "_rejected"
#: The columns of a pair.
_COLUMNS = ("prompt", "chosen", "rejected", "messages", "tools", "system")


def worse_of(table: Dataset) -> Dataset:
    """The worse answers of pairs, under the column names of the better ones."""
    worse = table.select_columns([name for name in table.column_names if name.endswith(WORSE) or name == "row"])
    return worse.rename_columns({name: name.removesuffix(WORSE) for name in worse.column_names if name != "row"})


def to_pairs(recipe: Recipe, table: Dataset, source: str) -> tuple[Dataset, str, list[str]]:
    """Pairs as two rows in one: the columns of `to_rows` for the better answer, and for the worse with `WORSE`.

    The answers are texts after a prompt, messages after a conversation, or two conversations with a common start.
    Raises DataError for missing columns and, counted together, for all rows that aren't a pair.
    """
    from datasets import Dataset

    columns = {name: column_of(recipe, name, table, source) for name in _COLUMNS}
    for name in ("chosen", "rejected"):
        require_column(table, columns[name] or name, f"data.columns.{name}", source)
    faults, reader = Faults(source, len(table)), RowReader(recipe, "prompt", columns)

    def pair(row: Any) -> dict[str, Any]:
        cells = cells_of(row, columns)
        prompt, good, bad = _pair(cells)
        better = reader.made({**cells, "prompt": prompt, "completion": good})
        worse = RowReader(recipe, "prompt", columns).made({**cells, "prompt": prompt, "completion": bad})
        if better is None or worse is None:
            raise RowFault("an answer is empty", gap=True)
        if better == worse:
            raise RowFault("both answers are the same", gap=True)
        return {**better, **{f"{name}{WORSE}": part for name, part in worse.items()}}

    rows = [{**row, "row": number} for number, row in faults.each(table, pair).items()]
    _, notes = faults.settle(table, recipe.data.drop_missing)
    reader.counts.pop("", None)
    notes += unread_note(table, columns, source)
    notes += joined_bare(rows)
    notes += [f"{count} of {len(table)} rows of {source} {remark}" for remark, count in sorted(reader.counts.items())]
    return Dataset.from_list(rows), "messages" if "messages" in rows[0] else "prompt", notes


def _pair(cells: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, better and worse answer: texts, or lists of messages."""
    good, bad = ([part] if isinstance(part, dict) else part for part in (cells["chosen"], cells["rejected"]))
    if (first := as_messages(good)) is None or (second := as_messages(bad)) is None:
        if cells["prompt"] is None and isinstance(good, str) and isinstance(bad, str):
            # Two whole texts: their common start, up to a word's end, is the prompt.
            shared = good[: common_start(good, bad)]
            start = len(shared) - len(shared.rstrip().rpartition(" ")[2]) if shared.rstrip() == shared else len(shared)
            return good[:start], good[start:], bad[start:]
        return cells["prompt"], good, bad
    before = as_messages(cells["prompt"]) or as_messages(cells["messages"])
    if before is None:
        start = common_start(first, second)
        before, first, second = first[:start], first[start:], second[start:]
        if not before and cells["prompt"]:
            before = [{"role": "user", "content": cells["prompt"]}]
    if not before:
        raise RowFault("the two conversations have no beginning in common, and there is no prompt")
    return before, first, second


def to_judged(recipe: Recipe, table: Dataset, source: str) -> tuple[Dataset, str, list[str]]:
    """The rows of `to_rows` with a column `good`, from `data.label`: true or false, or 1 and 0.

    Raises DataError as `to_rows` does, for other labels, and if all answers have the same one.
    """
    column, faults = recipe.data.label, Faults(source, len(table))
    require_column(table, column, "data.label", source)

    def verdict(value: Any) -> bool:
        if (word := str(value).strip().lower()) not in _VERDICTS:
            raise RowFault(f"no verdict in column '{column}': true or false is needed")
        return _VERDICTS[word]

    verdicts = faults.each(table[column], verdict)
    faults.settle(table, drop=None)
    rows, shape, notes = to_rows(recipe, table.remove_columns(column), source)
    good = [verdicts[number] for number in rows["row"]]
    if len(set(good)) < 2:
        raise DataError(f"data.label: all answers of {source} are {'good' if good[0] else 'bad'}; kto needs both")
    return rows.add_column("good", good), shape, notes


_VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
