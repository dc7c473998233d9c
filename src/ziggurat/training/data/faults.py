"""Rows of a table that can't be learned from, collected so that one error or one note names them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ziggurat.errors import DataError, with_article

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

#: Row numbers that a message spells out for each fault.
SHOWN = 5


class Faults:
    """The faults of the rows of one table; rows are counted from 1, in the file's order.

    A fault is a *gap* if the row lacks a needed value, and can be left out with `data.drop_missing`; other faults have
    to be mended in the file.
    """

    def __init__(self, source: str, total: int) -> None:
        self.source, self.total = source, total
        self._rows: dict[str, list[int]] = {}
        self._gaps: set[str] = set()

    def add(self, index: int, fault: str, *, gap: bool = False) -> None:
        """Record a fault of row `index` (from 0). Its text should contain a value only if few rows have it."""
        self._rows.setdefault(fault, []).append(index)
        if gap:
            self._gaps.add(fault)

    def each(self, rows: Iterable[Any], read: Callable[[Any], T | None]) -> dict[int, T]:
        """Row number -> the result of `read` for the row, without rows of None. A RowFault is recorded."""
        made: dict[int, T] = {}
        for index, row in enumerate(rows):
            try:
                value = read(row)
            except RowFault as fault:
                self.add(index, str(fault), gap=fault.gap)
            else:
                if value is not None:
                    made[index + 1] = value
        return made

    def settle(self, table: Dataset, drop: bool | None) -> tuple[Dataset, list[str]]:
        """The rows without a gap, and a note about those that were left out. `drop` None: none can be left out here.

        Raises DataError that counts every fault: those that aren't gaps, and gaps too unless `drop`; or if no row is
        left.
        """
        refused = {fault: rows for fault, rows in self._rows.items() if not drop or fault not in self._gaps}
        if refused:
            raise DataError(self._refusal(refused, drop is not None))
        if not self._rows:
            return table, []
        gone = {index for rows in self._rows.values() for index in rows}
        kinds = "; ".join(f"{fault} ({listed(rows)})" for fault, rows in self._rows.items())
        note = f"data.drop_missing leaves out {len(gone)} of {self.total} rows of {self.source}: {kinds}"
        if len(gone) == self.total:
            raise DataError(f"{note}; none is left")
        return table.select([index for index in range(len(table)) if index not in gone]), [note]

    def _refusal(self, refused: dict[str, list[int]], may_drop: bool) -> str:
        bad = {index for rows in refused.values() for index in rows}
        lines = [f"  {listed(rows)}: {fault}" for fault, rows in refused.items()]
        gaps = may_drop and all(fault in self._gaps for fault in refused)
        do = "take them out of the file, or set data.drop_missing: true" if gaps else "mend them, or take them out"
        return f"{self.source}: {len(bad)} of {self.total} rows cannot be used; {do}\n" + "\n".join(lines)


def listed(rows: Iterable[int]) -> str:
    """`row 3`, `rows 3, 9`, `rows 3, 9, 12, 15, 16 and 4 more`; indices count from 0, rows from 1."""
    numbers = [index + 1 for index in rows]
    shown = ", ".join(f"{number:,}" for number in numbers[:SHOWN])
    more = f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


def kind_of(value: Any) -> str:
    """The kind of a value that should be a text, in words for an error."""
    if isinstance(value, bytes):
        return "bytes that are not UTF-8 throughout"
    return with_article(type(value).__name__)


class RowFault(ValueError):
    """The fault of one row, raised by its reader and collected by `Faults.each`."""

    def __init__(self, fault: str, *, gap: bool = False) -> None:
        super().__init__(fault)
        self.gap = gap
