"""Print what verbs share: JSON documents, remarks on standard error, a bar of layers."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from refmoe.progress import Progress

EXIT = {"pass": 0, "fault": 1, "undecidable": 2}  # of a report's verdict


def print_json(document: Mapping[str, Any]) -> None:
    """Print the document on one line; NaN and infinity are errors, as JSON has neither."""
    print(json.dumps(document, ensure_ascii=False, allow_nan=False))


def remark(text: str) -> None:
    """Print something for people on standard error, where it does not mix with the result."""
    print(f"refmoe: {text}", file=sys.stderr)


@contextmanager
def layer_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield `progress(done, of)`, which shows how many layers are done."""
    with Progress(0, "layer") as bar:
        yield bar.show
