"""Read config.json into a frozen `Config`.

Every number of the model comes from config.json. A value that the graph of this family cannot
compute with is refused here, by the name of its field. The settings may be nested in `text_config`
(K2.5 and later), and those of RoPE may be called `rope_scaling` or `rope_parameters`.

Axis letters, everywhere in this project:

    T  tokens now                  N  qk_nope_head_dim      E  n_routed_experts
    S  positions seen, cached+now  R  qk_rope_head_dim      K  num_experts_per_tok
    D  hidden_size                 V  v_head_dim            F  moe_intermediate_size
    H  num_attention_heads         A  q_lora_rank           Z  vocab_size
                                   C  kv_lora_rank

A stored matrix is [O, I], as on disk. There is no batch axis: many prompts are many rows.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.files import InputError, read_object


@dataclass(frozen=True)
class Yarn:
    """The settings of YaRN (arXiv:2309.00071), under the names of `rope_scaling` in config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class Quantization:
    """A `quantization_config` as config.json has it; the files of model/formats/ interpret it.

    `model.formats.registry.announced_formats` asks them, and raises their errors.
    """

    text: str  # JSON with sorted keys, so that equal settings are equal and have one hash

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Quantization":
        """Keep a decoded `quantization_config`. Raises `InputError` if it cannot be JSON."""
        try:
            return cls(json.dumps(raw, sort_keys=True))
        except (TypeError, ValueError, RecursionError) as e:
            raise InputError(f"quantization_config cannot be JSON ({e})") from None

    def settings(self) -> dict[str, Any]:
        """Return a new copy of the decoded settings."""
        raw: dict[str, Any] = json.loads(self.text)
        return raw

    @property
    def label(self) -> str:
        """Return `quant_method` and, if there is one, `format`, as messages name them."""
        raw = self.settings()
        form = raw.get("format")
        return f"{raw.get('quant_method')}{f' {form}' if form else ''}"


@dataclass(frozen=True)
class Config:
    """The settings of a member of the K2 family, as config.json names them; sizes are counts."""

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
    quantization: Quantization | None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: N channels without position and R rotated ones."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Return whether a layer has routed experts; the others have one dense MLP."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        """Read a config.json, given itself or by its folder.

        Raises `InputError`, with the path, as `from_dict` does or if there is no such file.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        raw = read_object(path)
        try:
            return cls.from_dict(raw)
        except InputError as e:
            raise InputError(f"{path}: {e}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Config":
        """Parse a decoded config.json.

        Raises `InputError` naming the field that is missing, malformed, or asks for another graph.
        The settings in `quantization_config` are not examined; `weights.checkpoint.read_config`
        does that too.
        """
        text = get_object(raw, "text_config") or raw
        model_type = text.get("model_type")
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

        def count(key: str, least: int = 1, default: int | None = None) -> int:
            value = text.get(key)
            return check_count(
                key, default if value is None and default is not None else value, least
            )

        if not isinstance(norm := text.get("norm_topk_prob"), bool):
            raise InputError(f"norm_topk_prob = {norm!r}, expected true or false")
        rope = get_object(text, "rope_parameters") or get_object(text, "rope_scaling")
        q_lora = text.get("q_lora_rank")
        scheme = get_object(text, "quantization_config") or get_object(raw, "quantization_config")
        cfg = cls(
            model_type=model_type,
            vocab_size=count("vocab_size"),
            hidden_size=count("hidden_size"),
            num_hidden_layers=count("num_hidden_layers"),
            num_attention_heads=count("num_attention_heads"),
            q_lora_rank=None if q_lora is None else check_count("q_lora_rank", q_lora),
            kv_lora_rank=count("kv_lora_rank"),
            qk_nope_head_dim=count("qk_nope_head_dim"),
            qk_rope_head_dim=count("qk_rope_head_dim"),
            v_head_dim=count("v_head_dim"),
            intermediate_size=count("intermediate_size"),
            moe_intermediate_size=count("moe_intermediate_size"),
            first_k_dense_replace=count("first_k_dense_replace", 0),
            moe_layer_freq=count("moe_layer_freq", 1, 1),
            n_routed_experts=count("n_routed_experts"),
            n_shared_experts=count("n_shared_experts", 0, 0),
            num_experts_per_tok=count("num_experts_per_tok"),
            n_group=count("n_group", 1, 1),
            topk_group=count("topk_group", 1, 1),
            norm_topk_prob=norm,
            routed_scaling_factor=_positive(text, "routed_scaling_factor"),
            rms_norm_eps=_positive(text, "rms_norm_eps"),
            rope_theta=_positive(rope if "rope_theta" in rope else text, "rope_theta"),
            rope_scaling=_yarn(rope),
            max_position_embeddings=count("max_position_embeddings"),
            eos_token_id=as_ids(text.get("eos_token_id")),
            quantization=Quantization.from_dict(scheme) if scheme else None,
        )
        _check_consistency(cfg)
        return cfg


# names under which this graph was published; the vision wrappers of K2.5 and later carry it inside
MODEL_TYPES = ("kimi_k2", "deepseek_v3")


def as_ids(value: Any) -> tuple[int, ...]:
    """Return the ids of an `eos_token_id`, which may be absent, one id, or a list.

    Raises `InputError` if it is none of these.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(check_count("eos_token_id", i, 0) for i in ids)


