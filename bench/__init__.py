"""Benchmarks: ``pytest bench/ --benchmark``; every claim is a ratio to a named opponent."""
