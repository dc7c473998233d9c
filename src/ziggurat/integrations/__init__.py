"""Other programs' doors: one file for each program, loaded by that program or by its command alone."""

from pathlib import Path

#: Program -> the file that it takes as a plugin, where a path is all that it takes.
PLUGIN_FILES = {"swift": Path(__file__).parent / "swift" / "ziggurat_swift.py"}
