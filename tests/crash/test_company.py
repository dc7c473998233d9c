"""Two programs and one output; folders that a killed program has left on its way."""

import errno
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from places import Place

from ziggurat.errors import RecipeError
from ziggurat.training.folder import workplace
from ziggurat.training.folder.run_folder import RunFolder
from ziggurat.training.loop.run import train

#: What holds a folder: a program with the locks that the system has, or one on a system without `fcntl`, as Windows.
HOLD = {
    "fcntl": "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)",
    "filelock": "import filelock, sys; f = filelock.FileLock(sys.argv[1]); f.acquire()",
}


@pytest.mark.parametrize("locks", HOLD)
def test_a_second_program_is_refused_while_the_first_lives(
    locks: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if locks == "filelock":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    first = RunFolder(place.recipe(tmp_path / "out"))
    first.check()
    first.open()
    first.lock.release()
    program = f"{HOLD[locks]}; print('held', flush=True); input()"
    words = [sys.executable, "-c", program, str(first.work / workplace.LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for more in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(RecipeError, match=r"another program is training into .*out'"):
                RunFolder(place.recipe(tmp_path / "out", **more)).check()
        other.kill()
    if locks == "fcntl":
        RunFolder(place.recipe(tmp_path / "out", overwrite=True)).check()
    else:  # nothing else here knows of such a system: a whole run
        assert train(place.recipe(tmp_path / "out", overwrite=True, train__max_steps=5)).folder.is_dir()
    assert [file.name for file in tmp_path.iterdir()] == ["out" if locks == "filelock" else "out.unfinished"]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError("no locks")])
def test_a_file_system_without_locks_refuses_nobody(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is at hand here: filelock's attempt ends as it does there."""

    def refuses(lock: filelock.FileLock) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(filelock.FileLock, "_acquire", refuses)
    lock = workplace.Lock(tmp_path)
    assert lock.take() and lock.held
    lock.release()
    assert not lock.held


def ready(place: Place, out: Path, **more: bool) -> RunFolder:
    """A run whose result is finished, but not in its place."""
    folder = RunFolder(place.recipe(out, **more))
    folder.open()
    result = workplace.new_result(folder.work)
    for name in ("run.json", "recipe.yaml"):
        (result / name).write_text("new")
    workplace.finish(folder.work, result)
    folder.lock.release()
    return folder


def test_a_finished_result_is_put_in_its_place_by_whoever_comes_next(place: Place, tmp_path: Path) -> None:
    ready(place, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"resume: the run in .* is finished"):
        RunFolder(place.recipe(tmp_path / "out", resume=True)).check()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "run.json").read_text() == "new"


@pytest.mark.parametrize("ours", [True, False])
def test_only_what_may_be_replaced_gives_way(ours: bool, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if ours:
        out.mkdir()
        for name in ("run.json", "recipe.yaml"):
            (out / name).write_text("old")
    folder = ready(place, out, overwrite=True)
    if not ours:
        out.mkdir()
        (out / "letter").write_text("dear")
    resumed = RunFolder(place.recipe(out, resume=True))
    with pytest.raises(
        RecipeError, match="is finished" if ours else "filled by something else meanwhile; the result is"
    ):
        resumed.check()
    assert folder.work.exists() is not ours
    assert (out / ("run.json" if ours else "letter")).read_text() == ("new" if ours else "dear")


def test_what_a_killed_program_was_deleting_is_rubbish_and_a_strangers_folder_is_not(
    place: Place, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        work = tmp_path / f"{name}.unfinished"
        (work / "checkpoints").mkdir(parents=True)
    (tmp_path / "b.unfinished" / "letter").write_text("dear")
    RunFolder(place.recipe(tmp_path / "a")).check()
    with pytest.raises(RecipeError, match="was not written by a run"):
        RunFolder(place.recipe(tmp_path / "b", overwrite=True)).check()
    assert [path.name for path in tmp_path.iterdir()] == ["b.unfinished"]
