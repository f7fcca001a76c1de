"""Benchmarks: rnnkit against torch.nn, correctness first, both sides alternating in one process."""
