"""Judge config.json, and the metadata of a GGUF in its place."""

from collections.abc import Iterator

from refmoe.lint.base import Found
from refmoe.lint.facts.names import Names
from refmoe.lint.facts.settings import (
    MATHS,
    SHAPE,
    STORAGE,
    USE,
    ConfigFile,
    Constants,
    Metadata,
    Network,
    UnreadableGguf,
)
from refmoe.lint.facts.shards import BadFile
from refmoe.lint.registry import rule
from refmoe.model.formats.registry import unknown_method


@rule(
    "error",
    example="config.json: scoring_func = 'softmax' is not supported; supported: 'sigmoid'",
    reference="NVIDIA/TensorRT-Model-Connect#662, ggml-org/llama.cpp#18980",
)
def config_refused(c: ConfigFile) -> Iterator[Found]:
    """config.json describes another graph than K2's, or lacks what K2's needs.

    A field that the graph cannot serve (another scoring function, tied embeddings, a bias in
    attention) means that no computation with these weights would be the model's.
    """
    if c.refused is not None:
        yield Found(f"config.json: {c.refused}")


@rule("error", example="config.json: lm_head: 90 columns are no whole groups of 32")
def config_sizes(n: Names) -> Iterator[Found]:
    """The sizes in config.json are such that no tensor can have them.

    INT4 has a scale for each 32 columns. A width that 32 does not divide cannot be stored so:
    width and quantisation belong to two models.
    """
    if n.impossible:
        yield Found(f"{n.source}: {n.impossible}")


@rule("error", example="quant_method = 'modelopt': its weights cannot be read here")
def config_format(net: Network) -> Iterator[Found]:
    """The weights are stored in a format that cannot be read here.

    The settings were still examined, but no tensor was.
    """
    if (method := unknown_method(net.cfg.quantization)) is not None:
        yield Found(f"quant_method = {method!r}: its weights cannot be read here")


@rule(
    "note",
    example="YaRN is in rope_parameters alone: engines that look for rope_scaling have none",
    reference="red-hat-data-services/vllm-cpu efe1b6e07",
)
def config_rope_parameters(c: ConfigFile) -> Iterator[Found]:
    """YaRN's settings stand under the newer of their two names only.

    transformers 5 writes `rope_parameters`. A reader that looks up only `rope_scaling` then runs
    without YaRN, or refuses the config: softmax scale and frequencies are wrong.
    """
    if "rope_parameters" in c.text and "rope_scaling" not in c.text:
        text = "YaRN is in rope_parameters alone: engines that look for rope_scaling have none"
        yield Found(f"{text} (red-hat-data-services/vllm-cpu efe1b6e07)")


@rule("note", example="the shape nearest published member is k2.6 or k2.7-code")
def config_member(c: Constants) -> Iterator[Found]:
    """Name the published member whose shape this checkpoint has, or nearly has.

    The constants are held against this member's. A shape that no member has, but for two fields
    at most, leaves them unjudged.
    """
    if c.names is None:
        yield Found("no published member has this shape: constants not judged")
        return
    mark = "shape " if c.exact else f"shape but for {c.other_shape} fields; "
    yield Found(f"the {mark}nearest published member is {c.names}")


@rule(
    "error",
    example="routed_scaling_factor = 2.872, published k2.5 has 2.827",
    reference="sgl-project/sglang#12738, vllm-project/vllm#24119, huggingface/transformers#40320",
    listed=None,
)
def config_constant(c: Constants) -> Iterator[Found]:
    """A constant of the mathematics departs from the published member of the same shape.

    Another eps, scaling factor, YaRN beta or number of experts is another function of the same
    weights, and its text is often still fluent. It is a warning where the shape departs too, as
    in a derived model.
    """
    for d in c.departures:
        if d.key in MATHS:
            yield Found(str(d), level=None if c.exact else "warning")


@rule("warning", example="num_hidden_layers = 2, published k2.5 has 61", listed=None)
def config_shape(c: Constants) -> Iterator[Found]:
    """One or two sizes depart from the nearest published member.

    That is how a pruned, sliced or otherwise derived model looks, and a config that was edited by
    mistake.
    """
    for d in c.departures:
        if d.key in SHAPE:
            yield Found(str(d))


@rule(
    "warning",
    example="eos_token_id = 163585, published k2-thinking has 163586",
    reference="ggml-org/llama.cpp#15051",
    listed=None,
)
def config_use(c: Constants) -> Iterator[Found]:
    """Context length or a special id departs from the published member.

    The weights compute the same, but an engine stops elsewhere, pads with another id, or allows
    positions that the model was not trained on.
    """
    for d in c.departures:
        if d.key in USE:
            yield Found(str(d))


@rule("note", example="quantization = 'none', published k2.5 has 'compressed-tensors'")
def config_storage(c: Constants) -> Iterator[Found]:
    """The weights are stored in another format than the published ones.

    Converting is no fault. `refmoe lint --against` says whether the weights are still the same.
    """
    for d in c.departures:
        if d.key == STORAGE:
            yield Found(str(d))


@rule("error", example="generation_config.json: not JSON (Expecting property name: line 1 ...)")
def config_file(f: BadFile) -> Iterator[Found]:
    """A JSON file beside the weights cannot be read.

    Engines differ in what they do then: some refuse the folder, others go on with defaults, so
    that for instance nothing ends a turn.
    """
    yield Found(f.problem)


@rule("error", example="model.gguf: 8 bytes at 31744 in a file of 31744; truncated or damaged")
def gguf_unreadable(g: UnreadableGguf) -> Iterator[Found]:
    """The GGUF cannot be opened: a header, a length, a shape or a part of a split is wrong.

    Every length in the header is held against the size of the file before anything is read.
    """
    yield Found(g.problem)


@rule(
    "warning",
    example="the YaRN betas are not in this GGUF: 32 and 1 are used, as llama.cpp does",
    reference="ggml-org/llama.cpp#18013",
)
def gguf_metadata(m: Metadata) -> Iterator[Found]:
    """The metadata leave something unsaid that llama.cpp fills in by itself.

    GGUFs written before llama.cpp#18013 lack the YaRN betas, for instance. What is filled in may
    not be what the model was trained with.
    """
    for note in m.notes:
        yield Found(note)
