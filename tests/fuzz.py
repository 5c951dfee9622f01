"""Broken files by the thousand: whatever is opened, only the project's own error may come.

    python tests/fuzz.py [folder|gguf] [--cases 100000] [--seed 0]

takes real files of a small checkpoint, damages one at a time (bytes flipped, cut, doubled; JSON
values replaced by wrong ones of every kind; of a GGUF, tests/fuzz_gguf.py) and opens them as
`refmoe` does. Anything but success or `InputError`, more than `SECONDS` included, is printed with
its seed and ends the run with exit code 1. CI runs a few thousand through tests/test_fuzz.py.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from refmoe.files import InputError
from refmoe.model.decoder import policy
from refmoe.run.load import golden_folder
from refmoe.text.template import ChatTemplate
from refmoe.text.tokenizer import Tokenizer
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.synthetic.random import write_random

MESSAGES = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "functions.w:0", "function": {"name": "w", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "functions.w:0", "content": "fine"},
]
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
SECONDS = 60  # for one case: nothing may hang
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    -(10**400),
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "x",
    "re:(",
    "../outside.safetensors",
    "\x00",
    "\ud800",
    [],
    [0],
    [[]],
    {},
    {"x": {}},
]


def damage_json(raw: bytes, rng: random.Random) -> bytes:
    """Replace, remove or add one value somewhere in the tree."""
    tree = json.loads(raw)
    at: Any = tree
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
            at = at[key]
            continue
        what = rng.random()
        if what < 0.15 and isinstance(at, dict):
            del at[key]
        elif what < 0.3 and isinstance(at, dict):
            at[str(rng.choice(ODD))] = at[key]
        else:
            at[key] = rng.choice(ODD)
        break
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def damage_bytes(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 4])):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice([1, 2, 8, 100]))
        kind = rng.random()
        if kind < 0.4 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            del data[i:j]
        elif kind < 0.8:
            data[i:i] = data[i:j]
        else:
            data[i:j] = rng.randbytes(j - i)
    return bytes(data)


def damage(name: str, raw: bytes, rng: random.Random) -> bytes:
    if name.endswith(".json"):
        return damage_json(raw, rng) if rng.random() < 0.7 else damage_bytes(raw, rng)
    if name.endswith(".safetensors"):
        length = struct.unpack("<Q", raw[:8])[0]
        header, data = raw[8 : 8 + length], raw[8 + length :]
        kind = rng.random()
        if kind < 0.5:
            header = damage_json(header, rng)
        elif kind < 0.8:
            header = damage_bytes(header, rng)
        else:
            return damage_bytes(raw[:64], rng) + raw[64:]
        return struct.pack("<Q", len(header)) + header + data
    return damage_bytes(raw, rng)


def open_all(folder: Path) -> None:
    """What the verbs read before they compute."""
    checkpoint = Checkpoint.open(folder)
    decoder = checkpoint.decoder(policy("float32"))
    for layer in filter(decoder.cfg.is_moe, range(decoder.cfg.num_hidden_layers)):
        decoder.experts[layer](0)
    words = Tokenizer.load(folder)
    words.encode("To be, or not")
    ChatTemplate.load(folder).encode(words, MESSAGES, TOOLS)


def cases(folder: Path, count: int, seed: int) -> Iterator[tuple[int, str, BaseException]]:
    """Damage one file after another, yield what should not have been raised."""
    write_random(
        folder,
        "int4",
        seed=1,
        shards=2,
        shape={"num_hidden_layers": 2, "n_routed_experts": 5, "num_experts_per_tok": 3},
    )
    shutil.copy(golden_folder() / "tiny-k2" / "chat_template.jinja", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [275, 276]}')
    whole = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    for case in range(seed, seed + count):
        rng = random.Random(case)
        name = rng.choice(sorted(whole))
        (folder / name).write_bytes(damage(name, whole[name], rng))
        if error := foreign(partial(open_all, folder)):
            yield case, name, error
        (folder / name).write_bytes(whole[name])


def gguf_cases(folder: Path, count: int, seed: int) -> Iterator[tuple[int, str, BaseException]]:
    """The same of a GGUF in one file and in two."""
    from tests.fuzz_gguf import damaged  # what writes one is an extra

    for case, name, opened in damaged(folder, count, seed, MESSAGES, TOOLS):
        if error := foreign(opened):
            yield case, name, error


def foreign(opened: Callable[[], None]) -> BaseException | None:
    """What this raises and should not."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened()
    except (InputError, KeyboardInterrupt) as e:
        if isinstance(e, KeyboardInterrupt):
            raise
    except BaseException as e:
        return e
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Open damaged checkpoints.")
    parser.add_argument("kind", nargs="?", choices=("folder", "gguf"), default="folder")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # a file of a few kilobytes must not make us ask for gigabytes
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    bad = 0
    with tempfile.TemporaryDirectory() as tmp:
        each = cases if args.kind == "folder" else gguf_cases
        for case, name, error in each(Path(tmp) / "model", args.cases, args.seed):
            bad += 1
            *_, last = traceback.extract_tb(error.__traceback__)
            where = f"{Path(last.filename).name}:{last.lineno}"
            print(f"case {case}, {name}: {type(error).__name__}: {error} ({where})", flush=True)
    print(f"{args.cases} damaged {args.kind}s, {bad or 'no'} foreign exceptions")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
