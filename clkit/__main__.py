"""``python -m clkit``."""

import sys

from clkit.run.cli import main

if __name__ == "__main__":
    sys.exit(main())
