"""Incompatible combinations and their reasons, before they fail: `checks` finds them in the table of `facts`."""
