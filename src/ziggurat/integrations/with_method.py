"""`ziggurat with METHOD ... -- PROGRAM`: a program that makes a LoraConfig trains another method, its code unmodified.

The program and its child processes get the request by an environment variable, which `ziggurat_door` reads at `import
torch`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ziggurat.errors import ConfigError
from ziggurat.host.config import MethodConfig
from ziggurat.host.method import METHODS
from ziggurat.host.plugins import load, loaded
from ziggurat.nearest import did_you_mean

#: As in `ziggurat_door`, which is not imported here: it stands outside of the package.
WITH, SWITCHES = "ZIGGURAT_WITH", {"ZIGGURAT_AUTOLOAD": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}


def run_with(method: str, fields: Mapping[str, Any], program: Sequence[str]) -> int:
    """Run `program` so that each LoraConfig that it makes becomes the config of `method` with `fields`; its exit code.

    Raises:
        ConfigError: there is no such method, field or program; a value is invalid; or the program succeeded without
            making a LoraConfig, so that nothing in it was trained by `method`.
    """
    of_method(LoraConfig(), method, fields)  # raises before minutes have passed
    executable = shutil.which(program[0]) or shutil.which(program[0], path=str(Path(sys.executable).parent))
    if executable is None:
        a_file = " It is a file that can't be run by itself: `python FILE`?" if Path(program[0]).is_file() else ""
        raise ConfigError(f"there is no program {program[0]!r}: neither on PATH nor beside {sys.executable}.{a_file}")
    with tempfile.TemporaryDirectory(prefix="ziggurat-with-") as folder:
        mark = Path(folder) / "made"
        request = {"method": method, "fields": dict(fields), "plugins": loaded(), "mark": str(mark)}
        code = _run([executable, *program[1:]], {**os.environ, **SWITCHES, WITH: json.dumps(request)})
        if code == 0 and not mark.exists():
            raise ConfigError(
                f"{program[0]} has ended, and made no LoraConfig: nothing in it was trained by {method}. Does it train "
                "LoRA by PEFT (TRL: --use_peft), and is ziggurat installed where it runs? A program that only "
                "loads adapters needs no `ziggurat with`."
            )
    return code


def turned(lora: LoraConfig) -> MethodConfig:
    """The config that replaces `lora` in a program that `ziggurat with` runs.

    Raises:
        ConfigError: `lora` has settings that the method doesn't support.
    """
    import ziggurat  # noqa: F401  registers the methods

    request = json.loads(os.environ[WITH])
    load(request["plugins"])
    config = of_method(lora, request["method"], request["fields"])
    mark = Path(request["mark"])
    if mark.parent.is_dir():  # on another machine it isn't
        mark.touch()
    return config


def of_method(lora: LoraConfig, method: str, fields: Mapping[str, Any]) -> MethodConfig:
    """The config of `method` with the settings of `lora` and with `fields`, which override them."""
    if method.upper() not in METHODS:
        names = [name.lower() for name in METHODS]
        raise ConfigError(
            f"there is no method {method!r}{did_you_mean(method, names) or '.'} There are {', '.join(names)}."
        )
    from ziggurat.recipe.methods import NOT_IN_A_RECIPE

    config = METHODS[method.upper()].config
    allowed = set(config.__dataclass_fields__) - NOT_IN_A_RECIPE | {"task_type"}
    for name in fields:
        if name in NOT_IN_A_RECIPE & LoraConfig.__dataclass_fields__.keys() - allowed:
            raise ConfigError(f"{name} is set by the program itself: leave it out of the words of `ziggurat with`.")
        if name not in allowed:
            hint = did_you_mean(name, sorted(allowed)) or f"; it has {', '.join(sorted(allowed))}"
            raise ConfigError(f"{config.__name__} has no field {name!r}{hint}")
    try:
        return config.from_lora(lora, **fields)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # PEFT's own checks
        raise ConfigError(f"{config.__name__}: {error}") from error


def _run(words: list[str], env: dict[str, str]) -> int:
    """Run the program, passing stop signals on to it; its exit code, as in a shell."""
    with subprocess.Popen(words, env=env) as process:  # noqa: S603  what the user has asked to run
        # Ctrl-C reaches the program by itself; here only its end is waited for.
        before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number)),
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        }
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 128 - code if code < 0 else code
