"""MSPLoRA: a multi-scale pyramid of shared low-rank updates (arXiv 2503.21838)."""
