"""Tests of the parallel axes."""
