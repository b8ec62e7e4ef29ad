"""From raw text to the datasets that Megatron trains on: steps, each a function from a task number to files."""
