"""The test suite. Multi-process cases go through `tests.ranks`."""
