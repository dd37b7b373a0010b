"""Checkpoints: what one is on disk (format) and how ranks write and read it together (store)."""
