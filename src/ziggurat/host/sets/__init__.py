"""Adapters that have tensors in common: one that builds on another, and several trained and saved as a set."""
