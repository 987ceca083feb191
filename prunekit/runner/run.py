"""The runner: compose, check, load, measure, prune, measure, recover, measure, save. It names no
component.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.architecture import offload
from prunekit.errors import ConfigError
from prunekit.problem import CALIBRATION, Problem, named_sets
from prunekit.profiling import Stages
from prunekit.registry import Component, draw
from prunekit.runner import (
    cache,
    determinism,
    numerics,
    progress,
    provenance,
    results,
    tracking,
)
from prunekit.runner.dense import DenseModel
from prunekit.runner.distributed import first_process, join_others
from prunekit.runner.finished import Finished, Standing
from prunekit.runner.inputs import located
from prunekit.runner.preflight import Components, check
from prunekit.runner.texts_at_hand import check_texts, check_tokenized, warn_of_learnt
from prunekit.types import Pruned

log = logging.getLogger("prunekit")


@dataclass
class Job:
    """What the stages of one run share.

    kept: its finished stages on disk.
    stages: what each stage cost so far.
    found: the numbers of the evals so far.
    """

    cfg: dict[str, Any]
    folder: Path
    parts: Components
    cache: cache.Cache
    kept: Finished
    dense: DenseModel
    stages: Stages = field(default_factory=Stages)
    found: dict[str, float] = field(default_factory=dict)


def run(cfg: dict[str, Any], folder: str | Path, words: str = "") -> dict[str, Any]:
    """One experiment from a plain config; writes into `folder` and returns what `result.json`
    holds.

    Everything that can be wrong with `cfg` raises ConfigError before a weight is read.
    `result.json` is written last and atomically: a folder without one is a run that did not finish.
    Of several processes (torchrun, accelerate launch) the first one writes. `words` are those with
    which the same command goes on in `folder`.
    """
    path = Path(folder)
    join_others()
    parts, stored = check(cfg), cache.open_cache(cfg)
    learn = (parts.pruner, parts.recovery)
    check_texts(*parts.evals.values(), calibrated=parts.calib, learnt=learn)
    warn_of_learnt(parts.evals, learn)
    check_tokenized(parts.tokenizer, parts)
    # Only now: it removes what another configuration kept, and a refused one is a typo.
    kept = Finished(path, cfg, models=bool(cfg["save"]), words=words)
    dense = DenseModel(stored, lambda: parts.model()[0])
    job = Job(cfg, path, parts, stored, kept, dense)
    job.folder.mkdir(parents=True, exist_ok=True)
    track = tracking.open_track(config=cfg, folder=job.folder, **cfg["track"])
    with determinism.repeatable(cfg), track as tracker:
        standing = pruned_and_measured(job, tracker)
        if job.parts.recovery:
            standing = recovered(job, standing)
            measure(job, "recovered", lambda: standing.pruned.model, standing.tokenizer, tracker)
        saved = save(job, standing.pruned, standing.tokenizer, tracker)
        record = record_of(job, standing.pruned, saved, standing.texts[CALIBRATION])
    finish(job, record)
    return record


def pruned_and_measured(job: Job, tracker: tracking.Track) -> Standing:
    """The pruned model, from the stages that an earlier run kept or from the start; the dense
    model's numbers and its own are in `job.found` then.
    """
    standing = job.kept.standing("pruned")
    if standing is None:
        early = early_texts(job)
        with stage(job, "load", "loading the model"):
            model, tokenizer = job.parts.model()
            offload.check_fits_in_memory(model)
            check_finite(job, model, "load")
            if job.parts.tokenizer is None:
                check_tokenized(tokenizer, job.parts)
            texts = early or named_sets(draw(job.parts.calib, tokenizer, model))
        measure(job, "dense", lambda: model, tokenizer, tracker)
        check_reported(job)
        with stage(job, "prune", "pruning"), offload.in_memory(model):
            pruned = job.parts.pruner(pose(job, "pruned", model, tokenizer, texts))
            check_finite(job, pruned.model, "prune")
        standing = Standing(pruned, tokenizer, texts, job.stages.results)
        job.kept.keep("pruned", standing)
    else:
        job.stages.results |= standing.costs
        measure(job, "dense", lambda: job.parts.model()[0], standing.tokenizer, tracker)
    show_kept(standing.pruned, tracker)
    measure(job, "pruned", lambda: standing.pruned.model, standing.tokenizer, tracker)
    return standing


def early_texts(job: Job) -> dict[str, Tensor] | None:
    """The calibration text, where it can be had before a weight is read: what is wrong with it is
    better known then.
    """
    if job.parts.tokenizer is None or job.parts.calib.meta.get("needs") == "model":
        return None
    provenance.seed_everything(job.cfg["seed"])
    return named_sets(draw(job.parts.calib, job.parts.tokenizer, None))


def recovered(job: Job, start: Standing) -> Standing:
    """`start` after the recovery, kept from an earlier run or made now."""
    assert job.parts.recovery is not None
    standing = job.kept.standing("recovered")
    if standing is not None:
        job.stages.results |= standing.costs
        return standing
    pruned = start.pruned
    with stage(job, "recover", "recovering"):
        problem = pose(job, "recovered", pruned.model, start.tokenizer, start.texts)
        pruned.model = job.parts.recovery(problem, pruned)
        check_finite(job, pruned.model, "recover")
    standing = Standing(pruned, start.tokenizer, start.texts, job.stages.results)
    job.kept.keep("recovered", standing)
    return standing


def pose(
    job: Job, name: str, model: nn.Module, tokenizer: Any, texts: dict[str, Tensor]
) -> Problem:
    """What the pruner or the recovery of stage `name` works on."""
    parts = job.parts
    criterion = parts.criterion and job.cache.scores(parts.criterion, job.stages)
    if not job.cfg.get("allow_nonfinite"):
        criterion = numerics.watched(criterion)
    return Problem(
        model,
        tokenizer,
        texts,
        criterion,
        parts.ratio,
        parts.exclude,
        load_dense=job.dense.load,
        remember=job.cache.keeper(model, texts),
        training=job.kept.training(name),
        passes=job.kept.passes(name),
    )


@contextmanager
def stage(job: Job, name: str, says: str) -> Iterator[None]:
    """Says and notes what the job does now, and what it cost. Each starts from the run's seed,
    whether or not those before came from the cache.
    """
    log.info(says)
    progress.note(job.folder, name)
    provenance.seed_everything(job.cfg["seed"])
    with job.stages(name):
        yield


def measure(
    job: Job,
    when: str,
    model: Callable[[], nn.Module],
    tokenizer: Any,
    tracker: tracking.Track,
) -> None:
    """Every eval on `model()`, which is asked for only if a number is not kept from an earlier run;
    keys are prefixed with `when`. An eval named twice must not hide the other's number.
    """
    for name, evaluate in job.parts.evals.items():
        compute = partial(measured, job, when, name, model, tokenizer, evaluate)
        found, kept = job.kept.numbers(f"{when}/{name}", compute)
        if kept:
            job.stages.results[f"{when}/{name}"] = found["costs"]
        numbers = found["numbers"]
        job.found |= results.prefixed(when, numbers, job.found)
        job.found |= results.to_dense(when, numbers, job.found, evaluate.meta.get("relative"))
    tracker.log({k: v for k, v in job.found.items() if k.startswith(f"{when}/")})


def measured(
    job: Job,
    when: str,
    name: str,
    ask: Callable[[], nn.Module],
    tokenizer: Any,
    evaluate: Component,
) -> dict[str, Any]:
    """What one eval says of a model, and what it cost."""
    model = ask()
    evaluate = job.dense.bound(name, evaluate, tokenizer, model if when == "dense" else None)
    with stage(job, f"{when}/{name}", f"{when}: measuring {name}"):
        if when == "dense":
            numbers = job.cache.measured(name, model, tokenizer, evaluate)
        else:
            numbers = evaluate(model, tokenizer)
        if not job.cfg.get("allow_nonfinite"):
            numerics.check_numbers(f"{when}/{name}", numbers, model)
    return {"numbers": numbers, "costs": job.stages.results[f"{when}/{name}"]}


def check_finite(job: Job, model: nn.Module, name: str) -> None:
    """Raises NotFinite for weights that are not finite after stage `name`."""
    if not job.cfg.get("allow_nonfinite"):
        numerics.check_weights(model, name)


def check_reported(job: Job) -> None:
    """Raises ConfigError for an objective that the dense model's numbers show not to exist."""
    wanted = str(job.cfg.get("objective") or "").partition("/")[2]
    known = [key.partition("/")[2] for key in job.found]
    if wanted and known and not any(wanted.startswith(key) for key in known):
        raise ConfigError(
            f"objective={job.cfg['objective']!r}; the evals report: {', '.join(known)}"
        )


