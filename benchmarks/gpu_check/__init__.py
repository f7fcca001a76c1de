"""Correctness on this machine's GPU: `python -m rnnkit gpu-check`, parity first, then probes and the benchmark."""
