"""Log-probabilities of servers: every form is read, and what was done to them is solved for."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe.files import InputError
from refmoe.oracle.check import judge_dump
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.truth.check import check_truth
from refmoe.oracle.truth.file import read_truth
from refmoe.oracle.truth.make import make
from refmoe.run.load import load
from tests.oracle.servers import Answer, log_softmax, top

TEXT = "good my lord, my lord: good morrow, my good lord, good"
DRAWN = 5


@pytest.fixture(scope="module")
def model(tiny_k2):
    return load(tiny_k2, "float64", reference=True)


@pytest.fixture(scope="module")
def words(model):
    return model.tokenizer


@pytest.fixture(scope="module")
def engine(tiny_k2):
    """refmoe in float32, which plays the server."""
    return refmoe.load(tiny_k2)


@pytest.fixture(scope="module")
def sequence(engine, words):
    """A prompt, what greedy sampling adds to it, and the logits of all."""
    prompt = words.encode(TEXT)
    tokens = list(prompt)
    for _ in range(DRAWN):
        tokens.append(int(engine.logits(tokens)[-1].argmax()))
    return prompt, tokens[len(prompt) :], engine.logits(tokens).astype(np.float64)


@pytest.fixture(scope="module")
def answer(words, sequence):
    prompt, drawn, logits = sequence
    return Answer(words, prompt, drawn, log_softmax(logits))


@pytest.fixture
def judged(model, tmp_path):
    """The report of a response; files are written as JSON unless they are text already."""

    def judge(response, tokens=None, name="response.json", explain=False):
        file = tmp_path / name
        file.write_text(response if isinstance(response, str) else json.dumps(response), "utf-8")
        return judge_dump(model, read_dump(file), tokens, explain=explain).report

    return judge


# --- forms

OF_ALL = {  # forms that tell all tokens
    "refmoe": lambda a: a.refmoe(),
    "vLLM": lambda a: a.vllm(),
    "vLLM, echo": lambda a: a.vllm(echo=True),
    "vLLM, texts": lambda a: a.vllm(as_ids=False),
    "SGLang": lambda a: a.sglang(),
    "completions, echo": lambda a: a.completions(echo=True),
    "Fireworks": lambda a: a.fireworks(),
    "llama-server": lambda a: a.llama_server(),
    "TGI": lambda a: a.tgi(),
}
OF_ANSWER = {  # forms that lack the prompt
    "completions": lambda a: a.completions(),
    "chat": lambda a: a.chat(),
    "chat, no bytes": lambda a: a.chat(raw=False),
    "mlx_lm": lambda a: a.mlx(),
    "Ollama": lambda a: a.ollama(),
    "SGLang, part of the prompt": lambda a: a.sglang(first=9),
}


@pytest.mark.parametrize("form", OF_ALL)
def test_every_form_that_tells_its_tokens_is_judged(form, answer, judged):
    report = judged(OF_ALL[form](answer))
    assert report.verdict == "pass", report.reason
    generated = form in ("Fireworks", "llama-server")
    rows = DRAWN if generated else len(answer.tokens) - 1
    assert report.coverage.positions == (rows, len(answer.tokens))
    assert f"at {rows} positions" in report.form


@pytest.mark.parametrize("form", ["vLLM, texts", "llama-server"])
def test_one_wrong_row_is_a_fault(form, answer, judged):
    values = answer.values.copy()
    values[-3] = log_softmax(
        values[-3] + 3 * np.random.default_rng(1).standard_normal(len(values[0]))
    )
    report = judged(OF_ALL[form](Answer(answer.words, answer.prompt, answer.drawn, values)))
    assert (report.verdict, report.cause, report.undone) == ("fault", None, ())


@pytest.mark.parametrize("form", OF_ANSWER)
def test_a_form_without_the_prompt_takes_it_from_tokens(form, answer, judged):
    response = OF_ANSWER[form](answer)
    with pytest.raises(InputError, match=r"the prompt.* is not in the response.*--tokens FILE"):
        judged(response)
    for tokens in (answer.prompt, answer.tokens):
        report = judged(response, tokens)
        assert report.verdict == "pass", report.reason
        assert report.coverage.positions[0] >= DRAWN


def test_a_list_of_tokens_that_is_too_short_is_refused(answer, judged):
    with pytest.raises(InputError, match=r"--tokens has \d+ ids, .* counted .* is a BOS in front"):
        judged(answer.chat(), answer.prompt[1:])
    with pytest.raises(InputError, match=r"--tokens has 3 ids, the server counted 9"):
        judged(answer.sglang(first=9), answer.prompt[:3])


def test_a_stream_is_joined(answer, judged):
    whole = answer.vllm()
    choice = whole["choices"][0]
    events = []
    for n in range(DRAWN):
        part = {k: v[n : n + 1] for k, v in choice["logprobs"].items()}
        one = {"index": 0, "text": "x", "logprobs": part, "token_ids": answer.drawn[n : n + 1]}
        if n == 0:
            one |= {"prompt_token_ids": answer.prompt}
        events.append({"id": "a", "object": "text_completion", "choices": [one]})
    events.append({"id": "a", "choices": [], "usage": answer.usage()})
    lines = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
    for name in ("s.sse", "s.txt", "s.log", "s.json"):
        report = judged(": ping\n\n" + lines, name=name)
        assert (report.verdict, report.coverage.positions[0]) == ("pass", DRAWN)
    with pytest.raises(InputError, match="is no JSON"):
        judged(lines[:-40], name="s.sse")


def test_a_stream_that_repeats_what_came_before_is_joined(answer, judged):
    """SGLang's events have all tokens so far."""
    whole = answer.sglang()
    events = []
    for n in range(1, DRAWN + 1):
        meta = dict(whole["meta_info"], id="a")
        for key in ("output_token_logprobs", "output_top_logprobs"):
            meta[key] = meta[key][:n]
        events.append({"text": "", "meta_info": meta})
    report = judged("".join(f"data: {json.dumps(e)}\n\n" for e in events), name="s.sse")
    assert (report.verdict, report.coverage.positions[0]) == ("pass", len(answer.tokens) - 1)


