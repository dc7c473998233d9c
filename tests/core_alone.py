"""A process that has the core alone: what is installed here beyond `pip install ziggurat-peft` is hidden from it.

    python tests/core_alone.py JOB.json

runs every method on a tiny model, imports every module of the package, and runs the commands that JOB.json lists. The
last line it prints is one JSON object: see `main`.
"""

import contextlib
import importlib
import importlib.metadata
import io
import json
import pkgutil
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Modules that only import where Triton is, which torch brings on a machine with a GPU.
TRITON = {"ziggurat.lowrank.triton_kernels", "ziggurat.lowrank.triton_product"}
#: Modules that a client alone loads, whose classes they extend.
CLIENTS = {"ziggurat.integrations.axolotl", "ziggurat.integrations.swift.ziggurat_swift"}


def core_distributions() -> set[str]:
    """What pip installs for the core: its dependencies and theirs, as the installed metadata name them."""
    names: set[str] = {PROJECT["name"]}
    todo = [Requirement(text) for text in PROJECT["dependencies"]]
    while todo:
        wanted = todo.pop()
        if any(wanted.marker is None or wanted.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
            name = canonicalize_name(wanted.name)
            if name not in names:
                names.add(name)
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    todo += [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return names


def modules_outside(core: set[str]) -> set[str]:
    """Top-level modules that only distributions outside `core` bring."""
    return {
        module
        for module, brought in importlib.metadata.packages_distributions().items()
        if core.isdisjoint(map(canonicalize_name, brought)) and module.partition("_")[0] != "ziggurat"
    }


class Finder:
    """Python's finder of what lies on the path, blind to some modules and to all distributions but some."""

    def __init__(self, hidden: set[str], core: set[str]) -> None:
        self.hidden = hidden
        self.core = core

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in self.hidden else PathFinder.find_spec(name, path, target)

    def find_distributions(self, *context: Any) -> Iterator[importlib.metadata.Distribution]:
        distributions = importlib.metadata.MetadataPathFinder.find_distributions(*context)
        return (item for item in distributions if canonicalize_name(str(item.metadata["Name"])) in self.core)

    def invalidate_caches(self) -> None:
        PathFinder.invalidate_caches()


def hide() -> set[str]:
    """Hide everything but the core from this process; the modules that can't be found from now on."""
    core = core_distributions()
    hidden = modules_outside(core)
    sys.meta_path = [Finder(hidden, core) if item is PathFinder else item for item in sys.meta_path]
    return hidden


def try_methods() -> list[str]:
    """Put each method on a tiny model, save it and load it again; what failed."""
    import torch
    from peft import PeftModel, get_peft_model

    from methods_table import METHODS, logits, zoo_config
    from zoo import ZOO

    failed = []
    for method in METHODS:
        try:
            with tempfile.TemporaryDirectory() as folder:
                model = get_peft_model(ZOO["bert"].build(), zoo_config(method, "bert", init_weights=False)).eval()
                model.save_pretrained(folder)
                again = PeftModel.from_pretrained(ZOO["bert"].build(), folder).eval()
            assert torch.equal(logits(again, ZOO["bert"].inputs()), logits(model, ZOO["bert"].inputs()))
        except Exception:
            failed.append(f"{method}: {traceback.format_exc()}")
    return failed


def import_all() -> list[str]:
    """Import every module of the package; those that can't be."""
    import ziggurat

    failed = []
    for module in pkgutil.walk_packages(ziggurat.__path__, "ziggurat."):
        if module.name.endswith("__main__") or module.name in TRITON | CLIENTS:
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed.append(f"{module.name}: {error}")
    return failed


def main(job: Path) -> None:
    """Print {hidden, methods, modules, commands}: names, failures, failures, and [exit code, stdout, stderr] each."""
    hidden = hide()
    outcome: dict[str, Any] = {
        "hidden": sorted(hidden),
        "methods": try_methods(),
        "modules": import_all(),
        "commands": [],
    }
    from commands import main as command

    for words in json.loads(job.read_text(encoding="utf-8")):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command(*words)
        outcome["commands"].append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
