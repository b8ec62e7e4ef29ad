"""The arithmetic of the model, one op per file, each with its plain torch form."""
