"""PEFT's tests, from the source package of the installed version. They are never copied into this repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import peft

PARTS = ("tests", "LICENSE")


def home() -> Path:
    """Where the tests and the tiny models of the installed version of PEFT are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("PEFT_SUITE_DIR", cache / "ziggurat" / "peft-suite")) / peft.__version__


def fetch() -> Path:
    """Download and unpack the tests unless they are there; the folder that holds `tests`.

    Raises:
        SystemExit: the source package can't be downloaded.
    """
    target = home()
    if (target / "tests" / "testing_common.py").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*download, "--dest", work, f"peft=={peft.__version__}"], capture_output=True, text=True)
        archives = list(Path(work).glob("peft-*.tar.gz"))
        if done.returncode or not archives:
            raise SystemExit(
                f"the source package of peft {peft.__version__} can't be downloaded:\n{done.stderr.strip()}"
            )
        with tarfile.open(archives[0]) as archive:
            inside = [m for m in archive.getmembers() if m.name.split("/")[1:2] and m.name.split("/")[1] in PARTS]
            archive.extractall(work, members=inside, filter="data")
        (unpacked,) = (path for path in Path(work).iterdir() if path.is_dir())
        (unpacked / "tests" / "__init__.py").touch()
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)
    return target
