"""DyLoRA (arXiv 2210.07558): LoRA whose every leading rank works, a baseline of the papers' tables."""
