"""Checkpoints: format, commit protocol, faults."""
