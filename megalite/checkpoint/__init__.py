"""Checkpoints: what one is on disk (format), how ranks write (commit, writer) and read it (store)."""
