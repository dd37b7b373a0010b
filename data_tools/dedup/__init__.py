"""Find what was there before: equal documents, paragraphs and lines, near duplicates, repeated spans."""
