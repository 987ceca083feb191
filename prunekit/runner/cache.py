"""Scores and dense measurements on disk, under a hash of all they depend on: a sweep over ratios
pays for them once (design D11).
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.runs import ModelRun
from prunekit.architecture.compute import computes_in_float32
from prunekit.architecture.mapped import release
from prunekit.architecture.streaming import device_of, streaming
from prunekit.data.files import cache_limit
from prunekit.errors import ConfigError
from prunekit.registry import Component
from prunekit.runner import provenance, store
from prunekit.runner.inputs import State, is_file, place, state, strings
from prunekit.runner.store import Entry
from prunekit.source import code_hash, module_file
from prunekit.types import Group, Remember, Run, Scores

log = logging.getLogger("prunekit")
PACKAGES = ("transformers", "tokenizers", "peft", "datasets", "lm_eval", "numpy", "scipy")
"""Besides torch, those that compute or read what is kept."""


@dataclass
class Cache:
    """One run's view of the store. `used` collects the names of what was not computed anew."""

    cfg: dict[str, Any]
    on: bool
    used: list[str] = field(default_factory=list)

    def scores(self, criterion: Component, timed: Callable[[str], Any]) -> Component:
        """`criterion`, answered from disk where the same was asked before. `timed("score")`
        measures either way.

        Random numbers start from the run's seed before and after, so a hit leaves them where a miss
        does. Never stored: runs that are not over the whole model, scores of single weights (as big
        as the model) or for one ratio alone, of models whose weights are not at hand, and of
        criteria whose code lies outside of prunekit.
        """
        module = criterion.entry.fn.__module__
        storable = self.on and not criterion.meta.get("uses_counts") and module_file(module)

        def cached(model: nn.Module, groups: list[Group], run: Run, **_: Any) -> Scores:
            whole = isinstance(run, ModelRun) and all(g.kind != "weights" for g in groups)
            with timed("score"):
                provenance.seed_everything(self.cfg["seed"])
                if storable and whole and at_hand(model):
                    found = self._stored_scores(criterion, model, groups, run)
                else:
                    found = criterion(model, groups, run)
            provenance.seed_everything(self.cfg["seed"])
            return found

        return replace(criterion, entry=replace(criterion.entry, fn=cached))

    def _stored_scores(
        self, criterion: Component, model: nn.Module, groups: list[Group], run: Run
    ) -> Scores:
        key = digest(
            [criterion.entry.fn.__module__, __name__],
            "scores",
            self.cfg["criterion"],
            self.cfg["seed"],
            model_print(model),
            tokens_print(run.tokens),
            *map(group_print, groups),
        )
        entry = Entry.of_scores(key)
        found: Scores = self.remember(entry, lambda: criterion(model, groups, run))
        return found

    def measured(
        self, name: str, model: nn.Module, tokenizer: Any, evaluate: Component
    ) -> dict[str, float]:
        """The numbers of the eval called `name` on the dense model. Evals registered with
        `cached=False` (times, memory) always run.
        """
        node = self.cfg["eval"][name]
        module = evaluate.entry.fn.__module__
        storable = self.on and evaluate.meta.get("cached", True) and module_file(module)
        if not storable or not at_hand(model):
            measured: dict[str, float] = evaluate(model, tokenizer)
            return measured
        key = digest(
            [module, __name__],
            "dense",
            node,
            self.cfg["seed"],
            model_print(model),
            tokenizer_print(tokenizer),
            files_print(node),
        )
        entry = Entry.of_numbers(key, name)
        stored: dict[str, float] = self.remember(entry, lambda: evaluate(model, tokenizer))
        return stored

    def keeper(self, model: nn.Module, texts: Mapping[str, Tensor]) -> Remember:
        """`Problem.remember` for `model` as it is when first asked, and these texts.

        What is computed draws from the run's seed and moves no generator, so a hit leaves them
        where a miss does.
        """

        @cache
        def prints() -> list[Any]:
            return [model_print(model), {name: tokens_print(t) for name, t in texts.items()}]

        def kept(
            module: str,
            name: str,
            parts: Sequence[Any],
            compute: Callable[[], dict[str, Tensor]],
        ) -> dict[str, Tensor]:
            def seeded() -> dict[str, Tensor]:
                with provenance.seeded(self.cfg["seed"]):
                    return compute()

            if not (self.on and module_file(module) and at_hand(model)):
                return seeded()
            key = digest([module, __name__], "kept", name, list(parts), *prints())
            found: dict[str, Tensor] = self.remember(Entry.of_kept(key, name), seeded)
            return found

        return kept

    def remember(self, entry: Entry, compute: Callable[[], Any]) -> Any:
        """What is stored, or what `compute` gives, stored then; a hit is noted in `used`."""
        value, stored = store.remember(entry, compute)
        if stored:
            self.used.append(entry.name)
        return value


