"""Bottleneck adapters after linears, with AdapterDrop (arXiv 2010.11918), a baseline of the papers' tables."""
