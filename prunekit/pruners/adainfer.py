"""AdaInfer (Fan et al., 2024, arXiv 2403.02181): early exit. Weights stay; a small classifier ends
a token's way through the blocks once what would be predicted is clear.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.hooks import hook_activations
from prunekit.activations.runs import forward, samples_at_once
from prunekit.architecture.linear import readers
from prunekit.checkpoint.remote_code.early_exit import EarlyExit
from prunekit.checkpoint.remote_code.runtime_modules import insert
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem
from prunekit.registry import Positive, pruners
from prunekit.types import Pruned

Agreement = Annotated[float, Field(gt=0, le=1)]
Classifier = Literal["svm", "logistic"]
HELD_OUT = 5
"""Every so-manieth sample chooses the threshold, and is not fitted to."""
MOST_ROWS = 200_000
"""Tokens at a depth that the classifier is fitted to."""


def check_adainfer(problem: Problem, *, start: int, **_: Any) -> Expected:
    """Raises ConfigError for a ratio, which nothing would follow, and where tokens would leave
    behind the last block.
    """
    if problem.ratio is not None:
        raise ConfigError("pruner=adainfer removes nothing, so that no ratio decides: ratio=none")
    blocks = len(problem.blocks())
    if start >= blocks:
        raise ConfigError(f"pruner.start={start}: the model has {blocks} blocks")
    return Expected([], None, smaller=False, remark="No weight goes: tokens leave early.")


@pruners.register(
    paper="arXiv 2403.02181",
    year=2024,
    needs="data",
    out="self-contained",
    own_ratio=True,
    check=check_adainfer,
)
@torch.no_grad()
def adainfer(
    problem: Problem,
    *,
    classifier: Classifier = "svm",
    agreement: Agreement = 0.98,
    threshold: float | None = None,
    start: Positive = 1,
    every: Positive = 1,
    batch: Positive | None = None,
) -> Pruned:
    """Lets each token leave the blocks early, by a linear classifier of the two highest
    probabilities that its hidden state would give.

    Args:
        classifier: fitted to whether a depth's most likely token is that of the whole model: a
            linear `svm` (the paper), or `logistic` regression.
        agreement: share of the held-out tokens that leave with the whole model's most likely token;
            the lowest threshold that keeps it is taken.
        threshold: on what the classifier says, instead; 0 is its own.
        start: blocks that every token passes.
        every: blocks from one classification to the next. Each costs as much as the output matrix.
        batch: samples a forward; null takes as many as make up 4,096 tokens.

    Every fifth sample is held out. Notes have, of these, the mean depth at which tokens leave, and
    that of an oracle that knows the whole model's answer; they are judged with every context whole.
    In use tokens also read what others left behind early, so that fewer agree: `eval=exits` tells
    how many, and what is saved. The paper decides for a prompt as a whole, by its last token; here
    each token leaves by itself, so that reading and generating agree. Raises ConfigError for a
    ratio, for a single sample, and for a model whose output is not read with a norm and a matrix.
    """
    check_adainfer(problem, start=start)
    model, tokens = problem.model, problem.tokens
    if len(tokens) < 2:
        raise ConfigError(
            "pruner=adainfer chooses its threshold by samples that are not fitted to, and there is "
            "one sample: give calib.samples=2 or more"
        )
    body = next(n for n, m in model.named_modules() if m is model.base_model)
    module = EarlyExit(**places(problem), start=start, every=every)
    module.to(next(model.parameters()))
    insert(model, f"{body}.early_exit" if body else "early_exit", module)
    module.progress.never = True
    held = torch.zeros(len(tokens), dtype=torch.bool)
    held[::HELD_OUT] = True
    seen = observed(model, module, tokens[~held], batch)
    weight, bias = fitted(classifier, seen.features, seen.agrees)
    module.weight.copy_(weight)
    module.bias.fill_(bias)
    other = observed(model, module, tokens[held], batch)
    scores = module(other.features.to(module.weight.device)).cpu()
    limit = threshold
    if limit is None:
        limit = lowest_threshold(scores, other.agrees, agreement)
    set_threshold(module, limit)
    module.progress.never = False
    module.progress.clear()
    depths = torch.tensor([*module.tests, len(module.blocks)])
    scores = module(other.features.to(module.weight.device)).cpu()  # as it is in the model's dtype
    in_use = outcome(scores > 0, other.agrees, depths)
    oracle = outcome(other.agrees, other.agrees, depths)
    found = {"blocks": len(module.blocks), **in_use, "oracle_depth": oracle["depth"]}
    return Pruned(model, {}, [], notes={"adainfer": {**found, "threshold": limit}})


def set_threshold(module: EarlyExit, limit: float) -> None:
    """What was above `limit` for the module lets go from now on; what the bias is rounded by in its
    dtype lets fewer tokens go, never more.
    """
    bias = float(module.bias) - limit
    module.bias.fill_(bias)
    if float(module.bias) > bias:
        module.bias.sub_(torch.finfo(module.bias.dtype).eps * module.bias.abs())


def places(problem: Problem) -> dict[str, str]:
    """Names of the list of blocks, of what the output is read with, and of the module in a block
    that reads the heads. Raises ConfigError where the output is not read with a norm and a matrix
    of the last hidden state, or blocks put out states of another width (SliceGPT's).
    """
    model, blocks = problem.model, problem.blocks()
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), "")  # type: ignore[operator]
    norm = final_norm(model, blocks, head, problem.tokens[:1]) if head else None
    if norm is None:
        raise ConfigError(
            f"{type(model).__name__} has no norm and matrix that read the output from what any of "
            "its blocks puts out: pruner=adainfer cannot tell what a block would predict"
        )
    inside = {
        r.name.removeprefix(f"{block}.")
        for g in problem.everything()
        if g.kind == "heads"
        for r in readers(model, g)
        for block in blocks
        if r.name.startswith(f"{block}.")
    }
    reader = inside.pop() if len(inside) == 1 else ""
    names = {n for n, _ in model.named_modules()}
    alike = all(f"{block}.{reader}" in names for block in blocks)
    return {
        "blocks": blocks[0].rpartition(".")[0],
        "norm": norm,
        "head": head,
        "reader": reader if alike else "",
    }


def final_norm(model: nn.Module, blocks: tuple[str, ...], head: str, ids: Tensor) -> str | None:
    """The module with a vector of weights that runs after the last block, "" where there is none.
    None where with it the output matrix does not give the model's own predictions, or reads states
    of another width than some block's.
    """
    states: list[Tensor] = []
    after: list[str] = []

    def saw(name: str, x: Tensor) -> None:
        if len(states) == len(blocks):
            after.append(name)

    watched: dict[str, Callable[[Tensor], None]] = {
        n: partial(saw, n)
        for n, m in model.named_modules()
        if getattr(m, "weight", None) is not None and m.weight.dim() == 1
    }
    with hook_activations(model, outputs={**watched, **dict.fromkeys(blocks, states.append)}):
        want = forward(model, ids).logits.argmax(-1)
    matrix: Any = model.get_submodule(head)
    if len(after) > 1 or {x.shape[-1] for x in states} != {matrix.weight.shape[1]}:
        return None
    x = states[-1]
    for name in (*after, head):
        x = model.get_submodule(name)(x)
    return "".join(after) if torch.equal(x.argmax(-1), want) else None


class Observed(NamedTuple):
    """Of every token at every depth at which it may leave: features `(tokens, depths, 2)`, and
    whether the most likely token is that of the whole model `(tokens, depths)`.
    """

    features: Tensor
    agrees: Tensor


def observed(model: nn.Module, module: EarlyExit, tokens: Tensor, batch: int | None) -> Observed:
    """What the whole model shows on `tokens (N, T)`, on the CPU."""
    features: list[Tensor] = []
    agrees: list[Tensor] = []
    at_once = batch or samples_at_once(tokens)
    with tqdm(total=len(tokens), desc="depths", unit="sample", leave=False) as bar:
        for ids in tokens.split(at_once):
            *early, (_, whole) = predictions(model, module, ids)
            features.append(torch.stack([f for f, _ in early], 1).cpu())
            agrees.append(torch.stack([i == whole for _, i in early], 1).cpu())
            bar.update(len(ids))
    return Observed(torch.cat(features), torch.cat(agrees))


def predictions(model: nn.Module, module: EarlyExit, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`module.predictions` of what each block puts out after which tokens may leave, and of what
    the last one does.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def see(y: Tensor) -> None:
        found.append(module.predictions(y.flatten(0, -2)))

    names = {id(m): n for n, m in model.named_modules()}
    wanted = [module.blocks[depth - 1] for depth in module.tests] + module.blocks[-1:]
    with hook_activations(model, outputs={names[id(m)]: see for m in wanted}):
        forward(model, ids, head=False)
    return found


def fitted(classifier: Classifier, features: Tensor, agrees: Tensor) -> tuple[Tensor, float]:
    """Weight (1, 2) and bias of the classifier, from features `(tokens, depths, 2)`. Raises
    ConfigError where there is nothing to tell apart.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    step = -(-agrees.numel() // MOST_ROWS)  # tokens with all of their depths
    X = features[::step].flatten(0, 1).double().numpy()
    y = agrees[::step].flatten().numpy()
    if len(np.unique(y)) < 2:
        raise ConfigError(
            f"all predictions of all depths are {'right' if y[0] else 'wrong'} on this text: there "
            "is nothing that pruner=adainfer could learn; calibrate on more text"
        )
    model = LinearSVC(dual=False) if classifier == "svm" else LogisticRegression()
    model.fit(X, y)
    return torch.from_numpy(model.coef_.copy()), float(model.intercept_[0])


def outcome(leaves: Tensor, agrees: Tensor, depths: Tensor) -> dict[str, float]:
    """Mean depth of tokens that leave at the first depth of `leaves (tokens, depths)`, or at the
    end, and the share of them that predict what the whole model does.
    """
    end = torch.ones(len(leaves), 1, dtype=torch.bool)
    at = torch.cat([leaves, end], 1).int().argmax(1)
    right = torch.cat([agrees, end], 1).gather(1, at[:, None])
    return {"depth": float(depths[at].double().mean()), "agreement": float(right.double().mean())}


def lowest_threshold(scores: Tensor, agrees: Tensor, agreement: float) -> float:
    """The lowest threshold from which on upwards `agreement` of the tokens leave with the right
    prediction.
    """
    found = float(scores.max())  # none leaves
    depths = torch.arange(scores.shape[1] + 1)
    for share in torch.linspace(1, 0, 201).tolist():
        limit = float(np.quantile(scores.numpy(), share))
        if outcome(scores > limit, agrees, depths)["agreement"] < agreement:
            break
        found = limit
    return found
