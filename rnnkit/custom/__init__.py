"""A user's cell: declared, looked at, made into kernels, run."""
