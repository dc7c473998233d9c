"""The folder of a run: checkpoints, working files, the result."""
