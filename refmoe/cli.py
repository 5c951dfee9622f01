"""The verbs: generate, chat, tok, inspect, trace, sweep, check, lint, mutate, bench, plan, …

Without --model they use the embedded tiny-k2. With --json they print one JSON document. Exit
codes: 0 fine, 1 differs or fails, 2 could not tell or bad use.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import refmoe
from refmoe.engines import CONVENTIONS, PROFILES
from refmoe.fast.threads import use as use_threads
from refmoe.files import InputError, parse_size, read_json, read_text
from refmoe.lint import base as lint_base
from refmoe.lint import lint as lint_lint
from refmoe.lint import registry as lint_registry
from refmoe.lint.diff.report import verify as quant_verify
from refmoe.model.numerics import PRECISIONS, NonFinite
from refmoe.oracle import quant as quant_quant
from refmoe.oracle import repro
from refmoe.oracle.base_logits import divergence, read_base, write_base
from refmoe.oracle.check import arbitrate, judge_dump
from refmoe.oracle.judge import Report
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.report import write as write_html
from refmoe.oracle.selftest import golden, mutate
from refmoe.oracle.selftest import power as bench
from refmoe.oracle.trace import trace, write
from refmoe.oracle.truth.check import check_truth
from refmoe.oracle.truth.file import read_truth
from refmoe.oracle.truth.make import make as make_truth
from refmoe.oracle.words import arbitration_lines, report_lines
from refmoe.run import export
from refmoe.run.dialogue import Dialogue, interact, printable
from refmoe.run.generate import CHUNK, generate_tokens, generation_decoder
from refmoe.run.load import DENSE, Model, golden_folder, load
from refmoe.run.plan import hardware as plan_hardware
from refmoe.run.plan import measure as plan_measure
from refmoe.run.plan import plan as plan_plan
from refmoe.run.plan import time as plan_time
from refmoe.run.plan import units as plan_units
from refmoe.run.plan import validate as plan_validate
from refmoe.run.sampler import Sampling
from refmoe.run.sweep.sweep import sweep
from refmoe.text.explain import explain
from refmoe.text.messages import read_tools
from refmoe.text.template import ChatTemplate
from refmoe.text.tokenizer import Tokenizer
from refmoe.weights.checkpoint import Checkpoint, summary, tensor_class
from refmoe.weights.dense import sizes as dense_sizes
from refmoe.weights.gguf import Gguf
from refmoe.weights.open import open_checkpoint
from refmoe.weights.placement import Parts, parts_of
from refmoe.weights.streaming.reader import WAYS
from refmoe.weights.streaming.store import describe_store, format_store
from refmoe.weights.synthetic import members, random
from refmoe.weights.synthetic.k2_full import NAME as FULL
from refmoe.weights.synthetic.k2_full import SAID as FULL_SAID
from refmoe.weights.synthetic.k2_full import k2_full
from refmoe.weights.synthetic.k2_slice import k2_slice

BENCHES = ("oracle", "kernels", "decode", "prefill", "peers", "store", "sweep", "gpu")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        code: int = args.verb(args)
        sys.stdout.flush()
        return code
    except (InputError, NonFinite) as e:
        print(f"refmoe: {e}", file=sys.stderr)
        return 1 if isinstance(e, NonFinite) else 2
    except MemoryError as e:  # of a card, too: CuPy's says how much was asked for, and the limit
        print(f"refmoe: out of memory: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # a folder that is not there, a full disk
        print(f"refmoe: {e}", file=sys.stderr)
        return 2


def _generate(args: argparse.Namespace) -> int:
    model = _open(args)
    prompt = _prompt(args, model)
    has_words = not args.tokens or model.checkpoint.has_words
    text = model.tokenizer.stream() if has_words else None
    how = Sampling(args.temperature, args.top_p, args.min_p)
    tokens: list[int] = []
    pieces: list[str] = []
    began, first, interrupted = time.perf_counter(), None, False

    def show(piece: str) -> None:
        pieces.append(piece)
        if not args.json:
            sys.stdout.write(printable(piece, sys.stdout))
            sys.stdout.flush()

    made = generate_tokens(
        generation_decoder(model, args.int4, args.cache),
        prompt,
        max_new_tokens=args.max_new_tokens,
        sampling=how,
        seed=args.seed,
        stop=model.stop_ids,
    )
    try:
        for token in made:
            first = first or (time.perf_counter(), _process_age())
            tokens.append(token)
            show(text.feed(token) if text else f"{token} ")
        show(text.finish() if text else "")
    except KeyboardInterrupt:
        interrupted = True
    end = time.perf_counter()
    rate = (len(tokens) - 1) / (end - first[0]) if first and len(tokens) > 1 else None
    if args.json:
        _print_json(
            {
                "text": "".join(pieces) if text else None,
                "tokens": tokens,
                "prompt_tokens": len(prompt),
                "new_tokens": len(tokens),
                "seconds": end - began,
                "tok_s": rate,
                "first_token_s": first[1] if first else None,
                "store": describe_store(model.store) if model.store else None,
                **_card_facts(model),
            }
        )
    else:
        print()
        print(
            f"[{len(prompt)} prompt + {len(tokens)} new tokens in {end - began:.2f} s"
            + (f", {rate:.1f} tok/s" if rate else "")
            + (f", first token {first[1]:.2f} s after start" if first else "")
            + (", interrupted]" if interrupted else "]"),
            file=sys.stderr,
        )
        if model.store:
            print(format_store(model.store), file=sys.stderr)
        if card := _card_facts(model).get("gpu"):
            peak, budget = card["vram_peak"] / 1e9, card["budget"] / 1e9
            print(f"[at most {peak:.2f} GB of {budget:.2f} on the card]", file=sys.stderr)
    if model.store:
        model.store.close()
    return 130 if interrupted else 0


def _chat(args: argparse.Namespace) -> int:
    model = _open(args)
    tools = read_tools(args.tools) if args.tools else None
    template = model.template
    variables = {} if args.thinking is None else {"thinking": args.thinking}
    decoder = generation_decoder(model, args.int4, args.cache)
    dialogue = Dialogue(model, template, args.system, tools, variables, decoder=decoder)
    how = Sampling(args.temperature, args.top_p, args.min_p)
    interact(dialogue, how, args.seed, args.max_new_tokens, sys.stdout)
    if model.store:
        model.store.close()
    return 0


def _tok(args: argparse.Namespace) -> int:
    folder = args.model or golden_folder() / "tiny-k2"
    words = Tokenizer.load(folder)
    ids, text = _tok_input(args, folder, words)
    pieces = [words.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
    theirs = read_sequence(args.against) if args.against else None
    found = explain(words, ids, theirs) if theirs is not None else None
    if args.json:
        document = {"text": text, "tokens": ids, "pieces": pieces}
        _print_json({**document, "difference": found._asdict() if found else None})
    elif args.decode:
        print(text)
    elif found:
        print(f"{found.cause}: at byte {found.byte}, token {found.token}: {found.explanation}")
    elif theirs is not None:
        print(f"the same {len(ids)} tokens")
    else:
        print(" ".join(map(str, ids)))
        print(" ".join(json.dumps(piece, ensure_ascii=False) for piece in pieces))
    return 1 if found else 0


def _tok_input(args: argparse.Namespace, folder: Path, words: Tokenizer) -> tuple[list[int], str]:
    """The ids and the text that the arguments name, whichever of the two was given."""
    if (args.text is None) == (args.messages is None):
        raise InputError("give a TEXT or --messages FILE")
    if args.messages:
        messages = read_messages(args.messages)
        tools = read_tools(args.tools) if args.tools else None
        template = ChatTemplate.load(folder)
        prompt = template.encode(words, messages, tools, not args.no_generation_prompt)
        return prompt.tokens, prompt.text
    if args.decode:
        try:
            ids = [int(i) for i in args.text.replace(",", " ").split()]
        except ValueError:
            raise InputError("--decode takes token ids separated by spaces or commas") from None
        return ids, words.decode(ids)
    return words.encode(args.text, "all" if args.special else ()), args.text


def _inspect(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(args.model or golden_folder() / "tiny-k2")
    facts = summary(checkpoint)
    raw = (
        {k: v for k, v in checkpoint.metadata.items() if not isinstance(v, list)}
        if isinstance(checkpoint, Gguf)
        else json.loads((checkpoint.path / "config.json").read_text("utf-8"))
    )
    if args.json:
        tensors = {
            t.name: {"dtype": t.dtype, "shape": list(t.shape), "file": t.file.name}
            for t in checkpoint.tensors.values()
        }
        exact, q8 = dense_sizes(checkpoint)
        facts |= {"dense": {"exact": exact, "q8": q8}}
        lists = {"missing": checkpoint.missing, "unread": checkpoint.unread}
        _print_json({"config": raw, "tensors": tensors, **facts, **lists})
        return 1 if checkpoint.missing else 0
    cfg = checkpoint.cfg
    print(f"{checkpoint.path}")
    print(
        f"{cfg.model_type}: {cfg.num_hidden_layers} layers, hidden {cfg.hidden_size}, "
        f"{cfg.num_attention_heads} heads, {cfg.n_routed_experts} experts, "
        f"{cfg.num_experts_per_tok} a token, context {cfg.max_position_embeddings}"
    )
    counts = facts["parameters"]
    print(f"parameters: {counts['total']:,} in total, {counts['active']:,} active in a token")
    formats: dict[str, dict[str, int]] = {}
    for name, t in checkpoint.tensors.items():
        kind = formats.setdefault(tensor_class(name, cfg), {})
        kind[t.dtype] = kind.get(t.dtype, 0) + 1
    print(f"\n{'class':<16}{'bytes':>18}  tensors by dtype")
    for kind, size in sorted(facts["bytes"].items(), key=lambda row: -row[1]):
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in sorted(formats[kind].items()))
        print(f"{kind:<16}{size:>18,}  {dtypes}")
    print(f"{'total':<16}{sum(facts['bytes'].values()):>18,}")
    exact, q8 = dense_sizes(checkpoint)
    print(f"attention, shared experts, dense mlp, head: {exact:,}, with --dense q8 {q8:,}")
    for what, names in (
        ("missing", checkpoint.missing),
        ("unread", checkpoint.unread),
        ("stray", checkpoint.stray),
    ):
        print(f"{what}: {len(names) or 'none'}")
        for name in names[:20]:
            print(f"  {name}")
        if len(names) > 20:
            print(f"  … and {len(names) - 20} more (--json lists all)")
    return 1 if checkpoint.missing else 0


def _trace(args: argparse.Namespace) -> int:
    model = _open(args)
    sequences = read_tokens(args.tokens) if args.tokens else [model.tokenizer.encode(args.text)]
    arrays = {}
    for i, tokens in enumerate(sequences):
        prefix = f"{i}/" if len(sequences) > 1 else ""
        for name, x in trace(model, tokens, args.points, args.sketch).items():
            arrays[prefix + name] = x
    metadata = {
        "producer": f"refmoe {refmoe.__version__}",
        "model": str(model.checkpoint.path),
        "numerics": args.numerics,
        "conventions": args.conventions,
        "tokens": json.dumps(sequences if len(sequences) > 1 else sequences[0]),
    }
    write(args.out, arrays, metadata)
    shapes = {name: list(x.shape) for name, x in arrays.items()}
    if args.json:
        _print_json({"out": str(args.out), "points": shapes})
    else:
        size = sum(x.nbytes for x in arrays.values())
        print(f"{args.out}: {len(arrays)} points of {len(sequences)} sequences, {size:,} bytes")
        if args.verbose:
            for name, shape in shapes.items():
                print(f"  {name:<56} {arrays[name].dtype!s:<8} {shape}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    model = _open(args)
    try:
        done = sweep(
            model,
            read_tokens(args.tokens),
            args.out,
            logits=args.logits,
            positions=read_positions(args.positions) if args.positions else None,
            points=args.points or (),
            chunk=args.chunk,
            restart=args.restart,
            how={"dense": args.dense} | ({"gpu": True} if args.gpu else {}),
        )
    except KeyboardInterrupt:
        print("\nrefmoe: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        if model.store:
            model.store.close()
    if args.json:
        document = {"out": str(done.out), "rows": done.rows, "begun_at_layer": done.begun_at}
        document |= {"bytes_read": done.bytes_read, "seconds": done.seconds}
        tensors = {name: {"dtype": d, "shape": list(s)} for name, (d, s) in done.tensors.items()}
        _print_json({**document, "tensors": tensors})
    else:
        after = f", on from layer {done.begun_at}" if done.begun_at else ""
        print(
            f"{done.out}: {len(done.tensors)} tensors of {done.rows} tokens, "
            f"{done.out.stat().st_size:,} bytes; {done.bytes_read / 1e9:.3f} GB of weights in "
            f"{done.seconds:.1f} s{after}"
        )
        if model.store:
            print(format_store(model.store), file=sys.stderr)
    return 0


def read_positions(text: str) -> Any:
    """all, last, integers with commas between, or a JSON file of a list or a list of lists."""
    if text in ("all", "last"):
        return text
    if re.fullmatch(r"[-+\d, ]+", text):
        try:
            return [int(p) for p in text.split(",")]
        except ValueError:
            raise InputError(f"{text}: expected integers with commas between") from None
    value = read_json(Path(text))
    if not isinstance(value, list):
        raise InputError(f"{text}: expected a list of positions, or a list for each prompt")
    return value


def _check(args: argparse.Namespace) -> int:
    dump = read_dump(args.dump)
    for note in dump.notes:
        print(f"refmoe: note: {note}", file=sys.stderr)
    if args.truth:
        for option in ("against", "repro", "html"):
            if getattr(args, option):
                raise InputError(f"--{option} needs the model; --truth has none")
        report = check_truth(read_truth(args.truth), dump, engine=args.engine, profile=args.profile)
        return _show(report, args)
    model = load(args.model, "float64", reference=True)
    tokens = read_sequence(args.tokens) if args.tokens else None
    engine = args.engine or "refmoe"
    case = judge_dump(model, dump, tokens, engine, args.profile)
    if args.repro and case.report.verdict == "fault":
        for path in repro.write(case, args.repro):
            print(f"refmoe: wrote {path}", file=sys.stderr)
    if args.html:
        print(f"refmoe: wrote {write_html(case, args.html)}", file=sys.stderr)
    if args.against is None:
        return _show(case.report, args)
    second = judge_dump(
        model,
        read_dump(args.against),
        tokens,
        args.against_engine or engine,
        args.against_profile,
    )
    report, other, both = case.report, second.report, arbitrate(case, second)
    if args.json:
        _print_json(both.as_json())
    else:
        _print_lines(arbitration_lines(both, str(args.dump), str(args.against)))
    return max(EXIT[report.verdict], EXIT[other.verdict])


def _show(report: Report, args: argparse.Namespace) -> int:
    if args.json:
        _print_json(report.as_json())
    else:
        _print_lines(report_lines(report, args.all, bool(args.truth)))
    return EXIT[report.verdict]


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


EXIT = {"pass": 0, "fault": 1, "undecidable": 2}


def _golden(args: argparse.Namespace) -> int:
    if args.action == "make":
        return _golden_make(args)
    rows = []
    for row in golden.verify(args.folder, args.reference, _request(args)):
        rows.append(row)
        if not args.json and (args.all or not row.ok):
            mark = "ok  " if row.ok else "FAIL"
            print(f"{mark} {row.rel_error:9.2e} <= {row.bound:8.1e}  ", end="")
            print(f"{row.model}  {row.numerics} ~ {row.witness}  {row.point}", flush=True)
    document = golden.as_json(rows)
    if args.json:
        _print_json(document)
    else:
        _golden_table(rows)
    if not rows:
        return 2
    return 0 if document["ok"] else 1


@contextmanager
def _layers() -> Iterator[Callable[[int, int], None]]:
    """A bar of layers on a terminal: done, of."""
    with tqdm(unit="layer", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, of: int) -> None:
            bar.total, bar.n = of, done
            bar.refresh()

        yield progress


def _golden_make(args: argparse.Namespace) -> int:
    if not args.tokens or not args.out:
        raise InputError("golden make needs --tokens FILE and --out FILE")
    tokens = read_sequence(args.tokens)
    budget = {"ram": args.ram, "reads": args.reads}
    model = load(args.model, "float64", conventions=args.conventions, **budget)
    with _layers() as progress:
        make_truth(model, tokens, args.out, hash_shards=args.hash_shards, progress=progress)
    size = args.out.stat().st_size
    if args.json:
        _print_json({"out": str(args.out), "tokens": len(tokens), "bytes": size})
    else:
        print(f"{args.out}: {len(tokens)} tokens, {size:,} bytes, {size // len(tokens):,} a token")
    return 0


def _golden_table(rows: list[golden.Row]) -> None:
    """Worst point of each case."""
    cases: dict[tuple[str, str, str], list[golden.Row]] = {}
    for row in rows:
        cases.setdefault((row.model, row.numerics, row.witness), []).append(row)
    print(f"{'case':<20} {'refmoe':<8} {'witness':<28} points  {'worst':>8}  at")
    for (model, numerics, witness), part in cases.items():
        numbers = [r for r in part if r.bound > 0] or part
        worst = max(numbers, key=lambda r: r.rel_error / r.bound if r.bound else r.rel_error)
        bad = sum(not r.ok for r in part)
        print(
            f"{model:<20} {numerics:<8} {witness:<28} {len(part):>6}  {worst.rel_error:8.1e}  "
            f"{worst.point}, bound {worst.bound:.1e}{f'  {bad} FAIL' if bad else ''}"
        )
    bad = sum(not r.ok for r in rows)
    print(f"{len(rows)} comparisons, {bad or 'none'} outside the bound")


def _export(args: argparse.Namespace) -> int:
    model = load(args.model)
    if args.to == "gguf":
        kinds = args.dense or "q8_0", args.otherwise, args.experts
        made = export.to_gguf(model, args.out, *kinds)
    else:
        made = export.to_safetensors(model, args.out, args.to, args.dense or "bf16", args.quantiser)
    if args.json:
        _print_json(made.as_json())
        return 0
    print(f"{made.out}: {made.tensors} tensors, {made.bytes:,} bytes")
    if made.not_exact:
        names = ", ".join(made.not_exact[:4])
        more = ", …" if len(made.not_exact) > 4 else ""
        print(f"not exact: {len(made.not_exact)} tensors, {names}{more}")
    return 0


def _quant(args: argparse.Namespace) -> int:
    if args.what == "verify":
        if args.b is None:
            raise InputError("quant verify takes two files of one model: A B")
        found = quant_verify(args.a, args.b)
        if args.json:
            _print_json(found.as_json())
        else:
            for v in found.tensors:
                if v.verdict == "wrong" or args.all:
                    rel = "" if v.max_rel is None else f" {v.max_rel:.1e}"
                    print(f"{v.verdict:<10} {v.name}{rel}{f': {v.likely}' if v.likely else ''}")
            for f in found.findings:
                if f.level != "note" and f.rule != "diff-weights":
                    print(f)
            counts = Counter(v.verdict for v in found.tensors)
            print(", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
        return 0 if found.ok else 1
    if args.what in ("base", "kl"):
        return _quant_base(args)
    if args.to is None:
        raise InputError("quant expect takes --to FORMAT")
    model = load(args.a, "float64")
    tokens = read_sequence(args.tokens) if args.tokens else _own_text(model)
    with _layers() as progress:
        cost = quant_quant.expect(model, args.to, tokens, args.experts_only, progress)
    if args.json:
        _print_json(cost.as_json())
        return 0
    worst = sorted(cost.tensors, key=lambda row: -row["rel_rms"])
    for row in worst if args.all else worst[:5]:
        print(f"{row['rel_rms']:10.2e}  {row['name']}")
    print(
        f"{len(cost.tensors)} tensors in {args.to}, {len(tokens)} tokens: KL {cost.kl_mean:.2e} "
        f"nats a position, 99 % below {cost.kl_p99:.2e}; the likeliest token stays in "
        f"{cost.top1_agree:.1%}"
    )
    return 0


def _quant_base(args: argparse.Namespace) -> int:
    """llama-perplexity's file of base logits, written or compared with."""
    if args.base is None:
        raise InputError(f"quant {args.what} takes --base FILE")
    model = load(args.a, "float64" if args.what == "base" else "float32")
    if args.what == "base":
        if args.tokens is None:
            raise InputError("quant base takes --tokens FILE, as llama.cpp tokenises the text")
        chunks = write_base(model, read_sequence(args.tokens), args.ctx, args.base)
        document: dict[str, Any] = {"out": str(args.base), "chunks": chunks, "n_ctx": args.ctx}
        said = f"{args.base}: {chunks} chunks of {args.ctx} tokens, from float64"
    else:
        kl, same = divergence(model, read_base(args.base))
        document = {"kl_mean": float(kl.mean()), "kl_p99": float(np.quantile(kl, 0.99))}
        document["top1_agree"] = same
        said = (
            f"{len(kl)} positions: KL {document['kl_mean']:.2e} nats, 99 % below "
            f"{document['kl_p99']:.2e}; the likeliest token is the same in {same:.1%}"
        )
    if args.json:
        _print_json(document)
    else:
        print(said)
    return 0