def test_llama_servers_lines_are_one_response(answer, judged):
    whole = answer.llama_server()
    rows = whole.pop("completion_probabilities")
    lines = [{"index": 0, "stop": False, "completion_probabilities": [r]} for r in rows]
    last = {"index": 0, "stop": True, **whole}
    report = judged("\n".join(map(json.dumps, [*lines, last])), name="s.jsonl")
    assert (report.verdict, report.coverage.positions[0]) == ("pass", DRAWN)


def test_each_of_several_responses_is_judged(answer, judged):
    report = judged([answer.sglang(), answer.sglang()])
    assert report.verdict == "pass"
    assert [p.verdict for p in report.prompts] == ["pass", "pass"]
    wrong = Answer(answer.words, answer.prompt, answer.drawn, log_softmax(answer.values / 2))
    report = judged([answer.sglang(), wrong.sglang()])
    assert (report.verdict, report.cause.id) == ("fault", "temperature")
    assert report.reason.startswith("sequence 2: ")


def test_a_text_of_several_tokens_is_left_out_and_counted(answer, judged):
    """A list may name a token by a text that no token has, or that U+FFFD is a part of."""
    response = answer.completions(echo=True)
    rows = response["choices"][0]["logprobs"]["top_logprobs"]
    for key in ("my lord, the king", "\ufffd", ""):
        rows[5][key] = -3.0
    report = judged(response)
    assert report.verdict == "pass"
    assert "3 of " in report.notes[-1]
    assert "entries not read: their text is no token" in report.notes[-1]


def test_nothing_is_judged_where_no_text_is_a_token(answer, judged):
    response = answer.chat()
    for item in response["choices"][0]["logprobs"]["content"]:
        for x in (item, *item["top_logprobs"]):
            x |= {"token": "\ufffd", "bytes": None}
    with pytest.raises(InputError, match="no row can be judged"):
        judged(response, answer.prompt)


def test_rows_after_an_unknown_token_are_not_judged(answer, judged):
    response = answer.chat()
    choice = response["choices"][0]
    choice["message"]["content"] = "something else"
    choice["logprobs"]["content"][2] |= {"token": "\ufffd", "bytes": None}
    report = judged(response, answer.prompt)
    assert report.verdict == "pass"
    assert report.coverage.positions[0] == 3
    assert any("2 positions not read" in note for note in report.notes)
    report = judged(response, answer.tokens)  # which tell it
    assert report.coverage.positions[0] == DRAWN


