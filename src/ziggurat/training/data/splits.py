"""The validation rows that are drawn from the training rows where no others are named."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ziggurat.errors import DataError

#: Below so many validation rows the run says how coarse its scores are.
FEW = 50


@dataclass(frozen=True)
class Split:
    """Row numbers (from 0, in the file's order) of the two parts, how many rows repeat an earlier one, and whether
    equal rows are all on one side."""

    train: list[int]
    validation: list[int]
    repeated: int
    apart: bool


def draw_split(texts: Sequence[Hashable], strata: Sequence[Hashable] | None, count: int, seed: int) -> Split:
    """Draw about `count` validation rows. Rows with equal `texts` stay on one side, where a class has two of them.

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
    """The rows of the groups that are drawn; none where every class has one group."""
    random.Random(seed).shuffle(groups)  # noqa: S311
    spare = Counter(kinds[group[0]] for group in groups)  # groups that training still has
    drawn: set[int] = set()
    left, quotas = count, _quotas(Counter(kinds), count)
    for by_class in (True, False):  # by class first, then whatever fits
        for group in groups:
            kind = kinds[group[0]]
            room = min(left, quotas[kind]) if by_class else left
            if len(group) <= room and spare[kind] > 1 and group[0] not in drawn:
                drawn.update(group)
                spare[kind] -= 1
                left -= len(group)
                quotas[kind] -= len(group)
    if not drawn:  # every text is repeated more often than `count`
        drawn.update(min((group for group in groups if spare[kinds[group[0]]] > 1), key=len, default=[]))
    return drawn


def _quotas(sizes: Counter[Hashable], count: int) -> dict[Hashable, int]:
    """How many rows each class gives, by the largest remainders of its share."""
    shares = {kind: count * size / sizes.total() for kind, size in sizes.items()}
    quotas = {kind: int(share) for kind, share in shares.items()}
    rest = count - sum(quotas.values())
    for kind in sorted(shares, key=lambda kind: quotas[kind] - shares[kind])[:rest]:
        quotas[kind] += 1
    return quotas
