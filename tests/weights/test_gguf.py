"""GGUF: the same network under other names, read in place; written so that others read it."""

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmoe
from refmoe.cli import main
from refmoe.fast.engine import engine
from refmoe.fast.kquants import DECODERS, HALVES
from refmoe.fast.linear import linear
from refmoe.files import InputError
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.registry import announced_formats
from refmoe.model.matrix import dequantize
from refmoe.run import export
from refmoe.run.export import int4_to_q4, q4_to_int4, to_gguf, to_safetensors
from refmoe.run.generate import generate_tokens, generation_decoder
from refmoe.text.tokenizer import Tokenizer
from refmoe.weights.gguf import Gguf, config_of, is_gguf, read_part
from refmoe.weights.open import open_checkpoint
from refmoe.weights.synthetic.random import FIXED, pack_int4, write_random
from tests.fast.test_kernels import bound, exact

TOKENS = [5, 17, 2, 44, 9, 30, 11]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tiny-k2 with the rest in each type, and its source."""
    folder = tmp_path_factory.mktemp("gguf")
    model = refmoe.load()
    out = {}
    for kind in export.DENSE:
        out[kind] = folder / f"{kind}.gguf"
        to_gguf(model, out[kind], dense=kind)
    return out


def test_an_exact_export_is_the_same_network(files):
    """F32 and BF16 hold every value of tiny-k2, Q4_0 every INT4 code and scale."""
    truth = refmoe.load(None, "float64", reference=True).logits(TOKENS)
    for kind in ("f32", "bf16"):
        model = refmoe.load(files[kind], "float64", reference=True)
        assert model.cfg.rms_norm_eps == refmoe.load().cfg.rms_norm_eps
        # the same products, but for kv_b_proj whose halves are the same numbers
        np.testing.assert_array_equal(model.logits(TOKENS), truth)


def test_what_is_not_exact_is_named(files, tmp_path):
    model = refmoe.load()
    assert to_gguf(model, tmp_path / "f32.gguf", dense="f32").not_exact == []
    assert to_gguf(model, tmp_path / "bf16.gguf", dense="bf16").not_exact == []
    named = to_gguf(model, tmp_path / "q8.gguf").not_exact
    assert "blk.1.attn_k_b.weight" in named
    assert not [name for name in named if "exps" in name or "norm" in name]


def test_experts_keep_their_codes_both_ways(files, tmp_path):
    source, there = refmoe.load(), refmoe.load(files["f32"])
    again = to_safetensors(there, tmp_path / "again", "int4")
    assert not [name for name in again.not_exact if "experts." in name and "shared" not in name]
    back = refmoe.load(tmp_path / "again")
    for e in (0, 17, 39):
        for before, middle, after in zip(
            source.decoder.experts[2](e),
            there.decoder.experts[2](e),
            back.decoder.experts[2](e),
            strict=True,
        ):
            assert isinstance(middle, Q4)
            np.testing.assert_array_equal(after.packed, before.packed)
            np.testing.assert_array_equal(after.scale, before.scale)
    np.testing.assert_array_equal(
        back.tokenizer.encode("God save the King!"), source.tokenizer.encode("God save the King!")
    )
    assert back.cfg == dataclasses.replace(
        source.cfg, model_type=back.cfg.model_type, quantization=back.cfg.quantization
    )
    formats = announced_formats(back.cfg.quantization)  # which the two may say in other words
    assert formats == announced_formats(source.cfg.quantization)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), O=st.integers(1, 9), G=st.integers(1, 7))
def test_q4_and_int4_are_one_number(seed, O, G):
    rng = np.random.default_rng(seed)
    packed = rng.integers(-(2**31), 2**31, (O, 4 * G), dtype=np.int32)
    scale = rng.uniform(0.001, 100, (O, G)).astype(np.float32).view(np.uint32) >> 16
    m = Int4(packed, scale.astype(np.uint16))
    q4 = int4_to_q4(m)
    np.testing.assert_array_equal(dequantize(q4), dequantize(m))
    library = gguf.quants.dequantize(q4.blocks.reshape(O, -1), gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(library, dequantize(m))
    again = q4_to_int4(q4)
    np.testing.assert_array_equal(again.packed, m.packed)
    np.testing.assert_array_equal(again.scale, m.scale)


def test_a_scale_that_is_no_float16_sends_its_stack_elsewhere(tmp_path):
    yarn = {**FIXED["rope_scaling"], "mscale_all_dim": 1.0}  # a GGUF has one mscale
    write_random(tmp_path / "model", "int4", seed=1, shape={"rope_scaling": yarn})
    model = refmoe.load(tmp_path / "model")
    (m, *_) = model.decoder.experts[1](3)
    assert isinstance(m, Int4)
    tiny = m._replace(scale=np.full_like(m.scale, 0x0080))  # 2⁻¹²⁶ is no float16
    one = {(1, 3): model.decoder.experts[1](3)._replace(gate_proj=tiny)}
    decoder = model.decoder.with_experts(
        lambda i, e: one.get((i, e)) or model.checkpoint.expert(i, e)
    )
    made = to_gguf(dataclasses.replace(model, decoder=decoder), tmp_path / "x.gguf", "bf16")
    assert made.not_exact == []
    read = read_part(tmp_path / "x.gguf").tensors
    assert read["blk.1.ffn_gate_exps.weight"].dtype == "F32"
    assert read["blk.1.ffn_up_exps.weight"].dtype == "Q4_0"
    assert read["blk.2.ffn_gate_exps.weight"].dtype == "Q4_0"


def test_the_library_reads_what_is_written(files):
    """ggml-org's own reader and dequantiser, against the checkpoint."""
    reader = gguf.GGUFReader(files["q8_0"])
    model = refmoe.load()
    tensors = {t.name: t for t in reader.tensors}
    head = tensors["output.weight"]
    assert head.tensor_type == gguf.GGMLQuantizationType.Q8_0
    w = gguf.quants.dequantize(head.data, head.tensor_type)
    there = refmoe.load(files["q8_0"])
    np.testing.assert_array_equal(w, dequantize(there.decoder.lm_head))
    up = tensors["blk.3.ffn_up_exps.weight"]
    w = gguf.quants.dequantize(up.data, up.tensor_type)
    np.testing.assert_array_equal(w[11], dequantize(model.decoder.experts[3](11).up_proj))
    assert list(up.shape) == [256, 128, 40]  # fastest first
    assert reader.fields["deepseek2.rope.scaling.yarn_beta_fast"].contents() == 1.0
    special = model.tokenizer.special
    for key, name in (("BOS_ID", "[BOS]"), ("EOS_ID", "<|im_end|>"), ("PAD_ID", "[PAD]")):
        field = getattr(gguf.Keys.Tokenizer, key)  # as ggml-org spells it
        assert reader.fields[field].contents() == special[name]
    raw = json.loads((model.checkpoint.path / "config.json").read_text("utf-8"))
    said = {k: v for k, v in there.checkpoint.raw_config().items() if k in raw}
    ends = said.pop("eos_token_id")
    assert set(ends) <= {*model.cfg.eos_token_id}
    assert said.pop("rope_scaling").items() <= raw["rope_scaling"].items()
    assert {"bos_token_id", "pad_token_id", "rms_norm_eps"} <= said.keys()
    assert {k: v for k, v in said.items() if v != raw[k]} == {"model_type": "deepseek_v3"}