def test_tokens_that_are_not_the_responses_own_are_refused(answer, words, judged):
    bos = words.special["[BOS]"]
    with pytest.raises(InputError, match=r"a BOS in front: \[BOS\] \(\d+\) stands only here"):
        judged(answer.vllm(), [bos, *answer.prompt])
    with_bos = Answer(words, [bos, *answer.prompt], answer.drawn, answer.values[:1].repeat(99, 0))
    with pytest.raises(InputError, match=r"a BOS in front.* stands only there"):
        judged(with_bos.vllm(), answer.prompt)
    end, other = words.special["<|im_end|>"], words.special["[EOS]"]
    with pytest.raises(InputError, match=f"special ids mapped: {end}→{other}"):
        judged(Answer(words, [other, 7], [9], answer.values[:3]).vllm(), [end, 7])


def test_prompt_logprobs_alone_do_not_say_their_tokens(answer, judged):
    response = answer.vllm(ids=False)
    with pytest.raises(InputError, match="does not say its tokens; give them"):
        judged(response)
    for tokens in (answer.prompt, answer.tokens):
        report = judged(response, tokens)
        assert report.verdict == "pass", report.reason
        assert report.coverage.positions[0] == len(answer.tokens) - 1


# --- what was done


def penalised(z, tokens, presence=0.0, frequency=0.0, repetition=1.0):
    z = z.copy()
    for t in range(len(z)):
        for i in set(tokens[: t + 1]):
            x = z[t, i] / repetition if z[t, i] > 0 else z[t, i] * repetition
            z[t, i] = x - presence - frequency * tokens[: t + 1].count(i)
    return z


def kept(z, k=None, p=None, min_p=None):
    """Logits with -inf where top-k, top-p or min-p drops a token."""
    z = z.copy()
    for row in z:
        order = np.argsort(-row)
        q = np.exp(row - row.max())
        q /= q.sum()
        before = np.cumsum(q[order]) - q[order]
        keep = np.zeros(len(row), bool)
        if k is not None:
            keep[order[:k]] = True
        elif p is not None:
            keep[order[before < p]] = True
        else:
            keep = q >= min_p * q.max()
        row[~keep] = -np.inf
    return z


def biased(z, i, x):
    z = z.copy()
    z[:, i] += x
    return z


def listed(values, k=5):
    return [{str(i): x for i, x in row} for row in top(values, k)]


def of_list(values):
    """The k likeliest, made to sum to 1."""
    return [
        {i: x - math.log(math.fsum(map(math.exp, row.values()))) for i, x in row.items()}
        for row in listed(values)
    ]


