"""The stages of a job that are done, kept in its folder: the same command, started again in that
folder after it was cut off, goes on with the next one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit import checkpoint
from prunekit.architecture.compute import compute_in_float32, computes_in_float32
from prunekit.architecture.mapped import mapped
from prunekit.architecture.streaming import streaming
from prunekit.errors import ConfigError
from prunekit.runner import store
from prunekit.runner.distributed import first_process
from prunekit.runner.inputs import State, inputs
from prunekit.runner.results import is_plain
from prunekit.runner.resume import code_version, result_key
from prunekit.types import Group, Member, Pruned

log = logging.getLogger("prunekit")
FOLDER = "stages"


@dataclass(frozen=True)
class Standing:
    """A model after a stage, and what the stages behind it need."""

    pruned: Pruned
    tokenizer: Any
    texts: dict[str, Tensor]
    costs: dict[str, dict[str, float]]


class Finished:
    """Numbers of evaluations and models on disk, in folders named by a hash of the configuration,
    the code and the `files` that made them; those of another hash are dropped, with a warning.

    models: False keeps numbers alone.
    others: files that decide results though `cfg` does not name them.
    words: what the user adds to the same command for it to write into this folder again.
    own: raises ConfigError, and drops nothing, where all that is there has another hash.
    """

    def __init__(
        self,
        folder: Path,
        cfg: dict[str, Any],
        models: bool,
        others: Iterable[State] = (),
        words: str = "",
        own: bool = False,
    ):
        self.top, self.models, self.words = folder / FOLDER, models, words
        self.files = inputs(cfg)
        more = [state for state in others if state not in self.files]
        self.files += more
        self.key = key_of(cfg, self.files)
        # What comes before the recovery is the same whatever the recovery is: a mistake in that, or
        # another one, does not make it anew.
        before = {k: v for k, v in cfg.items() if k != "recovery"}
        self.before = key_of(before, inputs(before) + more)
        if first_process() and self.top.is_dir():
            self.drop_others(own)

    def drop_others(self, own: bool) -> None:
        """What another configuration, other code or files left. Raises ConfigError with `own` where
        nothing else is there.
        """
        there = [kept for kept in self.top.iterdir() if kept.is_dir()]
        gone = [kept for kept in there if kept.name not in (self.key, self.before)]
        if own and gone and gone == there:
            raise ConfigError(
                f"{self.top} holds what another command, code or text has done so far, which would "
                "be lost: give another folder, or remove that one"
            )
        for kept in gone:
            log.warning("%s is dropped: another configuration, code or text made it", kept)
            shutil.rmtree(kept)

    def numbers(self, name: str, compute: Callable[[], Any]) -> tuple[Any, bool]:
        """What stage `name` gave, or `compute` gives, kept then; and whether it was kept."""
        entry = self.entry(name)
        try:
            return store.read(entry), True
        except FileNotFoundError:
            pass
        except (store.Damaged, OSError) as error:
            log.warning("%s is made anew: %s", entry.path, error)
        value = compute()
        if first_process():
            entry.path.parent.mkdir(parents=True, exist_ok=True)
            store.write(entry, value)
        return value, False

    def key_for(self, name: str) -> str:
        """The key of stage `name`, under which its folder is."""
        return self.key if name.startswith("recovered") else self.before

    def entry(self, name: str) -> store.Entry:
        stage_key = self.key_for(name)
        path = self.top / stage_key / f"{name.replace('/', '-')}{store.ENDING}"
        key = f"{stage_key}-{name}".replace(" ", "-")
        codec = (store.decode_numbers, store.encode_numbers)
        return store.Entry(key, name, *codec, path, most=sys.maxsize)  # it is the job's own

    def keep(self, name: str, standing: Standing) -> None:
        """The model of stage `name`, if models are kept and this one lies in the memory of one
        device: whole, or not at all.
        """
        model = standing.pruned.model
        if not self.models or not first_process() or mapped(model) or streaming(model):
            return
        if getattr(model, "hf_device_map", None):
            return
        folder = self.top / self.key_for(name) / name
        notes = {k: v for k, v in standing.pruned.notes.items() if is_plain(v)}
        facts = {
            "device": str(next(model.parameters()).device),
            "wide": computes_in_float32(model),
            "groups": [described(g) for g in standing.pruned.groups],
            "notes": notes,
            "costs": standing.costs,
        }
        tensors = {f"kept:{k}": v for k, v in standing.pruned.kept.items()}
        tensors |= {f"scores:{k}": v for k, v in standing.pruned.scores.items()}
        tensors |= {f"texts:{k}": v for k, v in standing.texts.items()}
        for group in standing.pruned.groups:
            tensors |= {f"index:{group.name}:{i}": m.index for i, m in enumerate(group.members)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            checkpoint.save(model, standing.tokenizer, folder)
        except ConfigError as error:
            log.warning("stage %s is not kept: %s", name, error)
            return
        store.write(self.entry(f"{name}-facts"), facts)
        store.write(self.tensors(name), tensors)
        for entry in folder.parent.glob(f"{name}-unfinished-*"):
            entry.unlink(missing_ok=True)
        size = sum(p.stat().st_size for p in self.top.rglob("*") if p.is_file())
        log.info(
            "stage %s is kept: %d MiB in %s; the same command%s goes on from there",
            name,
            size // 2**20,
            self.top,
            f" with {self.words}" if self.words else "",
        )

    def tensors(self, name: str) -> store.Entry:
        entry = self.entry(f"{name}-tensors")
        return dataclasses.replace(entry, decode=store.decode_scores, encode=store.encode_scores)

    def standing(self, name: str) -> Standing | None:
        """The model of stage `name` as it was kept; None, with a line, for one that is damaged."""
        folder = self.top / self.key_for(name) / name
        if not self.models or not folder.is_dir():
            return None
        try:
            facts = store.read(self.entry(f"{name}-facts"))
            tensors = store.read(self.tensors(name))
            model, tokenizer = checkpoint.load(folder, device=facts["device"])
            if facts["wide"]:
                compute_in_float32(model)
        except FileNotFoundError:
            return None
        except (store.Damaged, ConfigError, OSError) as error:
            log.warning("stage %s is made anew: %s", name, error)
            return None
        log.info("stage %s was kept: going on from %s", name, folder)

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        groups = [restored(g, tensors) for g in facts["groups"]]
        pruned = Pruned(model, under("kept:"), groups, under("scores:"), facts["notes"])
        return Standing(pruned, tokenizer, under("texts:"), facts["costs"])

    def training(self, name: str) -> Unfinished | None:
        """Where a training in stage `name` keeps how far it is; None if models are not kept."""
        return self.unfinished(name, "training") if self.models else None

    def passes(self, name: str) -> Callable[[str], Unfinished] | None:
        """Where a pass by blocks in stage `name` keeps its parts; None if models are not kept."""
        if not self.models or not first_process():
            return None
        return lambda part: self.unfinished(name, f"pass-{part}")

    def unfinished(self, name: str, part: str) -> Unfinished:
        return Unfinished(self.tensors(f"{name}-unfinished-{part}"))

    def drop(self) -> None:
        """All of it, once the result is written."""
        if first_process():
            shutil.rmtree(self.top, ignore_errors=True)


def key_of(cfg: dict[str, Any], files: list[State]) -> str:
    """What decides a stage's outcome, as a name."""
    key = f"{result_key(cfg)}{code_version(cfg)}{files}"
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def described(group: Group) -> dict[str, Any]:
    """A group as JSON, but for the indices of its members."""
    fields = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    members = [[m.param, m.axis, m.reads] for m in group.members]
    return fields | {"members": members}


def restored(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Group:
    """The group that `described` gave."""
    members = tuple(
        Member(param, axis, tensors[f"index:{fields['name']}:{i}"], reads)
        for i, (param, axis, reads) in enumerate(fields["members"])
    )
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Group(**plain | {"members": members})


class Unfinished:
    """How far a stage is, in one entry that is replaced as a whole: see `types.Progress`."""

    def __init__(self, entry: store.Entry):
        self.entry = entry

    def read(self) -> dict[str, Tensor] | None:
        try:
            found: dict[str, Tensor] = store.read(self.entry)
        except FileNotFoundError:
            return None
        except (store.Damaged, OSError) as error:
            log.warning("%s: the stage starts anew: %s", self.entry.path, error)
            return None
        return found

    def write(self, tensors: dict[str, Tensor]) -> None:
        self.entry.path.parent.mkdir(parents=True, exist_ok=True)
        store.write(self.entry, tensors)

    def drop(self) -> None:
        self.entry.path.unlink(missing_ok=True)
