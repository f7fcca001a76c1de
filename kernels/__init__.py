"""Triton kernels, one file per family of cells, installed as `rnnkit.kernels`. Needs no triton to import."""
