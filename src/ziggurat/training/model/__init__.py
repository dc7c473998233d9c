"""Base model, head and adapter of a recipe, with and without weights."""
