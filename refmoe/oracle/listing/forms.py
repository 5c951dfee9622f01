"""The forms in which servers list log-probabilities; a new one is its `read` and an entry here.

Each file of this folder whose name is a server's has its forms and their sources.
"""

from collections.abc import Mapping
from typing import Any

from refmoe.oracle.listing.base import Form, Listing
from refmoe.oracle.listing.llama_server import LLAMA_SERVER
from refmoe.oracle.listing.openai import OPENAI
from refmoe.oracle.listing.own import OWN
from refmoe.oracle.listing.sglang import SGLANG
from refmoe.oracle.listing.tgi import OLLAMA, TGI

FORMS: tuple[Form, ...] = (OWN, SGLANG, LLAMA_SERVER, TGI, OPENAI, OLLAMA)  # the narrowest first


def read_response(where: str, response: Mapping[str, Any]) -> list[Listing]:
    """Return the sequences of a response by the first form that knows it; none if no form does."""
    for form in FORMS:
        found = form.read(where, response)
        if found:
            return found
    return []
