"""Benchmarks of the five ops beside their peers: `python -m mmrec_kernels.benchmarks --help`."""
