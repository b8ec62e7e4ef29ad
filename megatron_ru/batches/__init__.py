"""Documents of token ids become blocks of one length, and blocks of several domains a mixture."""
