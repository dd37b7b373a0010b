"""The model: parity with transformers, recompute, initial values, counts."""
