"""PERP's reconstruction (Zimmer et al., 2023, arXiv 2312.15230): block by block, a small part of
the parameters brings back what the dense model's block puts out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import graph
from prunekit.activations.blockwise import BlockRun, iterate_blocks
from prunekit.activations.storage import PassOptions, Store
from prunekit.architecture.blocks import block_names, linear_names
from prunekit.architecture.offload import put_beside
from prunekit.data.files import DataRoot, TextFile
from prunekit.data.kept_prompt import with_prompt
from prunekit.data.training_examples import (
    Corpus,
    Example,
    check_source,
    first_examples,
    load_examples,
)
from prunekit.errors import ConfigError
from prunekit.problem import Problem
from prunekit.registry import LearningRate, Length, Positive, Seed, recoveries
from prunekit.training.masked_low_rank import Form, MaskedUpdates, masked_updates
from prunekit.training.reconstruction import reconstruct as solve
from prunekit.training.weights import in_float32, is_norm
from prunekit.training.zeros import apply_masks
from prunekit.types import Pruned


def check_reconstruct(
    model: nn.Module,
    *,
    dataset: Corpus,
    split: str | None,
    path: str | None,
    norms: bool,
    updates: Form | None,
    targets: list[str] | None,
    **_: Any,
) -> None:
    """Raises ConfigError for options of `reconstruct` that cannot be, as far as the shapes of
    `model` decide; no data is read.
    """
    if not norms and updates is None:
        raise ConfigError("recovery.norms=false recovery.updates=null: there is nothing to train")
    if dataset == "alpaca":
        raise ConfigError(
            "recovery.dataset=alpaca: instructions are not of one length, and recovery=reconstruct "
            "takes plain text"
        )
    linear_names(model, targets)
    check_source(dataset, split, path)


def check_enough(found: list[Example], samples: int, length: int) -> None:
    """Raises ConfigError for a text of fewer samples."""
    if len(found) < samples:
        raise ConfigError(
            f"recovery.samples={samples}: the text has {len(found)} of {length} tokens"
        )


def check_text(tokenizer: Any, *, length: int, samples: int, **text: Any) -> None:
    """Raises ConfigError for a text that cannot be read or has too few samples."""
    check_enough(first_examples(tokenizer, length, samples, **text), samples, length)


@recoveries.register(
    paper="arXiv 2312.15230",
    year=2023,
    needs="data",
    dense=True,
    out="self-contained",
    check=check_reconstruct,
    tokenized=check_text,
    context=("length",),
)
@torch.no_grad()
def reconstruct(
    problem: Problem,
    pruned: Pruned,
    *,
    dataset: Corpus = "pydocs",
    split: str | None = None,
    path: TextFile | None = None,
    data_root: DataRoot = None,
    samples: Positive = 128,
    length: Length = 256,
    norms: bool = True,
    updates: Form | None = "mask",
    r: Positive = 16,
    alpha: Positive = 32,
    targets: list[str] | None = None,
    steps: Positive = 100,
    lr: LearningRate = 5e-4,
    batch: Positive = 2,
    store: Store = "memory",
    seed: Seed = 42,
) -> nn.Module:
    """Trains one block after the other, on what the blocks before it put out by now, to put out
    what the dense model's block does.

    Args:
        dataset: plain text.
        samples: of the text, from its beginning.
        length: tokens of a sample.
        norms: their weights are trained.
        updates: `mask` adds `alpha / r M * (B A)` with the mask of the weights (MaskLoRA), `scale`
            multiplies by `B A` (ScaleLoRA), null none.
        r: rank of the updates.
        alpha: of updates=mask.
        targets: names or patterns of linear layers in a block that get updates; null is all.
        steps: of Adam for each block; the rate falls to zero.
        lr: the first rate.
        batch: samples of a step.
        store: where activations between blocks wait.
        seed: draws the batches and the start of the updates.

    A block that comes no closer stays as it was. Zeros stay. The model is in float32 meanwhile. The
    notes have each block's relative squared error before and after. Raises ConfigError where the
    dense model has other blocks, or states of another size.
    """
    model = pruned.model
    found = load_examples(problem.tokenizer, dataset, split, path, data_root, length)
    check_enough(found, samples, length)
    found = with_prompt(found[:samples], model, problem.tokenizer)
    tokens = torch.tensor([e["input_ids"] for e in found])
    dense = put_beside(problem.dense(), model).requires_grad_(False).eval()
    blocks = check_alike(model, dense)
    keep = graph.zero_masks(model, pruned.groups, pruned.kept)
    layers = linear_names(model, targets)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the updates start at random
    options, errors = PassOptions(store, batch=batch), {}
    with in_float32(model):
        model.requires_grad_(False)
        pairs = zip(
            iterate_blocks(model, blocks, tokens, options),
            iterate_blocks(dense, block_names(dense), tokens, options),
            strict=True,
        )
        for own, other in pairs:
            name = blocks[own.block]
            inside = [n for n in layers if n.startswith(f"{name}.")]
            change = MaskedUpdates(inside, updates, r, alpha) if updates else None
            theirs = [out for _, out in other.outputs()]
            with masked_updates(model, change, keep):
                trained = trainable(own.module, norms)
                errors[name] = solve(trained, output_of(own), theirs, steps, lr, generator)
    apply_masks(model, keep)
    pruned.notes["reconstruction"] = errors
    return model


def check_alike(model: nn.Module, dense: nn.Module) -> tuple[str, ...]:
    """Names of the blocks. Raises ConfigError where the dense model has others, or states of
    another size.
    """
    blocks, others = block_names(model), block_names(dense)
    if len(blocks) != len(others):
        raise ConfigError(
            f"recovery=reconstruct brings blocks to what the dense model's put out: there are "
            f"{len(blocks)}, and the dense model has {len(others)}; recovery=distill compares "
            "the outputs of whole models"
        )
    sizes = [m.get_input_embeddings().weight.shape[1] for m in (model, dense)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"recovery=reconstruct: hidden states have {sizes[0]} channels, the dense model's "
            f"{sizes[1]}; recovery=distill compares the outputs of whole models"
        )
    return blocks


def trainable(block: nn.Module, norms: bool) -> list[nn.Parameter]:
    """The updates in a block, which require gradients, and with `norms` its norms, which do from
    now on.
    """
    for name, parameter in block.named_parameters() if norms else ():
        if is_norm(name, parameter):
            parameter.requires_grad_(True)
    return [p for p in block.parameters() if p.requires_grad]


def output_of(run: BlockRun) -> Callable[[int], Tensor]:
    """What a block puts out for a batch, as it is when asked."""

    def forward(i: int) -> Tensor:
        return run.feed.forward(run.module, run.block, i, run.inputs[run.feed.rows[i]])

    return forward
