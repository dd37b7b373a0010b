"""From text to shards: ingest documents, train or load a tokenizer, write train and held-out datasets."""