def show_kept(pruned: Pruned, tracker: tracking.Track) -> None:
    """The kept widths by layer, as a table of the tracker."""
    tracker.table(
        "kept", ["group", "kept", "of"], [[n, k, u] for n, (k, u) in results.widths(pruned).items()]
    )


def save(job: Job, pruned: Pruned, tokenizer: Any, tracker: tracking.Track) -> str | None:
    """The checkpoint folder, unless `save=false`; its metadata goes to the tracker, the weights
    stay here. `save=packed`: see `bitmask`.
    """
    if not job.cfg["save"] or not first_process():
        return None
    folder = job.folder / "checkpoint"
    with stage(job, "save", "writing the checkpoint"):
        facts: dict[str, Any] = {
            "kept": pruned.kept,
            "groups": pruned.groups,
            "config": located(job.cfg),
            "counts": counts(job),
            "merges": pruned.notes.get("merges", ()),
        }
        checkpoint.save(
            pruned.model, tokenizer, folder, packed=job.cfg["save"] == "packed", **facts
        )
    tracker.artifact("checkpoint", [folder / "config.json", folder / "pruning.json"])
    return str(folder)


def record_of(job: Job, pruned: Pruned, saved: str | None, tokens: Tensor | None) -> dict[str, Any]:
    """What the result file says; `saved` is the checkpoint, `tokens` the calibration text."""
    origin = provenance.collect(job.cfg, tokens, job.kept.files)
    return results.record(job.cfg, job.found, job.stages.results, pruned, saved, origin)


def finish(job: Job, record: dict[str, Any]) -> None:
    """Writes the result file; the stages on disk go, unless `keep_stages`."""
    if first_process():
        results.write(job.folder / "result.json", record | {"cached": job.cache.used})
    if not job.cfg.get("keep_stages"):
        job.kept.drop()
    progress.note(job.folder, "finished")


def counts(job: Job) -> dict[str, float]:
    """The measured sizes that belong into the checkpoint."""
    return {
        k: v for k, v in job.found.items() if k.partition("/")[2].startswith(("params", "macs"))
    }


def objective(record: dict[str, Any], key: str | None) -> float | None:
    """The number that a sweeper minimises. Raises ConfigError naming the keys there are."""
    if key is None:
        return None
    if key not in record["results"]:
        raise ConfigError(f"objective={key!r}; results are: {', '.join(record['results'])}")
    return float(record["results"][key])
