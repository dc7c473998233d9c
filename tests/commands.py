"""The command in the test's own process."""

import sys

from ziggurat import cli


def main(*words: str) -> int:
    """`ziggurat WORDS`; its exit code."""
    before = sys.argv
    sys.argv = ["ziggurat", *words]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
