"""Scores of a trained adapter on tasks it wasn't chosen by: GLUE's splits and server files, and lm-eval's tasks."""
