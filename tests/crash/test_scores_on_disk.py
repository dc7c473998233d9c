"""`ziggurat eval` and disks: a place that takes no file is known before the scoring; a full one costs no score."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disks import Disk
from glue_folder import write_glue

from commands import main
from ziggurat.errors import StorageError
from ziggurat.evaluation import glue
from ziggurat.evaluation.local_tasks import write_tasks
from ziggurat.files.staging import check_writable


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("data") / "glue")


class Scoring:
    """The real scoring of GLUE, counted, with something that happens after it."""

    def __init__(self) -> None:
        self.real, self.times = glue.glue_scores, 0
        self.then: Callable[[], None] = lambda: None

    def __call__(self, *given: Any) -> dict[str, float]:
        result = self.real(*given)
        self.times += 1
        self.then()
        return result


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Scoring:
    made = Scoring()
    monkeypatch.setattr(glue, "glue_scores", made)
    return made


def command(finished: Path, tables: Path, *more: str) -> list[str]:
    return ["eval", str(finished), "--tasks", "glue/sst2", "--data", str(tables), *more]


def test_a_full_disk_is_known_before_the_scoring(
    finished: Path, tables: Path, disk: Disk, scoring: Scoring, capsys: pytest.CaptureFixture[str]
) -> None:
    out = disk.folder / "new" / "scores.json"
    disk.fill()
    code = main(*command(finished, tables, "--out", str(out)))
    disk.empty()
    assert code == 2 and scoring.times == 0
    printed = capsys.readouterr().err
    assert f"{out}' could not be written" in printed and ("full" in printed or "limit" in printed)
    assert not list(disk.folder.iterdir())


def test_a_disk_that_fills_up_meanwhile_costs_no_scores(
    finished: Path, tables: Path, disk: Disk, scoring: Scoring, capsys: pytest.CaptureFixture[str]
) -> None:
    out = disk.folder / "scores.json"
    before = json.dumps({"scores": {}})
    out.write_text(before)
    scoring.then = disk.fill
    code = main(*command(finished, tables, "--out", str(out)))
    disk.empty()
    assert code == 2 and scoring.times == 1
    printed = capsys.readouterr()
    assert "glue/sst2: accuracy " in printed.out and "(6 rows)" in printed.out
    assert f"{out}' could not be written. The scores stand above" in printed.err
    assert out.read_text() == before and [path.name for path in disk.folder.iterdir()] == ["scores.json"]

    scoring.then = lambda: None
    assert main(*command(finished, tables, "--out", str(out))) == 0
    scores = json.loads(out.read_text())["scores"]["glue/sst2"]
    assert f"glue/sst2: accuracy {scores['accuracy']:.2f}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "place", "message"),
    [
        ("--out", "folder", "is a folder: name a file in it"),
        ("--out", "file/scores.json", "A file stands where a folder should be"),
        ("--predictions", "file", "A file stands where a folder should be"),
        ("--keep-tasks", "file", "A file stands where a folder should be"),
    ],
)
def test_a_place_that_is_taken_is_known_before_anything_is_loaded(
    option: str, place: str, message: str, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    # An adapter that isn't there would be the next complaint.
    tasks = ["--tasks", "glue/sst2,drop"]  # GLUE's have no task files
    assert main(*command(tmp_path / "none", tables, *tasks, option, str(tmp_path / place))) == 2
    shown = capsys.readouterr().err
    assert message in shown and "none" not in shown
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_task_files_that_find_no_room_are_named(disk: Disk, tmp_path: Path) -> None:
    if not disk.real:
        pytest.skip("reading the data writes a cache, which the limit on files forbids too")
    (tmp_path / "drop").mkdir()
    rows = [{"passage": "one", "question": "what ?", "answers": ["one"]}] * 4
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "drop" / "validation.parquet")
    disk.fill()
    with pytest.raises(StorageError, match=r"The disk is full: '.*drop_helpers\.py' could not be written"):
        write_tasks(["drop"], tmp_path, disk.folder)
    disk.empty()
    assert not list(disk.folder.iterdir())


def test_looking_leaves_nothing(disk: Disk) -> None:
    check_writable(disk.folder / "a" / "b" / "scores.json")
    assert not list(disk.folder.iterdir())
    disk.make_read_only()
    with pytest.raises(StorageError, match=r"a/b/scores\.json' could not be written"):
        check_writable(disk.folder / "a" / "b" / "scores.json")
    disk.make_writable()
