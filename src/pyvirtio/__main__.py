"""`python -m pyvirtio` is the `pyvirtio` command."""

import sys

from pyvirtio.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
