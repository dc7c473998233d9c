"""LoRA²: two nested low-rank planes, pruned by importance (arXiv 2408.06854)."""