def _own_text(model: Model) -> list[int]:
    """What the model itself says: 128 tokens, drawn at temperature 1."""
    how = Sampling(1.0, 1.0, 0.0)
    first = [int(i) for i in model.cfg.eos_token_id[:1]] or [0]
    made = generate_tokens(model.decoder, first, max_new_tokens=127, sampling=how, seed=0)
    return [*first, *made]


FORMATS = ("bf16", "q8", "int4-fast", "int4-exact", "q4-fast", "q4", "fp8", "f16", "f32")


def _bench(args: argparse.Namespace) -> int:
    if args.what == "oracle":
        return _bench_oracle(args)
    if args.what == "gpu":
        from refmoe.fast.gpu.device import open_device

        open_device()  # or an error that says what to install, before anything else
    _announce()
    if args.threads is not None:
        use_threads(args.threads)
    document, lines = _measured(args)
    if args.json:
        _print_json(document)
    else:
        print("\n".join(lines(document)))
    return 0


def _measured(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[Any], list[str]]]:
    """What a benchmark found, and how to show it to people."""
    from refmoe.run.bench.model import format_model

    if args.what == "kernels":
        from refmoe.run.bench.kernels import format_kernels, measure_kernels

        counts = [args.threads] if args.threads else []
        return measure_kernels(args.formats or FORMATS, counts), format_kernels
    if args.what in ("decode", "prefill"):
        return _bench_model(args), format_model
    folder = args.model if args.shape is None else _slice(args)
    if args.what == "peers":
        from refmoe.run.bench.peers import format_peers, measure_peers

        return measure_peers(folder, args.folder), format_peers
    if args.what == "gpu":
        from refmoe.run.bench.gpu import format_gpu, measure_gpu

        return measure_gpu(folder, args.dense, args.vram), format_gpu
    how = {"dense": args.dense, "reads": args.reads}
    if args.what == "store":
        from refmoe.run.bench.store import format_store, measure_store

        steps = args.tokens or 12
        return measure_store(folder, args.ram, steps, int4=args.int4, **how), format_store
    from refmoe.run.bench.sweep import format_sweep, measure_sweep

    return measure_sweep(
        folder, args.ram, args.prompt or 8, folder=args.folder, **how
    ), format_sweep


