"""A bad network between a source and a destination on one host."""
