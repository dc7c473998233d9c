"""The language of recipes: keys, text, mistakes, and the fields of each method."""
