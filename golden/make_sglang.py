"""SGLang's own dumpers, hooked into a transformers model that runs here: golden/sglang.

    pip install -e '.[peers]'
    pip download sglang==0.5.14 --no-deps --no-binary :none:
    python golden/make_sglang.py sglang-0.5.14-*.whl

Needs no GPU and no SGLang that runs: dumper.py is one file that says of itself how it is imported
"from non-SGLang system". That of 0.5.23 imports the server, which wants CUDA's libraries.
tensor_dump_forward_hook.py imports two modules of the server for the classes that it looks for in
arguments and results; in their place stand classes of the same name, and the result of the model's
head is put into one of them, as SGLang's is.

    dumper-core       DUMPER_NON_INTRUSIVE_MODE=core, the default: no tensor of the model
    dumper-all        all: a prompt of 6 tokens, 4 more, and 1 that is decoded
    dumper-two        all, the last layer and the head: a prompt of 3 tokens, then one of 5
    passes            --debug-tensor-dump-output-folder: the same 6, 4 and 1

The checkpoint is `refmoe tiny DIR --format bf16 --seed 5`, computed by transformers in float32.
Each archive has the folder that the dumper wrote; golden/sglang/about.json says how.
"""

import contextlib
import importlib
import io
import json
import re
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from refmoe.weights.synthetic.random import write_random

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import make  # noqa: E402

TOKENS = [i * 37 % 500 for i in range(11)]
CHUNKS = (6, 4, 1)
TWO = ([7, 8, 9], [300, 200, 100, 50, 25])
# one expert after another goes through act_fn, and nothing says which
LEFT_OUT = "not search(r'experts\\.act_fn|rotary_emb|attention_mask|position_embeddings', name)"
HOOK = "sglang/srt/debug_utils/tensor_dump_forward_hook.py"


def run(model: Any, tokens: list[int], chunks: tuple[int, ...]) -> Iterator[None]:
    """Compute a sequence in chunks, as a server with a cache does."""
    cache, at = transformers.DynamicCache(), 0
    for rows in chunks:
        ids, positions = torch.tensor([tokens[at : at + rows]]), torch.arange(at, at + rows)
        with torch.no_grad():
            model(input_ids=ids, position_ids=positions[None], past_key_values=cache)
        at += rows
        yield


def with_dumper(dumper: Any, model: Any, folder: Path, sequences: Any, **settings: Any) -> None:
    config = dumper.DumperConfig(
        enable=True,
        dir=str(folder.parent),
        exp_name=folder.name,
        enable_output_console=False,
        **settings,
    )
    own = dumper._Dumper(config=config)
    hooks = own.register_non_intrusive_dumper(model)
    for tokens, chunks in sequences:
        for _ in run(model, tokens, chunks):
            own.step()
    hooks.remove()


def with_hooks(wheel: zipfile.ZipFile, model: Any, folder: Path) -> str:
    """Run the tensor dump's hooks; return the name of the folder that it made."""
    classes: dict[str, tuple[str, ...]] = {
        "sglang.srt.layers.logits_processor": ("LogitsProcessorOutput",),
        "sglang.srt.model_executor.forward_batch_info": ("ForwardBatch", "PPProxyTensors"),
    }
    for module, names in classes.items():
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(parts[i - 1]))
        for name in names:
            setattr(sys.modules[module], name, type(name, (types.SimpleNamespace,), {}))
    logits = sys.modules["sglang.srt.layers.logits_processor"].LogitsProcessorOutput
    batch = sys.modules["sglang.srt.model_executor.forward_batch_info"].ForwardBatch
    hook = types.ModuleType("hook")
    exec(compile(wheel.read(HOOK), HOOK, "exec"), vars(hook))
    before = {m: dict(m._forward_hooks) for m in model.modules()}
    tensors = hook.register_forward_hook_for_model(model, str(folder), None, 1, 0, 0)
    given: dict[str, Any] = {}
    decoder, forward, head = model.model, model.model.forward, model.lm_head.forward

    def shown(*args: Any, **kwargs: Any) -> Any:
        given["batch"] = batch(
            input_ids=kwargs["input_ids"][0],
            seq_lens=kwargs["position_ids"][:, -1] + 1,
            positions=kwargs["position_ids"][0],
        )
        return forward(*args, **kwargs)

    # SGLang's models are called with the batch; transformers' are not, so that the hook is told
    for id, after in list(decoder._forward_hooks.items()):
        decoder._forward_hooks[id] = lambda module, _, output, after=after: after(
            module, (given["batch"],), output[0]
        )
    for id, after in list(model.lm_head._forward_hooks.items()):
        model.lm_head._forward_hooks[id] = lambda module, args, output, after=after: after(
            module, args, logits(next_token_logits=output[0, -1:])
        )
    decoder.forward = shown
    for _ in run(model, TOKENS, CHUNKS):
        pass
    decoder.forward, model.lm_head.forward = forward, head
    for m in model.modules():
        m._forward_hooks.clear()
        m._forward_hooks.update(before[m])
    return Path(tensors.get_dump_dir()).name


def pack(folder: Path, file: Path) -> None:
    """Write an archive of the folder, the same bytes for the same files."""
    with tarfile.open(file, "w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(str(path.relative_to(folder.parent)))
                data = path.read_bytes()
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("give the wheel of SGLang 0.5.14, from pip download")
    version = re.search(r"sglang-([\d.]+)-", Path(sys.argv[1]).name)[1]
    wheel = zipfile.ZipFile(sys.argv[1])
    out = HERE / "sglang"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):
        Path("dumper.py").write_bytes(wheel.read("sglang/srt/debug_utils/dumper.py"))
        sys.path.insert(0, tmp)
        dumper = importlib.import_module("dumper")
        write_random(Path("random"), "bf16", seed=5)
        Path("twin").mkdir()
        make.twin(Path("random"), Path("twin"), torch.float32)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            "twin", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        problems = {k: v for k, v in info.items() if v}
        if problems:
            raise SystemExit(f"transformers did not read it whole: {problems}")
        model.config._experts_implementation = "eager"
        model.eval()
        one = [(TOKENS, CHUNKS)]
        two = [(tokens, (len(tokens),)) for tokens in TWO]
        ends = f"({LEFT_OUT}) and (layer_id == 2 or layer_id is None)"
        with_dumper(dumper, model, Path("dumper-core"), one)
        with_dumper(
            dumper, model, Path("dumper-all"), one, non_intrusive_mode="all", filter=LEFT_OUT
        )
        with_dumper(dumper, model, Path("dumper-two"), two, non_intrusive_mode="all", filter=ends)
        with_hooks(wheel, model, Path("passes"))
        for name in ("dumper-core", "dumper-all", "dumper-two", "passes"):
            pack(Path(name), out / f"{name}.tar.xz")
            print(f"{name}: {(out / f'{name}.tar.xz').stat().st_size} bytes")
    about = {
        "engine": f"transformers {transformers.__version__}, hooked by SGLang {version}'s "
        "dumper.py and tensor_dump_forward_hook.py",
        "torch": torch.__version__,
        "command": f"python golden/make_sglang.py {Path(sys.argv[1]).name}",
        "checkpoint": "refmoe tiny DIR --format bf16 --seed 5, computed in float32",
        "tokens": TOKENS,
        "chunks": CHUNKS,
        "two": TWO,
        "filter": LEFT_OUT,
    }
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
