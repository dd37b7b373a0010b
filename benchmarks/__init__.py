"""Measurements: scripts that print tables, with their results beside them."""
