"""`python -m rmtcompile` is the command `rmtcompile`."""

import sys

from rmtcompile.cli import main

sys.exit(main())
