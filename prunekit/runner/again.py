"""A saved checkpoint recovered or measured again, with the components and result file of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint.manifest import MANIFEST, check_manifest
from prunekit.checkpoint.replay import kept_masks
from prunekit.errors import ConfigError
from prunekit.registry import Component, models
from prunekit.runner import cache, determinism, preflight, tracking
from prunekit.runner.dense import DenseModel, compares
from prunekit.runner.finished import Finished
from prunekit.runner.inputs import inputs
from prunekit.runner.relations import check_keys, check_lengths, check_streamed
from prunekit.runner.run import (
    Job,
    check_finite,
    finish,
    measure,
    pose,
    record_of,
    save,
    stage,
)
from prunekit.runner.texts_at_hand import check_texts, check_tokenized, warn_of_learnt
from prunekit.types import Group, Kept, Pruned

INHERITED = ("calib", "criterion", "ratio", "exclude", "pruner", "table", "row")
"""What the checkpoint's own run said, and the new result repeats."""
Zeros = tuple[list[Group], Kept]
LOADING = ("device", "dtype", "compute", "weights")
"""What may be said of how the checkpoint is loaded: options of model=hf."""


def configured(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """`cfg`, whose model is the checkpoint, loaded as the `model=hf` of `cfg` says, and whose other
    parts, but for recovery and evals, are those of the run that made it. Raises ConfigError where
    `path` is no checkpoint.
    """
    made_by = check_manifest(path).get("config")
    inherited = {k: made_by[k] for k in INHERITED if k in made_by} if made_by else {}
    said = cfg.get("model") or {}
    loading = {k: said[k] for k in LOADING if k in said} if said.get("name") == "hf" else {}
    return cfg | inherited | {"model": {"name": "hf", "path": str(path)} | loading}


def run_again(cfg: dict[str, Any], folder: Path, *, recover: bool) -> dict[str, Any]:
    """Measures the checkpoint that `cfg` names, recovers it where asked and measures again; writes
    into `folder` what a run writes. Everything wrong with `cfg` raises ConfigError before weights
    are read.
    """
    path = Path(cfg["model"]["path"])
    parts = check_again(cfg, path, recover)
    stored = cache.open_cache(cfg)
    teacher = inputs(made_of(path)) if asks_for_dense(parts) else ()
    kept = Finished(folder, cfg, models=bool(cfg["save"]), others=teacher, own=True)
    dense = DenseModel(stored, lambda: dense_model(path, cfg["model"].get("device"))()[0])
    job = Job(cfg, folder, parts, stored, kept, dense)
    folder.mkdir(parents=True, exist_ok=True)
    track = tracking.open_track(config=cfg, folder=folder, **cfg["track"])
    with determinism.repeatable(cfg), track as tracker:
        with stage(job, "load", "loading the checkpoint"):
            model, tokenizer = parts.model()
            check_finite(job, model, "load")
        measure(job, "pruned", lambda: model, tokenizer, tracker)
        done, others = standing_in(model, path)
        saved = None
        if parts.recovery:
            start = Pruned(model, done.kept | others.kept, done.groups + others.groups)
            with stage(job, "recover", "recovering"):
                done.model = parts.recovery(pose(job, "recovered", model, tokenizer, {}), start)
                check_finite(job, done.model, "recover")
            done.kept = {name: start.kept[name] for name in done.kept}
            done.notes |= start.notes
            measure(job, "recovered", lambda: done.model, tokenizer, tracker)
            saved = save(replace(job, cfg=cfg | made_of(path)), done, tokenizer, tracker)
        record = record_of(job, done, saved, tokens=None)
    finish(job, record)
    return record


def check_again(cfg: dict[str, Any], path: Path, recover: bool) -> preflight.Components:
    """The parts with checked options, no recovery among them unless `recover`. Raises ConfigError
    for those that do not fit this checkpoint, judged by its shapes.
    """
    preflight.check_top(cfg)
    parts = preflight.build_components(cfg)
    if not recover:
        parts = replace(parts, recovery=None)
    check_keys(parts.evals)
    check_streamed(parts.model, None, None, parts.recovery)
    if recover and parts.recovery is None:
        raise ConfigError("recover needs a recovery, for example recovery=lora_text")
    if not recover and not parts.evals:
        raise ConfigError("eval needs an eval, for example eval=quick")
    if asks_for_dense(parts):
        check_dense(path, cfg["model"].get("device"))
    model, tokenizer = parts.model(meta=True)
    check_lengths(model, *parts.evals.values(), parts.recovery)
    if parts.recovery and "check" in parts.recovery.meta:
        parts.recovery.meta["check"](model, **parts.recovery.options)
    check_texts(*parts.evals.values(), learnt=[parts.recovery])
    warn_of_learnt(parts.evals, [parts.recovery])
    check_tokenized(tokenizer, parts)
    return parts


def asks_for_dense(parts: preflight.Components) -> bool:
    """Whether an eval compares with the dense model, or the recovery learns from it."""
    learns = parts.recovery is not None and bool(parts.recovery.meta.get("dense"))
    return learns or any(map(compares, parts.evals.values()))


def made_of(path: Path) -> dict[str, Any]:
    """`{"model": node}` of the model that was pruned, which the checkpoint of a checkpoint says
    too; empty where `path` does not say it.
    """
    node = (check_manifest(path).get("config") or {}).get("model")
    return {} if node is None else {"model": node}


def dense_model(path: Path, device: str | None = None) -> Component:
    """The model that the checkpoint was made of, on `device` where one is named and the model is
    not spread over several. Raises ConfigError where the checkpoint does not say that.
    """
    node = made_of(path)
    if not node:
        raise ConfigError(
            f"{path} does not say which model it was made of: there is no dense model to compare "
            "with or to learn from"
        )
    spread = node["model"].get("device_map")
    placed = {} if device is None or spread else {"device": device}
    if placed == {"device": "cpu"} and node["model"].get("weights") == "host":
        placed["weights"] = "memory"  # which is the same there
    return models.build(node["model"] | placed)


def check_dense(path: Path, device: str | None) -> None:
    """Raises ConfigError where the model that the checkpoint was made of is not there."""
    found = dense_model(path, device)
    standin = {"config": None} if "config" in found.options else {}  # serves plans without a folder
    try:
        found(meta=True, **standin)
    except ConfigError as error:
        raise ConfigError(f"the model that {path} was made of is needed: {error}") from error


def kept_units(path: Path) -> Kept:
    """Masks over the units that the checkpoint's run kept, but for single weights."""
    manifest = check_manifest(path)
    units = {n: g for n, g in manifest["groups"].items() if g.get("kind") != "weights"}
    return kept_masks(manifest | {"groups": units}, str(path / MANIFEST))


def standing_in(model: nn.Module, path: Path) -> tuple[Pruned, Pruned]:
    """The checkpoint as its pruner handed it on, as far as `pruning.json` tells it; and the zeros
    that it does not tell of, of units that were zeroed where they stand.
    """
    manifest = check_manifest(path)
    known = {
        entry["members"][0]: name
        for name, entry in manifest["groups"].items()
        if entry.get("kind") == "weights"
    }
    groups, masks = zeros(model, known)
    own = [g for g in groups if g.matrix in known]
    others = [g for g in groups if g.matrix not in known]
    kept = kept_units(path) | {g.name: masks[g.name] for g in own}
    merges = {"merges": manifest["merges"]} if "merges" in manifest else {}
    return Pruned(model, kept, own, notes=merges), Pruned(
        model, {g.name: masks[g.name] for g in others}, others
    )


def zeros(model: nn.Module, known: Mapping[str, str] = MappingProxyType({})) -> Zeros:
    """The matrices, stacked ones too, that have zeros, as groups of single weights, and masks of
    what is not zero: zeros of a checkpoint stay zero. Those of a whole token's embedding (padding)
    are nothing that was pruned.

    known: matrix -> its group's name, of those that are listed with or without zeros.
    """
    groups, kept = [], {}
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    for name, p in model.named_parameters():
        free = p.detach() != 0
        if p is embedding:
            free = free | ~free.any(1, keepdim=True)
        if p.dim() >= 2 and (name in known or not bool(torch.all(free))):
            label = known.get(name, f"weights.{name}")
            groups.append(
                Group(label, "weights", None, p.numel(), shape=tuple(p.shape), matrix=name)
            )
            kept[label] = free
    return groups, kept
