"""The rules of imports, read from the source; and the modules that importing the package loads."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ziggurat.host.chatter import BEGINS

SOURCE = Path(__file__).parents[1] / "src" / "ziggurat"

#: The floors of the house, lowest first. A file imports from its own unit and from lower floors.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "extras", "nearest", "terminal", "_distribution"),
    ("lowrank", "files"),
    ("host",),
    ("kit",),
    ("methods",),
    ("__init__",),  # the public names: importing `ziggurat` itself means having all methods
    ("recipe",),
    ("training", "evaluation", "analysis", "export", "plan", "doctor", "integrations"),
    ("compare", "testing"),
    ("cli", "__main__"),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
DATA = {"demo", "launch", "recipes"}

#: What `import ziggurat` must not load, beyond what `import peft` does: none of it is needed to put an adapter in.
HEAVY = ("datasets", "gguf", "jaxtyping", "lm_eval", "matplotlib", "pandas", "pyarrow", "pydantic", "ray", "sklearn")
HEAVY += ("trl", "typer")


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything in the package that `file` imports, wherever in the file that stands."""
    package = module_name(file, root).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names = [str(node.args[0].value)]
        for name in names:
            if name.split(".")[0] == root.name:
                yield getattr(node, "lineno", 0), name


def unit_of(name: str, root: Path) -> str:
    """The unit that a dotted name belongs to; a name of the package's own `__init__` is of that."""
    parts = name.split(".")
    if len(parts) == 1 or not ((root / parts[1]).is_dir() or (root / f"{parts[1]}.py").is_file()):
        return "__init__"
    return parts[1]


#: The rooms of training, lowest first. A room imports from itself and from lower ones.
ROOMS = ("heads", "devices", "data", "model", "sizing", "folder", "callbacks", "loop", "answers")


def method_of(name: str) -> str:
    """The method whose folder a name in `methods` lies in."""
    return [*name.split("."), ""][2]


def breaches(root: Path) -> list[str]:
    """Every import in the package at `root` that goes up, round in a circle on one floor, or across methods."""
    faults = []
    beside: dict[tuple[str, str], str] = {}
    for file in sorted(root.rglob("*.py")):
        name = module_name(file, root)
        unit = unit_of(name, root)
        if unit not in FLOOR:
            faults.append(f"{unit}: stands on no floor")
            continue
        for line, target in imported_names(file, root):
            other = unit_of(target, root)
            where = f"{file.relative_to(root).as_posix()}:{line}: {unit} imports {target}"
            if other not in FLOOR:
                faults.append(f"{where}, which stands on no floor")
            elif FLOOR[other] > FLOOR[unit]:
                faults.append(f"{where}, which stands above it")
            elif other != unit and FLOOR[other] == FLOOR[unit]:
                beside[unit, other] = where
            elif unit == other == "methods" and method_of(name) != method_of(target):
                faults.append(f"{where}: a method never imports another")
    faults += [f"{where}, which imports it in turn" for (a, b), where in beside.items() if _reaches(b, a, set(beside))]
    return sorted(set(faults))


def edges_between_files(root: Path) -> set[tuple[str, str]]:
    """(file, file that it imports from when it is itself imported), as dotted names."""
    files = {module_name(file, root): file for file in root.rglob("*.py")}
    edges = set()
    for name, file in files.items():
        at_once = {node.lineno for node in _loaded_at_once(ast.parse(file.read_text(encoding="utf-8")))}
        for line, target in imported_names(file, root):
            home = target if target in files else target.rpartition(".")[0]
            if line in at_once and home in files and home != name and files[home].name != "__init__.py":
                edges.add((name, home))
    return edges


def _loaded_at_once(tree: ast.AST) -> Iterator[ast.stmt]:
    """The import statements that run when the file is imported: outside functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
            continue
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _loaded_at_once(node)


def closure(start: str, edges: set[tuple[str, str]]) -> set[str]:
    """All files that importing `start` loads, itself with them."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [b for a, b in edges if a == name]
    return seen


def test_no_file_imports_itself_round_a_circle() -> None:
    edges = edges_between_files(SOURCE)
    assert [a for a, b in sorted(edges) if a in closure(b, edges)] == []


def test_every_import_of_the_package_is_there() -> None:
    """Those inside functions too, which importing a file doesn't try."""
    files = {module_name(file, SOURCE): file for file in SOURCE.rglob("*.py")}
    packages = {name.rpartition(".")[0] for name in files}
    lost = []
    for file in files.values():
        for line, target in imported_names(file, SOURCE):
            home, _, name = target.rpartition(".")
            known = target in files or target in packages or (home == SOURCE.name and name == "__version__")
            text = files[home].read_text(encoding="utf-8") if home in files else ""
            if not known and not re.search(rf"\b{name}\b", text):
                lost.append(f"{file.relative_to(SOURCE)}:{line}: {target}")
    assert lost == []


