"""`python -m rmtcompile.cli` is the command `rmtcompile`."""

import sys

from rmtcompile.cli.commands import main

sys.exit(main())
