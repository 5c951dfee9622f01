"""Two files of one model: equal, rounded, or wrong and how; and what formats cost."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import refmoe
from refmoe.cli import main
from refmoe.files import InputError
from refmoe.lint.diff.report import verify
from refmoe.model.experts import MlpWeights
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import dequantize
from refmoe.oracle import quant as quant_quant
from refmoe.oracle.base_logits import divergence, read_base, write_base
from refmoe.run.export import to_gguf, to_safetensors
from refmoe.weights.dense import replaced
from refmoe.weights.synthetic.random import write_random

TINY = refmoe.run.load.golden_folder() / "tiny-k2"


def spoiled(path: Path, name: str, part: str, change) -> Path:
    """tiny-k2 in INT4, with one part of expert 5 of layer 2 changed."""
    model = refmoe.load()

    def expert(i: int, e: int) -> MlpWeights:
        w = model.checkpoint.expert(i, e)
        return w._replace(**{part: change(w)}) if (i, e) == (2, 5) else w

    wrong = replace(model, decoder=model.decoder.with_experts(expert))
    to_gguf(wrong, path / f"{name}.gguf", dense="bf16")
    return path / f"{name}.gguf"


def shuffled(order: np.ndarray):
    """The codes of each group of 32 in another order."""

    def change(w: MlpWeights) -> Int4:
        m = w.down_proj
        two = np.ascontiguousarray(m.packed).view(np.uint8)
        codes = np.stack((two & 15, two >> 4), axis=-1).reshape(len(two), -1, 32)[..., order]
        codes = codes.reshape(len(two), -1)
        return Int4((codes[:, 0::2] | codes[:, 1::2] << 4).view(np.int32), m.scale)

    return change


PAIRS = np.arange(32).reshape(16, 2)


@pytest.mark.parametrize(
    ("name", "part", "change", "text"),
    [
        ("nibbles", "down_proj", shuffled(PAIRS[:, ::-1].reshape(-1)), "nibbles swapped"),
        ("halves", "down_proj", shuffled(np.arange(32).reshape(2, 16).T.reshape(-1)), "Q4_0"),
        ("pairs", "down_proj", shuffled(PAIRS.T.reshape(-1)), "Q4_0"),
        ("swapped", "gate_proj", lambda w: w.up_proj, "gate and up swapped: it is our"),
        (
            "rows",
            "up_proj",
            lambda w: Int4(
                *(a.reshape(2, 64, -1).swapaxes(0, 1).reshape(128, -1) for a in w.up_proj)
            ),
            "rows of both halves",
        ),
        (
            "twice",
            "down_proj",
            lambda w: w.down_proj._replace(scale=w.down_proj.scale + 0x80),
            "times 2",
        ),
    ],
)
def test_a_wrong_repack_is_named(name, part, change, text, tmp_path):
    found = verify(TINY, spoiled(tmp_path, name, part, change))
    (wrong,) = [v for v in found.tensors if v.verdict == "wrong"]
    assert wrong.name == f"model.layers.2.mlp.experts.5.{part}"
    assert wrong.likely is not None
    assert text in wrong.likely
    assert not found.as_json()["ok"]


def test_an_offset_of_seven_is_named(tmp_path):
    """Codes one higher, as where less 7 was meant; 15 has none above it and stays."""

    def change(w: MlpWeights) -> Int4:
        two = np.ascontiguousarray(w.up_proj.packed).view(np.uint8)
        low, high = (np.minimum(n + 1, 15) for n in (two & 15, two >> 4))
        return Int4((low | high << 4).view(np.int32), w.up_proj.scale)

    found = verify(TINY, spoiled(tmp_path, "offset", "up_proj", change)).tensors
    (wrong,) = [v for v in found if v.verdict == "wrong"]
    assert wrong.likely == "codes read with an offset of 7 instead of 8"


def test_keys_that_were_not_transposed_are_named(tmp_path):
    model = refmoe.load()
    layers = list(model.decoder.layers)
    H, N, C = 4, 128, 512
    w = dequantize(layers[1].self_attn.kv_b_proj).reshape(H, -1, C).copy()
    w[:, :N] = w[:, :N].transpose(0, 2, 1).reshape(H, N, C)
    wrong = layers[1].self_attn._replace(kv_b_proj=w.reshape(-1, C))
    checkpoint = model.checkpoint
    matrix = checkpoint.matrix
    checkpoint.matrix = lambda module: (  # type: ignore[method-assign]
        wrong.kv_b_proj if module == "model.layers.1.self_attn.kv_b_proj" else matrix(module)
    )
    to_gguf(model, tmp_path / "x.gguf", dense="f32")
    found = [v for v in verify(TINY, tmp_path / "x.gguf").tensors if v.verdict == "wrong"]
    assert [v.name for v in found] == ["model.layers.1.self_attn.kv_b_proj"]
    assert found[0].likely == "attn_k_b read without its transposition"


def test_repacks_are_exact_or_rounded(tmp_path, capsys):
    model = refmoe.load()
    for kind, verdicts in (
        ("bf16", {"bit-equal"}),
        ("f16", {"bit-equal", "rounded"}),
        ("q8_0", {"bit-equal", "rounded"}),
    ):
        to_gguf(model, tmp_path / f"{kind}.gguf", dense=kind)
        found = verify(TINY, tmp_path / f"{kind}.gguf").tensors
        assert {v.verdict for v in found} == verdicts
        assert all(v.verdict == "bit-equal" for v in found if ".experts." in v.name)
    to_safetensors(refmoe.load(tmp_path / "q8_0.gguf"), tmp_path / "back", "int4")
    from_ = str(tmp_path / "q8_0.gguf")
    assert main(["quant", "verify", from_, str(tmp_path / "back"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"tensors", "findings", "ok"}
    assert set(document["tensors"][0]) == {"name", "verdict", "max_rel", "likely"}


def test_another_model_is_refused(tmp_path):
    write_random(tmp_path / "other", "bf16")
    with pytest.raises(InputError, match="not two files of one model"):
        verify(TINY, tmp_path / "other")


def test_a_format_costs_what_its_steps_say(capsys):
    """Of evenly spread values within a step: its RMS is step/√12, and finer formats cost less."""
    rng = np.random.default_rng(0)
    w = rng.uniform(-1, 1, (64, 512)).astype(np.float32)
    for kind, step in (("q8_0", 1 / 127), ("int4", 1 / 7), ("int4-7.5", 1 / 7.5)):
        off = quant_quant.rounder(kind)(w) - w
        groups = np.abs(w).reshape(64, -1, 32).max(axis=-1).mean()
        assert np.sqrt((off**2).mean()) == pytest.approx(groups * step / np.sqrt(12), rel=0.05)
    model = refmoe.load(None, "float64")
    costs = {
        kind: quant_quant.expect(model, kind, list(range(5, 45)))
        for kind in ("bf16", "q8_0", "int4")
    }
    assert costs["bf16"].kl_mean < costs["q8_0"].kl_mean < costs["int4"].kl_mean
    assert all(cost.kl_mean >= 0 for cost in costs.values())
    experts = quant_quant.expect(model, "q8_0", list(range(5, 45)), experts_only=True)
    assert {".experts." in row["name"] for row in experts.tensors} == {True}
    assert main(["quant", "expect", "--to", "q8_0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"tensors", "kl_mean", "kl_p99", "top1_agree"}


def at_once(model, kind: str, tokens: list[int]) -> quant_quant.Cost:
    """`expect` with every rounded matrix held at once, and the errors of whole matrices."""
    keep, off_by = quant_quant.rounder(kind), {}

    def changed(name: str, m):
        w = dequantize(m)
        if w.shape[1] % 32:
            return m
        kept = keep(w)
        square, off = (w.astype(float) ** 2).sum(), ((kept.astype(float) - w) ** 2).sum()
        off_by[name] = float(np.sqrt(off / square))
        return kept

    def expert(i: int, e: int) -> MlpWeights:
        w = model.decoder.experts[i](e)._asdict()
        at = f"model.layers.{i}.mlp.experts.{e}."
        return MlpWeights(*(changed(at + n, m) for n, m in w.items()))

    other = replaced(model.decoder, changed).with_experts(expert)
    wide = [d.logits(tokens).astype(float) for d in (model.decoder, other)]
    wide = [z - z.max(axis=-1, keepdims=True) for z in wide]
    p, q = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)) for z in wide)
    kl, agree = (np.exp(p) * (p - q)).sum(axis=-1), p.argmax(axis=-1) == q.argmax(axis=-1)
    rows = [{"name": name, "rel_rms": off} for name, off in off_by.items()]
    return quant_quant.Cost(
        rows, float(kl.mean()), float(np.quantile(kl, 0.99)), float(agree.mean())
    )


@pytest.mark.parametrize("kind", ["int4", "fp8", "q4_0"])
def test_rounding_tile_by_tile_is_rounding_at_once(kind, tmp_path):
    """Bit for bit: every matrix of these is one tile. Errors are sums in another order."""
    write_random(tmp_path / "random", "fp8", seed=2, shape={"hidden_size": 256})
    tokens = list(range(5, 21))
    for path, reference in ((None, False), (tmp_path / "random", False), (None, True)):
        model = refmoe.load(path, "float64", reference=reference)
        told: list[tuple[int, int]] = []
        found = quant_quant.expect(
            model, kind, tokens, progress=lambda *n, told=told: told.append(n)
        )
        wanted, of = at_once(model, kind, tokens), 2 * model.cfg.num_hidden_layers
        assert told == [(n + 1, of) for n in range(of)]
        assert (found.kl_mean, found.kl_p99, found.top1_agree) == wanted[1:]
        off = {row["name"]: row["rel_rms"] for row in found.tensors}
        assert off == {row["name"]: pytest.approx(row["rel_rms"]) for row in wanted.tensors}


def test_tiles_do_not_show(monkeypatch):
    """Products in other pieces, so sums in another order: what that does is measured.

    Logits off by δ move a divergence by at most 2·max|δ|, for ln p and the largest taken off it.
    """
    model, tokens = refmoe.load(None, "float64"), list(range(5, 45))
    other = model.using(replace(model.nx, attention="absorbed"))  # the same sums in another order
    noise = np.abs(model.logits(tokens) - other.logits(tokens)).max()
    assert noise > 0
    whole = quant_quant.expect(model, "fp8", tokens)
    monkeypatch.setattr(quant_quant, "TILE", 1)  # 128 rows, which FP8's blocks are of
    small = quant_quant.expect(model, "fp8", tokens)
    assert abs(small.kl_mean - whole.kl_mean) <= 4 * 2 * noise  # as much again for each pass
    off = {row["name"]: row["rel_rms"] for row in small.tensors}
    assert off == {row["name"]: pytest.approx(row["rel_rms"]) for row in whole.tensors}


def test_what_a_format_costs_takes_no_room_for_the_rounded_model(tmp_path):
    """K2's proportions at a seventh: 0.36 GB rounded, of which no more than a layer is there."""
    shape = {
        "hidden_size": 1024,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 4,
        "intermediate_size": 4096,
        "vocab_size": 32768,
    }
    write_random(tmp_path / "wide", "bf16", seed=5, shape=shape)
    model = refmoe.load(tmp_path / "wide")
    sizes: dict[str, int] = {}

    def note(name, m):
        sizes[name] = 4 * m.shape[0] * m.shape[1]
        return m

    replaced(model.decoder, note)
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    wide = model.using(refmoe.load(None, "float64").nx)
    tracemalloc.start()  # what NumPy allocates, without pages of mapped files
    try:
        cost = quant_quant.expect(wide, "q8_0", list(range(8)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {row["name"] for row in cost.tensors} >= sizes.keys()
    assert cost.kl_mean > 0
    assert sum(sizes.values()) > 6 * layer
    assert most <= layer


def test_base_logits_are_a_file_of_llama_perplexitys(tmp_path, capsys):
    """Its layout byte by byte, its precision, and the divergence of a model from itself."""
    tokens, file = list(range(5, 53)), tmp_path / "base.bin"
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(tokens))
    command = ["quant", "base", "--tokens", str(ids), "--ctx", "16", "--base", str(file)]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 3
    raw = file.read_bytes()
    assert raw[:8] == b"_logits_"
    assert np.frombuffer(raw, "<i4", 3, 8).tolist() == [16, 2304, 3]
    assert np.frombuffer(raw, "<i4", 48, 20).tolist() == tokens
    assert len(raw) == 20 + 48 * 4 + 3 * 7 * (8 + 2 * 2304)
    base = read_base(file)
    logits = refmoe.load(None, "float64").logits(tokens[16:32])[8:15]
    exact = logits - logits.max(axis=-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    told = exact > exact.max(axis=-1, keepdims=True) - 16
    assert np.abs(base.rows(1) - exact)[told].max() <= 16 / 65535 / 2 + 1e-5
    assert main(["quant", "kl", "--base", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert abs(document["kl_mean"]) <= 16 / 65535
    assert document["top1_agree"] == 1
    file.write_bytes(raw[:-1])
    assert main(["quant", "kl", "--base", str(file)]) == 2
    assert "3 chunks of 16 take" in capsys.readouterr().err


def test_a_vocabulary_that_wants_its_bos_has_it_in_front(tmp_path, capsys):
    """llama.cpp computes each chunk with it and writes the token that was there; so both ways."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    plain, model = refmoe.load(None, "float64"), refmoe.load(folder, "float64")
    bos = plain.tokenizer.special["[BOS]"]
    assert (plain.bos, model.bos) == (None, bos)
    to_gguf(model, tmp_path / "x.gguf", dense="f32")
    again = refmoe.load(tmp_path / "x.gguf", "float64")
    assert again.bos == bos
    to_safetensors(again, tmp_path / "back", "int4")
    assert refmoe.load(tmp_path / "back").bos == bos

    tokens = list(range(5, 37))
    assert write_base(model, tokens, 16, tmp_path / "x.base") == 2
    base = read_base(tmp_path / "x.base")
    assert base.tokens.reshape(-1).tolist() == tokens
    z = plain.logits([bos, *tokens[17:32]])[8:15]
    exact = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    told = exact > exact.max(axis=-1, keepdims=True) - 16
    assert np.abs(base.rows(1) - exact)[told].max() <= 16 / 65535 / 2 + 1e-5
    kl, same = divergence(again, base)
    assert abs(kl.mean()) <= 16 / 65535
    assert same == 1
    assert divergence(plain, base)[0].mean() > 1e-3