def test_train_imports_at_once_what_every_run_needs() -> None:
    loaded = closure("ziggurat.training.loop.run", edges_between_files(SOURCE))
    assert len(loaded) <= 55
    assert not [name for name in loaded if name.startswith(("ziggurat.analysis", "ziggurat.training.sizing"))]


def test_predict_imports_no_trainer_at_once() -> None:
    """transformers' Trainer brings `datasets` and pandas: up to a second, of some seven for predicting one text."""
    loaded = closure("ziggurat.training.answers.predict", edges_between_files(SOURCE))
    assert "ziggurat.training.answers.load" in loaded
    assert not [name for name in loaded if name.startswith("ziggurat.training.loop")]


def test_rooms_of_training_import_downwards() -> None:
    files = sorted((SOURCE / "training").rglob("*.py"))
    upwards = []
    for file in files:
        room = module_name(file, SOURCE).split(".")[2:3]
        for line, target in imported_names(file, SOURCE) if room else ():
            other = target.split(".")[2:3]
            if target.startswith("ziggurat.training.") and ROOMS.index(other[0]) > ROOMS.index(room[0]):
                upwards.append(f"{file.relative_to(SOURCE)}:{line}: {target}")
    assert upwards == []


def _reaches(start: str, goal: str, edges: set[tuple[str, str]]) -> bool:
    seen, todo = set(), [start]
    while todo:
        unit = todo.pop()
        if unit not in seen:
            seen.add(unit)
            todo += [b for a, b in edges if a == unit]
    return goal in seen


def test_the_import_rule_is_kept() -> None:
    assert breaches(SOURCE) == []


def test_every_unit_stands_on_a_floor() -> None:
    units = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert units - set(FLOOR) == set()
    assert {path.name for path in SOURCE.iterdir() if path.is_dir()} - set(FLOOR) - {"__pycache__"} == DATA


@pytest.mark.parametrize(
    ("file", "text", "breach"),
    [
        ("lowrank/pair.py", "from ziggurat.host import bank", "which stands above it"),
        ("lowrank/pair.py", "def f():\n    from ..host import bank", "which stands above it"),
        ("host/bank.py", "import ziggurat", "which stands above it"),
        ("host/bank.py", "from ziggurat import MSPLoraConfig", "which stands above it"),
        ("host/bank.py", "import importlib\nimportlib.import_module('ziggurat.training')", "which stands above it"),
        ("methods/one/model.py", "from ziggurat.methods.two import layer", "never imports another"),
        ("methods/one/model.py", "from ..two.layer import X", "never imports another"),
        ("training/loop/run.py", "from ziggurat import compare", "which stands above it"),
        ("newcomer.py", "", "newcomer: stands on no floor"),
    ],
)
def test_a_breach_is_seen(file: str, text: str, breach: str, tmp_path: Path) -> None:
    root = house(tmp_path)
    assert breaches(root) == []
    (root / file).write_text(text)
    breached = breaches(root)
    assert len(breached) == 1
    assert breach in breached[0]


def test_a_circle_on_one_floor_is_seen(tmp_path: Path) -> None:
    root = house(tmp_path)
    (root / "training" / "loop" / "run.py").write_text("from ziggurat.plan import plan")
    assert breaches(root) == []
    (root / "plan.py").write_text("from ziggurat.training.loop.run import run")
    assert len(breaches(root)) == 2


