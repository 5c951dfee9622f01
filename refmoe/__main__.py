"""Run the command line: `python -m refmoe VERB …`."""

import sys

from refmoe.cli import main

sys.exit(main())
