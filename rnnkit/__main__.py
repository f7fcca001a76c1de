"""`python -m rnnkit COMMAND`; the commands stand in `rnnkit.cli.main`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
