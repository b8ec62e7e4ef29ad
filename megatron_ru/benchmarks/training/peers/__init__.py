"""Who trains the same shape by other means, one file each."""
