"""Numbers for the eye: tables and curves in the terminal, figures as PNG."""
