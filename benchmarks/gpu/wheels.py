"""Which of the wheels in a folder this Python needs: those of packages that are missing, or older than we work with.

python -m benchmarks.gpu.wheels FOLDER    # prints their paths, one a line
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def needed(folder: Path) -> list[Path]:
    lowest = bounds()
    wheels = []
    for wheel in sorted(folder.glob("*.whl")):
        name = wheel.name.split("-")[0].replace("_", "-").lower()
        try:
            enough = numbers(metadata.version(name)) >= lowest.get(name, ())
        except metadata.PackageNotFoundError:
            enough = False
        if not enough:
            wheels.append(wheel)
    return wheels


def bounds() -> dict[str, tuple[int, ...]]:
    """Package -> the lowest version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    matches = (re.match(r"([\w-]+)\s*[^>]*>=\s*([\d.]+)", line) for line in project["dependencies"])
    return {match[1].lower(): numbers(match[2]) for match in matches if match}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


if __name__ == "__main__":
    print(*needed(Path(sys.argv[1])), sep="\n")
