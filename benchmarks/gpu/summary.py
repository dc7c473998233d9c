"""The tables of a results folder as summary.md, from whatever rows are there.

python -m benchmarks.gpu.summary --out DIR
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import read

Row = dict[str, Any]
#: Exit codes of `timeout`: the part was stopped, gently or not.
CUT = {124: "cut at its limit", 137: "cut at its limit"}


def markdown(rows: list[Row]) -> str:
    """Title, machine, parts, kernels, then one table for each `table` that rows name."""
    machines = [row for row in rows if row.get("what") == "machine"]
    card = next((row["card"] for row in machines), "no part began")
    machine = sorted({", ".join(f"{k} {v}" for k, v in row.items() if k not in ("part", "what")) for row in machines})
    sections = [f"# {'rehearsal on a CPU' if card == 'none' else card}", *machine, parts(rows), kernels(rows)]
    tables: dict[str, list[Row]] = {}
    for row in rows:
        if "table" in row:
            tables.setdefault(row["table"], []).append({k: v for k, v in row.items() if k not in ("part", "table")})
    sections += [f"## {title}\n\n{table(lines)}" for title, lines in tables.items()]
    return "\n\n".join(section for section in sections if section) + "\n"


def parts(rows: list[Row]) -> str:
    ends = [row for row in rows if row.get("what") == "end"]
    cells = [
        {
            "part": row["part"],
            "ended": CUT.get(row["exit"], "well" if row["exit"] == 0 else f"with exit code {row['exit']}"),
            "seconds": row["seconds"],
            "errors": sum("error" in other for other in rows if other["part"] == row["part"]),
        }
        for row in ends
    ]
    return f"## Parts\n\n{table(cells)}" if cells else ""


def kernels(rows: list[Row]) -> str:
    """Cases and the largest errors by dtype, and the cases that failed."""
    cases = [row for row in rows if row["part"] == "kernels" and "passed" in row]
    if not cases:
        return ""
    cells = []
    for dtype, factors in sorted({(row["dtype"], row["factors"]) for row in cases}):
        those = [row for row in cases if (row["dtype"], row["factors"]) == (dtype, factors)]
        row: Row = {"dtype": dtype, "factors": factors, "cases": len(those), "passed": sum(r["passed"] for r in those)}
        for name in ("out", "dy", "dx", "dA", "dB"):
            row[f"largest {name}"] = max((r[name] for r in those if isinstance(r.get(name), float)), default="")
        cells.append(row)
    failed = [{k: v for k, v in row.items() if k not in ("part", "passed")} for row in cases if not row["passed"]]
    text = f"## Kernels against float64\n\n{table(cells)}"
    return f"{text}\n\n### Failed\n\n{table(failed[:40])}" if failed else text


def table(rows: Iterable[Row]) -> str:
    """One column for each key, in the order in which keys first occur."""
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    aligned = ["--:" if any(isinstance(row.get(key), int | float) for row in rows) else "---" for key in keys]
    lines = [keys, aligned, *([cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    text = markdown(read(out))
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