def house(folder: Path) -> Path:
    """An empty package with every floor, and imports that are allowed."""
    root = folder / "ziggurat"
    for name in (
        "lowrank/pair.py",
        "host/bank.py",
        "methods/one/model.py",
        "methods/two/layer.py",
        "training/loop/run.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("from ziggurat.errors import ConfigError\n")
    (root / "methods" / "one" / "layer.py").write_text("from .model import X\nfrom ziggurat.host.bank import Y")
    for name in ("__init__", "errors", "plan", "compare", "cli"):
        (root / f"{name}.py").write_text("")
    (root / "__init__.py").write_text("from ziggurat.methods.one.model import X")
    (root / "cli.py").write_text("from ziggurat import X, compare\nfrom ziggurat.training.loop.run import run")
    return root


#: What one fresh interpreter does, one after the other.
STAGES = {
    "peft": "import peft",
    "package": "import ziggurat",
    "command": "import ziggurat.cli, ziggurat.training",
    "help": "from ziggurat.cli import app; app(args=['--help'], standalone_mode=False)",
}
#: What the command and asking for help may not load beyond what the package has: neither names nor parts of it.
OF_WORK = {"torch", "transformers", "peft", "datasets", "sklearn", "scipy", "trl", "pandas", "pyarrow", "pydantic"}


@dataclass(frozen=True)
class Stages:
    """Stage -> the modules that it was the first to load; and what all of them wrote on stderr."""

    loaded: dict[str, set[str]]
    errors: str

    def packages(self, *stages: str) -> set[str]:
        return {name.partition(".")[0] for stage in stages for name in self.loaded[stage]}


@pytest.fixture(scope="module")
def stages() -> Stages:
    code = "import sys, json; found = {}\n" + "".join(
        f"before = set(sys.modules); {statements}; found[{stage!r}] = sorted(set(sys.modules) - before)\n"
        for stage, statements in STAGES.items()
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(json.dumps(found))"], capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout.splitlines()[-1])
    return Stages({stage: set(names) for stage, names in loaded.items()}, done.stderr)


def test_importing_the_package_loads_nothing_heavy(stages: Stages) -> None:
    assert "torch" in stages.packages("peft") and "ziggurat" in stages.packages("package")
    assert stages.packages("package") & set(HEAVY) == set()


def test_importing_the_package_says_nothing_of_bitsandbytes(stages: Stages) -> None:
    assert BEGINS not in stages.errors


def test_the_command_itself_loads_nothing_heavy(stages: Stages) -> None:
    """`ziggurat COMMAND` may cost what `import ziggurat` costs, and hardly more."""
    assert "typer" in stages.packages("command")
    assert stages.packages("command") & OF_WORK == set()


def test_asking_for_help_loads_no_more_than_the_package_and_the_parser(stages: Stages) -> None:
    """The package registers its methods with PEFT when it is imported, so torch is there; the rest can wait."""
    assert stages.packages("command", "help") & set(HEAVY) <= {"typer"}


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        *((line, "Usage: ziggurat") for line in ("", "--help", "-h", "train -h")),
        ("--version", "ziggurat "),
        ("plugin-path swift", "ziggurat_swift.py"),
        ("launch-config fsdp2", "fsdp2.yaml"),
    ],
)
def test_the_script_answers_what_only_prints_without_torch(line: str, shown: str) -> None:
    words = line.split()
    call = (
        f"import sys, json; sys.argv[1:] = {words!r}\nfrom ziggurat_command import main\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print(json.dumps([m for m in sys.modules if '.' not in m]))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", call], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert any(shown in line for line in lines)
    loaded = set(json.loads(last))
    assert "ziggurat" in loaded
    parser = {"typer", "pydantic"}  # typer itself reads arguments with pydantic
    assert loaded & {"torch", "transformers", "peft", "numpy", *HEAVY} <= parser


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ziggurat an", ["analyze"]),
        ("ziggurat train train.ep", ["train.epochs=", "train.epochs=3.0"]),
    ],
)
def test_a_shell_completes_without_torch(typed: str, offered: list[str]) -> None:
    call = (
        "import sys, json; sys.argv = ['ziggurat']\nfrom ziggurat_command import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print(json.dumps(sorted(sys.modules)))"
    )
    place = str(len(typed.split()) - 1)
    asks = {"_ZIGGURAT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": place}
    command = [sys.executable, "-W", "ignore", "-c", call]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | asks)
    *words, modules = done.stdout.splitlines()
    assert words == offered and not {"torch", "peft"} & set(json.loads(modules))


@pytest.mark.parametrize(
    "words",
    [["train"], ["--debug", "--help"], ["predict", "a", "--help"], ["predict", "a", "--", "--help"], ["help"]],
    ids=" ".join,
)
def test_what_may_do_more_gets_the_whole_package(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import ziggurat
    import ziggurat_command

    modules = []
    monkeypatch.setattr(sys, "argv", ["ziggurat", *words])
    monkeypatch.setattr("ziggurat.cli.main", lambda: modules.append(sys.modules["ziggurat"]))
    ziggurat_command.main()
    assert modules == [ziggurat]


def test_ctrl_c_while_torch_is_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ziggurat_command

    class Interrupted:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "ziggurat.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["ziggurat", "train"])
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition("ziggurat.cli")[1] and name.startswith("ziggurat.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("ziggurat.cli", raising=False)
    with pytest.raises(SystemExit) as ended:
        ziggurat_command.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "error: stopped\n"
