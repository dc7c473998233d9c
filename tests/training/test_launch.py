"""`ziggurat train` on two gloo processes: the run of one process, by DDP and FSDP2, after failures too."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from training_tables import reviews, save_still_bert, save_tiny_llama, write_csv, write_jsonl

from fresh import FORKS, Fresh
from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig, cli
from ziggurat.cli.launch import NAMES, config_file
from ziggurat.errors import RecipeError
from ziggurat.recipe.recipe import load_recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.answers.predict import predict
from ziggurat.training.devices.processes import Processes
from ziggurat.training.devices.sharding import check
from ziggurat.training.loop.run import train
from zoo import ZOO

#: One launch makes twelve runs, on a machine that may have other things to do.
pytestmark = pytest.mark.timeout(1200)

METHODS: dict[str, list[str]] = {
    "msplora": ["method.name=msplora"],
    "lor2c": ["method.name=lor2c", "method.merges=1", "method.injections=1"],
    "lora2": ["method.name=lora2", "method.target_rank=1", "method.initial_warmup=2", "method.final_warmup=2"],
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@dataclass(frozen=True)
class Place:
    """A folder with a recipe for 36 training rows: by 8 a step the fifth step of an epoch has 4, its halves 4 and 0."""

    folder: Path

    def words(self, output: str, *more: str, recipe: str = "reviews") -> list[str]:
        return [str(self.folder / f"{recipe}.yaml"), f"output={self.folder / output}", *more]

    def run(self, output: str) -> dict[str, Any]:
        return json.loads((self.folder / output / "run.json").read_text())

    def weights(self, output: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / output / "adapter_model.safetensors")

    def alone(self, output: str, *more: str, recipe: str = "reviews") -> dict[str, Any]:
        """The same in this process, with the batches of both."""
        first, *rest = self.words(output, *more, "train.batch=8", recipe=recipe)
        train(load_recipe(first, rest))
        return self.run(output)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("launched")
    save_still_bert(folder / "bert")
    save_tiny_llama(folder / "llama")
    write_csv(folder / "reviews.csv", reviews(43))
    pairs = [("what colour sky", "blue"), ("what colour grass", "green green"), ("say yes", "yes yes yes")]
    write_jsonl(folder / "pairs.jsonl", [{"prompt": f"{a} ", "completion": b} for a, b in pairs * 15])
    shared = {"method.name": "msplora", "method.r": 4, "train.lr": 3.0e-2, "train.batch": 4, "train.save": "never"}
    recipe = shared | {"model": str(folder / "bert"), "data.train": str(folder / "reviews.csv")}
    recipe |= {"data.validation_rows": 7, "train.max_steps": 12, "train.eval_batch": 2, "train.evaluate": 10}
    (folder / "reviews.yaml").write_text(yaml.safe_dump(recipe))
    recipe = shared | {"model": str(folder / "llama"), "data.train": str(folder / "pairs.jsonl"), "task": "instruct"}
    recipe |= {"data.validation_rows": 9, "train.max_steps": 10, "train.eval_batch": 2, "train.evaluate": "never"}
    (folder / "pairs.yaml").write_text(yaml.safe_dump(recipe | {"method.target_modules": "all-linear"}))
    return Place(folder)


def launch(launcher: list[str], *words: str) -> tuple[int, str]:
    """Exit code and output of both processes."""
    before = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment = before | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1000
    )
    return done.returncode, done.stdout


def launch_forks(fresh: Fresh, *words: str) -> tuple[int, str]:
    """The same by `two_forks.py`, where forks are safe."""
    if not FORKS:
        return launch(TORCHRUN, *words)
    done = fresh.run(Path(__file__).with_name("two_forks.py").read_text(encoding="utf-8"), *words)
    return done.returncode, done.stdout + done.stderr


def jobs(place: Place, name: str, listed: list[dict[str, Any]]) -> list[str]:
    file = place.folder / f"{name}.json"
    file.write_text(json.dumps([{"way": "ddp", "trouble": None, **job} for job in listed]))
    return [str(Path(__file__).with_name("launched.py")), str(file)]


@pytest.fixture(scope="module")
def launched(place: Place, fresh: Fresh) -> Place:
    """All runs on two processes, in one launch, which ends with one that fails where a finished run lies.

    A launcher's own processes load the libraries anew: that of accelerate, which is torchrun's, has a test below.
    """
    words = place.words("kept", "train.max_steps=2")
    train(load_recipe(words[0], words[1:]))
    shutil.copytree(place.folder / "kept", place.folder / "before")
    stop = place.words("stopped", "method.lora_dropout=0.3")
    listed: list[dict[str, Any]] = [
        {"way": way, "words": place.words(f"{way}-{method}", *words)}
        for way in ("ddp", "fsdp")
        for method, words in METHODS.items()
    ]
    listed += [
        {"words": place.words("accumulated", "train.batch=2", "train.accumulate=2")},
        {"words": place.words("instructed", *METHODS["lora2"], recipe="pairs")},
        {"words": place.words("straight", "method.lora_dropout=0.3")},
        {"words": stop, "trouble": ["SIGTERM", 1, 5], "code": 143},
        {"words": [*stop, "resume=true"]},
        {"words": place.words("kept", "overwrite=true", "train.save=2"), "trouble": ["error", 1, 5]},
    ]
    code, output = launch_forks(fresh, *jobs(place, "all", listed))
    (place.folder / "log").write_text(output)
    assert code != 0 and f"codes of process 1: {[*[0] * 9, 143, 0, 1]}" in output, output
    return place


def curve(run: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in run["history"] if "loss" in line]


def shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Of all but LoR2C's structure, a text with numbers of as many digits as they need."""
    return {name: tensor.shape for name, tensor in weights.items() if "structure" not in name}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_learns(method: str, launched: Place) -> None:
    alone = launched.alone(f"one-{method}", *METHODS[method])
    mine = launched.weights(f"one-{method}")
    inputs = [row["text"] for row in reviews(43)]
    expected = predict(load_adapter_model(launched.folder / f"one-{method}"), inputs)
    for way in ("ddp", "fsdp"):
        run = launched.run(f"{way}-{method}")
        assert curve(run) == pytest.approx(curve(alone), rel=1e-4) and len(curve(alone)) == 2
        for scores in ("before", "after"):
            assert run[scores] == pytest.approx(alone[scores], rel=1e-3)
        assert run["left"] == alone["left"] and run["parameters"] == alone["parameters"]
        held = launched.weights(f"{way}-{method}")
        assert shapes(held) == shapes(mine)
        again = load_adapter_model(launched.folder / f"{way}-{method}")
        for each, two in zip(expected, predict(again, inputs), strict=True):
            assert two.shares == pytest.approx(each.shares, abs=1e-3)


