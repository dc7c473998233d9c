"""Several processes: ranks, sharding."""
