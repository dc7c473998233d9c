"""Disks that fill up, or take nothing: a clear error, nothing lost, no litter, and the same command works with room."""

import errno
from pathlib import Path
from typing import Any

import pytest
from disks import Disk
from places import Place
from transformers import TrainerCallback

from commands import main
from ziggurat.compare.fill import fill
from ziggurat.compare.results import Results
from ziggurat.compare.table import make_table
from ziggurat.errors import RecipeError, StorageError
from ziggurat.files.staging import write_whole
from ziggurat.training.folder.checkpoints import newest
from ziggurat.training.folder.workplace import ROOM
from ziggurat.training.loop.run import train


class At(TrainerCallback):
    """Does something at the end of a step, or of training (step 0)."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step == 0:
            self.what()


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_no_room_for_the_result_is_said_before_training(place: Place, disk: Disk) -> None:
    disk.fill(500_000)
    with pytest.raises(StorageError, match=r"(disk is full|limit allows).*The result needs 1\.\d MiB; make room"):
        train(place.recipe(disk.folder / "out"))
    assert {path.name for path in disk.folder.iterdir()} <= {"filler"}


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(place: Place, finished: Path, disk: Disk) -> None:
    recipe = place.recipe(disk.folder / "out")
    with pytest.raises(StorageError, match=r"checkpoints' could not be written.*resume=true") as stopped:
        train(recipe, callbacks=[At(3, lambda: disk.fill(20_000))])
    disk.empty()
    assert "full" in str(stopped.value) or "limit" in str(stopped.value) or "a part" in str(stopped.value)
    left = newest(disk.folder / "out.unfinished" / "checkpoints")
    assert left is not None and left.name == "checkpoint-2"
    assert [path.name for path in left.parent.iterdir()] == ["checkpoint-2"]
    resumed = train(recipe.model_copy(update={"resume": True}))
    assert weights(resumed.folder) == weights(finished)


def test_the_room_for_the_result_is_kept_while_training(place: Place, finished: Path, disk: Disk) -> None:
    if not disk.real:
        pytest.skip("needs a disk that can be filled; mounting one is not allowed here")
    result = train(place.recipe(disk.folder / "out", train__save="never"), callbacks=[At(4, disk.fill)])
    assert weights(result.folder) == weights(finished)
    assert sorted(path.name for path in disk.folder.iterdir()) == ["filler", "out"]


def test_a_result_that_finds_no_room_leaves_the_checkpoint(place: Place, finished: Path, disk: Disk) -> None:
    def take_the_room() -> None:
        (disk.folder / "out.unfinished" / ROOM).unlink()
        disk.fill(8_000)

    recipe = place.recipe(disk.folder / "out")
    with pytest.raises(StorageError, match=r"out' could not be written\. The checkpoint .*checkpoint-6 is whole"):
        train(recipe, callbacks=[At(0, take_the_room)])
    disk.empty()
    assert [path.name for path in disk.folder.iterdir()] == ["out.unfinished"]
    resumed = train(recipe.model_copy(update={"resume": True}))
    assert resumed.steps == 6 and weights(resumed.folder) == weights(finished)


@pytest.mark.parametrize("words", [["export"], ["merge"], ["report", "--out"]], ids=lambda words: words[0])
def test_what_writes_beside_leaves_no_half(
    words: list[str], finished: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    out = disk.folder / "out"
    command = [words[0], str(finished), *words[1:], str(out)]
    disk.fill(4_096)
    code = main(*command)
    disk.empty()
    assert code == 2
    printed = capsys.readouterr().err
    assert "error: " in printed and f"{out}' could not be written" in printed
    assert not [path for path in disk.folder.iterdir() if path.name.startswith(".")]
    assert not out.exists()
    assert main(*command) == 0


@pytest.mark.parametrize(
    "words",
    [["export"], ["merge"], ["analyze", "--out"], ["report", "--out"], ["eval", "--tasks", "arc_easy", "--out"]],
    ids=lambda words: words[0],
)
def test_a_read_only_place_is_named(
    words: list[str], finished: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.make_read_only()
    code = main(words[0], str(finished), *words[1:], str(disk.folder / "out"))
    disk.make_writable()
    printed = capsys.readouterr().err
    assert code == 2 and f"{disk.folder / 'out'}' could not be written" in printed
    assert "read-only" in printed or "not allowed" in printed
    assert not list(disk.folder.iterdir())


def test_training_into_a_read_only_place_is_refused_at_once(place: Place, disk: Disk) -> None:
    disk.make_read_only()
    with pytest.raises(RecipeError, match="is not a folder that can be written to"):
        train(place.recipe(disk.folder / "out"))
    disk.make_writable()


def test_a_table_loses_no_line(place: Place, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table(
        {
            "set": {"model": str(place.folder / "tiny-bert"), "data.folder": str(place.folder)},
            "methods": {"LoRA": {"method.name": "lora", "method.r": 2}},
            "tasks": ["rte"],
            "seeds": [1],
        },
        "small",
        disk.folder / "table",
    )
    results = Results(table.folder)
    results.add({"key": "a", "status": "done"})
    disk.fill(4_096 if disk.real else 60)
    with pytest.raises(StorageError, match=r"results\.jsonl' could not be written\. The finished run is in its folder"):
        results.add({"key": "b", "status": "done", "text": "x" * 9_000})
    disk.empty()
    assert not results.done("b")
    assert Results(table.folder).done("a")
    results.add({"key": "b", "status": "done"})
    assert Results(table.folder).done("a") and Results(table.folder).done("b")
    disk.make_read_only()
    with pytest.raises(StorageError, match=r"table' could not be written\. Finished runs are in their folders"):
        fill(table)
    disk.make_writable()


@pytest.mark.parametrize(("number", "reason"), [(32, "A program has the file open"), (112, "The disk is full")])
def test_windows_says_why_by_numbers_of_its_own(
    number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is open in a spreadsheet: Windows lets nobody replace such a file."""
    (tmp_path / "table.csv").write_text("old")

    def replace(path: Path, target: Path) -> None:
        error = PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        error.winerror = number  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(StorageError, match=rf"^{reason}: '.*table.csv' could not be written"):
        write_whole(tmp_path / "table.csv", "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
