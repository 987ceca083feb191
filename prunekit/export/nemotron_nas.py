"""Llama-like models whose layers differ, as a folder in the form of NVIDIA's Nemotron-NAS
(DeciLM): engines that know it need no code of ours but the class of the config.

Query heads are the same in all layers that have attention. Feed-forward widths are multiples of
256, by the engines' formula; zeros fill up what is short of one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunekit.checkpoint.block_configs import LIKE_LLAMA, MULTIPLE
from prunekit.checkpoint.construction import clean_config
from prunekit.checkpoint.writer import appears_when_complete
from prunekit.errors import ConfigError
from prunekit.export.gguf_content import own_tensors
from prunekit.export.gguf_families import FAMILIES, check_fields, head_sizes
from prunekit.export.llama_like import check_difference, empty_attention, split_fused

CODE = Path(__file__).with_name("configuration_decilm.py")
WEIGHTS_OF = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
NORMS = {"self_attn": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}


class Content(NamedTuple):
    """What config.json says, and the tensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def export_nemotron_nas(path: str | Path, out: str | Path) -> Path:
    """Write the checkpoint folder `path` as the folder `out`, which appears only when it is
    complete. Raises ConfigError for a model that the form cannot hold, and for a folder `out` that
    is there.
    """
    from huggingface_hub import save_torch_state_dict

    from prunekit.checkpoint import load

    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out} is there already; possible: another --out")
    model: Any
    model, tokenizer = load(path)
    content = nemotron_nas_content(model)
    with appears_when_complete(out) as part:
        save_torch_state_dict({name: whole(t) for name, t in content.tensors.items()}, part)
        text = json.dumps(content.config, indent=2, sort_keys=True)
        (part / "config.json").write_text(text + "\n", encoding="utf-8")
        shutil.copy(CODE, part)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(part)  # engines read there what ends a text
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return out


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU with a storage of its own: safetensors takes no part of another."""
    t = tensor.detach().cpu().contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def nemotron_nas_content(model: Any) -> Content:
    """Config and tensors for a Llama-like model. Raises ConfigError naming what the form has no
    place for.
    """
    config, kind = clean_config(model.config), model.config.model_type
    if kind not in LIKE_LLAMA:
        raise ConfigError(
            f"nemotron-nas holds models like {', '.join(LIKE_LLAMA)}, not {kind}. "
            "Possible: prune with ratio.loadable=stock"
        )
    check_fields(config, FAMILIES[kind], "nemotron-nas")
    check_difference(model, config, "nemotron-nas")
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise ConfigError(f"nemotron-nas: partial_rotary_factor={share}; possible: 1.0")
    tensors, head_dim = dict(own_tensors(model)), head_sizes(config)[2]
    layers = [
        own_of(tensors, f"model.layers.{i}.", i == 0, head_dim)
        for i in range(config.num_hidden_layers)
    ]
    heads = query_heads(layers, head_dim)
    fill_biases(layers)
    fields = shared_fields(config, heads) | {
        "attention_bias": any("self_attn.o_proj.bias" in own for own in layers),
        "mlp_bias": any("mlp.down_proj.bias" in own for own in layers),
        "block_configs": [block_config(own, config.hidden_size, heads, head_dim) for own in layers],
    }
    kept = {n: t for n, t in tensors.items() if not n.startswith("model.layers.")}
    for i, own in enumerate(layers):
        kept |= {f"model.layers.{i}.{name}": t for name, t in own.items()}
    return Content(fields, kept)


def own_of(tensors: dict[str, Tensor], stem: str, first: bool, head_dim: int) -> dict[str, Tensor]:
    """The tensors of a layer, those of halves that are gone left out, feed-forward widths filled
    up. In the first layer engines ask for an attention.
    """
    found = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
    own = split_fused(found)
    for half, norm in NORMS.items():
        if not any(name.startswith(half + ".") for name in own):
            like = own.pop(norm)
            if first and half == "self_attn":
                empty = empty_attention(head_dim, like.shape[0])
                own |= {n: t.to(like.dtype) for n, t in empty.items()}
    width = own["mlp.gate_proj.weight"].shape[0] if "mlp.gate_proj.weight" in own else 0
    short = -width % MULTIPLE
    if short:
        for name in [n for n in own if n.startswith(("mlp.gate", "mlp.up"))]:
            t = own[name]
            own[name] = pad(t, (0, 0, 0, short) if t.dim() == 2 else (0, short))
        own["mlp.down_proj.weight"] = pad(own["mlp.down_proj.weight"], (0, short))
    return own


def query_heads(layers: list[dict[str, Tensor]], head_dim: int) -> int:
    """The query heads of all layers; an attention of zeros takes on that number. Raises ConfigError
    where layers differ.
    """
    rows = [own["self_attn.q_proj.weight"].shape[0] // head_dim for own in layers if _attends(own)]
    real = [r for r, own in zip(rows, filter(_attends, layers)) if not _empty(own)] or rows
    if len(set(real)) > 1:
        raise ConfigError(
            f"nemotron-nas has one number of query heads for all layers, these have "
            f"{', '.join(map(str, sorted(set(real))))}. Possible: prune with pruner.kinds=[neurons]"
        )
    (heads,) = set(real)
    for own in filter(_attends, layers):
        groups = own["self_attn.k_proj.weight"].shape[0] // head_dim
        if heads % groups:
            raise ConfigError(
                f"nemotron-nas: {heads} query heads on {groups} key/value heads; it asks for a "
                "multiple. Possible: prune whole groups of heads"
            )
        if _empty(own):
            rows_of = own["self_attn.q_proj.weight"]
            own["self_attn.q_proj.weight"] = rows_of.new_zeros(heads * head_dim, rows_of.shape[1])
            own["self_attn.o_proj.weight"] = rows_of.new_zeros(rows_of.shape[1], heads * head_dim)
    return heads


def _attends(own: dict[str, Tensor]) -> bool:
    return "self_attn.q_proj.weight" in own


def _empty(own: dict[str, Tensor]) -> bool:
    weights = (own[f"self_attn.{leaf}.weight"] for leaf in WEIGHTS_OF["self_attn"])
    return not any(w.is_meta or bool(w.any()) for w in weights)


def fill_biases(layers: list[dict[str, Tensor]]) -> None:
    """Where one matrix of a half has a bias, all of that half have one in every layer."""
    for half, leaves in WEIGHTS_OF.items():
        if any(f"{half}.{leaf}.bias" in own for own in layers for leaf in leaves):
            for own in (o for o in layers if f"{half}.{leaves[0]}.weight" in o):
                for leaf in leaves:
                    weight = own[f"{half}.{leaf}.weight"]
                    own.setdefault(f"{half}.{leaf}.bias", weight.new_zeros(weight.shape[0]))


def shared_fields(config: Any, heads: int) -> dict[str, Any]:
    """What config.json says of the model as a whole."""
    names = (
        "hidden_size num_hidden_layers vocab_size max_position_embeddings rms_norm_eps "
        "hidden_act tie_word_embeddings bos_token_id eos_token_id pad_token_id initializer_range"
    ).split()
    given = config.to_dict()
    rope = dict(config.rope_parameters)
    scaled = {} if rope.get("rope_type", "default") == "default" else {"rope_scaling": rope}
    return {
        **{name: given[name] for name in names if name in given},
        **scaled,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "head_dim": head_sizes(config)[2],
        "model_type": "nemotron-nas",
        "num_attention_heads": heads,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
    }


def block_config(
    own: dict[str, Tensor], hidden: int, heads: int, head_dim: int
) -> dict[str, dict[str, Any]]:
    """The entry of a layer."""
    attention: dict[str, Any] = {"no_op": True, "n_heads_in_group": None}
    ffn: dict[str, Any] = {"no_op": True, "ffn_mult": None}
    if _attends(own):
        groups = own["self_attn.k_proj.weight"].shape[0] // head_dim
        attention = {"no_op": False, "n_heads_in_group": heads // groups}
    if "mlp.gate_proj.weight" in own:
        width = own["mlp.gate_proj.weight"].shape[0]
        ffn = {"no_op": False, "ffn_mult": ffn_mult(width, hidden), "intermediate_size": width}
    attention["replace_with_linear"] = ffn["replace_with_linear"] = False
    return {"attention": attention, "ffn": ffn}


def ffn_mult(width: int, hidden: int) -> float:
    """The number from which engines get `width`, a multiple of 256: `int(2 * mult * hidden / 3)`
    and up to the next multiple.
    """
    return 1.5 * (width - MULTIPLE // 2) / hidden
