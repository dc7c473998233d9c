"""The base model: its stacks of layers, its linear layers, and its weights."""
