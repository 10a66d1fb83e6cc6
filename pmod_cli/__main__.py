"""`python -m pmod_cli` is `pmod`."""

import sys

from pmod_cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
