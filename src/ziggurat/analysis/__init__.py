"""Analysis of an adapter: its components, their use of their rank, and the similarity of its layers.

`collect` reads any adapter into plain values; `measures` turns them into rows, arrays and data frames; `figures` draws
on matplotlib axes; `write` makes tables, files and figures of all of it. Nothing here loads matplotlib until it draws.
"""

from .collect import collect, collect_state
from .components import Collected, Component

__all__ = ["Collected", "Component", "collect", "collect_state"]
