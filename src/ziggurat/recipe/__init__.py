"""The language of recipes: keys, text, mistakes, and what each method may be told."""
