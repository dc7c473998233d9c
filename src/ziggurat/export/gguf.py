"""For llama.cpp and Ollama: an exported adapter as GGUF, by llama.cpp's own converter, and Ollama's Modelfile."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ziggurat.errors import ExportError

CONVERTER, SOURCE = "convert_lora_to_gguf.py", "LLAMA_CPP"
ADAPTER = "adapter.gguf"


def converter() -> Path:
    """llama.cpp's converter of adapters.

    Raises:
        ExportError: it is neither in the folder that the variable LLAMA_CPP names, nor on PATH.
    """
    named = os.environ.get(SOURCE)
    path = str(Path(named) / CONVERTER) if named else shutil.which(CONVERTER)
    if path is None or not Path(path).is_file():
        where = f"in {SOURCE}={named}" if named else f"on PATH, and {SOURCE} names no folder"
        raise ExportError(f"llama.cpp's {CONVERTER} isn't {where}: set {SOURCE} to the folder of llama.cpp's source.")
    return Path(path)


def check_convertible(config: Any, base_model: str | None) -> None:
    """Raise ExportError if the converter can't take the adapter of this config: before anything is written.

    `base_model`: the base model, if the config names a wrong one.
    """
    if not (base_model or config.base_model_name_or_path):
        raise ExportError(f"{CONVERTER} needs the base model's config, and the adapter doesn't name it: give --base.")
    if named := getattr(config, "target_parameters", None):
        raise ExportError(
            f"the adapter adapts parameters ({', '.join(named)}), and llama.cpp's converter knows the factor pairs of "
            "linear layers alone. Merge into the model (`ziggurat merge`) and convert that."
        )


def write_gguf(folder: Path, base_model: str) -> Path:
    """Convert the exported adapter in `folder` to `folder`/adapter.gguf, beside it.

    `base_model`: a folder with the base model's config, or its name.

    Raises:
        ExportError: the converter isn't there, or it fails, with the last line of its output.
    """
    base = ["--base", base_model] if Path(base_model).is_dir() else ["--base-model-id", base_model]
    command = [sys.executable, str(converter()), str(folder), *base, "--outfile", str(folder / ADAPTER)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")  # noqa: S603
    if done.returncode != 0 or not (folder / ADAPTER).is_file():
        reason = next(filter(str.strip, reversed(done.stderr.splitlines())), "it gives no reason")
        raise ExportError(f"{CONVERTER} can't convert {folder}, which stays as --serving writes it: {reason.strip()}")
    return folder / ADAPTER


def modelfile(base_model: str | None, adapter: str = ".") -> str:
    """The Modelfile for `ollama create NAME -f Modelfile`. `adapter`: `.`, or the name of a GGUF file.

    A folder is named by its whole path, as Ollama looks beside the Modelfile. A line break would begin an instruction.
    """
    base = str(Path(base_model).resolve()) if base_model and Path(base_model).is_dir() else base_model
    return f"""# ollama create NAME -f Modelfile
# FROM is the adapter's own base: a folder of safetensors, a GGUF file, or Ollama's name of it.
FROM {base if base and base.isprintable() else "BASE"}
ADAPTER {adapter if adapter == "." else f"./{adapter}"}
"""
