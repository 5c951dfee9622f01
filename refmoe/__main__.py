import sys

from refmoe.cli import main

sys.exit(main())
