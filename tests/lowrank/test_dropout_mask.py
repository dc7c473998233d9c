"""Dropout masks: right frequencies, reproducible, readable in parts."""

from pathlib import Path

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
    assert mask.nbytes == -(-x.numel() // 8)
    once = masks.apply(x, mask)
    assert torch.equal(once, torch.where(once == 0, 0, x))
    assert torch.equal(once, masks.apply(x, mask))
    assert torch.equal(once, masks.apply(x.clone(), mask, in_place=True))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
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


def test_the_seed_decides_and_masks_differ() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(5)
    first, second = masks.draw(x, 0.5), masks.draw(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(first, masks.draw(x, 0.5))
    assert not torch.equal(first, second)


@given(st.integers(1, 60), st.integers(1, 17), st.integers(1, 5))
def test_parts_make_the_whole(rows: int, columns: int, eights: int) -> None:
    x = torch.randn(rows, columns)
    mask = masks.draw(x, 0.4)
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
        drawn.append(masks.draw(torch.empty(64, 16), 0.5))
    torch.save(drawn, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_that_are_seeded_alike_drop_other_entries(tmp_path: Path) -> None:
    way = "fork" if FORKS else "spawn"  # a spawned process loads the libraries anew
    torch.multiprocessing.start_processes(_draw_in_a_group, (str(tmp_path),), nprocs=2, start_method=way)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for masks_of_call in (first, second):
        assert torch.equal(masks_of_call[0], masks_of_call[1])
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(0)
    assert torch.equal(masks.draw(torch.empty(64, 16), 0.5), first[0])
