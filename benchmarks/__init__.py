"""Speed and correctness, measured: commands in speed/ and gpu_check/, scripts in usage/ and dispatch/, records."""
