"""LoR2C: low-rank residual paths around layers, that share, merge and inject (arXiv 2503.00572)."""
