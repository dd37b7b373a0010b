"""Tokens from disk to batches: shards, order, mixture, loader. Knows numpy and pyarrow, not torch."""
