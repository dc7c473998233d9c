"""Scores of a trained adapter on further tasks: GLUE's splits and server files, and lm-eval's tasks."""