def test_it_generates_and_is_judged_as_a_folder_is(files, tmp_path, capsys):
    prompt = refmoe.load().tokenizer.encode("My lord")
    texts = [
        list(generate_tokens(generation_decoder(refmoe.load(path)), prompt, max_new_tokens=12))
        for path in (None, files["f32"])
    ]
    assert texts[0] == texts[1]
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(TOKENS))
    dump = tmp_path / "dump.safetensors"
    trace = ["trace", "--model", str(files["q8_0"]), "--tokens", str(ids), "--out", str(dump)]
    assert main(trace) == 0
    assert main(["check", str(dump), "--model", str(files["q8_0"]), "--tokens", str(ids)]) == 0
    assert main(["inspect", "--model", str(files["q8_0"]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["missing"] == document["unread"] == []
    # 8-bit weights are another model, and check says so
    assert main(["check", str(dump), "--tokens", str(ids)]) == 1


def test_heads_by_kernels_are_the_definition(files):
    """The absorbed form from attn_k_b and attn_v_b as stored, against float64."""
    for kind in ("q8_0", "bf16", "f16"):
        model = refmoe.load(files[kind])
        assert isinstance(model.decoder.layers[0].self_attn.kv_b_proj, Heads)
        truth = refmoe.load(files[kind], "float64", reference=True).logits(TOKENS)
        plain = refmoe.load(files[kind], reference=True).logits(TOKENS)
        nx = dataclasses.replace(engine("float32"), attention="absorbed")
        memory = model.decoder.caches()
        rows = [model.decoder.using(nx).logits([t], memory)[0] for t in TOKENS]
        assert np.abs(np.array(rows) - truth).max() <= 4 * np.abs(plain - truth).max()


@pytest.mark.parametrize("T", [1, 3, 20])
def test_the_kernel_of_q4_is_its_twin(T):
    rng = np.random.default_rng(T)
    for O, I in ((1, 32), (70, 96), (40, 2048)):
        packed, scale = pack_int4(rng.standard_normal((O, I)))
        m = int4_to_q4(Int4(packed, scale))
        x = rng.standard_normal((T, I)).astype(np.float32)
        assert (np.abs(linear(x, m) - exact(x, m)) <= bound(x, m)).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_0", "IQ4_XS", "Q2_K"])
def test_other_types_are_decoded_by_the_library(name, tmp_path):
    """Random blocks of the type, in a file that the library wrote."""
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (8, 2 * size), dtype=np.uint8)
    raw[..., 1::2] &= 0x3F  # halves among them stay finite
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "deepseek2")
    writer.add_tensor("blk.0.attn_q_a.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (t,) = read_part(tmp_path / "x.gguf").tensors.values()
    assert (t.dtype, t.shape) == (name, (8, 2 * elements))
    stored = {"model.layers.0.self_attn.q_a_proj.weight": t}
    m = Gguf(tmp_path / "x.gguf", refmoe.load().cfg, stored).matrix(
        "model.layers.0.self_attn.q_a_proj"
    )
    assert isinstance(m, Coded)
    np.testing.assert_array_equal(dequantize(m), gguf.quants.dequantize(raw, kind))
    for T in (1, 20):
        x = rng.standard_normal((T, 2 * elements)).astype(np.float32)
        assert (np.abs(linear(x, m) - exact(x, m)) <= bound(x, m)).all()


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_k_quants_are_their_twins_bit_for_bit(name):
    """Every code there is, halves of any size that is finite, read-only rows."""
    kind = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (40, 3 * size), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0, 2)):
        for n in range(3):
            finite = rng.uniform(-9, 9, (40, 1)).astype(np.float16)
            raw[:, n * size + at : n * size + at + 2] = finite.view(np.uint8)
    raw.flags.writeable = False
    out = np.empty((30, 3 * 256), np.float32)
    DECODERS[name](raw, HALVES, out, 5, 35)
    np.testing.assert_array_equal(out, gguf.quants.dequantize(raw[5:35], kind))


