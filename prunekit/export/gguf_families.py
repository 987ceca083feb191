"""Which models of transformers llama.cpp computes, and what it presumes of them: a row a family.

The tensors' names are those of the package `gguf`. What a row does not mention must be as the
config class has it by default: a model is refused by the name of the field, never written wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prunekit.checkpoint.construction import clean_config
from prunekit.checkpoint.layout import difference
from prunekit.checkpoint.stock_config import mirrored
from prunekit.errors import ConfigError
from prunekit.export.gguf_content import (
    Change,
    Content,
    Entry,
    entry,
    grouped,
    names_of,
    neighbours,
    own_tensors,
    plus_one,
    rope_factors,
    rotated,
    transposed,
    whole_heads,
)

Values = tuple[Any, ...]
RMS = {"layer_norm_rms_eps": "rms_norm_eps"}
EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
GELU: Values = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""llama.cpp has one, the approximation by tanh."""
NO_WINDOW: dict[str, Values] = {"sliding_window": (None,)}
NO_QWEN_WINDOW: dict[str, Values] = {"use_sliding_window": (False,)}
SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
SIZES = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
    "intermediate_size n_inner max_position_embeddings rope_parameters tie_word_embeddings "
    "attention_bias mlp_bias use_bias clip_qkv"
).split()
"""Fields that facts or tensors tell of in every family."""
UNUSED = (
    "dropout pdrop initializer _token_id use_cache output_ return_dict dtype architectures label "
    "problem_type name_or_path transformers_version model_type router_aux router_jitter "
    "chunk_size summary_ max_window_layers pretraining_tp original_max "
    "is_decoder is_encoder"
).split()
"""Parts of names of fields that no forward pass for generation reads."""


@dataclass(frozen=True)
class Family:
    """How one `model_type` is written.

    Attributes:
        arch: its name in GGUF.
        eps: facts about norms, as `facts`.
        facts: what `GGUFWriter.add_<name>` takes -> field of the config.
        presumed: field -> the values at which the engine's graph is this model.
        pairs: the engine pairs neighbouring channels for rotary embedding.
        factors: it reads factors of the rotary frequencies.
        gain: norms add one to their weight.
        square: heads times their width must be the hidden size.
    """

    arch: str
    eps: Mapping[str, str] = field(default_factory=lambda: RMS)
    facts: Mapping[str, str] = field(default_factory=dict)
    presumed: Mapping[str, Values] = field(default_factory=dict)
    pairs: bool = False
    factors: bool = False
    gain: bool = False
    square: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", pairs=True, factors=True),
    "mistral": Family("llama", presumed=NO_WINDOW, pairs=True, factors=True),
    "mixtral": Family("llama", facts=EXPERTS, presumed=NO_WINDOW, pairs=True),
    "qwen2": Family("qwen2", presumed=NO_QWEN_WINDOW, square=True),
    "qwen3": Family("qwen3", presumed=NO_QWEN_WINDOW),
    "qwen3_moe": Family(
        "qwen3moe",
        facts=EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        presumed=NO_QWEN_WINDOW
        | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ),
    "gemma": Family("gemma", gain=True),
    "gemma2": Family("gemma2", facts=SOFTCAPS | {"sliding_window": "sliding_window"}, gain=True),
    "phi3": Family("phi3", presumed=NO_WINDOW, square=True),
    "gpt_neox": Family(
        "gptneox",
        eps={"layer_norm_eps": "layer_norm_eps"},
        facts={"parallel_residual": "use_parallel_residual"},
        presumed={"hidden_act": GELU},
        square=True,
    ),
    "gpt2": Family(
        "gpt2",
        eps={"layer_norm_eps": "layer_norm_epsilon"},
        presumed={"activation_function": GELU},
        square=True,
    ),
    "starcoder2": Family(
        "starcoder2",
        eps={"layer_norm_eps": "norm_epsilon"},
        presumed=NO_WINDOW | {"hidden_act": GELU},
        square=True,
    ),
    "olmo": Family("olmo", eps={}, pairs=True, square=True),
    "olmo2": Family("olmo2", square=True),
    "granite": Family(
        "granite",
        facts={
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention_scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        },
        pairs=True,
    ),
}
"""model_type -> how llama.cpp takes it."""


