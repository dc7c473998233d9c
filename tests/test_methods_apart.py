"""Knowledge of a method is in its folder: no other file names one, imports from one, or asks for its parts."""

import ast
from collections.abc import Iterator
from pathlib import Path

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

import ziggurat
from ziggurat.host.bank import Bank
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.method import METHODS
from ziggurat.host.tuner import MethodTuner

SOURCE = Path(ziggurat.__file__).parent
#: Files that name methods because that is what they are for.
LISTS = {
    "__init__.py": "what `import ziggurat` offers",
    "recipe/methods.py": "the rows that recipes name, with PEFT's own methods",
    "plan/planner.py": "the methods that a plan is compared with",
    "plan/suggest.py": "the command that lays out a pyramid",
    "plan/allocate.py": "the sizes of a pyramid's tiers, for that command",
    "doctor/facts.py": "the table of what was tested with the papers' three methods",
    "cli/plan.py": "the method of a plan without a recipe",
}


def others() -> Iterator[tuple[str, ast.AST]]:
    """The syntax tree of every file outside the methods' folder, by its path there."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith("methods/") and name not in LISTS:
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def test_no_other_file_names_a_method() -> None:
    names = {name for method in METHODS.values() for name in (method.name, method.peft_type, method.card.shown)}
    named = [
        f"{file}:{node.lineno} {node.value!r}"
        for file, tree in others()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert named == []


def test_no_other_file_imports_from_a_method() -> None:
    imports = [
        f"{file}:{node.lineno} {node.module}"
        for file, tree in others()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ziggurat.methods")
    ]
    assert imports == []


def test_no_other_file_asks_for_what_only_a_method_has() -> None:
    """By `hasattr` or `getattr`: attributes of one method's config, tuner, layer or bank that the shared ones lack."""
    shared = {name for kind in (MethodTuner, AdaptedLinear, Bank) for name in dir(kind)}
    private: set[str] = set()
    for method in METHODS.values():
        private |= (
            set(dir(method.config)) - set(dir(method.config.__mro__[1])) - {"hidden_size"}
        )  # the base has one too
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(method.peft_type)]
        private |= {name for kind in (tuner, tuner.layer_cls, tuner.bank_cls) for name in vars(kind)} - shared
    asked = [
        f"{file}:{node.lineno} {node.args[1].value}"
        for file, tree in others()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
        and isinstance(node.args[1], ast.Constant)
        and node.args[1].value in private
    ]
    assert asked == []


def test_the_lists_are_still_needed() -> None:
    names = {name for method in METHODS.values() for name in (method.name, method.peft_type, method.config.__name__)}
    for file in LISTS:
        text = (SOURCE / file).read_text(encoding="utf-8")
        assert any(name in text for name in names) or "tier_of" in text, file