def test_accumulated_batches_are_one_batch(launched: Place) -> None:
    alone = launched.alone("one-accumulated")
    run = launched.run("accumulated")
    assert curve(run) == pytest.approx(curve(alone), rel=1e-4)
    assert run["after"] == pytest.approx(alone["after"], rel=1e-3)
    assert any("2 x train.batch 2 x train.accumulate 2 = 8 examples a step" in note for note in run["notes"])


def test_every_token_counts_once(launched: Place) -> None:
    """Nine validation texts by two a process: the last round fills three of its four places again.

    TRL makes the loss outside the model, so LoRA²'s regulariser must find its own way into the gradient.
    """
    alone = launched.alone("one-instructed", *METHODS["lora2"], recipe="pairs")
    run = launched.run("instructed")
    assert curve(run) == pytest.approx(curve(alone), rel=1e-4)
    assert run["before"]["perplexity"] == pytest.approx(alone["before"]["perplexity"], rel=1e-5)
    assert run["after"]["perplexity"] == pytest.approx(alone["after"]["perplexity"], rel=1e-3)


def test_a_signal_to_one_stops_both_and_the_run_goes_on_as_if_nothing_had_been(launched: Place) -> None:
    output = (launched.folder / "log").read_text()
    assert output.count("stopped at step 6 of 12.") == 1
    assert output.count("Go on with: the launcher, as before, -m ziggurat train") == 1
    resumed, straight = (launched.folder / name / "adapter_model.safetensors" for name in ("stopped", "straight"))
    assert resumed.read_bytes() == straight.read_bytes()


def test_one_process_speaks_for_all(launched: Place) -> None:
    output = (launched.folder / "log").read_text()
    assert output.count("note: 2 processes") == 12 and output.count("│ seconds ") == 10
    assert [path.name for path in launched.folder.glob("*.unfinished")] == ["kept.unfinished"]


def test_a_failed_process_ends_the_job_and_spoils_nothing(launched: Place) -> None:
    errors = [line for line in (launched.folder / "log").read_text().splitlines() if line.startswith("error")]
    assert errors == [
        "error in process 1 of 2: ValueError: a batch that only this process has seen (--debug shows where)"
    ]
    before, after = (
        {path.name: path.read_bytes() for path in (launched.folder / name).iterdir()} for name in ("before", "kept")
    )
    assert before == after
    assert (launched.folder / "kept.unfinished" / "checkpoints" / "checkpoint-4").is_dir()


