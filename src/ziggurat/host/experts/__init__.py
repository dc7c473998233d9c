"""Experts whose weights lie in one parameter: where they are, their updates, and a forward for all of them."""
