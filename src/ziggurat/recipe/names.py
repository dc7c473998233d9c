"""Other programs' names of a recipe's keys, from `names.yaml`, and hints for recipes that use them."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

#: Program in `names.yaml` -> its name in texts.
PROGRAMS = {"huggingface": "Hugging Face", "llama_factory": "LLaMA-Factory", "axolotl": "Axolotl"}


@cache
def tables() -> dict[str, dict[str, str]]:
    """Program -> its names with their equivalents: a key, a key with its value, or words; "" for none."""
    read: Any = yaml.safe_load((files("ziggurat") / "recipe" / "names.yaml").read_text(encoding="utf-8"))
    return {program: read[program] | dict.fromkeys(read["none"][program], "") for program in PROGRAMS}


def answer(key: str) -> str | None:
    """A hint for an unknown key that another program has; None for other keys."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    program = next((program for program, names in tables().items() if name in names), None)
    if program is None:
        return None
    ours = tables()[program][name]
    if not ours:
        return f"; {PROGRAMS[program]} has it, and no key stands for it here"
    if ours.startswith("nothing"):
        return f"; {ours.replace('nothing', 'leave it out', 1)}"
    return f"; here it is {ours}" if " " in ours else f", did you mean {ours}?"
