"""Dropout masks: right frequencies, reproducible, readable in parts."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fresh import FORKS
from ziggurat.lowrank import mask as masks


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 2**31))
def test_applying_zeroes_entries_and_keeps_the_rest(shape: list[int], p: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape) + 10
    mask = masks.draw(x, p)
    once = masks.apply(x, mask)
    assert torch.equal(once, torch.where(once == 0, 0, x))
    assert torch.equal(once, masks.apply(x, mask))
    assert torch.equal(once, x * masks.kept(mask, 0, x.numel()).view(x.shape))
    assert mask.nbytes == (4 * int((once == 0).sum()) if masks.is_numbered(mask) else -(-x.numel() // 8))
    assert masks.is_numbered(mask) == (0 < masks.threshold(p) <= 2**13)
    assert torch.equal(once, masks.apply(y := x.clone(), mask, out=y))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.12, 0.13, 0.5, 0.9])
def test_entries_are_dropped_with_the_probability_and_independently(p: float) -> None:
    torch.manual_seed(0)
    n = 1_000_000
    x = torch.ones(n)
    kept = masks.apply(x, masks.draw(x, p))
    # Five standard deviations of a mean of n Bernoulli draws, and of a product of two neighbours.
    assert abs((1 - kept).mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    for step in (1, 2, 4, 8, 64):
        both = (1 - kept[:-step]) * (1 - kept[step:])
        assert abs(both.mean().item() - p * p) < 5 * (p * p / n) ** 0.5 + 1e-7
    assert abs((kept * masks.keep_scale(p)).mean().item() - 1) < 5 * (p / (1 - p) / n) ** 0.5


def test_nothing_and_everything() -> None:
    x = torch.ones(1000)
    assert masks.apply(x, masks.draw(x, 0.0)).all()
    assert not masks.apply(x, masks.draw(x, 1.0)).any()
    assert masks.keep_scale(0.0) == 1
    assert masks.keep_scale(1.0) == 0
    assert masks.keep_scale(0.1) == pytest.approx(1 / 0.9, rel=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_seed_decides_and_masks_differ(p: float) -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(5)
    first, second = masks.draw(x, p), masks.draw(x, p)
    torch.manual_seed(5)
    assert torch.equal(first, masks.draw(x, p))
    assert not torch.equal(masks.apply(x, first), masks.apply(x, second))


def test_threads_draw_by_generators_of_their_own() -> None:
    """A mask depends on torch's generator alone, not on what this or another thread drew before."""
    x = torch.ones(64, 64)

    def draw(p: float) -> torch.Tensor:
        torch.manual_seed(5)
        return masks.draw(x, p)

    for p in (0.1, 0.5):
        here = draw(p)
        draw(0.3)
        assert torch.equal(draw(p), here)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(draw, p).result(), here)


@pytest.mark.parametrize("p", [2**-16, 0.01, 0.125])
def test_numbered_entries_are_drawn_anew_until_they_reach_the_end(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps that are all short, as happens once in a while: the first draw of them doesn't reach the last entry."""
    n, source = 400_000, masks._source()

    class Short:
        calls = 0

        def standard_exponential(self, size: int, dtype: type) -> "np.ndarray[Any, Any]":
            self.calls += 1
            gaps = source.standard_exponential(size, dtype=dtype)
            return gaps / 2 if self.calls == 1 else gaps

    short = Short()
    numbers = masks._numbers(short, n, p)  # type: ignore[arg-type]
    assert short.calls > 1 or p == 2**-16
    assert (np.diff(numbers) > 0).all()
    assert numbers.size == 0 or 0 <= numbers[0] <= numbers[-1] < n
    assert numbers.dtype == np.int32


@given(st.integers(1, 60), st.integers(1, 17), st.integers(1, 5), st.sampled_from([0.1, 0.4]))
def test_parts_make_the_whole(rows: int, columns: int, eights: int, p: float) -> None:
    x = torch.randn(rows, columns)
    mask = masks.draw(x, p)
    step = 8 * eights
    parts = [masks.apply(x[i : i + step], mask, start=i * columns) for i in range(0, rows, step)]
    assert torch.equal(torch.cat(parts), masks.apply(x, mask))


def test_a_mask_longer_than_one_block_of_random_bits() -> None:
    x = torch.ones(3 * masks._BLOCK + 12_345)
    kept = masks.apply(x, masks.draw(x, 0.25))
    for i, part in enumerate(kept.split(masks._BLOCK)):
        assert abs(part.mean().item() - 0.75) < 0.03
        assert i == 0 or not torch.equal(part, kept[: len(part)])


def test_without_memory() -> None:
    x = torch.empty(4, 6, device="meta")
    assert masks.apply(x, masks.draw(x, 0.5)).shape == (4, 6)


def _draw_in_a_group(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(masks.kept(masks.draw(torch.empty(64, 16), 0.5), 0, 64 * 16))
        drawn.append(masks.kept(masks.draw(torch.empty(64, 16), 0.1), 0, 64 * 16))
    torch.save(drawn, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_that_are_seeded_alike_drop_other_entries(tmp_path: Path) -> None:
    way = "fork" if FORKS else "spawn"  # a spawned process loads the libraries anew
    torch.multiprocessing.start_processes(_draw_in_a_group, (str(tmp_path),), nprocs=2, start_method=way)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for drawn in (first, second):
        assert torch.equal(drawn[0], drawn[2])
        assert torch.equal(drawn[1], drawn[3])
    for i in (0, 1):
        assert not torch.equal(first[i], second[i])
    torch.manual_seed(0)
    assert torch.equal(masks.kept(masks.draw(torch.empty(64, 16), 0.5), 0, 64 * 16), first[0])
