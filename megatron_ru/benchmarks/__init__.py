"""How fast and how exact the ops are, beside others' in the same run."""
