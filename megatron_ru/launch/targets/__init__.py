"""One renderer per target, found by scanning this package."""
