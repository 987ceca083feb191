"""Components are plain functions; wrong names, options and values are told apart before anything
runs.
"""

from __future__ import annotations

import inspect
from typing import Literal

import pytest
import yaml
from paths import ROOT

from prunekit.errors import ConfigError
from prunekit.registry import REGISTRIES, Registry, Share


@pytest.fixture
def registry():
    r = Registry("criterion", "a package without files")

    @r.register()
    def mine(model, *, share: Share = 0.1, mode: Literal["a", "b"] = "a"):
        """Mine."""
        return share, mode

    return r


def test_build_binds_checked_options(registry):
    assert registry.build({"name": "mine", "share": 0.5})(None) == (0.5, "a")


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"name": "min"}, "Did you mean 'mine'"),
        ({"name": "mine", "sharee": 1}, "Options: share, mode"),
        ({"name": "mine", "share": 1.2}, "share=1.2.*less than 1"),
        ({"name": "mine", "share": 20}, "share=20: it should be less than 1, e.g. 0.2 for 20%"),
        ({"name": "mine", "mode": "c"}, "'a' or 'b'"),
        ({"share": 1}, "There are: mine"),
    ],
)
def test_what_is_wrong_is_named(registry, node, says):
    with pytest.raises(ConfigError, match=says):
        registry.build(node)


def options_of(path):
    """The YAML's own keys with those of the YAMLs it builds on."""
    node = yaml.safe_load(path.read_text()) or {}
    inherited = [
        options_of(path.parent / f"{d}.yaml")
        for d in node.pop("defaults", [])
        if isinstance(d, str) and d != "_self_"
    ]
    return {k: v for d in [*inherited, node] for k, v in d.items()}


@pytest.mark.parametrize("kind", REGISTRIES)
def test_yaml_and_signature_say_the_same(kind):
    """Every component has a YAML of its name with every option, and the default in both is the
    same.
    """
    registry = REGISTRIES[kind]
    for name in registry.names():
        path = ROOT / "conf" / kind / f"{name}.yaml"
        assert path.is_file(), f"{kind} {name} has no {path.relative_to(ROOT)}"
        node = options_of(path)
        entry = registry.entry(name)
        assert node.pop("name") == name
        assert entry.summary, f"{kind} {name} has no docstring"
        assert set(node) - {"meta"} == set(entry.defaults) - {"meta"}, (
            f"{path.name} and {entry.fn.__module__} differ"
        )
        for key, value in node.items():
            default = entry.defaults[key]
            required = default is inspect.Parameter.empty and value in (None, "???")
            if not required and not (isinstance(value, str) and "${" in value):
                assert (list(default) if isinstance(default, tuple) else default) == value, (
                    f"{path.name}: {key}"
                )
