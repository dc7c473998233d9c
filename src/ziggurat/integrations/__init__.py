"""Plugins for other programs: one file for each program, loaded by that program or by its command alone."""

from pathlib import Path

#: Program -> its plugin file, for programs that take a plugin by its path.
PLUGIN_FILES = {"swift": Path(__file__).parent / "swift" / "ziggurat_swift.py"}
