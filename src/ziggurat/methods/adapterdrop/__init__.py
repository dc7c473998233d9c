"""Bottleneck adapters after linear layers, with AdapterDrop (arXiv 2010.11918), a baseline of the papers' tables."""