def get_object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a field that holds an object, or an empty one if it is absent."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{key} = {value!r}, expected an object")
    return value


def get_names(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return a field that holds a list of names; none if it is absent."""
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise InputError(f"{key} = {value!r}, expected a list of names")
    return tuple(value)


def check_count(key: str, value: Any, least: int = 1) -> int:
    """Return a value that must be a whole number from `least` to 2^31."""
    if value is None:
        raise InputError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InputError(f"{key} = {value!r}, expected a whole number from {least} to 2^31")
    return value


def _positive(raw: dict[str, Any], key: str) -> float:
    """Return a field that must be a number above 0."""
    value = raw.get(key)
    if value is None:
        raise InputError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise InputError(f"{key} = {value!r}, expected a number above 0")
    return float(value)


def _refuse(text: dict[str, Any], key: str, supported: object) -> None:
    """Raise `InputError` if a field is there with another value than the one supported."""
    value = text.get(key, supported)
    if value != supported:
        raise InputError(f"{key} = {value!r} is not supported; supported: {supported!r}")


def _yarn(rope: dict[str, Any]) -> Yarn | None:
    """Return the settings of YaRN, or None for plain RoPE."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"rope_scaling type = {kind!r} is not supported; supported: yarn, default")
    return Yarn(
        factor=_positive(rope, "factor"),
        original_max_position_embeddings=check_count(
            "original_max_position_embeddings", rope.get("original_max_position_embeddings")
        ),
        beta_fast=_positive(rope, "beta_fast"),
        beta_slow=_positive(rope, "beta_slow"),
        mscale=_positive(rope, "mscale"),
        mscale_all_dim=_positive(rope, "mscale_all_dim"),
    )


def _check_consistency(cfg: Config) -> None:
    """Raise `InputError` for fields that are well formed and cannot hold together."""
    if cfg.qk_rope_head_dim % 2:
        raise InputError(f"qk_rope_head_dim = {cfg.qk_rope_head_dim}: rotation needs pairs")
    if cfg.rope_theta <= 1:
        raise InputError(f"rope_theta = {cfg.rope_theta}, expected a number above 1")
    if cfg.n_routed_experts % cfg.n_group:
        raise InputError(f"n_group = {cfg.n_group} does not divide {cfg.n_routed_experts} experts")
    if cfg.topk_group > cfg.n_group:
        raise InputError(f"topk_group = {cfg.topk_group} of n_group = {cfg.n_group}")
    eligible = cfg.n_routed_experts // cfg.n_group * cfg.topk_group
    if cfg.num_experts_per_tok > eligible:
        raise InputError(f"num_experts_per_tok = {cfg.num_experts_per_tok} of {eligible} eligible")
