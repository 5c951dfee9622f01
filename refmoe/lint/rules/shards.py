"""Judge the safetensors files of a folder against their index."""

from collections.abc import Iterator

from refmoe.lint.base import Found
from refmoe.lint.facts.names import Names
from refmoe.lint.facts.shards import Shards
from refmoe.lint.registry import rule
from refmoe.weights.checkpoint import INDEX


@rule("error", example="checkpoint: no *.safetensors file")
def shard_none(s: Shards) -> Iterator[Found]:
    """The folder has no safetensors file.

    A config.json alone was examined; there are no weights.
    """
    if not any(s.folder.glob("*.safetensors")):
        yield Found(f"{s.folder}: no *.safetensors file")


@rule(
    "error",
    example="shard 'model-00007-of-000062.safetensors' of model.safetensors.index.json is not in "
    "the folder; 3,456 tensors are lost",
)
def shard_missing(s: Shards) -> Iterator[Found]:
    """The index names a shard that is not in the folder.

    An interrupted download looks like this. A shard whose name leads out of the folder is not
    looked for, and counts as missing.
    """
    for shard, count in s.missing:
        yield Found(f"shard {shard!r} of {INDEX} is not in the folder; {count} tensors are lost")


@rule(
    "error",
    example="model-00001-of-000062.safetensors: the header describes 9,663,676,416 bytes, the file "
    "has 9,663,676,407: truncated or damaged; copy this shard again",
)
def shard_damaged(s: Shards) -> Iterator[Found]:
    """The header of a shard is damaged, or does not describe the file.

    Tensors must follow each other without gap or overlap and end where the file ends. Readers
    that trust the header compute with other tensors' bytes.
    """
    for problem in s.damaged:
        yield Found(problem)


@rule(
    "warning",
    example="in more.safetensors, model.safetensors.index.json says model-00001-of-000062"
    ".safetensors",
)
def shard_stray(s: Shards) -> Iterator[Found]:
    """A tensor lies in a shard where the index does not have it.

    Engines that follow the index never see it; engines that read whole shards do.
    """
    for stored, told in s.stray:
        where = told or "nothing about it"
        yield Found(f"in {stored.file.name}, {INDEX} says {where}", stored.name)


@rule(
    "error",
    example="in b.safetensors and, as model.norm.weight, in a.safetensors: different values, the "
    "last one read wins",
)
def shard_twice(s: Shards) -> Iterator[Found]:
    """A tensor is stored twice.

    With different values the engine's order of reading decides which model runs. With the same
    bytes it is a warning if the index names one of them, and an error if nothing does: refmoe
    refuses such a folder.
    """
    for t in s.twice:
        who = "engines that read whole shards" if t.stray else "refmoe refuses it"
        text = f"in {t.one.file.name} and, as {t.other.name}, in {t.other.file.name} ({who}): "
        text += "the same bytes" if t.same else "different values, the last one read wins"
        level = "warning" if t.same and t.stray else None
        yield Found(text, t.one.name, level=level)  # type: ignore[arg-type]


@rule(
    "error",
    example="not in model-00003-of-000062.safetensors, though model.safetensors.index.json says so",
)
def shard_absent_tensor(s: Shards) -> Iterator[Found]:
    """A tensor is not in the shard where the index has it.

    Index and shards are of two downloads or two conversions.
    """
    for name, shard in s.absent:
        yield Found(f"not in {shard}, though {INDEX} says so", name)


@rule(
    "note",
    example="12 scales are in another shard than their weight, first "
    "model.layers.3.self_attn.o_proj.weight_scale_inv; converters that go by shard miss them",
    reference="deepseek-ai/DeepSeek-V3 8f1c948",
)
def shard_apart(n: Names) -> Iterator[Found]:
    """A weight and its scale lie in different shards.

    That is allowed, and a converter that goes shard by shard leaves such a weight unscaled.
    """
    if n.apart:
        text = f"{len(n.apart)} scales are in another shard than their weight, first {n.apart[0]}"
        yield Found(f"{text}; converters that go by shard miss them")
