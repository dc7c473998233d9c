"""`python -m ziggurat.cli`: the same as `ziggurat`."""

from . import main

main()
