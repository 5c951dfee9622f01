"""The full size on little disk: every tensor in its place, and holes where nothing was written."""

import json
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import refmoe
from refmoe.cli import main
from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.registry import announced_formats
from refmoe.model.matrix import widen_bf16
from refmoe.weights.checkpoint import INDEX, Checkpoint, read_header
from refmoe.weights.synthetic import k2_full as module
from refmoe.weights.synthetic.k2_full import (
    BLOCK,
    CONFIG,
    PROBE,
    SPARE,
    count_real,
    k2_full,
    on_disk,
)
from refmoe.weights.writer import Spec

SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 9,
    "num_experts_per_tok": 2,
    "vocab_size": 16384,
}
ROWS = 256  # of embedding and head, instead of 4,096


@pytest.fixture(autouse=True, scope="module")
def small_numbers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", ROWS)
        patch.setattr("refmoe.weights.synthetic.k2_slice.DRAWN", 1 << 20)
        yield


@pytest.fixture(scope="module")
def holes(tmp_path_factory: pytest.TempPathFactory) -> None:
    probe = tmp_path_factory.mktemp("probe") / "probe"
    with probe.open("wb") as out:
        out.truncate(PROBE)
    if on_disk(probe) > PROBE // 4:
        pytest.skip(f"the file system of {probe} knows no holes")


