"""What ``python -m bench.roofline`` computes: how long the kernels should take on a GPU."""
