"""The Triton half of each operation: its kernels, and the operator that launches them.

Imported only where a kernel is to run, so everything else works without Triton.
"""
