"""Drawing validation rows if the recipe names none, and weighting several training files."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ziggurat.errors import DataError, first_line
from ziggurat.recipe.schema import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

#: With fewer validation rows the run notes that its scores are coarse.
FEW = 50
#: The column with the number of a row's file.
ORIGIN = "origin"


@dataclass(frozen=True)
class Split:
    """Row numbers (from 0, in the file's order) of the two parts, how many rows repeat an earlier one, and whether
    equal rows are all on one side."""

    train: list[int]
    validation: list[int]
    repeated: int
    apart: bool


def draw_split(texts: Sequence[Hashable], strata: Sequence[Hashable] | None, count: int, seed: int) -> Split:
    """Draw about `count` validation rows. Rows with equal `texts` stay on one side, if a class has two of them.

    With `strata` (the class of each row) every class gives validation rows by its share of all rows, and at least one
    of its texts stays in training. Where repeated texts don't add up to `count`, fewer rows are drawn (more, if all are
    repeated more often).

    Raises DataError if no row can be drawn: each class has one row.
    """
    kinds: list[Hashable] = list(strata) if strata is not None else [None] * len(texts)
    groups: dict[Hashable, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(text, []).append(index)
    single = {index: [index] for index in range(len(texts))}
    drawn = _drawn(list(groups.values()), kinds, count, seed)
    apart = bool(drawn)
    drawn = drawn or _drawn(list(single.values()), kinds, count, seed)
    if not drawn:
        raise DataError(
            "no row can be split off for the scores, since every class would lose its only row; name validation data "
            "in data.validation"
        )
    train = [index for index in range(len(texts)) if index not in drawn]
    return Split(train, sorted(drawn), len(texts) - len(groups), apart)


def _drawn(groups: list[list[int]], kinds: list[Hashable], count: int, seed: int) -> set[int]:
    """The rows of the drawn groups; none if every class has a single group."""
    random.Random(seed).shuffle(groups)  # noqa: S311
    spare = Counter(kinds[group[0]] for group in groups)  # groups that training still has
    drawn: set[int] = set()
    remaining, quotas = count, _quotas(Counter(kinds), count)
    for by_class in (True, False):  # by class first, then whatever fits
        for group in groups:
            kind = kinds[group[0]]
            room = min(remaining, quotas[kind]) if by_class else remaining
            if len(group) <= room and spare[kind] > 1 and group[0] not in drawn:
                drawn.update(group)
                spare[kind] -= 1
                remaining -= len(group)
                quotas[kind] -= len(group)
    if not drawn:  # every text is repeated more often than `count`
        drawn.update(min((group for group in groups if spare[kinds[group[0]]] > 1), key=len, default=[]))
    return drawn


def _quotas(sizes: Counter[Hashable], count: int) -> dict[Hashable, int]:
    """The number of validation rows from each class, by the method of largest remainders."""
    shares = {kind: count * size / sizes.total() for kind, size in sizes.items()}
    quotas = {kind: int(share) for kind, share in shares.items()}
    unassigned = count - sum(quotas.values())
    for kind in sorted(shares, key=lambda kind: quotas[kind] - shares[kind])[:unassigned]:
        quotas[kind] += 1
    return quotas


def joined(tables: Sequence[Dataset], sources: Sequence[str]) -> Dataset:
    """The rows of all tables, with the column `ORIGIN` if there are several. Raises DataError if their columns
    differ."""
    if len(tables) == 1:
        return tables[0]
    from datasets import concatenate_datasets

    try:
        whole = concatenate_datasets(list(tables))
    except (ValueError, TypeError) as error:
        problem = f"the columns of {', '.join(sources)} hold values of several kinds"
        raise DataError(f"data.train: {problem}: {first_line(error)}") from error
    return whole.add_column(ORIGIN, [place for place, table in enumerate(tables) for _ in table])


def mixed(recipe: Recipe, train: Dataset, notes: list[str]) -> Dataset:
    """The training rows by `data.weights`: with 2 each row twice, with 0.5 half of the rows, drawn with the seed."""
    if ORIGIN not in train.column_names:
        return train
    sources = recipe.data.sources
    weights = recipe.data.weights or [1.0] * len(sources)
    origins, draws, drawn = list(train[ORIGIN]), random.Random(recipe.seed), []  # noqa: S311
    for place, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        rows = [index for index, origin in enumerate(origins) if origin == place]
        whole = int(weight)
        part = rows * whole + sorted(draws.sample(rows, round((weight - whole) * len(rows))))
        notes.append(f"{source}: {len(rows)} training rows, with weight {weight:g} {len(part)}")
        drawn += part
    if not drawn:
        raise DataError("data.weights: no row is left to learn from; raise them")
    return train.select(drawn).remove_columns(ORIGIN)