def test_a_killed_process_is_told_of(place: Place, fresh: Fresh) -> None:
    job = {"words": place.words("killed"), "trouble": ["SIGKILL", 1, 5]}
    code, output = launch_forks(fresh, *jobs(place, "killing", [job]))
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert (
        code != 0
        and len(errors) == 1
        and errors[0].startswith("error in process 0 of 2: process 0 of 2 lost the connection")
    )
    assert not list(place.folder.glob("killed*"))


def first_of_two(code: str) -> tuple[int, str]:
    """The exit status and the errors of a program that takes itself for process 0 of 2, and for the first to report."""
    start = "from ziggurat import cli\nfrom ziggurat.training.devices import processes\n"
    env = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", start + code], env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_the_reason_is_given_before_the_launchers_sigterm_ends_the_process() -> None:
    code = (
        "import os, signal\n"
        "processes.is_first_to_report = lambda: os.kill(os.getpid(), signal.SIGTERM) or True\n"
        "cli._fail('lost the connection', 2)"
    )
    assert first_of_two(code) == (2, "error in process 0 of 2: lost the connection\n")


def test_a_command_in_another_thread_gives_its_reason() -> None:
    """Signals can be set in the main thread alone."""
    code = (
        "import threading\n"
        "processes.is_first_to_report = lambda: True\n"
        "thread = threading.Thread(target=cli._fail, args=('lost the connection', 2))\n"
        "thread.start(), thread.join()"
    )
    assert first_of_two(code)[1] == "error in process 0 of 2: lost the connection\n"


def test_a_process_that_lost_another_one_waits_for_that_ones_reason() -> None:
    """It speaks some seconds later, even where the launcher's SIGTERM arrives meanwhile."""
    code = (
        "import os, signal, time\n"
        "processes._SECONDS_TO_SPEAK, processes.is_first_to_report = 0.5, lambda: True\n"
        "sleep, begun = time.sleep, time.monotonic()\n"
        "time.sleep = lambda seconds: (os.kill(os.getpid(), signal.SIGTERM), sleep(seconds))\n"
        "try:\n"
        "    with processes.Processes(0, 2).reporting_lost_processes():\n"
        "        raise RuntimeError('Connection closed by peer')\n"
        "except processes.ProcessError as error:\n"
        "    cli._fail(str(error).partition(',')[0] + ('' if time.monotonic() - begun > 0.4 else ' at once'), 2)"
    )
    lost = "error in process 0 of 2: process 0 of 2 lost the connection to another one\n"
    assert first_of_two(code) == (2, lost)


def test_accelerate_launches_the_command_with_a_shipped_config(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the first mistake, which both processes find and one tells."""
    monkeypatch.setattr(sys, "argv", ["ziggurat", "launch-config", "ddp"])
    with pytest.raises(SystemExit):
        cli.main()
    config = capsys.readouterr().out.strip()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--cpu"]
    taken = place.folder / "taken"
    (taken / "letter").mkdir(parents=True)
    code, output = launch([*launcher, "--num_processes", "2", "-m", "ziggurat"], "train", *place.words("taken"))
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert code != 0 and len(errors) == 1 and "holds something else already" in errors[0]
    assert [path.name for path in taken.iterdir()] == ["letter"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRA2Config(r=4, target_rank=2), "LoRA2 ranks directions by their gradients"),
        (LoR2CConfig(r=4, merges=1), "LoR2C moves weights during training"),
        (LoR2CConfig(r=4), None),
        (MSPLoraConfig(r=4, target_modules=["q_proj"]), None),
    ],
)
def test_deepspeed_is_refused_what_it_cannot_do(config: Any, message: str | None) -> None:
    model = get_peft_model(ZOO["llama"].build(), config)  # type: ignore[arg-type]
    check(model, Processes(way="ddp", size=2))
    refusal = pytest.raises(RecipeError, match=message) if message else nullcontext()
    with refusal:
        check(model, Processes(way="deepspeed", size=2))


def test_every_shipped_config_is_read_by_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert set(NAMES) == set(kinds)
    for name in NAMES:
        config = load_config_from_file(str(config_file(name)))
        assert config.distributed_type.value == kinds[name]  # type: ignore[union-attr]
        assert config.fsdp_config.get("fsdp_version", 2) == 2  # type: ignore[union-attr]
