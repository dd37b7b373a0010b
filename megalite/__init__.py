"""megalite: a small, provably right trainer for decoder-only language models."""

__version__ = "0.1.0"
