"""The kernels: every operation against its formula."""
