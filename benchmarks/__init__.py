"""Measured and checked: speed/ and gpu_check/ are commands; usage/, dispatch/ and results/ hold what is recorded."""