@pytest.fixture(scope="module")
def sparse(holes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "full"
    k2_full(folder, SMALL, seed=5)
    return folder


@pytest.fixture(scope="module")
def layout() -> dict[str, list[Spec]]:
    return module._layout(Config.from_dict(CONFIG))


def raw_tensors(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """name → shard, and what the safetensors library reads of it."""
    return {
        name: (file.name, tensor)
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.deserialize(file.read_bytes())
    }


# --- the real size, without writing it


def test_the_full_layout_is_that_of_k2_thinking(layout):
    """Sums from the table of shapes alone: 61 layers, 60 of them with 384 experts."""
    D, A, C, H, F, E = 7168, 1536, 512, 64, 2048, 384
    assert list(layout) == [f"model-{i:05d}-of-000062.safetensors" for i in range(1, 63)]
    attention = A * D + H * 192 * A + (C + 64) * D + H * 256 * C + D * H * 128
    norms = 2 * D + A + C
    expert = 3 * (F * D // 2 + F * D // 32 * 2 + 8)
    per_layer = [
        2 * (attention + norms + (3 * 18432 * D if i == 0 else 3 * F * D + E * D))
        + (0 if i == 0 else 4 * E + E * expert)
        for i in range(61)
    ]
    sizes = [sum(spec.nbytes for spec in specs) for specs in layout.values()]
    assert sizes == [*per_layer, 2 * (2 * 163840 * D + D)]
    counts = [len(specs) for specs in layout.values()]
    assert counts == [12, *[9 + 5 + 9 * E] * 60, 3]
    assert sum(counts) == 208_215
    assert round(sum(sizes) / 1e9) == 594


def test_the_full_size_takes_less_than_3_gb_of_disk(layout, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4096)
    assert module._need(layout, BLOCK) + SPARE < 3e9


def test_what_is_real_at_the_full_size(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4096)

    def rows(name: str, *shape: int) -> float:
        return count_real(Spec(name, "BF16", shape)) / prod(shape[1:])

    e = "model.layers.9.mlp.experts.7."
    assert rows("model.embed_tokens.weight", 163840, 7168) == 4096
    assert rows("lm_head.weight", 163840, 7168) == 4096
    assert rows("model.layers.9.mlp.gate.weight", 384, 7168) == 384
    assert rows("model.layers.9.mlp.gate.e_score_correction_bias", 384) == 384
    assert rows("model.layers.9.self_attn.kv_a_layernorm.weight", 512) == 512
    assert rows("model.norm.weight", 7168) == 7168
    assert rows(e + "gate_proj.weight_shape", 2) == 2
    assert rows(e + "gate_proj.weight_scale", 2048, 224) == 9  # of 448 bytes, in 4,096
    assert rows(e + "down_proj.weight_scale", 7168, 64) == 32
    assert rows(e + "down_proj.weight_packed", 7168, 256) == 0
    assert rows("model.layers.0.mlp.gate_proj.weight", 18432, 7168) == 0
    assert rows("model.layers.9.self_attn.o_proj.weight", 7168, 8192) == 0


def test_its_config_is_that_of_k2_5_but_for_what_thinking_has_otherwise(kimi):
    file = kimi / "configs" / "moonshotai--Kimi-K2.5_config.json"
    theirs = Config.from_dict(json.loads(file.read_text()))
    assert theirs.rope_scaling is not None
    yarn = replace(theirs.rope_scaling, beta_fast=1.0)
    ours = Config.from_dict(CONFIG)
    same = {"quantization": ours.quantization}  # in other words: compared as it is understood
    assert ours == replace(theirs, rope_scaling=yarn, eos_token_id=(163586,), **same)
    assert announced_formats(ours.quantization) == announced_formats(theirs.quantization)


# --- a small one


def test_every_tensor_is_where_the_index_says_and_nothing_else_is(sparse):
    checkpoint = Checkpoint.open(sparse)
    assert (checkpoint.missing, checkpoint.unread, checkpoint.stray) == ([], [], [])
    index = json.loads((sparse / INDEX).read_text())
    found = raw_tensors(sparse)
    assert index["weight_map"] == {name: shard for name, (shard, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(len(t["data"]) for _, t in found.values())
    for name, stored in checkpoint.tensors.items():
        shard, tensor = found[name]
        assert (stored.file.name, stored.dtype, list(stored.shape)) == (
            shard,
            tensor["dtype"],
            tensor["shape"],
        )
        assert checkpoint.array(name).tobytes() == bytes(tensor["data"])
    last = "model-00004-of-000004.safetensors"
    for name, (shard, _) in found.items():
        layer = name.split(".")[2] if ".layers." in name else None
        assert shard == (f"model-{int(layer) + 1:05d}-of-000004.safetensors" if layer else last)


def test_tensors_lie_in_the_order_of_safetensors_own_writer(sparse, tmp_path):
    names = {"float32": "F32", "int32": "I32", "bfloat16": "BF16"}
    for file in sorted(sparse.glob("*.safetensors")):
        ours = sorted(read_header(file).values(), key=lambda stored: stored.start)
        specs = {
            stored.name: safetensors.TensorSpec(
                dtype=next(k for k, v in names.items() if v == stored.dtype),
                shape=stored.shape,
                data_ptr=(data := np.zeros(stored.nbytes, np.uint8)).ctypes.data,
                data_len=data.nbytes,
            )
            for stored in ours[::-1]
            if stored.nbytes < 10**6  # not embedding and head
        }
        safetensors.serialize_file(specs, tmp_path / "theirs.safetensors")
        theirs = read_header(tmp_path / "theirs.safetensors").values()
        assert [s.name for s in sorted(theirs, key=lambda stored: stored.start)] == [
            stored.name for stored in ours if stored.nbytes < 10**6
        ]


def test_what_was_not_written_takes_no_disk_and_reads_as_zeros(sparse):
    shards = list(sparse.glob("*.safetensors"))
    apparent, disk = sum(f.stat().st_size for f in shards), sum(map(on_disk, shards))
    assert apparent > 70e6
    assert disk < apparent / 8
    checkpoint = Checkpoint.open(sparse)
    written = 0
    for name, stored in checkpoint.tensors.items():
        count = count_real(Spec(name, stored.dtype, stored.shape))
        flat = checkpoint.array(name).reshape(-1)
        assert not flat[count:].any(), name
        assert np.count_nonzero(flat[:count]) >= 0.99 * count, name
        written += flat[:count].nbytes
    assert written < disk
    scale = checkpoint.tensors["model.layers.1.mlp.experts.0.gate_proj.weight_scale"]
    assert count_real(Spec(scale.name, scale.dtype, scale.shape)) < prod(
        scale.shape
    )  # has holes too


def test_experts_differ_and_routing_spreads(sparse):
    model = refmoe.load(sparse, reference=True)
    scales = set()
    for layer in (1, 2):
        for e in range(9):
            gate = model.checkpoint.expert(layer, e).gate_proj
            assert isinstance(gate, Int4)
            s = widen_bf16(gate.scale)
            assert (s >= 0).all()
            scales.add(s.tobytes())
    assert len(scales) == 18
    tokens = list(range(64))
    chosen = refmoe.trace(model, tokens, ["model.layers.1.mlp.gate#experts"])
    counts = np.bincount(next(iter(chosen.values())).reshape(-1).astype(int), minlength=9)
    assert counts.min() > 0


def test_it_decodes_to_finite_numbers_that_the_experts_change(sparse):
    model = refmoe.load(sparse, reference=True)
    found = refmoe.trace(model, [3, 250, 41], ["model.layers.0", "model.layers.2", "lm_head"])
    logits = found["lm_head"]
    assert np.isfinite(logits).all()
    assert logits[:, :ROWS].all()
    assert not logits[:, ROWS:].any()
    before, after = found["model.layers.0"], found["model.layers.2"]
    assert (before != after).any(axis=-1).all()  # dense layer and attention are zero
    assert 0.5 < np.sqrt((after**2).mean()) < 20
    outside = model.logits([ROWS + 1])  # an embedding of zeros
    assert np.isfinite(outside).all()


def test_a_second_run_writes_nothing(sparse):
    stamps = {f.name: f.stat().st_mtime_ns for f in sparse.iterdir()}
    again = k2_full(sparse, SMALL, seed=5)
    assert {f.name: f.stat().st_mtime_ns for f in sparse.iterdir()} == stamps
    assert again.shards == 4
    assert again.apparent == sum(f.stat().st_size for f in sparse.glob("*.safetensors"))
    for other in (6, SMALL), (5, {**SMALL, "n_routed_experts": 10}):
        with pytest.raises(InputError, match="exists and is not empty; give a new folder"):
            k2_full(sparse, other[1], seed=other[0])


def test_the_same_seed_gives_the_same_bytes(sparse, tmp_path):
    folder = tmp_path / "again"
    folder.mkdir()  # an empty folder is no hindrance
    k2_full(folder, SMALL, seed=5)
    for file in sparse.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


# --- what is refused


def test_an_interrupted_write_leaves_nothing(holes, tmp_path, monkeypatch):
    header, shards = module.header, []

    def interrupted(specs, metadata):  # type: ignore[no-untyped-def]
        shards.append(specs)
        if len(shards) == 3:
            assert len(list(tmp_path.rglob("*.safetensors"))) == 2
            raise KeyboardInterrupt
        return header(specs, metadata)

    monkeypatch.setattr(module, "header", interrupted)
    with pytest.raises(KeyboardInterrupt):
        k2_full(tmp_path / "full", SMALL)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_holes_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "on_disk", lambda file: file.stat().st_size)
    with pytest.raises(InputError, match=r"knows no holes .* name a folder on another disk"):
        k2_full(tmp_path / "full", SMALL)
    assert not list(tmp_path.iterdir())


def test_holes_that_are_filled_later_are_noticed(holes, tmp_path, monkeypatch):
    def filled(file: Path) -> int:
        return BLOCK if file.name == "probe" else file.stat().st_size

    monkeypatch.setattr(module, "on_disk", filled)
    with pytest.raises(InputError, match="this file system fills holes"):
        k2_full(tmp_path / "full", SMALL)
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_takes_no_such_files_is_refused(holes, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PROBE, hard))
    try:
        with pytest.raises(InputError, match="takes no file of"):
            k2_full(tmp_path / "full", {**SMALL, "vocab_size": 163840})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_refused_before_anything_is_written(holes, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(InputError, match=r"takes 0\.1 GB of disk .* 1\.0 GB are free"):
        k2_full(tmp_path / "full", {"n_routed_experts": 16})
    assert not list(tmp_path.iterdir())


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        k2_full(tmp_path, SMALL)
    with pytest.raises(InputError, match=r"notes\.txt is a file"):
        k2_full(tmp_path / "notes.txt", SMALL)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


# --- the command


def test_the_command_says_what_is_real_and_what_is_not(sparse, capsys):
    shape = [f"{key}={value}" for key, value in SMALL.items()]
    tiny = ["tiny", str(sparse), "--seed", "5", "--shape", "k2-full", *shape]
    assert main(tiny) == 0
    said = capsys.readouterr().out
    apparent = sum(f.stat().st_size for f in sparse.glob("*.safetensors"))
    assert f"in 4 shards, {apparent:,} bytes, of which " in said
    for words in ("weights are mostly zero", "does not show\nnumerics", "holes", "Prompts are ids"):
        assert words.lower() in said.lower()
    assert main([*tiny, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["apparent"] == apparent
    assert document["disk"] == sum(map(on_disk, sparse.glob("*.safetensors")))
    assert document["tensors"] == len(Checkpoint.open(sparse).tensors)
    assert main([*tiny, "--format", "int4"]) == 2
    assert "k2-full decides layout, format and shards" in capsys.readouterr().err
    assert main(["tiny", str(sparse), "--shape", "k3-full"]) == 2
    assert "--shape k3-full: expected FIELD=VALUE" in capsys.readouterr().err
