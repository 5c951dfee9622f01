"""config.json → a frozen `Config`; the sides taken where engines disagree → `Conventions`.

Every number of the model comes from config.json; what the graph cannot do is refused here, by
field name. Nested `text_config` (K2.5 and later) and both spellings of the rope settings
(`rope_scaling`, `rope_parameters`) are read.

Axis letters, everywhere in this project:

    T  tokens now                  N  qk_nope_head_dim      E  n_routed_experts
    S  positions seen, cached+now  R  qk_rope_head_dim      K  num_experts_per_tok
    D  hidden_size                 V  v_head_dim            F  moe_intermediate_size
    H  num_attention_heads         A  q_lora_rank           Z  vocab_size
                                   C  kv_lora_rank

A stored matrix is [O, I], as on disk. There is no batch axis: many prompts are many rows.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal


class InputError(ValueError):
    """Bad input from outside: says what was found, what was expected, where, and what to do."""


@dataclass(frozen=True)
class Yarn:
    """`rope_scaling` of type yarn (arXiv:2309.00071), names as in config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class Int4Scheme:
    """`quantization_config` of compressed-tensors' pack-quantized INT4, group 32.

    `targets` and `ignore` are matched against module names: a plain entry is a whole name or the
    class `Linear`, an entry that begins with `re:` is a regular expression matched at the start.
    """

    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    group_size: int


@dataclass(frozen=True)
class Config:
    """The K2 family's settings under config.json's own names. Sizes are counts."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None  # None: one q_proj instead of q_a_proj, q_b_proj (Moonlight)
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    moe_layer_freq: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Yarn | None
    max_position_embeddings: int
    eos_token_id: tuple[int, ...]
    quantization: Int4Scheme | None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        """Read config.json, or the one in a folder."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file; a checkpoint folder holds a config.json"
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise InputError(f"{path}: not JSON ({e})") from None
        try:
            return cls.from_dict(raw)
        except InputError as e:
            raise InputError(f"{path}: {e}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Config":
        """Parse a decoded config.json; `InputError` names the field that cannot be served."""
        text = raw.get("text_config") or raw
        model_type = str(text.get("model_type", ""))
        if model_type not in MODEL_TYPES:
            raise InputError(
                f"model_type = {model_type!r}"
                f"{' in text_config' if text is not raw else ''}: another graph than K2's; "
                f"supported: {', '.join(MODEL_TYPES)}"
            )
        _refuse(text, "scoring_func", "sigmoid")
        _refuse(text, "topk_method", "noaux_tc")
        _refuse(text, "hidden_act", "silu")
        _refuse(text, "attention_bias", False)
        _refuse(text, "tie_word_embeddings", False)

        def need(key: str) -> Any:
            if text.get(key) is None:
                raise InputError(f"{key} is missing")
            return text[key]

        counts = {
            key: _count(key, need(key))
            for key in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "intermediate_size",
                "moe_intermediate_size",
                "n_routed_experts",
                "num_experts_per_tok",
                "max_position_embeddings",
            )
        }
        rope = dict(text.get("rope_parameters") or {}) or dict(text.get("rope_scaling") or {})
        theta = rope.get("rope_theta", text.get("rope_theta"))
        if theta is None:
            raise InputError("rope_theta is missing")
        q_lora = text.get("q_lora_rank")
        cfg = cls(
            model_type=model_type,
            **counts,
            q_lora_rank=None if q_lora is None else _count("q_lora_rank", q_lora),
            first_k_dense_replace=_count("first_k_dense_replace", need("first_k_dense_replace"), 0),
            moe_layer_freq=_count("moe_layer_freq", text.get("moe_layer_freq", 1)),
            n_shared_experts=_count("n_shared_experts", text.get("n_shared_experts") or 0, 0),
            n_group=_count("n_group", text.get("n_group") or 1),
            topk_group=_count("topk_group", text.get("topk_group") or 1),
            norm_topk_prob=bool(need("norm_topk_prob")),
            routed_scaling_factor=float(need("routed_scaling_factor")),
            rms_norm_eps=float(need("rms_norm_eps")),
            rope_theta=float(theta),
            rope_scaling=_yarn(rope),
            eos_token_id=as_ids(text.get("eos_token_id")),
            quantization=_scheme(text.get("quantization_config") or raw.get("quantization_config")),
        )
        _consistent(cfg)
        return cfg


