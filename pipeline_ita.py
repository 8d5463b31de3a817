"""Pipeline (being written)."""
