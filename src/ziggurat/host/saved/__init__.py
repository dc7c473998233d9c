"""An adapter's folder: its config, the names of its tensors, the table of its sites, its structure, its card."""