# K2's text graph under the names it was published with; the vision wrappers carry it inside.
MODEL_TYPES = ("kimi_k2", "deepseek_v3")


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` is written as nothing, one id or several."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _count(key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{key} = {value!r}, expected a whole number, at least {least}")
    return value


def _refuse(text: dict[str, Any], key: str, supported: object) -> None:
    value = text.get(key, supported)
    if value != supported:
        raise InputError(f"{key} = {value!r} is not supported; supported: {supported!r}")


def _yarn(rope: dict[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"rope_scaling type = {kind!r} is not supported; supported: yarn, default")
    values: dict[str, Any] = {}
    for field in fields(Yarn):
        if rope.get(field.name) is None:
            raise InputError(f"rope_scaling lacks {field.name}")
        values[field.name] = (int if field.type is int else float)(rope[field.name])
    return Yarn(**values)


def _scheme(raw: dict[str, Any] | None) -> Int4Scheme | None:
    if not raw:
        return None
    method = raw.get("quant_method")
    if method != "compressed-tensors" or raw.get("format") != "pack-quantized":
        raise InputError(
            f"quantization_config: quant_method = {method!r}, format = {raw.get('format')!r}; "
            "supported: compressed-tensors pack-quantized"
        )
    targets: list[str] = []
    sizes: set[int] = set()
    for name, group in (raw.get("config_groups") or {}).items():
        where = f"quantization_config.config_groups.{name}"
        weights = group.get("weights") or {}
        wanted = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "actorder": None,
        }
        for key, value in wanted.items():
            if weights.get(key) != value:
                raise InputError(
                    f"{where}.weights.{key} = {weights.get(key)!r}; supported: {value!r}"
                )
        if group.get("input_activations") is not None:
            raise InputError(f"{where}.input_activations: quantised activations are not supported")
        targets += group.get("targets") or []
        sizes.add(weights["group_size"])
    if not targets:
        raise InputError("quantization_config.config_groups names no targets")
    return Int4Scheme(tuple(targets), tuple(raw.get("ignore") or ()), sizes.pop())


def _consistent(cfg: Config) -> None:
    if cfg.qk_rope_head_dim % 2:
        raise InputError(f"qk_rope_head_dim = {cfg.qk_rope_head_dim}: rotation needs pairs")
    if cfg.n_routed_experts % cfg.n_group:
        raise InputError(f"n_group = {cfg.n_group} does not divide {cfg.n_routed_experts} experts")
    if cfg.topk_group > cfg.n_group:
        raise InputError(f"topk_group = {cfg.topk_group} of n_group = {cfg.n_group}")
    eligible = cfg.n_routed_experts // cfg.n_group * cfg.topk_group
    if cfg.num_experts_per_tok > eligible:
        raise InputError(f"num_experts_per_tok = {cfg.num_experts_per_tok} of {eligible} eligible")


@dataclass(frozen=True)
class Conventions:
    """Where correct engines differ; each preset is true to one engine.

    Sources: the tables of differences in docs/conventions.md, with repository and file.
    """

    name: str
    latent_norm_eps: float | None = 1e-6  # q_a/kv_a norms; None: config.rms_norm_eps
    int4_product: Literal["exact", "bfloat16"] = "exact"  # q·s as it is, or rounded to bf16
    router_logits: Literal["wide", "activations"] = "wide"  # float32 at least, or as activations
    normaliser: Literal["sum + 1e-20", "sum", "max(sum, 2^-14)"] = "sum + 1e-20"
    masked_groups: float = float("-inf")  # choice score of experts in groups not chosen
    rope_layout: Literal["pairs", "halves"] = "pairs"  # of q_pe, k_pe in memory and in dumps
    yarn_betas: tuple[float, float] | None = None  # (fast, slow); None: the config's


CONVENTIONS = {
    c.name: c
    for c in (
        Conventions("refmoe"),
        Conventions("moonshot", int4_product="bfloat16", masked_groups=0.0, rope_layout="halves"),
        Conventions("transformers", int4_product="bfloat16", rope_layout="halves"),
        # Marlin multiplies a dequantised nibble by its scale in the activations' dtype
        Conventions(
            "vllm",
            latent_norm_eps=None,
            int4_product="bfloat16",
            router_logits="activations",
            normaliser="sum",
        ),
        Conventions(
            "sglang",
            latent_norm_eps=None,
            int4_product="bfloat16",
            router_logits="activations",
            masked_groups=0.0,
        ),
        # its converter writes the betas, its deepseek2 loader never reads them
        Conventions(
            "llama.cpp",
            latent_norm_eps=None,
            normaliser="max(sum, 2^-14)",
            yarn_betas=(32.0, 1.0),
        ),
        Conventions("mlx", router_logits="activations", normaliser="sum", masked_groups=0.0),
    )
}
