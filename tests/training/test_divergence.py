"""A loss or a weight that is NaN stops a run, keeps the last good state, and names remedies."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_tables import tiny_recipe
from transformers import TrainerCallback

from ziggurat.cli import main
from ziggurat.errors import DivergedError
from ziggurat.recipe.recipe import to_yaml
from ziggurat.training.loop.run import train

recipe_for = partial(tiny_recipe, train__lr=1.0e-2, train__epochs=None, train__max_steps=6, train__save=2)


class Spoil(TrainerCallback):
    """At the end of optimiser step `step` sets one trained weight to `value`, as a fault of a device might."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(p for p in kwargs["model"].parameters() if p.requires_grad).view(-1)[0] = self.value


@pytest.fixture
def broken_bert(tiny_bert: Path, tmp_path: Path) -> Path:
    """The tiny model with one infinite weight, as a conversion to float16 leaves them."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_bert, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("intermediate.dense.weight"))
    tensors[name].view(-1)[0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def finite(folder: Path) -> bool:
    files = [*folder.rglob("*.safetensors")]
    return bool(files) and all(torch.isfinite(t).all() for file in files for t in load_file(file).values())


def test_a_base_model_with_an_infinite_weight(broken_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        train(recipe_for(broken_bert, reviews_csv, tmp_path / "out"))
    message = str(caught.value)
    assert message.startswith("step 1 of 6: the loss is nan, so training stopped. There is no earlier checkpoint.")
    assert "lower train.lr (now 0.01)" in message
    assert "damaged weights in the base model" in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


def test_float16_and_a_learning_rate_that_is_far_too_high(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    """Steps of 10 in weights of 0.02: attention overflows 65,504 after a few."""
    recipe = recipe_for(tiny_bert, reviews_csv, tmp_path / "out", train__lr=10.0, train__warmup=0.0, dtype="float16")
    with pytest.raises(DivergedError, match=r"step \d of 6: .*lower train\.lr \(now 10\)"):
        train(recipe)
    assert not (tmp_path / "out").exists()
    checkpoints = tmp_path / "out.unfinished" / "checkpoints"
    assert all(finite(folder) for folder in checkpoints.glob("checkpoint-*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoilt_weight_leaves_the_checkpoint_before_and_the_run_goes_on(
    value: float, tiny_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError) as caught:
        train(recipe_for(tiny_bert, reviews_csv, tmp_path / "out"), callbacks=[Spoil(3, value)])
    checkpoint = tmp_path / "out.unfinished" / "checkpoints" / "checkpoint-2"
    assert f"The last good checkpoint is in {checkpoint}" in str(caught.value)
    assert str(caught.value).startswith("step 4 of 6: the loss is ")
    assert [folder.name for folder in checkpoint.parent.glob("checkpoint-*")] == ["checkpoint-2"]
    assert finite(checkpoint)
    result = train(recipe_for(tiny_bert, reviews_csv, tmp_path / "out", resume=True))
    assert result.steps == 6
    assert finite(result.folder)


def test_no_checkpoint_is_made_of_a_spoilt_weight(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    """The step before a checkpoint spoils a weight: no loss has shown it yet."""
    with pytest.raises(DivergedError, match=r"step 4 of 6: \S+ has values that are NaN or infinite"):
        train(recipe_for(tiny_bert, reviews_csv, tmp_path / "out"), callbacks=[Spoil(4, float("nan"))])
    checkpoints = tmp_path / "out.unfinished" / "checkpoints"
    assert [folder.name for folder in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_last_step_is_looked_at_too(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_bert, reviews_csv, tmp_path / "out", train__save="never", train__max_steps=2)
    with pytest.raises(DivergedError, match="step 2 of 2"):
        train(recipe, callbacks=[Spoil(2, float("nan"))])
    assert not (tmp_path / "out").exists()


def test_an_earlier_result_stays(tiny_bert: Path, broken_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    good = train(recipe_for(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=2)).folder
    files = {file.name: file.read_bytes() for file in good.iterdir() if file.is_file()}
    with pytest.raises(DivergedError):
        train(recipe_for(broken_bert, reviews_csv, tmp_path / "out", overwrite=True))
    assert {file.name: file.read_bytes() for file in good.iterdir() if file.is_file()} == files
    assert json.loads(files["run.json"])["steps"] == 2


def test_the_command_fails_with_one_line(
    broken_bert: Path,
    reviews_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_for(broken_bert, reviews_csv, tmp_path / "out", train__max_steps=2)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["ziggurat", "train", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "step 1 of 2: the loss is nan, so training stopped" in " ".join(capsys.readouterr().err.split())
