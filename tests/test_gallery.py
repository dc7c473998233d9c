"""The notebooks of examples/ are whole, were executed, and name existing files. `.ci/gallery` executes them."""

import ast
import json
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from ziggurat.cli import app
from ziggurat.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
COMMANDS = {command.name for command in typer.main.get_command(app).commands.values()}


def parts(notebook: Path) -> dict[str, Any]:
    return json.loads(notebook.read_text(encoding="utf-8"))


def code(notebook: Path, magic: str = "") -> list[str]:
    """Its code cells; of those that begin with a magic, the rest of the cells with this one."""
    cells = ["".join(cell["source"]) for cell in parts(notebook)["cells"] if cell["cell_type"] == "code"]
    if not magic:
        return [cell for cell in cells if not cell.startswith("%%")]
    return [cell for cell in cells if cell.startswith(magic)]


def test_the_gallery_is_linked_and_shipped() -> None:
    page = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    assert [notebook.name for notebook in NOTEBOOKS if f"(../examples/{notebook.name})" not in page] == []
    assert "gallery.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert '"examples"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for place in ("README.md", "docs/where-you-work.md"):
        assert "gallery.md)" in (ROOT / place).read_text(encoding="utf-8"), place
    assert len(NOTEBOOKS) >= 10
    used = "".join(cell for notebook in NOTEBOOKS for cell in code(notebook))
    assert all(config in used for config in ("MSPLoraConfig(", "LoRA2Config(", "LoR2CConfig("))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_as_it_is_written(notebook: Path) -> None:
    made = parts(notebook)
    assert (made["nbformat"], made["metadata"]["kernelspec"]["name"]) == (4, "python3")
    cells = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    run = made["metadata"]["ziggurat"]
    (result,) = (cell for cell in cells if "result" in cell["metadata"].get("tags", []))
    assert "".join(result["outputs"][0]["text"]).strip() == run["result"]
    assert f"| {run['result']} | {run['cpu_seconds']} | {run['ran']} |" in (ROOT / "docs/gallery.md").read_text("utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users|opt)/", json.dumps(outputs)), "a path of a machine"
    assert notebook.stat().st_size < 100_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_what_exists(notebook: Path, tmp_path: Path) -> None:
    for node in ast.walk(ast.parse("\n".join(code(notebook)))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        for name in names:
            module = node.module if isinstance(node, ast.ImportFrom) else name
            if module.partition(".")[0] == "ziggurat" or find_spec(module.partition(".")[0]):
                assert isinstance(node, ast.Import) or hasattr(import_module(module), name), f"{module}.{name}"
    files = {}
    for cell in code(notebook, "%%writefile"):
        head, _, text = cell.partition("\n")
        files[head.split()[1]] = text
    for cell in code(notebook, "%%bash"):
        for line in re.findall(r"^\s*(ziggurat .*)$", cell.replace("\\\n", " "), re.MULTILINE):
            check_command(shlex.split(line, comments=True)[1:], files, tmp_path)


def check_command(words: list[str], files: dict[str, str], folder: Path) -> None:
    """The command exists; what `train` is given is a recipe that would run."""
    name, *words = words
    assert name in COMMANDS
    if name != "train":
        return
    recipe, *changes = [word for word in words if not word.startswith("--")]
    changes = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in changes]  # a variable's default
    if recipe in files:
        (folder / recipe).write_text(files[recipe], encoding="utf-8")
        recipe = str(folder / recipe)
    elif recipe.endswith(".yaml"):  # that `ziggurat init` writes
        recipe = "own-csv"
    load_recipe(recipe, changes)
