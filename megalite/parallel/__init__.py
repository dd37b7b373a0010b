"""Processes, their axes, and the collectives between them."""
