"""From text to shards: ingest, clean, filter and deduplicate documents, tokenize them, mix the datasets."""