def test_parts_are_one_model(files, tmp_path):
    """As llama-gguf-split leaves them; a part that is not there is named."""
    whole = gguf.GGUFReader(files["f32"])
    cut = len(whole.tensors) // 2
    kinds = (whole.tensors[:cut], whole.tensors[cut:])
    for i, tensors in enumerate(kinds):
        writer = gguf.GGUFWriter(tmp_path / f"m-{i + 1:05d}-of-00002.gguf", "deepseek2")
        for key, value in (("no", i), ("count", 2)):
            writer.add_uint16(f"split.{key}", value)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        if i == 0:
            for f in whole.fields.values():
                if f.name.startswith("deepseek2."):
                    writer.add_key_value(f.name, f.contents(), f.types[0])
        for t in tensors:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert is_gguf(tmp_path)
    for path in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        logits = refmoe.load(path, "float64", reference=True).logits(TOKENS)
        np.testing.assert_array_equal(logits, refmoe.load(None, "float64", True).logits(TOKENS))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf: not there; the model has 2"):
        open_checkpoint(tmp_path)


def test_betas_that_are_not_there_are_llama_cpps_and_are_told(files):
    metadata = dict(read_part(files["f32"]).metadata)
    cfg, notes = config_of(metadata, files["f32"])
    assert (cfg.rope_scaling.beta_fast, cfg.rope_scaling.beta_slow, notes) == (1, 1, [])
    for end in ("fast", "slow"):
        del metadata[f"deepseek2.rope.scaling.yarn_beta_{end}"]
    cfg, (note,) = config_of(metadata, files["f32"])
    assert (cfg.rope_scaling.beta_fast, cfg.rope_scaling.beta_slow) == (32, 1)
    assert "18013" in note


