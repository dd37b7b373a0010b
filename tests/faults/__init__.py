"""Faults on purpose: killed, without power, corrupted, out of space. Never a broken or a wrong resume."""
