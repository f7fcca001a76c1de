"""Benchmarks, installed as `rnnkit.benchmarks`: a user measures the cases that the project measures."""
