"""Files and hub data sets to checked examples and token ids."""
