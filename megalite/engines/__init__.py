"""Ways to run a step, behind one contract."""