WAYS = {
    "temperature 0.6": (
        lambda z, t: listed(log_softmax(z / 0.6)),
        "temperature",
        "temperature 0.6 ",
    ),
    "temperature 2": (lambda z, t: listed(log_softmax(z / 2)), "temperature", "temperature 2 "),
    "one number a row": (
        lambda z, t: (
            [{str(i): float(x[i])} for i, x in zip(t[1:], log_softmax(z / 0.7), strict=False)]
            + [None]
        ),
        "temperature",
        "temperature 0.7 ",
    ),
    "list": (lambda z, t: of_list(log_softmax(z)), "renormalised-list", "over the listed tokens"),
    "heated list": (
        lambda z, t: of_list(log_softmax(z / 0.7)),
        "temperature+renormalised-list",
        "temperature 0.7 ",
    ),
    "top-k": (
        lambda z, t: listed(log_softmax(kept(z, k=50))),
        "renormalised-top-k",
        "over the 50 likeliest",
    ),
    "heated top-k": (
        lambda z, t: listed(log_softmax(kept(z / 0.7, k=40))),
        "temperature+renormalised-top-k",
        "over the 40 likeliest",
    ),
    "top-p": (lambda z, t: listed(log_softmax(kept(z, p=0.9))), "renormalised-top-p", "0.9"),
    "min-p": (lambda z, t: listed(log_softmax(kept(z, min_p=0.1))), "renormalised-min-p", "0.1"),
    "next": (lambda z, t: [*listed(log_softmax(z))[1:], None], "shifted", "next position"),
    "previous": (lambda z, t: [None, *listed(log_softmax(z))[:-1]], "shifted", "previous position"),
    "repetition": (
        lambda z, t: listed(log_softmax(penalised(z, t, repetition=1.2))),
        "repetition-penalty",
        "a repetition penalty of 1.2 ",
    ),
    "presence": (
        lambda z, t: listed(log_softmax(penalised(z, t, presence=1.0))),
        "presence-penalty",
        "a presence penalty of 1 ",
    ),
    "frequency": (
        lambda z, t: listed(log_softmax(penalised(z, t, frequency=0.5))),
        "frequency-penalty",
        "a frequency penalty of 0.5 ",
    ),
    "both": (
        lambda z, t: listed(log_softmax(penalised(z, t, presence=0.8, frequency=0.3))),
        "presence-penalty+frequency-penalty",
        "a frequency penalty of 0.3 ",
    ),
    "bias": (
        lambda z, t: listed(log_softmax(biased(z, 198, 2.0))),
        "logit-bias",
        "was raised by 2",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_was_done_is_solved_for(way, sequence, judged):
    prompt, drawn, logits = sequence
    tokens = [*prompt, *drawn]
    make_rows, cause, words_of = WAYS[way]
    report = judged({"tokens": tokens, "top_logprobs": make_rows(logits, tokens)})
    assert (report.verdict, report.point) == ("fault", "lm_head")
    assert report.cause is not None, report.shape
    assert report.cause.id == cause
    assert words_of in report.cause.text + " "


@pytest.mark.parametrize("way", ["temperature 0.6", "list", "heated top-k", "next", "presence"])
def test_rounding_to_16_bits_changes_no_name(way, tiny_k2, sequence, judged):
    """With noise on every number, a second fitted number always fits a little better."""
    prompt, drawn, _ = sequence
    tokens = [*prompt, *drawn]
    logits = refmoe.load(tiny_k2, "bfloat16").logits(tokens).astype(np.float64)
    make_rows, cause, _ = WAYS[way]
    report = judged({"tokens": tokens, "top_logprobs": make_rows(logits, tokens)})
    assert (report.verdict, report.cause and report.cause.id) == ("fault", cause)


@pytest.mark.parametrize("base", [2, 10])
def test_another_base_is_a_form(base, sequence, judged):
    prompt, drawn, logits = sequence
    rows = listed(log_softmax(logits) / math.log(base))
    report = judged({"tokens": [*prompt, *drawn], "top_logprobs": rows})
    assert (report.verdict, report.undone) == ("pass", (f"logarithms are to base {base}",))
    assert any("judged after undoing this" in note for note in report.notes)


def test_logits_in_place_of_log_probabilities_are_a_form(sequence, judged):
    prompt, drawn, logits = sequence
    report = judged({"tokens": [*prompt, *drawn], "top_logprobs": listed(logits)})
    assert report.verdict == "pass"
    assert report.undone == ("logits are listed, not log-probabilities",)
    assert report.form.startswith("logits of ")
    report = judged({"tokens": [*prompt, *drawn], "top_logprobs": listed(logits / 0.6)})
    assert (report.verdict, report.cause.id) == ("fault", "logits+temperature")


def test_a_whole_head_of_log_probabilities_is_a_form(model, sequence, tiny_k2):
    prompt, drawn, logits = sequence
    tokens = [*prompt, *drawn]
    whole = log_softmax(logits).astype(np.float32)
    dump = Dump(tiny_k2, {"lm_head": whole}, tokens, "float32")
    report = judge_dump(model, dump, explain=False).report
    assert report.verdict == "pass"
    assert report.undone == ("lm_head holds log-probabilities, not logits",)
    wrong = whole.copy()
    wrong[3, 700] += 1
    report = judge_dump(model, replace(dump, arrays={"lm_head": wrong}), explain=False).report
    assert (report.verdict, report.undone) == ("fault", ())
    colder = log_softmax(logits / 0.6).astype(np.float32)
    report = judge_dump(model, replace(dump, arrays={"lm_head": colder}), explain=False).report
    assert (report.verdict, report.cause.id) == ("fault", "temperature")


@pytest.mark.parametrize("older", [False, True])
def test_probabilities_after_sampling_are_judged_after_undoing_it(older, words, sequence, judged):
    prompt, drawn, logits = sequence
    after = Answer(words, prompt, drawn, log_softmax(kept(logits, p=0.95) / 0.8))
    after.values = np.where(np.isfinite(after.values), after.values, -50)
    response = after.llama_server_older() if older else after.llama_server(after=True)
    report = judged(response)
    assert report.verdict == "pass", report.reason
    assert "probabilities after sampling" in report.form
    raw = Answer(words, prompt, drawn, log_softmax(logits))
    report = judged(raw.llama_server(after=True))
    assert (report.verdict, report.undone) == ("pass", ())


@pytest.mark.parametrize("kind", ["one number", "noise"])
def test_what_nothing_explains_has_no_name(kind, sequence, judged):
    prompt, drawn, logits = sequence
    rng = np.random.default_rng(0)
    if kind == "noise":
        rows = listed(log_softmax(logits + 0.4 * rng.standard_normal(logits.shape)))
    else:
        rows = listed(log_softmax(logits))
        for row in rows:
            second = list(row)[1]
            row[second] -= 0.5
    response = {"tokens": [*prompt, *drawn], "top_logprobs": rows}
    report = judged(response, explain=kind == "noise")
    assert (report.verdict, report.cause, report.undone) == ("fault", None, ())


def test_a_list_that_sums_to_1_without_the_likeliest_token_is_no_form(words, sequence, judged):
    """What a list leaves out is invisible once it is made to sum to 1, unless its tokens tell."""
    prompt, drawn, logits = sequence
    without = logits.copy()
    without[np.arange(len(logits)), logits.argmax(axis=1)] = -np.inf
    rows = of_list(log_softmax(without))
    report = judged({"tokens": [*prompt, *drawn], "top_logprobs": rows})
    assert report.verdict == "fault"
    assert report.cause is None or "list" not in report.cause.id


def test_tokens_that_cannot_come_are_counted_and_contradicted(sequence, judged):
    prompt, drawn, logits = sequence
    tokens = [*prompt, *drawn]
    for none in (-9999.0, -math.inf, -3.4028234663852886e38):
        rows = [{**row, "7": none} for row in listed(log_softmax(logits))]
        report = judged({"tokens": tokens, "top_logprobs": rows})
        assert report.verdict == "pass"
        assert f"{len(rows)} of {6 * len(rows)} entries are of tokens that cannot come" in (
            " ".join(report.notes)
        )
    rows = listed(log_softmax(logits))
    likeliest = next(iter(rows[3]))
    rows[3][likeliest] = -9999.0
    report = judged({"tokens": tokens, "top_logprobs": rows})
    assert report.verdict == "fault"
    assert f"token {likeliest} is said to be impossible after token 3" in report.reason
    banned = listed(log_softmax(biased(logits, 198, -1e9)))
    rows = [{**{i: x for i, x in row.items() if i != "198"}, "198": -9999.0} for row in banned]
    report = judged({"tokens": tokens, "top_logprobs": rows})
    assert report.cause.text == "token '\\n' (198) was forbidden"


# --- truths


def test_a_truth_judges_responses(model, answer, tmp_path):
    out = tmp_path / "truth.safetensors"
    truth = read_truth(make(model, answer.tokens[:-2], out, profiles=["float32", "bfloat16"]))
    for response in (answer.vllm(), answer.sglang(), answer.sglang(first=9), answer.tgi()):
        (tmp_path / "r.json").write_text(json.dumps(response))
        report = check_truth(truth, read_dump(tmp_path / "r.json"))
        assert report.verdict == "pass", report.reason
        assert any("behind the truth's" in note for note in report.notes)
    (tmp_path / "r.json").write_text(json.dumps(answer.chat()))
    with pytest.raises(InputError, match="texts, which need the model's vocabulary"):
        check_truth(truth, read_dump(tmp_path / "r.json"))
    hotter = Answer(answer.words, answer.prompt, answer.drawn, log_softmax(answer.values / 2))
    (tmp_path / "r.json").write_text(json.dumps(hotter.vllm()))
    assert check_truth(truth, read_dump(tmp_path / "r.json")).verdict == "fault"
    (tmp_path / "r.json").write_text(json.dumps(answer.llama_server(after=True)))
    report = check_truth(truth, read_dump(tmp_path / "r.json"))
    assert report.verdict == "undecidable"
