"""Methods from outside: by an installed entry point or --plugin, and by nothing else."""

import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from training_tables import reviews, save_tiny_bert, write_csv

from commands import main
from fresh import Fresh
from ziggurat.errors import ConfigError
from ziggurat.host import plugins
from ziggurat.host.method import METHODS
from ziggurat.host.saved.folder import adapter_config
from ziggurat.kit import unregister
from ziggurat.training.loop.rewards import from_words

PLUGIN = '''
from dataclasses import dataclass, replace

from ziggurat.kit import Card, FactorPair, Method, MethodConfig, low_rank, register


@dataclass
class OneAConfig(MethodConfig):
    """LoRA with one A for all layers of a role."""


def tensors(config, site):
    specs = low_rank(config.r, site.d_in, site.d_out, config.init_weights)
    return {**specs, "A": replace(specs["A"], shared=site.kind)}


def pair(config, site, t, context):
    return FactorPair(t["A"], config.scale_of(config.r) * t["B"])


register(Method("onea", OneAConfig, tensors, pair, Card("OneA", "", "LoRA with one A for all layers")))
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "one_a.py"
    path.write_text(PLUGIN)
    yield path
    unregister("onea")
    sys.modules.pop("one_a", None)
    plugins._loaded.clear()


def test_every_command_takes_a_method_of_ones_own(
    plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_bert(tmp_path / "bert")
    write_csv(tmp_path / "reviews.csv", reviews(48))
    values = {"model": str(tmp_path / "bert"), "data.train": str(tmp_path / "reviews.csv"), "data.validation_rows": 8}
    values |= {"method.name": "onea", "method.r": 4, "method.target_modules": ["query", "value"], "train.lr": 1e-2}
    values |= {"train.max_steps": 3, "train.batch": 8, "train.evaluate": "never", "train.save": "never"}
    recipe, run, flag = tmp_path / "mine.yaml", tmp_path / "run", ["--plugin", str(plugin)]
    recipe.write_text(yaml.safe_dump(values))
    assert main("train", str(recipe)) == 2
    printed = capsys.readouterr().err
    assert "'onea' is not one of" in printed and "no --plugin FILE has brought it" in printed

    assert main("train", str(recipe), f"output={run}", *flag) == 0
    printed = capsys.readouterr().out
    assert "trainable parameters, OneA r 4" in printed
    assert METHODS["ONEA"].card.shown == "OneA"
    # One A for each role, one B for each layer.
    info = json.loads((run / "run.json").read_text())
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    assert info["parameters"]["adapter"] == 2 * (4 * d + layers * d * 4)

    assert main("plan", *flag, str(tmp_path / "bert"), "method.name=onea", "method.r=4") == 0
    assert "OneA r 4" in capsys.readouterr().out
    for words in (
        ["analyze", str(run)],
        ["predict", str(run), "a text", f"--plugin={plugin}"],
        ["export", str(run), str(tmp_path / "plain")],
        ["export", str(run), str(tmp_path / "served"), "--serving"],
        ["merge", str(run), str(tmp_path / "merged")],
    ):
        code = main(*words, *([] if "--plugin" in words[-1] else flag))
        shown = capsys.readouterr()
        # The head is no factor pair, which servers reject, of any method.
        assert code == (2 if "--serving" in words else 0), shown.err
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    card = (run / "README.md").read_text()
    assert "import one_a" in card and "comes from `one_a`" in card and "```bibtex" not in card


def test_compare_gives_it_to_its_workers(plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_bert(tmp_path / "bert")
    write_csv(tmp_path / "reviews.csv", reviews(48))
    data = {"data.train": str(tmp_path / "reviews.csv"), "data.validation_rows": 8}
    recipe = {"model": str(tmp_path / "bert"), **data, "method.name": "lora", "train.max_steps": 2, "train.batch": 8}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    table = {"recipe": str(tmp_path / "base.yaml"), "tasks": {"reviews": data}, "seeds": [1]}
    table["methods"] = {"Mine": {"method.name": "onea", "method.target_modules": ["query"], "method.r": 2}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    code = main("compare", str(tmp_path / "table.yaml"), "--out", str(tmp_path / "out"), "--plugin", str(plugin))
    printed = capsys.readouterr()
    assert code == 0 and "1 of 1 runs are done" in printed.out, printed.out + printed.err


def test_a_folder_whose_method_is_not_there_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ONEA"}')
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"unknown PEFT method 'ONEA'.*--plugin"):
        adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1\nnobody()\n", "NameError in line 2: name 'nobody' is not defined"),
        ("import nowhere_at_all", "ModuleNotFoundError in line 1"),
        ("def f(:", "SyntaxError"),
        (None, "there is no such file"),
    ],
)
def test_a_plugin_that_fails(code: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.py"
    if code is not None:
        path.write_text(code)
    assert main("recipes", "--plugin", str(path)) == 2
    printed = capsys.readouterr().err
    assert f"--plugin {path}: {says}" in printed and "Traceback" not in printed
    assert "wrong" not in sys.modules and not plugins.loaded()
    assert main("recipes", "--plugin", "no.such.module") == 2


def test_what_is_no_python_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    (tmp_path / "mine.yaml").touch()
    for words, says in (
        (["recipes", "--plugin"], "--plugin needs a value: a Python file, or a module"),
        (["recipes", "--plugin", "--json"], "--plugin needs a value: a Python file, or a module"),
        (["recipes", "--plugin", "."], "--plugin .: that is a folder; name a Python file in it"),
        (["recipes", "--plugin", "films"], "--plugin films: that is a folder; name a Python file in it"),
        (["recipes", "--plugin", "mine.yaml"], "no Python file: its name doesn't end in .py"),
    ):
        assert main(*words) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--reward films: that is a folder"):
        from_words(["films:correct"])


def test_a_plugin_is_loaded_once(plugin: Path) -> None:
    plugin.write_text(f"import builtins\nbuiltins.times = getattr(builtins, 'times', 0) + 1\n{PLUGIN}")
    plugins.load([str(plugin), str(plugin)])
    plugins.load([str(plugin.parent / "." / plugin.name)])
    import builtins

    assert vars(builtins).pop("times") == 1 and plugins.loaded() == (str(plugin.resolve()),)


def package(folder: Path, name: str, code: str) -> None:
    """An installed package, as its files look, with an entry point."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ziggurat.methods]\nmine = {name}\n")


def in_python(fresh: Fresh, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    begin = f"import sys, warnings\nsys.path.insert(0, {str(folder)!r})\nwarnings.simplefilter('always', UserWarning)\n"
    return fresh.run(begin + textwrap.dedent(code))


def test_installed_packages_bring_methods(fresh: Fresh, tmp_path: Path) -> None:
    package(tmp_path, "one_a_package", PLUGIN)
    package(tmp_path, "broken_package", "raise OSError('a disk is gone')")
    done = in_python(
        fresh,
        tmp_path,
        """
        import ziggurat
        from ziggurat.recipe.methods import METHODS
        from peft import PeftType
        print(METHODS["onea"].about, METHODS["onea"].exports, PeftType.ONEA.value)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "LoRA with one A for all layers True ONEA\n"
    assert "the methods of the package 'broken-package' are not there" in done.stderr
    assert "OSError: a disk is gone" in done.stderr
    # The package first: it imports ziggurat, which doesn't import it again.
    done = in_python(fresh, tmp_path, "import one_a_package; print(one_a_package.OneAConfig.method.name)")
    assert (done.returncode, done.stdout) == (0, "onea\n"), done.stderr


def test_without_packages_there_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins.load_installed()
