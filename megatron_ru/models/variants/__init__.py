"""Every known architecture: a file here that calls `register` adds one, or a family of them."""
