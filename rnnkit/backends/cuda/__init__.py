"""Backend `cuda`: `backend` launches the kernels of csrc/cuda, `configs` says which kernel runs a layer.

`configs` imports nothing of the package: the build reads it by its path.
"""
