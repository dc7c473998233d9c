"""The folder of a run: checkpoints, working files, one result."""
