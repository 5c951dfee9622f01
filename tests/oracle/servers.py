"""Responses of servers, written from logits as each server writes them.

The expected answer of a test is known from how its response was made: from refmoe's own float32
logits of tiny-k2, or with something done to them first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = list[tuple[int, float]]  # token id, number; the likeliest first
Json = dict[str, Any]


def log_softmax(z: np.ndarray) -> np.ndarray:
    most = z.max(axis=-1, keepdims=True)
    return z - most - np.log(np.exp(z - most).sum(axis=-1, keepdims=True))


def top(values: np.ndarray, k: int = 5) -> list[Row]:
    """The k largest of each row [T, Z] that are finite."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    rows = [[(int(i), float(v[i])) for i in ids] for v, ids in zip(values, order, strict=True)]
    return [[(i, x) for i, x in row if np.isfinite(x)] for row in rows]


class Answer:
    """A prompt, tokens that an engine generated after it, and the rows that it lists of each.

    Row t is of what follows token t of both together.
    """

    def __init__(self, words: Any, prompt: Sequence[int], drawn: Sequence[int], values: np.ndarray):
        self.words, self.prompt, self.drawn = words, list(prompt), list(drawn)
        self.tokens = [*prompt, *drawn]
        self.values, self.rows = values, top(values)

    def text(self, i: int) -> str:
        return self.words.token_bytes(i).decode("utf-8", "replace")

    def own(self, t: int) -> float:
        """The number of token t in the row before it."""
        return float(self.values[t - 1, self.tokens[t]])

    # --- forms

    def refmoe(self) -> Json:
        rows = [{str(i): x for i, x in row} for row in self.rows]
        return {"tokens": self.tokens, "top_logprobs": [*rows[: len(self.tokens) - 1], None]}

    def vllm(self, ids: bool = True, as_ids: bool = True, echo: bool = False) -> Json:
        """/v1/completions with prompt_logprobs, logprobs, return_token_ids and tokens as ids."""

        def name(i: int) -> str:
            return f"token_id:{i}" if as_ids else self.text(i)

        n = len(self.prompt)
        listed: list[Any] = [None]
        for t in range(1, n):
            row = dict([(self.prompt[t], self.own(t)), *self.rows[t - 1]])
            order = sorted(row.values(), reverse=True)
            shown = {"decoded_token": "?"}
            listed.append(
                {
                    str(i): {"logprob": x, "rank": order.index(x) + 1, **shown}
                    for i, x in row.items()
                }
            )
        places = range(0 if echo else n, len(self.tokens))
        logprobs = {
            "tokens": [name(self.tokens[t]) for t in places],
            "token_logprobs": [self.own(t) if t else None for t in places],
            "top_logprobs": [
                {name(i): x for i, x in self.rows[t - 1]} if t else None for t in places
            ],
            "text_offset": [0 for _ in places],
        }
        choice = {"index": 0, "text": "", "logprobs": logprobs, "prompt_logprobs": listed}
        if ids:
            choice |= {"prompt_token_ids": self.prompt, "token_ids": self.drawn}
        return {"object": "text_completion", "choices": [choice], "usage": self.usage()}

    def usage(self) -> Json:
        return {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.drawn)}

    def sglang(self, first: int = 0) -> Json:
        """/generate with return_logprob, logprob_start_len=first, top_logprobs_num=5."""

        def one(t: int) -> list[Any]:
            return [self.own(t) if t else None, self.tokens[t], None]

        def many(t: int) -> list[Any] | None:
            return [[x, i, None] for i, x in self.rows[t - 1]] if t else None

        n = len(self.prompt)
        meta = {
            "prompt_tokens": n,
            "input_token_logprobs": [one(t) for t in range(first, n)],
            "input_top_logprobs": [many(t) for t in range(first, n)],
            "output_token_logprobs": [one(t) for t in range(n, len(self.tokens))],
            "output_top_logprobs": [many(t) for t in range(n, len(self.tokens))],
        }
        return {"text": "", "meta_info": meta}

    def completions(self, echo: bool = False) -> Json:
        """OpenAI's completions: tokens are texts."""
        response = self.vllm(ids=False, as_ids=False, echo=echo)
        choice = response["choices"][0]
        del choice["prompt_logprobs"]
        choice["text"] = self.words.decode(self.tokens if echo else self.drawn)
        return response

    def content(self, made: Callable[[int, float], Json]) -> list[Json]:
        n = len(self.prompt)
        return [
            {
                **made(self.tokens[t], self.own(t)),
                "top_logprobs": [made(i, x) for i, x in self.rows[t - 1]],
            }
            for t in range(n, len(self.tokens))
        ]

    def chat(self, raw: bool = True) -> Json:
        """OpenAI's chat: texts, and their bytes."""

        def made(i: int, x: float) -> Json:
            return {
                "token": self.text(i),
                "bytes": list(self.words.token_bytes(i)) if raw else None,
                "logprob": x,
            }

        message = {"role": "assistant", "content": self.words.decode(self.drawn)}
        choice = {"index": 0, "message": message, "logprobs": {"content": self.content(made)}}
        return {"object": "chat.completion", "choices": [choice], "usage": self.usage()}

    def fireworks(self) -> Json:
        """Fireworks' chat with raw_output."""

        def made(i: int, x: float) -> Json:
            return {"token": "?", "bytes": [], "logprob": x, "token_id": i}

        raw = {"prompt_token_ids": self.prompt, "completion_token_ids": self.drawn}
        response = self.chat()
        response["choices"][0] |= {"logprobs": {"content": self.content(made)}, "raw_output": raw}
        return response

    def mlx(self) -> Json:
        """mlx_lm.server's chat: the token of an object is one of its list, in no order."""
        response = self.chat()
        content = []
        for t in range(len(self.prompt), len(self.tokens)):
            row = [{"id": i, "token": "?", "logprob": x} for i, x in self.rows[t - 1]][::-1]
            content.append({**row[0], "top_logprobs": row})
        response["choices"][0]["logprobs"]["content"] = content
        return response

    def llama_server(self, after: bool = False) -> Json:
        """/completion with n_probs, and with post_sampling_probs."""
        name, more = ("prob", "top_probs") if after else ("logprob", "top_logprobs")

        def made(i: int, x: float) -> Json:
            raw = self.words.token_bytes(i)
            value = float(np.exp(x)) if after else x
            return {"id": i, "token": self.text(i), "bytes": list(raw), name: value}

        rows = self.content(made)
        rows = [{more if k == "top_logprobs" else k: x for k, x in row.items()} for row in rows]
        return {
            "content": self.words.decode(self.drawn),
            "prompt": self.words.decode(self.prompt),
            "tokens_evaluated": len(self.prompt),
            "tokens_predicted": len(self.drawn),
            "completion_probabilities": rows,
        }

    def llama_server_older(self) -> Json:
        """/completion of before December 2024: texts and probabilities."""
        response = self.llama_server(after=True)
        response["completion_probabilities"] = [
            {
                "content": row["token"],
                "probs": [{"tok_str": x["token"], "prob": x["prob"]} for x in row["top_probs"]],
            }
            for row in response["completion_probabilities"]
        ]
        return response

    def tgi(self) -> Json:
        """TGI's /generate with details, decoder_input_details and top_n_tokens."""

        def made(i: int, x: float | None) -> Json:
            return {"id": i, "text": "?", "logprob": x}

        n, every = len(self.prompt), len(self.tokens)
        details = {
            "prefill": [made(self.tokens[t], self.own(t) if t else None) for t in range(n)],
            "tokens": [made(self.tokens[t], self.own(t)) for t in range(n, every)],
            "top_tokens": [[made(i, x) for i, x in self.rows[t - 1]] for t in range(n, every)],
        }
        return {"generated_text": "", "details": details}

    def ollama(self) -> Json:
        """Ollama's /api/generate with logprobs."""
        content = self.chat()["choices"][0]["logprobs"]["content"]
        text = self.words.decode(self.drawn)
        return {"response": text, "logprobs": content, "prompt_eval_count": len(self.prompt)}
