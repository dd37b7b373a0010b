"""The model: nothing but mathematics."""
