"""What a pruner works on: a model, calibration text, and the components that score, allocate and
exclude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import graph
from prunekit.activations import processes
from prunekit.activations.blockwise import BlockRun, groups_by_block, iterate_blocks
from prunekit.activations.done_blocks import DoneBlocks
from prunekit.activations.runs import ModelRun
from prunekit.activations.storage import PassOptions
from prunekit.architecture.blocks import block_names
from prunekit.architecture.matrices import matrices
from prunekit.errors import ConfigError, NeedsData
from prunekit.graph.discovery import discovery
from prunekit.registry import Component
from prunekit.selection.eligible import apply_exclusion, of_kinds
from prunekit.types import (
    Allocation,
    Counts,
    Group,
    LocalSolutions,
    Progress,
    Remember,
    Run,
    Scores,
)

CALIBRATION = "calibration"


def named_sets(tokens: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a calib gives, by name: `calibration` is all of it, and several texts are there beside,
    in order.
    """
    if isinstance(tokens, Tensor):
        return {CALIBRATION: tokens}
    return {CALIBRATION: torch.cat(list(tokens.values())), **tokens}


def computed(
    module: str, name: str, parts: Sequence[Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`Remember` where nothing is kept."""
    return compute()


@dataclass(frozen=True)
class Problem:
    """One model to prune, and all that a pruner or a recovery may ask for.

    Attributes:
        model: changed in place.
        tokenizer: None where none is at hand.
        token_sets: name -> (N, T) int64; `calibration` is the run's own, and the texts of a
            sequence stand beside it. Empty on the meta device, where only shapes can be asked for.
        criterion: `(model, groups, run) -> Scores`; None for pruners that choose by themselves.
        ratio: `(problem, groups) -> Allocation`; None for pruners that decide that by themselves.
        exclude: `(groups) -> groups`.
        load_dense: makes the model as it was before anything was pruned.
        remember: keeps on disk what is computed of the dense model and the text.
        solutions: the pruner's local solutions, for the ratios that choose among them.
        training: where a training keeps how far it is; None where nothing is kept.
        passes: where a pass by blocks keeps the part of a name; likewise.
    """

    model: nn.Module
    tokenizer: Any = None
    token_sets: Mapping[str, Tensor] = field(default_factory=dict)
    criterion: Component | Callable[..., Scores] | None = None
    ratio: Callable[[Problem, list[Group]], Allocation] | None = None
    exclude: Callable[[list[Group]], list[Group]] = lambda groups: groups
    load_dense: Callable[[], nn.Module] | None = None
    remember: Remember = computed
    solutions: LocalSolutions | None = None
    training: Progress | None = None
    passes: Callable[[str], Progress] | None = None

    @property
    def tokens(self) -> Tensor:
        """(N, T) calibration tokens. Raises NeedsData where only shapes are known."""
        if CALIBRATION not in self.token_sets:
            raise NeedsData("this needs the weights and the calibration text")
        return self.token_sets[CALIBRATION]

    @property
    def has_data(self) -> bool:
        """Whether there are weights and text, not shapes alone."""
        return CALIBRATION in self.token_sets

    def everything(self) -> list[Group]:
        """All groups of the model as it is now; on the meta device without the proofs."""
        return graph.discover(self.model, verify=self.has_data)

    def units(self, kinds: Sequence[str]) -> list[Group]:
        """All groups of these kinds. Raises ConfigError for a kind that the model lacks."""
        return of_kinds(self.model, self.everything(), kinds)

    def groups(self, kinds: Sequence[str]) -> list[Group]:
        """The groups of these kinds that may lose units. Raises ConfigError where none may."""
        everything = self.everything()
        return apply_exclusion(of_kinds(self.model, everything, kinds), self.exclude, everything)

    def matrices(self, targets: list[str] | None = None) -> list[Group]:
        """The linear matrices of the blocks whose elements may go, as groups of kind `weights`."""
        found, blocks = matrices(self.model, targets), self.blocks()
        whole = Group("blocks", "blocks", None, len(blocks), modules=blocks)
        return apply_exclusion(found, self.exclude, [whole])

    def blocks(self) -> tuple[str, ...]:
        """Names of the decoder blocks, in order. Raises ConfigError where there is no list."""
        return block_names(self.model)

    def run(self, counts: Counts | None = None) -> ModelRun:
        """The calibration text through the whole model as it is now; `counts` for a criterion that
        asks how much is about to go.
        """
        asks = isinstance(self.criterion, Component) and self.criterion.meta.get("uses_counts")
        return ModelRun(self.model, self.tokens, (counts or {}) if asks else None)

    def score(self, groups: list[Group], run: Run) -> Scores:
        """The criterion's scores. Raises ConfigError where there is no criterion."""
        if self.criterion is None:
            raise ConfigError("this pruner needs a criterion; criterion=none was given")
        scores: Scores = self.criterion(self.model, groups, run)
        return scores

    def allocate(self, groups: list[Group]) -> Allocation:
        """How many units of each of `groups` go. Raises ConfigError where the target cannot be met
        or there is no ratio, NeedsData where only weights and text can tell.
        """
        if self.ratio is None:
            raise ConfigError("this pruner needs a ratio; ratio=none was given")
        allocation = self.ratio(self, groups)
        self._check_picks(groups, allocation.counts)
        return allocation

    def _check_picks(self, groups: list[Group], counts: Counts) -> None:
        """Raises ConfigError where fewer experts would stay than a router picks for a token."""
        if not any(g.kind == "experts" for g in groups):
            return
        least = discovery(self.model, verify=self.has_data).least
        for g in groups:
            left, picks = g.units - counts.get(g.name, 0), least.get(g.name, 1)
            if g.kind == "experts" and left < picks:
                raise ConfigError(
                    f"{left} of {g.units} units of {g.name} would stay, and its router picks "
                    f"{picks} for a token: give a smaller ratio.target"
                )

    def by_block(
        self,
        groups: list[Group],
        counts: Counts,
        options: PassOptions,
        resumable: bool = False,
    ) -> Iterator[tuple[list[Group], BlockRun]]:
        """The blocks of which something goes, one after the other: all groups in the block, with a
        run over it.

        What the caller does to a block, the next one sees in its inputs. Nothing runs where
        nothing is to go. A `resumable` pass, of which a pruner has one at most, does all by the
        run's `once`: cut off, it goes on with the block at which it was. Raises ConfigError for a
        group that is not inside one block.
        """
        blocks = self.blocks()
        rows = groups_by_block(groups, blocks)
        if not any(counts.values()):
            return
        done = self.done_blocks() if resumable else None
        for run in iterate_blocks(self.model, blocks, self.tokens, options, done):
            if any(counts.get(g.name) for g in rows[run.block]):
                yield rows[run.block], run

    def done_blocks(self, name: str = "") -> DoneBlocks | None:
        """What a pass by blocks has done so far; `name` for a second pass beside the pruner's own.
        None where nothing is kept, and in several processes.
        """
        passes = self.passes
        if passes is None or processes.count() > 1:
            return None
        return DoneBlocks(lambda part: passes(f"{name}{part}"))

    def dense(self) -> nn.Module:
        """The model before pruning, loaded anew. Raises ConfigError where it cannot be."""
        if self.load_dense is None:
            raise ConfigError("the dense model is not at hand here")
        return self.load_dense()


@dataclass(frozen=True)
class Expected:
    """What shapes alone tell of a pruner's outcome: what its `check` returns.

    Attributes:
        groups: that may lose units.
        counts: units that go, None where only weights and text can tell.
        smaller: whether tensors shrink (else elements become zero).
        remark: what the numbers leave out.
    """

    groups: list[Group]
    counts: Counts | None
    smaller: bool = True
    remark: str = ""


def check_no_loss(problem: Problem, pruner: str) -> None:
    """Raises ConfigError for a criterion that needs the loss, which a block alone does not have."""
    criterion = problem.criterion
    if isinstance(criterion, Component) and criterion.meta.get("needs") == "gradients":
        raise ConfigError(
            f"criterion={criterion.name} needs the loss, and {pruner} scores one block at a time: "
            "take pruner=oneshot, or another criterion"
        )


def expect(problem: Problem, groups: list[Group], *, smaller: bool = True) -> Expected:
    """The ratio's counts for `groups`, as far as shapes decide. Raises ConfigError where the target
    cannot be met.
    """
    try:
        allocation = problem.allocate(groups)
    except NeedsData:
        return Expected(groups, None, smaller, "The ratio needs the weights and the text.")
    remark = (
        ""
        if allocation.ranking == "local"
        else (
            "Ranked together, groups exchange units: the widths are those of a local ranking, "
            "the totals are about the same."
        )
    )
    return Expected(groups, allocation.counts, smaller, remark)


def ranking_of(problem: Problem, expected: Expected) -> str:
    """How the ratio ranks (`Allocation.ranking`), `local` where neither shapes nor its options
    (`register(ranking=...)`) tell.
    """
    if expected.counts is not None:
        return problem.allocate(expected.groups).ranking
    if isinstance(problem.ratio, Component) and "ranking" in problem.ratio.meta:
        found: str = problem.ratio.meta["ranking"](**problem.ratio.options)
        return found
    return "local"
