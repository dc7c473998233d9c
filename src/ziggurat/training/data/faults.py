"""Rows of a table that can't be learned from, collected so that one error or one note names them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

#: Row numbers that a message spells out for each fault.
SHOWN = 5


class Faults:
    """What is wrong with which rows of one table; rows are counted as the file has them, from 1.

    A fault is a *gap* where the row lacks what is needed, and can be left out with `data.drop_missing`; any other has
    to be mended in the file.
    """

    def __init__(self, source: str, total: int) -> None:
        self.source, self.total = source, total
        self._rows: dict[str, list[int]] = {}
        self._gaps: set[str] = set()

    @property
    def kinds(self) -> list[str]:
        """What is wrong, each once."""
        return list(self._rows)

    def add(self, index: int, what: str, *, gap: bool = False) -> None:
        """Row `index` (from 0) has the fault `what`. Values belong into `what` only where few rows have them."""
        self._rows.setdefault(what, []).append(index)
        if gap:
            self._gaps.add(what)

    def settle(self, table: Dataset, drop: bool) -> tuple[Dataset, list[str]]:
        """The rows without a gap, and a note of those that were left out.

        Raises DataError that counts every fault: those that aren't gaps, and gaps too unless `drop`; or if no row is
        left.
        """
        refused = {what: rows for what, rows in self._rows.items() if not drop or what not in self._gaps}
        if refused:
            raise DataError(self._refusal(refused))
        if not self._rows:
            return table, []
        gone = {index for rows in self._rows.values() for index in rows}
        kinds = "; ".join(f"{what} ({listed(rows)})" for what, rows in self._rows.items())
        note = f"data.drop_missing leaves out {len(gone)} of {self.total} rows of {self.source}: {kinds}"
        if len(gone) == self.total:
            raise DataError(f"{note}; none is left")
        return table.select([index for index in range(len(table)) if index not in gone]), [note]

    def _refusal(self, refused: dict[str, list[int]]) -> str:
        bad = {index for rows in refused.values() for index in rows}
        lines = [f"  {listed(rows)}: {what}" for what, rows in refused.items()]
        gaps = all(what in self._gaps for what in refused)
        do = "take them out of the file, or set data.drop_missing: true" if gaps else "mend them, or take them out"
        return f"{self.source}: {len(bad)} of {self.total} rows cannot be used; {do}\n" + "\n".join(lines)


def listed(rows: Iterable[int]) -> str:
    """`row 3`, `rows 3, 9`, `rows 3, 9, 12, 15, 16 and 4 more`; indices count from 0, rows from 1."""
    numbers = [index + 1 for index in rows]
    shown = ", ".join(f"{number:,}" for number in numbers[:SHOWN])
    more = f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


def kind_of(value: Any) -> str:
    """What a value is that should be a text, in words for an error."""
    if isinstance(value, bytes):
        return "bytes that are not UTF-8 throughout"
    return f"a {type(value).__name__}"


class RowFault(ValueError):
    """What is wrong with one row, raised where it is read and noted in `Faults` by whoever goes through the rows."""

    def __init__(self, what: str, *, gap: bool = False) -> None:
        super().__init__(what)
        self.gap = gap
