"""Everything that a loaded model is asked for, on pruned checkpoints of seven architectures; the
run writes `docs/matrix.md`.

A cell is an architecture pruned in one way, saved, and loaded by transformers. What fails on the
dense model as well is no fault of the checkpoint and is listed as such.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoint_features import FEATURES, Cell, int8, words
from torch import nn

from prunekit import graph
from prunekit.checkpoint import save

ARCHS = ("llama", "qwen2", "gpt_neox", "gpt2", "gemma2", "phi3", "mixtral")
KINDS = ("uniform", "uneven", "depth", "residual")
# Without `-m slow` one cell of each kind runs, on architectures that differ most.
QUICK = {("llama", "uneven"), ("gpt2", "uniform"), ("gemma2", "depth"), ("mixtral", "residual")}
TABLE = Path(__file__).parents[2] / "docs" / "matrix.md"


def dense(arch: str) -> nn.Module:
    """A small random model whose sizes are all different, with activations of order one."""
    import transformers as t

    torch.manual_seed(0)
    ids = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "initializer_range": 0.3,
    } | ids
    grouped = sizes | {"num_key_value_heads": 3, "max_position_embeddings": 64}
    gpt2 = {
        "n_embd": 48,
        "n_inner": 80,
        "n_layer": 3,
        "n_head": 6,
        "n_positions": 64,
        "initializer_range": 0.3,
    }
    gpt2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | ids
    config, model = {
        "llama": (t.LlamaConfig(**grouped, head_dim=8), t.LlamaForCausalLM),
        "qwen2": (t.Qwen2Config(**grouped, tie_word_embeddings=True), t.Qwen2ForCausalLM),
        "gpt_neox": (t.GPTNeoXConfig(**sizes, max_position_embeddings=64), t.GPTNeoXForCausalLM),
        "gpt2": (t.GPT2Config(**gpt2), t.GPT2LMHeadModel),
        "gemma2": (
            t.Gemma2Config(**grouped, head_dim=8, query_pre_attn_scalar=8, sliding_window=32),
            t.Gemma2ForCausalLM,
        ),
        "phi3": (t.Phi3Config(**grouped), t.Phi3ForCausalLM),
        "mixtral": (
            t.MixtralConfig(**grouped, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
            t.MixtralForCausalLM,
        ),
    }[arch]
    return model(config).eval()


def masks(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Half of everything, the same or not the same in all layers; widths stay multiples of 8, as
    grouped matrix kernels ask.
    """
    wanted = {
        "uniform": ("neurons", "heads"),
        "uneven": ("neurons", "heads", "experts"),
        "depth": ("blocks",),
        "residual": ("hidden",),
    }
    kept = {}
    for i, group in enumerate(g for g in graph.discover(model) if g.kind in wanted[kind]):
        uneven = kind == "uneven" and (group.layer or 0) % 2 == 0
        gone = {"neurons": 48 if uneven else 32, "hidden": 24, "blocks": 1}.get(
            group.kind, 1 if uneven or kind == "uniform" else 0
        )
        kept[group.name] = torch.ones(group.units, dtype=torch.bool)
        kept[group.name][
            torch.randperm(group.units, generator=torch.Generator().manual_seed(i))[:gone]
        ] = False
    return {name: mask for name, mask in kept.items() if not bool(mask.all())}


Outcome = str
"""`yes`, `dense` (fails on the dense model too), `no`, or `not run`."""


def outcome(name: str, cell: Cell, arch: str, folder: Path) -> tuple[Outcome, str]:
    """How one feature fares, and why it did not work."""
    if FEATURES[name] is int8 and find_spec("torchao") is None:
        return "not run", "torchao is not installed"
    try:
        FEATURES[name](cell)
    except Exception as error:  # noqa: BLE001  the table tells of whatever went wrong
        problem = f"{type(error).__name__}: {str(error)[:300]}"
    else:
        return "yes", ""
    folder.mkdir()
    whole = dense(arch)
    whole.save_pretrained(folder / "out")
    words().save_pretrained(folder / "out")
    try:
        FEATURES[name](Cell(whole, folder / "out", True))
    except Exception:  # noqa: BLE001
        return "dense", problem
    return "no", problem


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], dict[str, Outcome]]]:
    """Outcomes by cell; written as a table once every cell has run."""
    found: dict[tuple[str, str], dict[str, Outcome]] = {}
    yield found
    if len(found) == len(ARCHS) * len(KINDS) and not any(
        "not run" in one.values() for one in found.values()
    ):
        TABLE.write_text(markdown(found), encoding="utf-8")


CELLS = [
    pytest.param(a, k, marks=[] if (a, k) in QUICK else [pytest.mark.slow], id=f"{a}-{k}")
    for a in ARCHS
    for k in KINDS
]


@pytest.mark.parametrize(("arch", "kind"), CELLS)
def test_every_feature_works_on_a_loaded_checkpoint(
    arch: str, kind: str, tmp_path: Path, table: dict
) -> None:
    model = dense(arch)
    before = sum(p.numel() for p in model.parameters())
    graph.remove(model, masks(model, kind))
    assert sum(p.numel() for p in model.parameters()) < before
    path = save(model, words(), tmp_path / "out")
    cell = Cell(copy.deepcopy(model), path, stock=not (path / "modeling_pruned.py").exists())
    table[arch, kind] = {"loads with": "stock" if cell.stock else "code"}
    problems = {}
    for i, name in enumerate(FEATURES):
        table[arch, kind][name], why = outcome(name, cell, arch, tmp_path / f"dense{i}")
        if table[arch, kind][name] == "no":
            problems[name] = why
    assert not problems


def markdown(found: dict[tuple[str, str], dict[str, Outcome]]) -> str:
    """One row a feature, one column an architecture; a cell tells of the four ways of pruning."""
    lines = [
        "# What works on a loaded checkpoint",
        "",
        "Written by `pytest tests/checkpoint/test_matrix.py -m 'slow or not slow'` on tiny random "
        "models. "
        "Each cell stands for four checkpoints: " + ", ".join(KINDS) + ".",
        "`4/4`: works on all; `dense`: the dense model cannot either (stated only where it is so).",
        "`stock` loads with `from_pretrained(path)`, `code` with `from_pretrained(path, "
        "trust_remote_code=True)` or `prunekit.load(path)`.",
        "`torch.compile` is its backend `aot_eager`, which needs no compiler ([on a GPU](gpu.md): "
        "inductor); `push_to_hub` writes into a folder instead of the hub.",
        "",
        "| | " + " | ".join(ARCHS) + " |",
        "|---|" + "---|" * len(ARCHS),
        "| loads with | "
        + " | ".join(", ".join(found[a, k]["loads with"] for k in KINDS) for a in ARCHS)
        + " |",
    ]
    for name in FEATURES:
        cells = []
        for arch in ARCHS:
            one = [found[arch, kind][name] for kind in KINDS]
            rest = (
                "".join(f", {k} {o}" for k, o in zip(KINDS, one) if o != "yes")
                if len(set(one)) > 1
                else ""
            )
            cells.append(
                one[0]
                if set(one) == {one[0]} and one[0] != "yes"
                else f"{one.count('yes')}/4{rest}"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