def uniform_content(model: Any) -> Content:
    """The content for a model that stock transformers builds. Raises ConfigError naming what the
    engine would compute differently.
    """
    config, kind = clean_config(model.config), model.config.model_type
    if kind not in FAMILIES:
        raise ConfigError(f"llama.cpp: no row for {kind}; possible: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    check_fields(config, family)
    left = difference(model, config, mirrored(model, config), own_configs=False)
    if left:
        what = "; ".join(f"{part}: {next(iter(of))}" for part, of in left.items())
        raise ConfigError(
            f"llama.cpp has one width for all layers of a {kind}, and this one differs by layer, "
            f"or from what its class builds ({what} …). "
            "Possible: prune with ratio.loadable=stock"
        )
    heads, _, width = head_sizes(config)
    if family.square and heads * width != config.hidden_size:
        raise ConfigError(
            f"llama.cpp: {heads} heads of {width} channels are not the hidden size "
            f"{config.hidden_size}, which it asks of a {kind}. "
            "Possible: prune with pruner.kinds=[neurons]"
        )
    if family.pairs:
        whole_heads(model, width)
    entries = [e for name, t in own_tensors(model) for e in _written(family, config, name, t)]
    if family.factors:
        entries += rope_factors(model, width)
    return Content(family.arch, facts_of(model, config, family), entries)


def head_sizes(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads, channels of a head."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def rope_of(config: Any) -> dict[str, Any]:
    """The parameters of rotary embedding, {} where there is none. Raises ConfigError for scalings
    that depend on the length of a text.
    """
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if given.get("rope_type", "default") not in ("default", "llama3", "linear"):
        raise ConfigError(
            f"llama.cpp: rope_type {given.get('rope_type')!r} is not written; possible: default, "
            "llama3, linear"
        )
    return given


def check_fields(config: Any, family: Family, engine: str = "llama.cpp") -> None:
    """Raises ConfigError naming a field of the config at which the engine's graph is not this
    model.
    """
    usual, told = type(config)().to_dict(), _told(config, family)
    for name, value in config.to_dict().items():
        if name not in usual or name in told or any(part in name for part in UNUSED):
            continue
        possible = family.presumed.get(name, (usual[name],))
        if name == "layer_types":
            possible = (["full_attention"] * len(value or []), None)
        elif name == "query_pre_attn_scalar":
            possible = (head_sizes(config)[2],)
        if value not in possible:
            raise ConfigError(
                f"{engine}: {name}={value!r} of this {config.model_type}; possible: "
                + ", ".join(map(repr, possible))
            )
    scaling = rope_of(config).get("rope_type", "default")
    if scaling != "default" and not family.factors:
        raise ConfigError(
            f"{engine}: rope_type {scaling!r} of a {config.model_type}; possible: default"
        )


def _told(config: Any, family: Family) -> set[str]:
    """The fields of the config that the file holds."""
    fields = {*SIZES, *family.eps.values(), *family.facts.values()}
    if "sliding_window" in fields:
        fields.add("layer_types")
    elif "sliding_window" not in family.presumed:
        fields.add("sliding_window")  # said to be off by another field
    return {config.attribute_map.get(f, f) for f in fields}


def facts_of(model: Any, config: Any, family: Family) -> dict[str, Any]:
    """Name of a writer's method -> value."""
    heads, pairs, width = head_sizes(config)
    rope = rope_of(config)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    facts = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": inner or 4 * config.hidden_size,
        "head_count": heads,
        "head_count_kv": pairs,
        "key_length": width,
        "value_length": width,
    }
    if rope:
        facts |= {"rope_dimension_count": rotated(model), "rope_freq_base": rope["rope_theta"]}
    if getattr(config, "clip_qkv", None):
        facts["clamp_kqv"] = config.clip_qkv
    if family.arch == "olmo":
        facts["layer_norm_eps"] = 1e-5
    for name, of in {**family.eps, **family.facts}.items():
        facts[name] = getattr(config, of)
        if facts[name] is None:
            raise ConfigError(
                f"llama.cpp: {of}=None of a {config.model_type}; it asks for a number"
            )
    if "sliding_window" in family.facts:
        facts["sliding_window_pattern"] = [t == "sliding_attention" for t in config.layer_types]
    return facts


def _written(family: Family, config: Any, name: str, tensor: Tensor) -> list[Entry]:
    """What a tensor of the model becomes in the file."""
    named = names_of(family.arch, config.num_hidden_layers)
    heads, pairs, _ = head_sizes(config)
    stem, leaf = name.rsplit(".", 2)[-2:]
    if stem == "experts":
        path = name.removesuffix(".experts." + leaf)
        block = named(path + ".gate.weight").removesuffix("gate_inp.weight")
        if leaf == "gate_up_proj":
            half = tensor.shape[1] // 2
            return [
                entry(block + "gate_exps.weight", tensor, lambda t: t[:, :half]),
                entry(block + "up_exps.weight", tensor, lambda t: t[:, half:]),
            ]
        return [entry(block + "down_exps.weight", tensor)]
    changes: list[Change] = []
    if family.pairs and stem in ("q_proj", "k_proj"):
        changes.append(neighbours(heads if stem == "q_proj" else pairs))
    if family.gain and stem.endswith("norm"):
        changes.append(plus_one)
    if stem == "query_key_value":
        changes.append(grouped(heads))
    if family.arch == "gpt2" and stem.startswith("c_") and leaf == "weight":
        changes.append(transposed)
    return [entry(named(name), tensor, *changes)]
