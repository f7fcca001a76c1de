"""What compiled GPU kernels take: registers, spills and shared memory for every chip, without a GPU."""
