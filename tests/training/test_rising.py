"""A loss that rises above its start is told with the likely cause; noise and a run that learns are not."""

import io
import json
import math
import random
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from training_tables import tiny_recipe
from transformers import TrainerControl, TrainerState, TrainingArguments

from ziggurat.training.callbacks.rising import EVERY, RisingLoss, has_risen
from ziggurat.training.loop.run import train

recipe_for = partial(tiny_recipe, train__epochs=None, train__max_steps=60, train__evaluate_before=False)


def told(losses: list[float], classes: int | None, tmp_path: Path, warmup: int = 0) -> list[str]:
    """What is said of a Trainer's log: the loss of the first step, then one every 10 steps."""
    texts: list[str] = []
    args = TrainingArguments(str(tmp_path), learning_rate=1e-2, warmup_steps=warmup, max_grad_norm=0.0, report_to=[])
    state, control = TrainerState(max_steps=10 * len(losses) - 10), TrainerControl()
    callback = RisingLoss(texts.append, classes)
    callback.on_train_begin(args, state, control)
    for number, loss in enumerate(losses):
        state.global_step = 10 * number or 1
        callback.on_log(args, state, control, logs={"loss": loss})
    return texts


def test_a_loss_above_its_start_and_one_above_a_uniform_guess_are_told_once_each(tmp_path: Path) -> None:
    texts = told([4.0, 5.8, 5.9, 6.1, 6.0, 11.5, 11.6, 11.4, 11.5], 49_152, tmp_path)
    assert [text.partition(":")[0] for text in texts] == ["step 30 of 80", "step 60 of 80"]
    assert texts[0] == (
        "step 30 of 80: the training loss is 6.000; at the start it was 4.000. Most likely the steps are too large: "
        "lower train.lr (now 0.01; the best rate of one method breaks another), or begin with train.warmup=0.05, or "
        "clip gradients by train.max_grad_norm=1.0."
    )
    assert f"that of a uniform guess among 49,152 is {math.log(49_152):.3f}" in texts[1]
    assert "uniform guess" not in "".join(told([4.0, 3.8, 11.5, 11.6], None, tmp_path))


def test_a_run_that_breaks_in_its_first_steps_and_one_that_breaks_later(tmp_path: Path) -> None:
    """The first mean is spoilt in the one, and the first batch was a hard one in the other."""
    assert len(told([4.2, 9.1, 10.4, 10.6], None, tmp_path)) == 1
    assert len(told([5.4, 4.1, 4.0, 3.9, 5.3, 5.4], None, tmp_path)) == 1


def test_a_broken_run_whose_losses_jump_about(tmp_path: Path) -> None:
    """Its own noise hides no rise; a hard batch after an easy one, far below a guess, is none."""
    assert len(told([0.69, 5.1, 7.6, 8.1, 4.4, 2.9, 2.4], 2, tmp_path)) == 1
    assert len(told([4.2, 7.0, 9.0, 7.5, 8.2], 49_152, tmp_path)) == 1
    assert told([0.02, 0.05, 0.09, 0.04, 0.08], 2, tmp_path) == []


def test_nothing_is_said_during_the_warm_up(tmp_path: Path) -> None:
    losses = [4.0, 5.9, 6.0, 6.1, 6.2, 3.0, 2.9]
    assert told(losses, 100, tmp_path, warmup=40) == []
    assert len(told(losses, 100, tmp_path)) == 1


@pytest.mark.parametrize("noise", [0.01, 0.02])
@pytest.mark.parametrize("number", [4, 5, 10, 100])
def test_noise_is_no_rise(noise: float, number: int) -> None:
    """Runs that learn nothing: at most one in a hundred is told of, at any of its logs."""
    draw = random.Random(0)
    alarms = 0
    for _ in range(300):
        spread = [noise * math.sqrt(EVERY), *[noise] * (number - 1)]
        losses = [0.7 * (1 + draw.gauss(0, each)) for each in spread]
        alarms += any(has_risen(losses[:end]) for end in range(2, number + 1))
    assert alarms <= 3


def test_a_run_whose_rate_is_far_too_high_says_so_on_the_terminal_and_in_its_folder(
    tiny_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    output = io.StringIO()
    console = Console(file=output, width=10_000)
    result = train(recipe_for(tiny_bert, reviews_csv, tmp_path / "out", train__lr=10.0), console=console)
    notes = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))["notes"]
    warnings = [note for note in notes if "a uniform guess among 2 is 0.693" in note]
    assert len(warnings) == 1
    assert "lower train.lr (now 10;" in warnings[0]
    assert f"warning: {warnings[0]}" in output.getvalue()


def test_a_run_that_learns_says_nothing_and_draws_nothing_anew_in_a_pipe(
    tiny_bert: Path, reviews_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter does
    output = io.StringIO()
    result = train(recipe_for(tiny_bert, reviews_csv, tmp_path / "out"), console=Console(file=output))
    assert not [note for note in result.notes if "training loss" in note]
    shown = output.getvalue()
    assert "\x1b[2m" in shown and "\x1b[?25l" not in shown and "learning" not in shown
