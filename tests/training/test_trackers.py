"""`train.report_to`: a tracker's content after a real run, its place, and refusals before the run begins."""

import json
from pathlib import Path
from typing import Any

import pytest
from stops import StopAt
from training_tables import save_still_bert, tiny_recipe

from ziggurat.analysis import collect
from ziggurat.analysis.trace import scalars
from ziggurat.errors import RecipeError
from ziggurat.training.callbacks import trackers
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.loop.result import Result
from ziggurat.training.loop.run import train


def events(folder: Path) -> dict[str, list[Any]]:
    """Name -> the events that TensorBoard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {name: read.Scalars(name) for name in read.Tags()["scalars"]}


@pytest.fixture
def still_bert(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    save_still_bert(folder)
    return folder


@pytest.fixture
def no_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


@pytest.mark.usefixtures("no_own_folder")
def test_tensorboard_gets_the_losses_scores_and_spectra_of_a_run(
    still_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"spectra": "epoch", "train__epochs": 2, "train__evaluate": "epoch"}
    result = train(tiny_recipe(still_bert, reviews_csv, tmp_path / "out", train__report_to=["tensorboard"], **settings))
    logged = events(result.folder / "logs")
    expected = scalars(collect(result.folder))
    for name, value in expected.items():
        assert [event.step for event in logged[f"train/{name}"]] == [5, 10]
        assert logged[f"train/{name}"][-1].value == pytest.approx(value, rel=1e-5), name
    assert logged["eval/accuracy"][-1].value == pytest.approx(result.after["accuracy"])
    losses = [
        line["loss"] for line in json.loads((result.folder / "run.json").read_text())["history"] if "loss" in line
    ]
    assert [event.value for event in logged["train/loss"]] == pytest.approx(losses)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]

    silent = train(tiny_recipe(still_bert, reviews_csv, tmp_path / "silent", **settings))
    assert not (silent.folder / "logs").exists()
    assert silent.after == result.after  # who is told changes nothing


@pytest.mark.usefixtures("no_own_folder")
def test_the_logs_of_a_resumed_run_are_whole_and_the_tracker_may_change(
    still_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    def recipe(**more: Any) -> Any:
        settings = {"spectra": 1, "train__save": 3, "train__max_steps": 6, "train__report_to": ["tensorboard"]}
        return tiny_recipe(still_bert, reviews_csv, tmp_path / "out", **{**settings, **more})

    with pytest.raises(Interrupted):
        train(recipe(), callbacks=[StopAt(5, times=2)])
    assert events(tmp_path / "out.unfinished" / "logs")
    result: Result = train(recipe(resume=True, train__report_to=["tensorboard"]))
    steps = {event.step for event in events(result.folder / "logs")["train/spectra/layer/s1"]}
    assert steps == {1, 2, 3, 4, 5, 6}

    with pytest.raises(Interrupted):
        train(recipe(overwrite=True), callbacks=[StopAt(5, times=2)])
    train(recipe(resume=True, train__report_to=None))


def test_ones_own_folder_is_respected(
    still_bert: Path, reviews_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    more: dict[str, Any] = {"train__max_steps": 2, "train__report_to": ["tensorboard"]}
    result = train(tiny_recipe(still_bert, reviews_csv, tmp_path / "out", **more))
    assert "eval/accuracy" in events(tmp_path / "mine") and not (result.folder / "logs").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], "'tensorbord' is no tracker of transformers, did you mean tensorboard?; one of azure_ml"),
        (["none"], "leave the key out to report nowhere"),
        (["tensorboard", "tensorboard"], "tensorboard is named twice"),
        ("tensorboard", "train.report_to: needs a list, got 'tensorboard'"),
    ],
)
def test_names_that_are_none(names: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        tiny_recipe(tmp_path, tmp_path / "x.csv", tmp_path / "out", train__report_to=names)
    assert message in str(error.value)


def test_a_tracker_that_is_not_installed_ends_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe = tiny_recipe(tmp_path / "no", tmp_path / "no.csv", tmp_path / "out", train__report_to=["wandb", "comet_ml"])
    with pytest.raises(RecipeError, match="wandb and comet_ml not installed here; pip install wandb comet-ml"):
        train(recipe)
    assert not list(tmp_path.iterdir())
