"""Replaced names of other people's packages: each a record that checks what it finds and can be undone."""
