"""What is done with a finished model to see what it has learned."""
