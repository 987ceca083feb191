"""The dense model of a run, for evals that compare with it: what they need of it is computed once
and kept beside the dense measurements, so that a sweep pays for it once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

from torch import Tensor, nn

from prunekit.registry import Component
from prunekit.runner import cache, provenance, store
from prunekit.source import module_file


def compares(evaluate: Component) -> bool:
    """Whether an eval takes the dense model as its third argument."""
    return evaluate.meta.get("needs") == "dense"


@dataclass
class DenseModel:
    """What evals asked of the dense model in this run.

    load: makes it anew, where it is gone and what is asked is not on disk.
    fingerprint: of its weights; empty where nothing is kept on disk.
    """

    cache: cache.Cache
    load: Callable[[], nn.Module]
    fingerprint: str | None = None
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def bound(
        self, name: str, evaluate: Component, tokenizer: Any, itself: nn.Module | None
    ) -> Component:
        """`evaluate` with the contract `(model, tokenizer)` of every other; `itself` is the dense
        model where that is what is measured.
        """
        if not compares(evaluate):
            return evaluate
        if itself is not None:
            self.meet(itself)
        handle = _Handle(self, name, tokenizer, evaluate, itself)

        @wraps(evaluate.entry.fn)
        def with_dense(model: nn.Module, tokenizer: Any, **options: Any) -> Any:
            return evaluate.entry.fn(model, tokenizer, handle, **options)

        return replace(evaluate, entry=replace(evaluate.entry, fn=with_dense))

    def meet(self, model: nn.Module) -> None:
        """Notes whose answers are kept; to be called before anything of the model changes."""
        if self.fingerprint is None:
            storable = self.cache.on and cache.at_hand(model)
            self.fingerprint = cache.model_print(model) if storable else ""


@dataclass(frozen=True)
class _Handle:
    """`types.Dense` for one eval."""

    owner: DenseModel
    name: str
    tokenizer: Any
    evaluate: Component
    model: nn.Module | None

    @property
    def itself(self) -> bool:
        return self.model is not None

    def load(self) -> nn.Module:
        return self.owner.load() if self.model is None else self.model

    def remember(
        self, name: str, compute: Callable[[nn.Module], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        kept, key = self.owner.kept, f"{self.name}/{name}"
        if key not in kept:
            kept[key] = self._found(key, compute)
        return kept[key]

    def _found(
        self, name: str, compute: Callable[[nn.Module], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        owner, loaded = self.owner, self.model
        if owner.fingerprint is None:  # an earlier run kept the dense model's numbers
            loaded = owner.load()
            owner.meet(loaded)

        def computed() -> dict[str, Tensor]:
            model = owner.load() if loaded is None else loaded
            return {k: v.detach().cpu().contiguous() for k, v in compute(model).items()}

        seed = owner.cache.cfg["seed"]
        provenance.seed_everything(seed)
        module = self.evaluate.entry.fn.__module__
        if owner.fingerprint and module_file(module):
            key = cache.digest(
                [module, __name__],
                "reference",
                name,
                owner.cache.cfg["eval"][self.name],
                seed,
                owner.fingerprint,
                cache.tokenizer_print(self.tokenizer),
                cache.files_print(owner.cache.cfg["eval"][self.name]),
            )
            found: dict[str, Tensor] = owner.cache.remember(
                store.Entry.of_reference(key, name), computed
            )
        else:
            found = computed()
        provenance.seed_everything(seed)  # a hit leaves the generators where a miss does
        return found
