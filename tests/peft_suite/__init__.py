"""PEFT's own public tests, run on a method of this package. See docs/peft-suite.md."""
