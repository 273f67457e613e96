"""`fedloom benchmark`: a matrix of recipes, run cell by cell, and its table."""
