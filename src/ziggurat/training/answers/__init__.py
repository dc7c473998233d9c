"""A trained adapter, loaded and asked."""
