"""Speed: `python -m rnnkit bench` and its parts. Every result is checked before it is timed."""
