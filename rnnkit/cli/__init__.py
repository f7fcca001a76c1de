"""The command line, `python -m rnnkit COMMAND`: the dispatch of commands (`main`), `info`, and the bar of a long run.

Nothing is imported here: programs that only show a bar take `rnnkit.cli.progress` alone.
"""
