"""How fast: `python -m rnnkit bench` and what it is made of, every result checked before it is timed."""
