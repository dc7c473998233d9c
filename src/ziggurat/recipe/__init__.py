"""The language of recipes: keys, parsing, errors, and the fields of each method."""
