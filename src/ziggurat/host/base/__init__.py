"""The base model: where its layers and linear layers are, what its weights are, and what a merge must know of them."""
