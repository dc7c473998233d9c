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
    """Row numbers (from 0, in the file's order) of the two parts, and how many rows repeat an earlier one."""

    train: list[int]
    validation: list[int]
    repeated: int


def draw_split(texts: Sequence[Hashable], strata: Sequence[Hashable] | None, count: int, seed: int) -> Split:
    """Draw about `count` validation rows. Rows with equal `texts` stay on one side.

    With `strata` (the class of each row) every class gives validation rows by its share of all rows, and at least one
    of its texts stays in training. Where repeated texts don't add up to `count`, fewer rows are drawn (more, if all are
    repeated more often). If all rows repeat one text, the rows themselves are split.

    Raises DataError if no row can be drawn: each class has one text.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(text, []).append(index)
    repeated = len(texts) - len(groups)
    if len(groups) == 1:
        groups = {index: [index] for index in range(len(texts))}
    order = list(groups.values())
    random.Random(seed).shuffle(order)  # noqa: S311

    def stratum(group: list[int]) -> Hashable:
        return strata[group[0]] if strata is not None else None

    spare = Counter(map(stratum, order))  # groups that training still has
    wanted = _quotas(Counter(map(stratum, [[index] for group in order for index in group])), count, strata)
    drawn: set[int] = set()
    left = count
    for quota in (wanted, None):  # by class first, then whatever fits
        for group in order:
            kind = stratum(group)
            room = left if quota is None else min(left, quota[kind])
            if len(group) <= room and spare[kind] > 1 and group[0] not in drawn:
                drawn.update(group)
                spare[kind] -= 1
                left -= len(group)
                if quota is not None:
                    quota[kind] -= len(group)
    if not drawn:  # every text is repeated more often than `count`
        spared = [group for group in order if spare[stratum(group)] > 1]
        if not spared:
            raise DataError(
                "no row can be split off for the scores, since every class would lose its only text; name validation "
                "data in data.validation"
            )
        drawn.update(min(spared, key=len))
    train = [index for index in range(len(texts)) if index not in drawn]
    return Split(train, sorted(drawn), repeated)


def _quotas(sizes: Counter[Hashable], count: int, strata: Sequence[Hashable] | None) -> dict[Hashable, int]:
    """How many rows each class gives, by the largest remainders of its share."""
    if strata is None:
        return {None: count}
    shares = {kind: count * size / sizes.total() for kind, size in sizes.items()}
    quotas = {kind: int(share) for kind, share in shares.items()}
    rest = count - sum(quotas.values())
    for kind in sorted(shares, key=lambda kind: quotas[kind] - shares[kind])[:rest]:
        quotas[kind] += 1
    return quotas
