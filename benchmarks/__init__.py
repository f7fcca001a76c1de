"""Benchmarks: every backend against torch.nn and its peers, correctness first, all sides in turn in one process."""
