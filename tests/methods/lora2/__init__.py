"""A package, so that its test files may be called as those of the other methods are."""
