"""`ziggurat launch-config`: config files for `accelerate launch`, one for each way to train on several devices."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from ziggurat.errors import ConfigError
from ziggurat.terminal import say

NAMES = ("ddp", "fsdp2", "zero2", "zero3")


def config_file(name: str) -> Path:
    """The config file called `name`. Raises ConfigError for a name that isn't one of `NAMES`."""
    if name not in NAMES:
        raise ConfigError(f"launch config {name!r} does not exist; there are {', '.join(NAMES)}")
    return Path(str(files("ziggurat") / "launch" / f"{name}.yaml"))


def launch_config(name: Annotated[str | None, typer.Argument(help="Print the path of this one.")] = None) -> None:
    """List the configs for `accelerate launch` that ship, or print the path of one."""
    if name is not None:
        say(str(config_file(name)))
        return
    for config_name in NAMES:
        about = config_file(config_name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        say(f"{config_name:<6} {about}")
    say('accelerate launch --config_file "$(ziggurat launch-config ddp)" --num_processes 2 -m ziggurat train ...')
