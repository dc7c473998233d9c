"""Lines of code of each part of the package, without docstrings, comments and blank lines; and its longest functions.

python benchmarks/code_size.py [SOURCE]
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

CORE = ("lowrank", "files", "host", "methods", "export")
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
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [((node.end_lineno or node.lineno) - node.lineno + 1, f"{path.name}:{node.name}") for node in found]


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
    print(
        "functions over 60 lines:", ", ".join(f"{name} {lines}" for lines, name in sorted(longest)[::-1] if lines > 60)
    )


if __name__ == "__main__":
    main()
