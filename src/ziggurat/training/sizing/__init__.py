"""Trainable parameters from shapes, and ranks from a budget."""
