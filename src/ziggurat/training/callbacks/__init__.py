"""Callbacks of a run's Trainer."""
