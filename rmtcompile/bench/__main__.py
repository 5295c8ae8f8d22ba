"""`python -m rmtcompile.bench`."""

from __future__ import annotations

import sys

from rmtcompile.bench import main

if __name__ == "__main__":
    sys.exit(main())