def test_older_files_have_one_kv_b_and_other_lengths(files):
    metadata = dict(read_part(files["f32"]).metadata)
    for key in ("key_length_mla", "value_length_mla"):
        del metadata[f"deepseek2.attention.{key}"]
    metadata |= {"deepseek2.attention.key_length": 192, "deepseek2.attention.value_length": 128}
    cfg, _ = config_of(metadata, files["f32"])
    assert cfg == dataclasses.replace(
        refmoe.load().cfg, model_type="deepseek_v3", quantization=None
    )


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("general.architecture", "llama", "supported: 'deepseek2'"),
        ("deepseek2.expert_gating_func", 1, "expert_gating_func = 1"),
        ("deepseek2.embedding_length", None, "hidden_size is missing"),
        ("deepseek2.rope.scaling.yarn_log_multiplier", 0.0, "expected 0.1"),
    ],
)
def test_what_the_graph_cannot_do_is_refused_by_name(files, key, value, text):
    metadata = {**read_part(files["f32"]).metadata, key: value}
    with pytest.raises(InputError, match=text):
        config_of(metadata, files["f32"])


def test_the_vocabulary_comes_back(files):
    """Tokens, special tokens, template; and encoding of any text is the same."""
    before, after = refmoe.load(), refmoe.load(files["f32"])
    assert after.tokenizer.special == before.tokenizer.special
    assert after.template.source == before.template.source
    assert set(before.cfg.eos_token_id) <= after.stop_ids <= before.stop_ids  # a GGUF names one
    metadata = after.checkpoint.metadata
    merges = metadata["tokenizer.ggml.merges"]
    long = [t for t in metadata["tokenizer.ggml.tokens"][:-256] if len(t) > 1]
    assert ["".join(m.split(" ")) for m in merges] == long


def test_a_vocabulary_of_numbers_is_refused():
    with pytest.raises(InputError, match="expected strings"):
        Tokenizer.from_gguf({"tokenizer.ggml.tokens": [*range(600)]})


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_has_the_same_ids(files, text):
    before = refmoe.load().tokenizer if not _WORDS else _WORDS[0]
    if not _WORDS:
        _WORDS.extend((before, Tokenizer.from_gguf(read_part(files["f32"]).metadata)))
    assert _WORDS[1].encode(text) == _WORDS[0].encode(text)


_WORDS: list[Tokenizer] = []


