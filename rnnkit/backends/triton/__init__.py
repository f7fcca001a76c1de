"""Backend `triton`: `backend` launches the kernels of rnnkit.kernels, `configs` says which kernel runs a layer."""
