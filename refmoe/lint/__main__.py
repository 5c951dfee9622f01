"""Write docs/lint.md: `python -m refmoe.lint`, in the repository's root."""

import sys
from pathlib import Path

from refmoe.lint.page import PAGE, render

target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
target.write_text(render(), "utf-8")
print(target)
