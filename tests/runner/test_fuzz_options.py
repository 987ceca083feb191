"""Any value under any option of any component: refused with a ConfigError, or meant."""

from __future__ import annotations

import copy
import json
import os
from functools import cache

import pytest
import yaml
from compositions import config
from fuzzing import ASKED, at, examples, leaves, like, put, values, within
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from prunekit.errors import ConfigError, NotFinite
from prunekit.runner.preflight import check
from prunekit.runner.run import run

CHOICES = {
    kind: sorted(p.stem for p in (ROOT / "conf" / kind).glob("*.yaml"))
    for kind in ("criterion", "ratio", "exclude", "pruner")
}
FILLED = {"${seed}": 1, "${data_root}": None}
CHOICES["recovery"] = ["none", "lora_text"]
CHOICES["eval"] = ["none", "quick"]


def usual() -> dict:
    """The usual composition, composed once."""
    return json.loads(_usual())


@cache
def _usual() -> str:
    return json.dumps(config())


@cache
def node_of(kind: str, name: str) -> dict:
    """One component's YAML, what it builds on included; composing takes a second each."""
    node = yaml.safe_load((ROOT / "conf" / kind / f"{name}.yaml").read_text()) or {}
    below: dict = {}
    for other in node.pop("defaults", []):
        if other != "_self_":
            name, _, place = str(other).partition("@")
            below |= {place: node_of(kind, name)} if place else node_of(kind, name)
    return {k: FILLED.get(str(v), v) for k, v in (below | node).items()}


@st.composite
def configs(draw: st.DrawFn) -> dict:
    """A composition of any components, some of whose values are anything."""
    cfg = usual()
    for kind, names in CHOICES.items():
        if draw(st.booleans()):
            cfg[kind] = copy.deepcopy(node_of(kind, draw(st.sampled_from(names))))
    for _ in range(draw(st.integers(1, 2))):
        places = [p for p in leaves(cfg) if p != ("out",)]
        place = draw(st.sampled_from(places))
        put(cfg, place, draw(like(at(cfg, place)) if draw(st.booleans()) else values))
    return cfg


@examples(60)
@given(cfg=configs())
def test_no_value_is_a_raw_error(cfg, tmp_path_factory):
    """Accepted ones are run where many are asked for; `PRUNEKIT_FUZZ_LOG` names a file for what
    became of each.
    """
    told = "accepted"
    try:
        with within(120):
            check(cfg)
            if ASKED:
                run(cfg | {"save": False}, tmp_path_factory.mktemp("run"))
                told = "ran"
    except (ConfigError, NotFinite) as e:
        told = f"{type(e).__name__}: {e}"
    if "PRUNEKIT_FUZZ_LOG" in os.environ:
        with open(os.environ["PRUNEKIT_FUZZ_LOG"], "a", errors="backslashreplace") as log:
            log.write(f"{told[:200]!r} {yaml.safe_dump(changes(cfg), default_flow_style=True)!r}\n")


def changes(cfg: dict) -> dict:
    """What differs from the usual composition."""
    base = usual()
    return {k: v for k, v in cfg.items() if v != base.get(k)}


def test_the_usual_composition_is_accepted():
    check(usual())
    for kind, names in CHOICES.items():
        assert all(isinstance(node_of(kind, name), dict) for name in names)
    with pytest.raises(ConfigError):
        check(usual() | {"model": 3})
