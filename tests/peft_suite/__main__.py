"""`python -m tests.peft_suite MSPLoraConfig [FILES...] [-- PYTEST ARGUMENTS]`."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from .fetch import fetch

FILES = (
    "test_custom_models",
    "test_config",
    "test_tuners_utils",
    "test_low_level_api",
    "test_initialization",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
)
#: Methods of PEFT whose rows are rewritten: both share factors between layers, as ours do.
TEMPLATES = ("VeraConfig", "LilyConfig")
RENAME = {"vera_dropout": "lora_dropout"}


def main(words: list[str]) -> int:
    """Run the tests; pytest's exit status."""
    at = words.index("--") if "--" in words else len(words)
    given, extra = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("config", help="config class of ziggurat, such as MSPLoraConfig")
    parser.add_argument("files", nargs="*", help=f"PEFT's test files (default: {' '.join(FILES)})")
    parser.add_argument("--templates", nargs="+", default=list(TEMPLATES), help="methods whose rows are rewritten")
    asked = parser.parse_args(given)
    if importlib.util.find_spec("parameterized") is None:
        raise SystemExit(f"pip install -r {Path(__file__).with_name('requirements.txt')}")
    folder = fetch()
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "PEFT_SUITE": json.dumps({"config": asked.config, "templates": asked.templates, "rename": RENAME}),
    }
    furnish = (
        "import sys, pathlib, peft_suite.tiny_hub as hub; hub.T.logging.disable_progress_bar(); "
        "hub.furnish(pathlib.Path(sys.argv[1]))"
    )
    cache = str(folder / "hub" / "hub")
    subprocess.run([sys.executable, "-W", "ignore", "-c", furnish, cache], env=environment, check=True)
    tests = [f"tests/{name.removesuffix('.py')}.py" for name in asked.files or FILES]
    pytest = [sys.executable, "-m", "pytest", "-p", "peft_suite.plugin", "-c", os.devnull, "--rootdir", str(folder)]
    return subprocess.run([*pytest, "-q", "-W", "ignore", *tests, *extra], env=environment, cwd=folder).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