def _bench_model(args: argparse.Namespace) -> dict[str, Any]:
    from refmoe.run.bench.base import describe_machine
    from refmoe.run.bench.decode import measure_decode
    from refmoe.run.bench.prefill import measure_prefill

    folder = args.model if args.shape is None else _slice(args)
    model = load(folder, dense=args.dense, gpu=_request(args))
    decoder = generation_decoder(model, args.int4, args.cache)
    count = 128 if args.prompt is None else args.prompt
    measure = measure_decode if args.what == "decode" else measure_prefill
    how = {"dense": args.dense, "int4": args.int4, "cache": args.cache}
    found = {"machine": describe_machine(), **measure(model, decoder, count), **how}
    return {**found, **_card_facts(model)}


def _slice(args: argparse.Namespace) -> Path:
    if args.folder is None:
        raise InputError("--folder DIR: where the random checkpoint of K2's dimensions may lie")
    return k2_slice(args.folder, args.experts, args.vocab, args.layers)


def _bench_oracle(args: argparse.Namespace) -> int:
    rows: dict[str, list[dict[str, Any]]] = {"healthy": [], "planted": []}
    for kind, row in bench.real_engines(args.quick):
        rows[kind].append(row)
        if not args.json:
            print(_bench_row(kind, row), flush=True)
    alarms = {}
    runs = args.runs or (16 if args.quick else 200)
    for profile, found in bench.false_alarms(runs):
        low, high = bench.interval(found["alarms"], runs)
        alarms[profile] = {**found, "interval": [low, high]}
        if not args.json:
            print(
                f"false alarms, {profile:<16} {found['alarms']} of {runs}, "
                f"95 % interval {low:.2%} to {high:.2%}",
                flush=True,
            )
    if args.json:
        _print_json({**rows, "false_alarms": alarms})
    else:
        for precision in dict.fromkeys(row["precision"] for row in rows["planted"]):
            here = [row for row in rows["planted"] if row["precision"] == precision]
            counts = [sum(row[key] for row in here) for key in ("detected", "placed")]
            print(f"{precision}: of {len(here)} faults {counts[0]} detected, {counts[1]} placed")
    passed = all(row["verdict"] == "pass" for row in rows["healthy"])
    found_all = all(row["detected"] for row in rows["planted"])
    few = all(found["alarms"] <= max(1, runs // 200) for found in alarms.values())
    return 0 if passed and found_all and few else 1


def _bench_row(kind: str, row: dict[str, Any]) -> str:
    if kind == "healthy":
        sides = ", ".join(row["conventions"]) or "none"
        return (
            f"healthy  {row['verdict']:<12} {row['engine']:<52} {row['compared']:>3} tensors, "
            f"worst {row['worst']:.2f} of what is explained; sides of its own: {sides}"
        )
    mark = "placed  " if row["placed"] else "detected" if row["detected"] else "MISSED  "
    name = f"{row['fault']}, {row['engine']}, {row['precision']}"
    return f"planted  {mark}     {name:<72} {row['point']}"


def _plan(args: argparse.Namespace) -> int:
    if args.validate:
        document = plan_validate.validate()
        if args.json:
            _print_json(document)
        else:
            print("\n".join(plan_validate.format_validation(document)))
        return 0 if document["inside"] >= 0.8 * document["total"] else 1
    hardware = _hardware(args)
    dense, cache = args.dense or hardware.dense, args.cache or hardware.cache
    if args.model:
        checkpoint = open_checkpoint(args.model)
        parts, eighths = parts_of(checkpoint, dense), parts_of(checkpoint, "q8")
    else:
        cfg = plan_time.model_config(args.config, args.member)
        parts, eighths = Parts.of(cfg, dense), Parts.of(cfg, "q8")
    context = plan_units.parse_count(args.ctx, "--ctx") if args.ctx else None
    number = plan_units.NUMBER_BYTES[cache]
    case = plan_time.Placed.of(parts, hardware, context, number, args.hit_rate, args.card_experts)
    prompt, sweep = (
        plan_units.parse_count(args.prompt, "--prompt"),
        plan_units.parse_count(args.sweep, "--sweep"),
    )
    named = args.model or args.config or args.member or "k2-thinking"
    document = {
        "model": f"{named}, dense {dense}, cache {cache}",
        **plan_plan.plan(case, eighths, prompt, sweep),
    }
    if args.json:
        _print_json(document)
    else:
        print("\n".join(plan_plan.format_plan(document)))
    return 0 if document["fits"] else 1


def _hardware(args: argparse.Namespace) -> plan_hardware.Hardware:
    """A preset, a description or, unless flags say how much memory, this machine; then flags."""
    size, rate = parse_size, plan_units.parse_rate
    kinds = {"ram": size, "vram": size, "pmem": size, "disk": rate}
    kinds |= {f"{kind}_bandwidth": rate for kind in ("ram", "vram", "pmem")}
    given = {
        name: read(text, f"--{name.replace('_', '-')}")
        for name, read in kinds.items()
        if (text := getattr(args, name)) is not None
    }
    cores = plan_units.parse_count(args.cores, "--cores") if args.cores else None
    flags = plan_measure.Flags(**given, cores=cores)
    base = None
    if args.hardware:
        base = plan_hardware.parse_hardware(read_text(args.hardware), str(args.hardware))
    elif args.preset or flags.ram is None:
        base = plan_measure.load_preset(args.preset or "this", args.model)
    return plan_measure.with_flags(base, flags)


def _lint(args: argparse.Namespace) -> int:
    if args.rules:
        for r in lint_registry.rules():
            print(f"{r.level:<8} {r.id:<23} {r.summary}")
        return 0
    folder = args.folder or golden_folder() / "tiny-k2"
    chosen = args.select, args.ignore
    found = (
        lint_lint.lint_against(folder, args.against, *chosen)
        if args.against
        else lint_lint.lint(folder, *chosen)
    )
    document = lint_base.as_json(found)
    if args.json:
        _print_json(document)
    else:
        for f in found:
            print(f)
        errors = sum(f.level == "error" for f in found)
        print(f"{errors or 'no'} errors in {len(found)} findings")
    return 0 if document["ok"] else 1


def _ids(text: str) -> list[str]:
    return text.split(",")


def _mutate(args: argparse.Namespace) -> int:
    def show(fault: Any, score: Any, seconds: float) -> None:
        if args.json:
            return
        marks = f"{score.detected:>3} {score.placed:>3} {score.named:>3} of {score.runs:<3}"
        small = ", ".join(f"{p} {x:.2g}" for p, x in score.smallest.items())
        print(f"{marks} {seconds:6.0f} s  {fault.id:<28}{f'down to {small}' if small else ''}")
        for line in score.missed[:4] if args.verbose else ():
            print(f"      {line}")
        sys.stdout.flush()

    if not args.json:
        print("detected, placed, named")
    document = mutate.run(args.quick, args.faults, args.seeds, args.jobs, show)
    if args.json:
        _print_json(document)
    else:
        # downwards: 100.0% is all of them
        cut = {key: int(1000 * document[key]) / 10 for key in ("detected", "placed", "named")}
        shares = (f"{key} {share:.1f}%" for key, share in cut.items())
        print(
            f"{document['runs']} mutants of {len(document['faults'])} faults: {', '.join(shares)}"
        )
        if document["inert_everywhere"]:
            print(f"without effect anywhere: {', '.join(document['inert_everywhere'])}")
    fine = document["detected"] == 1 and document["placed"] >= 0.98 and document["named"] >= 0.95
    return 0 if fine else 1


def _tiny(args: argparse.Namespace) -> int:
    full = FULL in args.shape
    shape: dict[str, Any] = {}
    for item in (item for item in args.shape if item != FULL):
        key, _, value = item.partition("=")
        try:
            shape[key] = json.loads(value)
        except json.JSONDecodeError:
            raise InputError(f"--shape {item}: expected FIELD=VALUE, as in config.json") from None
    if full:
        return _full(args, shape)
    if args.like:
        if args.format or args.shards != 1 or shape:
            raise InputError("--like decides format, shape and shards; give only --seed with it")
        members.write_member(args.folder, args.like, args.seed)
    else:
        random.write_random(args.folder, args.format or "bf16", args.seed, shape, args.shards)
    checkpoint = Checkpoint.open(args.folder)
    alike: dict[int, list[str]] = {}
    for axis, size in random.axes(checkpoint.cfg).items():
        alike.setdefault(size, []).append(axis)
    for size, names in alike.items():
        if len(names) > 1 and not args.like:
            print(f"refmoe: warning: {' = '.join(names)} = {size}", file=sys.stderr)
    if args.json:
        _print_json({"folder": str(args.folder), "tensors": len(checkpoint.tensors)})
    else:
        size = sum(t.nbytes for t in checkpoint.tensors.values())
        made = args.like or args.format or "bf16"
        print(f"{args.folder}: {len(checkpoint.tensors)} tensors, {size:,} bytes, {made}")
    return 0


def _full(args: argparse.Namespace, shape: dict[str, Any]) -> int:
    if args.like or args.format or args.shards != 1:
        raise InputError(f"--shape {FULL} decides layout, format and shards; give only --seed")
    made = k2_full(args.folder, shape, args.seed)
    checkpoint = Checkpoint.open(args.folder)
    if args.json:
        facts = {"tensors": len(checkpoint.tensors), **made._asdict()}
        _print_json({"folder": str(args.folder), **facts})
        return 0
    print(
        f"{args.folder}: {len(checkpoint.tensors):,} tensors in {made.shards} shards, "
        f"{made.apparent:,} bytes, of which {made.disk:,} on disk"
    )
    print(FULL_SAID)
    return 0


def read_messages(file: Path) -> list[dict[str, Any]]:
    """A JSON list of chat messages, or an object that holds it under `messages`."""
    value = read_json(file)
    value = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise InputError(f"{file}: expected a list of messages")
    return value


def read_tokens(file: Path) -> list[list[int]]:
    """A JSON list of integers is one sequence, a list of lists several."""
    value = read_json(file)
    several = value if value and all(isinstance(v, list) for v in value) else [value]
    for tokens in several:
        if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
            raise InputError(f"{file}: expected a list of integers, or a list of such lists")
    return several


def read_sequence(file: Path) -> list[int]:
    """The one sequence of a tokens file."""
    sequences = read_tokens(file)
    if len(sequences) != 1:
        raise InputError(f"{file}: one sequence is taken here, not {len(sequences)}")
    return sequences[0]


def _open(args: argparse.Namespace) -> Model:
    if getattr(args, "threads", None) is not None:
        use_threads(args.threads)
    dense = getattr(args, "dense", "exact")
    request = _request(args)
    how = dense, getattr(args, "ram", None), getattr(args, "reads", None), request
    model = load(args.model, args.numerics, args.reference, args.conventions, *how)
    if model.card is not None:
        print(f"refmoe: {model.card.said}", file=sys.stderr)
    for line in model.checkpoint.warnings:
        print(f"refmoe: warning: {line}", file=sys.stderr)
    if not args.reference:
        _announce()
    return model


def _request(args: argparse.Namespace) -> Any:
    """What --gpu asks for; None without it."""
    if not getattr(args, "gpu", False):
        for name in ("vram", "gpu_experts", "ctx"):
            if getattr(args, name, None) is not None and hasattr(args, "gpu"):
                raise InputError(f"--{name.replace('_', '-')} is for --gpu")
        return None
    from refmoe.fast.gpu.placement import CONTEXT, Request

    experts = getattr(args, "gpu_experts", None) or 0
    if experts < 0:
        raise InputError(f"--gpu-experts {experts}, expected a number from 0")
    context = plan_units.parse_count(args.ctx, "--ctx") if getattr(args, "ctx", None) else CONTEXT
    passing = args.verb is _sweep
    return Request(args.vram, experts, context, getattr(args, "cache", "float32"), passing)


def _card_facts(model: Model) -> dict[str, Any]:
    """What is on a card, where there is one."""
    if model.card is None:
        return {}
    from refmoe.fast.gpu.placement import facts

    return {"gpu": facts(model.card)}


def _announce() -> None:
    from refmoe.fast import kernels  # Numba, which the model has loaded

    kernels.announce(lambda text: print(f"refmoe: {text}", file=sys.stderr))


def _prompt(args: argparse.Namespace, model: Model) -> list[int]:
    if args.tokens:
        return read_sequence(args.tokens)
    if args.prompt is None:
        if sys.stdin.isatty():
            raise InputError('a prompt is needed: refmoe generate "ROMEO:"')
        args.prompt = sys.stdin.read()
    return model.tokenizer.encode(args.prompt)


def _process_age() -> float | None:
    """Seconds since the process started; None where the system does not tell."""
    try:
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        ticks = os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / ticks
    except (OSError, AttributeError, ValueError):
        return None


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, ensure_ascii=False, allow_nan=False))


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("refmoe", description=refmoe.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"refmoe {refmoe.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, help: str, model: bool = True) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=help, description=help)
        p.set_defaults(verb=run)
        if name != "chat":
            p.add_argument("--json", action="store_true", help="print one JSON document")
        if model:
            p.add_argument(
                "--model", type=Path, metavar="DIR", help="a checkpoint's folder, or a GGUF"
            )
            p.add_argument("--numerics", choices=tuple(PRECISIONS), default="float32")
            p.add_argument("--conventions", choices=tuple(CONVENTIONS), default="refmoe")
            p.add_argument(
                "--reference", action="store_true", help="the definition in model/ alone"
            )
        return p

    def sampling(p: argparse.ArgumentParser, temperature: float) -> None:
        help = f"0 is greedy; default: {temperature}"
        p.add_argument("--temperature", type=float, default=temperature, help=help)
        p.add_argument("--top-p", type=float, default=1.0)
        p.add_argument("--min-p", type=float, default=0.0)
        p.add_argument("--seed", type=int, default=0)

    def quicker(p: argparse.ArgumentParser) -> None:
        help = "exact: as stored; q8: attention, shared experts, dense MLP and head in 8 bits"
        p.add_argument("--dense", choices=DENSE, default="exact", help=help)
        help = "fast: 16-bit activations for INT4, Q4_0 and, in prompts, 8-bit weights; or exact"
        p.add_argument("--int4", choices=["fast", "exact"], default="fast", help=help)
        p.add_argument("--cache", choices=["float32", "bf16"], default="float32", help="latents")
        p.add_argument("--threads", type=int, metavar="N", help="default: all processors")
        budget(p)
        help = "what every token uses on a CUDA card, as `refmoe plan` places it"
        p.add_argument("--gpu", action="store_true", help=help)
        help = "--gpu: of the card; default: 12GB, or what it has free"
        p.add_argument("--vram", type=_bytes, metavar="BYTES", help=help)
        help = "--gpu: the N most used routed experts as well, where there is room"
        p.add_argument("--gpu-experts", type=int, metavar="N", help=help)
        help = "--gpu: tokens that caches have room for; default: 4096"
        p.add_argument("--ctx", metavar="N", help=help)

    def budget(p: argparse.ArgumentParser) -> None:
        help = "bytes that weights may take, like 8GB; what is beyond is read from the disk"
        p.add_argument("--ram", type=_bytes, metavar="BYTES", help=help)
        help = "with --ram: past the system's cache, or through it; default: the quicker"
        p.add_argument("--reads", choices=WAYS, help=help)

    p = verb("generate", _generate, "continue a prompt")
    p.add_argument("prompt", nargs="?", help="text; without it, standard input")
    p.add_argument("--tokens", type=Path, metavar="FILE", help="a JSON list of ids as the prompt")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    sampling(p, temperature=0.0)
    quicker(p)

    p = verb("chat", _chat, "talk to it, through its own template")
    p.add_argument("--system", metavar="TEXT", help="a system message instead of the template's")
    p.add_argument("--tools", type=Path, metavar="FILE", help="JSON: tool declarations")
    p.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="K2.5 and later: think first"
    )
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="of a reply; default: no limit")
    sampling(p, temperature=0.6)
    quicker(p)

    p = verb(
        "tok", _tok, "text or messages to token ids, or back; compare with others'", model=False
    )
    p.add_argument("text", nargs="?")
    p.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint's folder, or a GGUF")
    p.add_argument("--decode", action="store_true", help="TEXT is ids")
    p.add_argument("--special", action="store_true", help="special tokens in TEXT become their ids")
    p.add_argument("--messages", type=Path, metavar="FILE", help="JSON: a list of chat messages")
    p.add_argument("--tools", type=Path, metavar="FILE", help="JSON: tool declarations")
    p.add_argument("--no-generation-prompt", action="store_true")
    p.add_argument("--against", type=Path, metavar="FILE", help="JSON: another engine's ids")

    p = verb("inspect", _inspect, "tensors, formats, bytes, parameters", model=False)
    p.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint's folder, or a GGUF")

    p = verb("trace", _trace, "write points of one forward pass to a safetensors file")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tokens", type=Path, metavar="FILE", help="JSON: a list of ids, or several"
    )
    source.add_argument("--text", help="a text instead")
    p.add_argument("--points", nargs="+", metavar="PATTERN", help="names or patterns; default: all")
    p.add_argument("--sketch", action="store_true", help="65 numbers a row instead of each tensor")
    p.add_argument("--out", type=Path, required=True, metavar="FILE")
    p.add_argument("--verbose", action="store_true", help="list the points")
    budget(p)

    p = verb("sweep", _sweep, "many prompts, layer by layer, each weight read once; resumable")
    p.add_argument(
        "--tokens", type=Path, required=True, metavar="FILE", help="JSON: a list of ids, or several"
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE")
    help = "all, none, or top:K, the likeliest; default: top:64"
    p.add_argument("--logits", default="top:64", metavar="WHICH", help=help)
    help = "logits of all, last, a list such as 0,7,-1, or a JSON file; default: all"
    p.add_argument("--positions", metavar="WHICH", help=help)
    help = "names or patterns; hidden states of the last layer and routing are always written"
    p.add_argument("--points", nargs="+", metavar="PATTERN", help=help)
    p.add_argument("--chunk", type=int, default=CHUNK, metavar="ROWS", help=f"default: {CHUNK}")
    p.add_argument("--restart", action="store_true", help="forget what an earlier run left")
    help = "exact: as stored; q8: attention, shared experts, dense MLP and head in 8 bits"
    p.add_argument("--dense", choices=DENSE, default="exact", help=help)
    p.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    budget(p)
    help = "what every token uses goes through a CUDA card, layer by layer"
    p.add_argument("--gpu", action="store_true", help=help)
    p.add_argument(
        "--vram", type=_bytes, metavar="BYTES", help="--gpu: default: 12GB, or what is free"
    )
    p.add_argument("--ctx", metavar="N", help="--gpu: tokens of the longest prompt; default: 4096")

    p = verb("check", _check, "where does another engine's dump first go wrong?", model=False)
    p.add_argument("dump", type=Path, help="tensors by module path: .safetensors, .npz or .pt")
    p.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint's folder, or a GGUF")
    p.add_argument("--tokens", type=Path, metavar="FILE", help="JSON: the ids, if not in the dump")
    p.add_argument("--truth", type=Path, metavar="FILE", help="of `golden make`, not the model")
    p.add_argument("--engine", choices=tuple(CONVENTIONS), help="its conventions; default: refmoe")
    p.add_argument("--profile", choices=tuple(PROFILES), help="default: as its values are")
    p.add_argument("--against", type=Path, metavar="DUMP", help="which of two is further off?")
    p.add_argument("--against-engine", choices=tuple(CONVENTIONS), help="default: as --engine")
    p.add_argument("--against-profile", choices=tuple(PROFILES))
    p.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    p.add_argument("--repro", type=Path, metavar="FILE", help="write the fault as a NumPy script")
    p.add_argument("--all", action="store_true", help="print every point")

    p = verb("golden", _golden, "verify the goldens, or make one of a checkpoint", model=False)
    p.add_argument("action", choices=["verify", "make"])
    p.add_argument("--model", type=Path, metavar="DIR", help="make: a checkpoint's folder")
    p.add_argument("--tokens", type=Path, metavar="FILE", help="make: JSON, a list of ids")
    p.add_argument("--out", type=Path, metavar="FILE", help="make: the file to write")
    p.add_argument("--conventions", choices=tuple(CONVENTIONS), default="refmoe")
    p.add_argument("--hash-shards", action="store_true", help="make: also sha256 of every shard")
    budget(p)
    p.add_argument("--folder", type=Path, metavar="DIR", help="goldens elsewhere")
    p.add_argument("--reference", action="store_true", help="the definition in model/ alone")
    p.add_argument("--gpu", action="store_true", help="verify: on a CUDA card, in float32")
    p.add_argument(
        "--vram", type=_bytes, metavar="BYTES", help="--gpu: default: 12GB, or what is free"
    )
    p.add_argument("--all", action="store_true", help="print every point")

    p = verb("lint", _lint, "what is wrong with a checkpoint, without running it", model=False)
    p.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="default: tiny-k2")
    p.add_argument("--against", type=Path, metavar="DIR", help="another copy of the same model")
    p.add_argument("--rules", action="store_true", help="list all rules")
    help = "judge by these rules or families alone"
    p.add_argument("--select", type=_ids, action="extend", default=[], metavar="ID", help=help)
    help = "leave these rules or families out"
    p.add_argument("--ignore", type=_ids, action="extend", default=[], metavar="ID", help=help)

    p = verb("mutate", _mutate, "plant every known fault and see it found", model=False)
    p.add_argument("faults", nargs="*", metavar="ID", help="default: all")
    p.add_argument("--quick", action="store_true", help="four checkpoints, one layer, one prompt")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="prompts of each")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    p.add_argument("--verbose", action="store_true", help="what was missed, and how")

    what = (
        "oracle: engines judged; kernels, decode, prefill: speed; peers: beside transformers; "
        "store: under a budget; sweep: many tokens, layer by layer; gpu: on a card"
    )
    p = verb("bench", _bench, "measure: the oracle's power, and speed", model=False)
    p.add_argument("what", choices=BENCHES, help=what)
    p.add_argument("--quick", action="store_true", help="oracle: fewer engines and runs")
    p.add_argument("--runs", type=int, metavar="N", help="oracle: for false alarms; 200")
    p.add_argument("--model", type=Path, metavar="DIR", help="decode, prefill: default tiny-k2")
    p.add_argument("--shape", choices=["k2-slice"], help="a random checkpoint of K2's dimensions")
    p.add_argument("--folder", type=Path, metavar="DIR", help="where it is, or will be, written")
    p.add_argument("--experts", type=int, default=384, metavar="N", help="of the slice")
    p.add_argument("--vocab", type=int, default=163840, metavar="N", help="of the slice")
    p.add_argument("--layers", type=int, default=2, metavar="N", help="of the slice")
    p.add_argument(
        "--prompt", type=int, metavar="N", help="tokens before, or of the rest; 128, sweep: 8"
    )
    p.add_argument("--tokens", type=int, metavar="N", help="store: to decode; 12")
    p.add_argument("--formats", nargs="+", choices=FORMATS, help="kernels: default all")
    quicker(p)

    p = verb("plan", _plan, "what lives where, does it fit, how fast will it be", model=False)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint, or a GGUF")
    which.add_argument("--config", type=Path, metavar="FILE", help="a config.json alone")
    help = "as published; default: k2-thinking"
    which.add_argument("--member", choices=tuple(members.MEMBERS), help=help)
    where = p.add_mutually_exclusive_group()
    where.add_argument(
        "--preset", choices=plan_measure.PRESETS, help="default, without flags: this"
    )
    where.add_argument("--hardware", type=Path, metavar="FILE", help="a description in TOML")
    for kind in ("ram", "vram", "pmem"):
        p.add_argument(f"--{kind}", metavar="SIZE", help="64GB is 10⁹, 64GiB 2³⁰")
        p.add_argument(f"--{kind}-bandwidth", metavar="RATE", help="50GB/s")
    p.add_argument("--disk", metavar="RATE", help="7GB/s: what is nowhere else is read from there")
    p.add_argument("--cores", metavar="N")
    p.add_argument("--ctx", metavar="N", help="tokens in the cache; default: 8k, or the preset's")
    p.add_argument("--prompt", default="512", metavar="N", help="tokens of a prompt; 512")
    p.add_argument("--sweep", default="10000", metavar="N", help="tokens of a sweep; 10000")
    p.add_argument("--dense", choices=DENSE, help="default: exact, or the preset's")
    p.add_argument(
        "--cache", choices=tuple(plan_units.NUMBER_BYTES), help="default: float32, or the preset's"
    )
    p.add_argument(
        "--hit-rate", type=_share, metavar="H", help="experts not read from disk, 0 to 1"
    )
    help = "the most routed experts a card takes; default: as many as fit, or the preset's"
    p.add_argument("--card-experts", type=int, metavar="N", help=help)
    p.add_argument("--validate", action="store_true", help="public reports against predictions")

    p = verb("export", _export, "safetensors to GGUF and back, INT4 to bf16 and back", model=False)
    p.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint's folder, or a GGUF")
    p.add_argument("--to", choices=["gguf", "int4", "bf16"], required=True)
    p.add_argument("--out", type=Path, required=True, help="a file for gguf, else a new folder")
    help = "what is not a routed expert; default: q8_0 in a GGUF, else bf16"
    p.add_argument("--dense", choices=export.DENSE, help=help)
    help = "gguf: routed experts; default: q4_0, exact where INT4's scales are float16 too"
    p.add_argument("--experts", choices=("q4_0", *export.DENSE), default="q4_0", help=help)
    help = "gguf: experts whose scales are no float16; default: f32"
    p.add_argument("--otherwise", choices=export.DENSE, default="f32", help=help)
    p.add_argument("--quantiser", choices=tuple(export.QUANTISERS), default="amax/7", help="int4")

    p = verb("quant", _quant, "is this file that model; what should a format cost", model=False)
    help = "base: write llama-perplexity's base logits; kl: a model against such a file"
    p.add_argument("what", choices=["verify", "expect", "base", "kl"], help=help)
    p.add_argument("a", type=Path, nargs="?", metavar="A", help="the right one, or the model")
    p.add_argument("b", type=Path, nargs="?", metavar="B", help="verify: the other")
    p.add_argument("--to", choices=quant_quant.FORMATS, help="expect: the format")
    p.add_argument("--base", type=Path, metavar="FILE", help="base, kl: llama-perplexity's file")
    p.add_argument("--ctx", type=int, default=512, metavar="N", help="base: tokens of a chunk")
    p.add_argument("--experts-only", action="store_true", help="expect: of routed experts alone")
    p.add_argument(
        "--tokens", type=Path, metavar="FILE", help="expect: JSON; default: its own text"
    )
    p.add_argument("--all", action="store_true", help="print every tensor")

    p = verb("tiny", _tiny, "write a random checkpoint in Hugging Face layout", model=False)
    p.add_argument("folder", type=Path)
    p.add_argument("--like", choices=tuple(members.MEMBERS), help="a member's published layout")
    p.add_argument("--format", choices=random.FORMATS, help="default: bf16")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--shards", type=int, default=1)
    p.add_argument(
        "--shape",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help=f"of config.json; with {FULL}: K2-Thinking's size, 594 GB of mostly holes",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
