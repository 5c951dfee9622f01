"""Goldens: refmoe within the bounds of another engine's numbers, and these reproducible."""

import contextlib
import importlib.util
import io
import json
import shutil
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from refmoe import cli
from refmoe.files import InputError
from refmoe.oracle.selftest import golden
from refmoe.run.load import golden_folder
from refmoe.weights.synthetic.members import MEMBERS
from tests.conftest import ROOT


def script(name: str) -> ModuleType:
    """golden/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "golden" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VECTORS = golden_folder() / "vectors"
MANIFEST = golden.read_manifest(VECTORS)


@pytest.fixture(scope="module")
def printed() -> tuple[int, dict[str, Any]]:
    """The exit code of `golden verify`, and its document."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(["golden", "verify", "--json"])
    return code, json.loads(out.getvalue())


@pytest.mark.parametrize("reference", [False, True])
def test_every_golden_is_met(reference, request):
    if reference:
        rows = list(golden.verify(reference=True))
    else:
        _, document = request.getfixturevalue("printed")
        rows = [SimpleNamespace(**row) for row in document["rows"]]
    bad = [row for row in rows if not row.ok]
    assert not bad
    bounds = {(r.numerics, r.bound) for r in rows if r.witness.endswith("float64") and r.bound}
    assert bounds == {("float64", 1e-10), ("float32", 2e-5)}
    assert all(r.bound <= 4e-5 for r in rows)
    cases = {(r.model, r.numerics, r.witness) for r in rows}
    transformers, mlx = (sorted({w for _, _, w in cases if w.startswith(e)}) for e in ("tr", "mlx"))
    for name in ("tiny-k2/text", "tiny-k2/dialogue", "tiny-k2/one", "tiny-k2/long"):
        assert {(name, "float32", w) for w in transformers} <= cases
    for name in ("random-bf16", "random-int4", *MEMBERS):
        assert (f"{name}/mixed", "float64", transformers[-1]) in cases
    for name in MEMBERS:
        assert (f"{name}/mixed", "float32", mlx[0]) in cases


def test_the_goldens_hold_what_they_promise():
    cases = {(c["model"], c["sequence"], c["witness"]): c for c in MANIFEST["cases"]}
    text = golden.points(VECTORS, cases["tiny-k2", "text", "float64"])
    assert text["lm_head"].dtype == np.float64
    inside = {name.split(".", 3)[-1] for name in text if name.startswith("model.layers.3")}
    assert len(inside) == 26  # every point of a mixture layer but those inside one expert
    for i in range(4):
        assert text[f"model.layers.{i}"].shape == (22, 256)
    long = cases["tiny-k2", "long", "float64"]
    assert len(long["tokens"]) == 1500
    assert max(long["positions"]) == 1499
    members = {c["file"] for c in MANIFEST["cases"] if "member" in MANIFEST["models"][c["model"]]}
    size = {True: 0, False: 0}
    for file in VECTORS.iterdir():
        size[file.name in members] += file.stat().st_size
    assert size[True] <= 5_000_000
    assert size[False] <= 10_000_000


def test_the_rows_have_the_promised_shape(printed):
    code, document = printed
    assert code == 0
    assert document["ok"] is True
    fields = {"model", "witness", "numerics", "point", "rel_error", "bound", "ok"}
    assert all(set(row) == fields for row in document["rows"])


def test_a_wrong_number_is_found(tmp_path, capsys):
    folder = tmp_path / "vectors"
    shutil.copytree(VECTORS, folder)
    (tmp_path / "tiny-k2").symlink_to(golden_folder() / "tiny-k2")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cases"] = [c for c in manifest["cases"] if c["model"] == "random-bf16"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    case = manifest["cases"][0]
    arrays = safetensors.numpy.load_file(folder / case["file"])
    arrays["model.layers.2"][3, 5] += 1e-8 * np.abs(arrays["model.layers.2"][3]).max()
    safetensors.numpy.save_file(arrays, folder / case["file"])
    with pytest.raises(InputError, match="not the file the witness saw or wrote"):
        list(golden.verify(folder))
    case["sha256"] = golden.sha256(folder / case["file"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["golden", "verify", "--folder", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "random-bf16/mixed  float64 ~ transformers" in out


def test_another_version_or_a_missing_manifest_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"no such file; run: python golden/make\.py"):
        list(golden.verify(tmp_path))
    (tmp_path / "manifest.json").write_text('{"version": 0}')
    with pytest.raises(InputError, match=r"version 0, this refmoe reads 2"):
        list(golden.verify(tmp_path))


def test_rel_error_is_row_wise_and_notices_shapes_and_nan():
    a = np.array([[1.0, 2.0], [1e-6, 0.0]])
    b = np.array([[1.0, 2.0], [2e-6, 0.0]])
    assert golden.rel_error(a, b) == 0.5
    assert golden.rel_error(a, a) == 0.0
    assert golden.rel_error(a, a[:1]) == np.inf
    assert golden.rel_error(a * np.nan, a) == np.inf
    assert golden.rel_error(np.ones((1, 2)), np.zeros((1, 2))) == np.inf


@pytest.mark.peers
def test_transformers_writes_these_goldens_again(tmp_path):
    """The committed numbers are those the witness computes now, to the last bits of its sums."""
    script("make").make(tmp_path)
    fresh = golden.read_manifest(tmp_path)
    strip = {"sha256", "greedy"}
    assert [{k: v for k, v in c.items() if k not in strip} for c in fresh["cases"]] == [
        {k: v for k, v in c.items() if k not in strip} for c in MANIFEST["cases"]
    ]
    assert fresh["models"] == MANIFEST["models"]
    for old, new in zip(MANIFEST["cases"], fresh["cases"], strict=True):
        before = safetensors.numpy.load_file(VECTORS / old["file"])
        after = safetensors.numpy.load_file(tmp_path / new["file"])
        assert set(before) == set(after)
        for name, value in before.items():
            if name.endswith("#experts"):
                np.testing.assert_array_equal(after[name], value)
            else:
                assert golden.rel_error(after[name], value) <= golden.BOUNDS[old["witness"]]
        assert old.get("greedy", {}).get("tokens") == new.get("greedy", {}).get("tokens")


@pytest.mark.peers
def test_the_packing_is_that_of_compressed_tensors(random_int4):
    """Codes and scales of our packer unpack, with the library's own code, to the same values."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    from refmoe.model.formats.int4 import Int4
    from refmoe.model.matrix import dequantize
    from refmoe.weights.checkpoint import Checkpoint

    for folder in (random_int4, golden_folder() / "tiny-k2"):
        checkpoint = Checkpoint.open(folder)
        for e, part in ((0, 0), (3, 1), (7, 2)):
            m = checkpoint.expert(1, e)[part]
            assert isinstance(m, Int4)
            packed = torch.from_numpy(np.array(m.packed))
            codes = unpack_from_int32(packed, 4, torch.Size(m.shape))
            scale = torch.from_numpy(np.array(m.scale)).view(torch.bfloat16).double()
            values = codes.double() * scale.repeat_interleave(32, dim=1)
            np.testing.assert_array_equal(dequantize(m, np.float64), values.numpy())
            assert torch.equal(pack_to_int32(codes, 4), packed)


@pytest.mark.peers
def test_bf16_rounding_is_torchs():
    import torch

    from refmoe.model.matrix import round_bf16

    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32) * 1e3
    x[:4] = [np.inf, -np.inf, 3.4e38, 1e-45]
    np.testing.assert_array_equal(round_bf16(x), torch.from_numpy(x).bfloat16().float().numpy())