HEAD = 70_100  # bytes in which something is damaged


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_damaged_file_gives_an_error_with_a_sentence(files, data, tmp_path_factory):
    """Bytes of the header changed, or the file cut short: nothing else is raised, nothing hangs."""
    if not _DAMAGED:
        path = tmp_path_factory.mktemp("damaged") / "x.gguf"
        _DAMAGED.append((path, files["bf16"].read_bytes()))
        path.write_bytes(_DAMAGED[0][1])
    ((file, whole),) = _DAMAGED
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    head = bytearray(whole[: min(cut, HEAD)])
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, min(len(head), 70_000) - 1)) if head else 0
        width = data.draw(st.sampled_from((1, 4, 8)))
        head[place : place + width] = data.draw(st.binary(min_size=width, max_size=width))
    length = max(cut, len(head))
    with file.open("r+b") as there:  # megabytes behind the header stay, unless they were cut off
        size = there.seek(0, os.SEEK_END)
        if size < length:
            there.seek(min(size, HEAD))
            there.write(memoryview(whole)[min(size, HEAD) : length])
        there.truncate(length)
        there.seek(0)
        there.write(head)
    with contextlib.suppress(InputError):
        checkpoint = open_checkpoint(file)
        if not checkpoint.missing:
            checkpoint.decoder(engine("float32"))


_DAMAGED: list[tuple[Path, bytes]] = []  # the file that is damaged, and what is in it


