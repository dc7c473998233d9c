"""Where the script `ziggurat` starts: help and version are answered without loading torch.

`import ziggurat` registers the methods with PEFT, so it loads torch and transformers, which takes seconds. What only
prints needs neither. This module stands beside the package, as nothing inside can be imported before the package is.
"""

import os
import sys
from importlib.util import find_spec, module_from_spec
from typing import NoReturn

#: Commands that print the path of a file, for another command's line.
_PATHS = ("launch-config", "plugin-path")


def only_prints(words: list[str]) -> bool:
    """Whether `ziggurat WORDS` surely ends in help, the version, a path, or what a shell asks to complete a line.

    Further on, `--help` can be an option's value.
    """
    if "_ZIGGURAT_COMPLETE" in os.environ or words in ([], ["--version"], ["--show-completion"]):
        return True
    if len(words) != 2:
        return words in (["--help"], ["-h"])
    return not words[0].startswith("-") and (words[1] in ("--help", "-h") or words[0] in _PATHS)


def main() -> NoReturn:
    if only_prints(sys.argv[1:]):
        # The package is found but not run: its modules can be imported, its methods are not there.
        spec = find_spec("ziggurat")
        assert spec is not None
        sys.modules["ziggurat"] = module_from_spec(spec)
    try:
        from ziggurat.cli import main as command
    except KeyboardInterrupt:  # loading torch takes seconds; what comes after tells of it itself
        sys.stderr.write("error: stopped\n")
        raise SystemExit(130) from None
    command()
