"""Loading a trained adapter, and its answers."""
