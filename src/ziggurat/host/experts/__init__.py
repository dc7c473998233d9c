"""Experts whose weights lie in one parameter: their sites, their updates, and a forward for all of them."""
