"""The package's name on PyPI, and its version: readable without importing the package, which loads torch."""

#: `ziggurat` is another project's name on PyPI; the import name and the command are `ziggurat`.
DISTRIBUTION = "ziggurat-peft"
VERSION = "0.1.0"
