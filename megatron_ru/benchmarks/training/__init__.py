"""How fast a model trains, ours beside others' at the same shape, each in a process of its own."""
