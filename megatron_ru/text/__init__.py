"""Documents and the files they come from."""
