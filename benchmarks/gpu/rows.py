"""What the parts write: JSON objects, one a line, in the file at once, so that a part that is cut loses nothing."""

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = "results.jsonl"


class Rows:
    """The rows of one part. Several processes may add at once: each row is one write to the end of the file."""

    def __init__(self, out: Path, part: str) -> None:
        self.part, self.file = part, out / FILE
        self.failures = 0

    def add(self, **row: Any) -> None:
        line = json.dumps({"part": self.part, **{key: _written(value) for key, value in row.items()}}) + "\n"
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def failed(self, error: BaseException | str, **row: Any) -> None:
        """A measurement that raised: the others go on, and the part ends with an exit code other than 0."""
        self.failures += 1
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.add(**row, error=text[:400])
        print(f"{self.part}: {row}: {text}", flush=True)


def read(out: Path) -> list[dict[str, Any]]:
    """All rows in the folder. A line that a killed process left unfinished is dropped."""
    rows = []
    for line in (out / FILE).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def machine() -> dict[str, str]:
    """The card, its driver, the versions and the source, found without touching the card."""
    card, driver = "none", "none"
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
        card, driver = (word.strip() for word in line.split(",", 1))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        pass
    packages = {name: _version(name) for name in ("torch", "triton", "transformers", "peft", "accelerate")}
    return {
        "card": card,
        "driver": driver,
        "python": platform.python_version(),
        **packages,
        "commit": os.environ.get("ZIGGURAT_COMMIT", "unknown"),
        "source": source(),
        "date": time.strftime("%Y-%m-%d"),
    }


def source() -> str:
    """A digest of src/: it tells the measured code where the tree came without its git folder."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "src").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def arguments(part: str, about: str | None) -> tuple[argparse.Namespace, Rows]:
    """What every part is told, and its rows, which begin with the machine."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--until", type=float, default=math.inf, help="no measurement starts after this Unix time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on a CPU")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out, part)
    rows.add(what="machine", **machine())
    return given, rows


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _written(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value