def open_cache(cfg: dict[str, Any]) -> Cache:
    """Raises ConfigError for a `cache` that is neither on nor off, and for a limit that is none.
    Processes that work together go
    without: one would wait for the other's entry, and the other for its sums. So does a run that
    has no home folder to keep it in, with a warning.
    """
    on = switched_on(cfg.get("cache", True)) and processes.count() == 1
    cache_limit()
    try:
        store.folder()
    except ConfigError as error:
        if on:
            log.warning("cache: %s: nothing is kept; PRUNEKIT_CACHE=FOLDER names a place", error)
        on = False
    return Cache(cfg, on)


def switched_on(value: Any) -> bool:
    """What `cache` says. Raises ConfigError."""
    if value not in ("on", "off", True, False):
        raise ConfigError(f"cache={value!r}; possible: on, off")
    return value in ("on", True)


def digest(modules: list[str], *parts: Any) -> str:
    """128 bits over the parts, the code of `modules` and of all that they import, and what the bits
    of a result hang on: versions of Python, whose own text is read, and of packages, devices,
    threads, precision, determinism.
    """
    where = [
        code_hash(modules),
        torch.__version__,
        platform.python_version(),
        [provenance.version_of(package) for package in PACKAGES],
        provenance.gpu_names(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    ]
    text = json.dumps([*where, *parts], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def at_hand(model: nn.Module) -> bool:
    """Whether every weight is in memory; accelerate leaves those that it offloaded on the meta
    device.
    """
    return not any(p.is_meta for p in model.parameters())


def model_print(model: nn.Module) -> str:
    """Hash of the weights, their names and places, the configuration, how it generates, whether
    they run in float32, and where, if not where they are. Memory is read once: 0.1 s for 135M
    parameters.
    """
    hasher = xxhash.xxh3_128()
    configs: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    settings = [c.to_json_string() if hasattr(c, "to_json_string") else c for c in configs]
    kind = f"{type(model).__name__}{settings}{computes_in_float32(model)}"
    kind += f"{device_of(model)}" if streaming(model) else ""
    hasher.update(kind.encode())
    for name, tensor in model.state_dict().items():
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{tensor.device.type}".encode())
        hasher.update(bytes_of(tensor))
        release([tensor])
    return hasher.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's own bytes, whatever its dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tokens_print(tokens: Tensor) -> list[Any]:
    """Shape and hash of tokens `(N, T)`: the same ones in other rows are another text."""
    return [list(tokens.shape), provenance.token_hash(tokens)]


def group_print(group: Group) -> str:
    """Hash of what a criterion sees of a group."""
    hasher = xxhash.xxh3_128(
        (
            f"{group.name} {group.kind} {group.layer} {group.units} {group.shape} {group.modules} "
            f"{group.matrix}"
        ).encode()
    )
    for m in group.members:
        hasher.update(f"{m.param} {m.axis} {tuple(m.index.shape)}".encode())
        hasher.update(bytes_of(m.index))
    return hasher.hexdigest()


def tokenizer_print(tokenizer: Any) -> str:
    """Hash of a tokenizer's rules, or of its vocabulary where the rules are code, of the names of
    its special tokens and of its chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = (
        backend.to_str()
        if backend is not None
        else f"{type(tokenizer).__name__}{sorted(tokenizer.get_vocab().items())}"
    )
    names = sorted(getattr(tokenizer, "special_tokens_map", {}).items())
    more = [str(names), str(getattr(tokenizer, "chat_template", None))]
    return xxhash.xxh3_128_hexdigest("\0".join([text, *more]).encode())


def files_print(node: Any) -> list[State]:
    """State of the local files that an eval's options name, also of all in the folders that they
    name by a path, and of all in the data folder.
    """
    found: list[State] = []
    roots = {node.get("data_root") or "", os.environ.get("PRUNEKIT_DATA") or ""}
    for top in sorted({*strings(node), *roots} - {""}):
        path = place(top)
        if is_file(path):
            found.append(state(path))
        elif (top in roots or os.sep in top) and os.path.isdir(path):  # of a long text: no folder
            found += [state(p) for p in sorted(path.rglob("*")) if p.is_file()]
    return found
