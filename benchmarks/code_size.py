"""Lines of code of each part of the package, without docstrings, comments and blank lines; its longest functions; and
how many of its files `ziggurat train` imports at once.

python benchmarks/code_size.py [SOURCE]
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

CORE = ("lowrank", "files", "host", "methods", "export")
TRAIN = "ziggurat.training.loop.run"
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def code_lines(text: str) -> int:
    """How many lines of a module hold code."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {n for t in tokens if t.type not in _LAYOUT for n in range(t.start[0], t.end[0] + 1) if t.string}
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines, name) of every function of a module, with its signature and docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [((node.end_lineno or node.lineno) - node.lineno + 1, f"{path.name}:{node.name}") for node in nodes]


def imported_at_once(source: Path, start: str) -> set[str]:
    """The files of the package that importing the module `start` imports, itself with them.

    Imports inside functions and for types only don't count, nor do packages' `__init__`.
    """
    files = {".".join(file.relative_to(source.parent).with_suffix("").parts): file for file in source.rglob("*.py")}
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in files and name not in reached:
            reached.add(name)
            waiting += _imports(name, files[name])
    return reached


def _imports(name: str, file: Path) -> list[str]:
    parents = name.split(".")[:-1]
    names = []
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = parents[: len(parents) - node.level + 1] if node.level else []
                module = ".".join([*base, *filter(None, [node.module])])
                names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _for_types(node):
                waiting.append(node)
    return names


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "src" / "ziggurat")
    rooms: Counter[str] = Counter()
    longest: list[tuple[int, str]] = []
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).parts
        rooms[parts[0] if len(parts) > 1 else "(top)"] += code_lines(path.read_text(encoding="utf-8"))
        longest += functions(path)
    for room, lines in sorted(rooms.items(), key=lambda item: -item[1]):
        print(f"{room:12} {lines:6,}")
    print(f"{'core':12} {sum(rooms[room] for room in CORE):6,}  ({', '.join(CORE)})")
    print(f"{'all':12} {sum(rooms.values()):6,}")
    long = [f"{name} {lines}" for lines, name in sorted(longest)[::-1] if lines > 60]
    print("functions over 60 lines:", ", ".join(long) or "none")
    print("files that train imports at once:", len(imported_at_once(source, TRAIN)))


if __name__ == "__main__":
    main()