def test_export_prints_its_document(tmp_path, capsys):
    out = tmp_path / "x.gguf"
    assert main(["export", "--to", "gguf", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"out", "tensors", "bytes", "not_exact"}
    assert document["bytes"] == out.stat().st_size
    assert main(["export", "--to", "bf16", "--out", str(tmp_path / "plain")]) == 0
    assert refmoe.load(tmp_path / "plain").cfg.quantization is None
    assert main(["export", "--to", "bf16", "--out", str(tmp_path / "plain")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_lint_reads_a_gguf(files, tmp_path, capsys):
    assert main(["lint", str(files["q8_0"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert any("llama.cpp's deepseek2 takes beta_fast" in f["text"] for f in found)
    assert any(f["text"].startswith("360 Q4_0, 38 Q8_0, 23 F32") for f in found)
    raw = bytearray(files["q8_0"].read_bytes())
    t = read_part(files["q8_0"]).tensors["output.weight"]
    raw[t.start + 340 : t.start + 342] = np.float16(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(raw)
    assert main(["lint", str(tmp_path / "nan.gguf"), "--json"]) == 1
    errors = json.loads(capsys.readouterr().out)["findings"]
    wanted = {"level": "error", "tensor": "lm_head.weight", "text": "1 scales are not finite"}
    assert {**wanted, "rule": "tensor-nonfinite"} in errors
    (tmp_path / "cut.gguf").write_bytes(raw[:100_000])
    assert main(["lint", str(tmp_path / "cut.gguf"), "--json"]) == 1
    assert "truncated" in capsys.readouterr().out


def test_lint_compares_a_gguf_with_its_source(files, tmp_path, capsys):
    source = str(refmoe.load().checkpoint.path)
    assert main(["lint", source, "--against", str(files["bf16"]), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["findings"]
    equal = re.compile(r"the same (?:bits|values): (\d+) of")
    assert sum(int(equal.match(note["text"])[1]) for note in notes) == 417
    raw = bytearray(files["bf16"].read_bytes())
    t = read_part(files["bf16"]).tensors["blk.2.attn_q_b.weight"]
    half = t.nbytes // 2
    raw[t.start : t.start + t.nbytes] = (
        raw[t.start + half : t.start + t.nbytes] + raw[t.start : t.start + half]
    )
    (tmp_path / "rolled.gguf").write_bytes(raw)
    assert main(["lint", source, "--against", str(tmp_path / "rolled.gguf"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    (error,) = [f for f in found if f["level"] == "error"]
    assert error["tensor"] == "model.layers.2.self_attn.q_b_proj.weight"
    assert error["text"].endswith("halves of its rows swapped")


def test_the_real_vocabulary_survives_a_gguf(kimi):
    """Every token and merge of K2.6's, the published conversations, and 10,000 random strings."""
    words = Tokenizer.load(kimi / "k2.6")
    lists = export.vocabulary(words)
    assert len(lists["merges"]) == 163_328
    metadata = {f"tokenizer.ggml.{key}": values for key, values in lists.items()}
    again = Tokenizer.from_gguf(metadata)
    assert again.special == words.special
    _, *conversations = json.loads((kimi / "chat_vectors.json").read_text("utf-8"))
    texts = [text for c in conversations for text in c.values() if isinstance(text, str)]
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        low, high = [(32, 127), (0x20, 0x3000), (0x3000, 0xD7FF), (1, 0x110000)][rng.integers(4)]
        points = rng.integers(low, high, rng.integers(1, 40))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    for text in texts:
        assert again.encode(text) == words.encode(text)


def test_merged_experts_and_one_kv_b_are_the_same_network(files, tmp_path):
    """`ffn_gate_up_exps`, and `attn_kv_b` with the older lengths."""
    whole = gguf.GGUFReader(files["f32"])
    tensors = {t.name: t for t in whole.tensors}
    source = refmoe.load()
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "deepseek2")
    older = {"key_length": 192, "value_length": 128, "head_count_kv": 4}
    for f in whole.fields.values():
        end = f.name.removeprefix("deepseek2.attention.")
        if f.name.startswith("deepseek2.") and not end.endswith("_mla"):
            writer.add_key_value(f.name, older.get(end, f.contents()), f.types[0])
    for name, t in tensors.items():
        layer = name.partition(".attn")[0].partition(".ffn")[0]
        if name.endswith("ffn_gate_exps.weight"):
            both = np.concatenate([t.data, tensors[f"{layer}.ffn_up_exps.weight"].data], axis=1)
            writer.add_tensor(f"{layer}.ffn_gate_up_exps.weight", both, raw_dtype=t.tensor_type)
        elif name.endswith("attn_k_b.weight"):
            i = int(layer.removeprefix("blk."))
            w = dequantize(source.decoder.layers[i].self_attn.kv_b_proj)
            writer.add_tensor(f"{layer}.attn_kv_b.weight", w)
        elif not name.endswith(("ffn_up_exps.weight", "attn_v_b.weight")):
            writer.add_tensor(name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = refmoe.load(tmp_path / "x.gguf", "float64", reference=True)
    assert not model.checkpoint.missing
    assert not model.checkpoint.unread
    truth = refmoe.load(None, "float64", reference=True).logits(TOKENS)
    np.testing.assert_array_equal(model.logits(TOKENS), truth)


def test_metadata_that_call_for_a_million_tensors_are_refused(files, tmp_path):
    raw = bytearray(files["f32"].read_bytes())
    key = b"deepseek2.block_count"
    place = raw.index(key) + len(key) + 4
    raw[place : place + 4] = (2**31 - 1).to_bytes(4, "little")
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(InputError, match="more than 1000000 tensors"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("tensor", "kind", "text"),
    [
        ("blk.0.attn_norm.weight", "Q8_0", "is Q8_0, a vector is never in blocks"),
        ("blk.0.attn_q_a.weight", "I16", "is I16, which the gguf package cannot decode"),
    ],
)
def test_a_type_that_cannot_be_there_is_refused(tensor, kind, text, files, tmp_path, capsys):
    which = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[which]
    writer, whole = gguf.GGUFWriter(tmp_path / "x.gguf", "deepseek2"), gguf.GGUFReader(files["f32"])
    for f in whole.fields.values():
        if f.name.startswith("deepseek2."):
            writer.add_key_value(f.name, f.contents(), f.types[0])
    for t in whole.tensors:
        if t.name == tensor:
            shape = (*t.data.shape[:-1], t.data.shape[-1] // elements * size)
            raw = np.zeros(shape, np.uint8)
            writer.add_tensor(t.name, raw, raw_dtype=which)
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=text):
        open_checkpoint(tmp_path / "x.gguf").decoder(engine("float32"))
    assert main(["lint", str(tmp_path / "x.gguf")]) == 1
    assert text in capsys.readouterr().out
