"""How much of what, and when: buckets before tokenization; weights, a curriculum and a search after it."""
