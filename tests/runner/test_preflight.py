"""What cannot be is said before a weight is read, with what can."""

from __future__ import annotations

from dataclasses import replace

import pytest
from compositions import config

from prunekit.errors import ConfigError
from prunekit.runner.preflight import check

SINGLE = ["criterion=none", "ratio.of=prunable", "ratio.target=0.5"]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Models on the meta device only."""
    from prunekit import registry

    build = registry.models.build

    def shapes_alone(node):
        made = build(node)

        def ask(meta=False, **_):
            assert meta, "weights were read"
            return made(meta=meta)

        return replace(made, entry=replace(made.entry, fn=ask))

    monkeypatch.setattr(registry.models, "build", shapes_alone)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["resume=cnofig"], "resume='cnofig'; possible: strict, config, off"),
        (["objective=foo"], "objective='foo'; possible: a key of result.json"),
        (["save=perhaps"], "save='perhaps'; possible: true, false, packed"),
        (["recovery=lora_text", "recovery.batch=7"], "batch=7 is no multiple of micro_batch=8"),
        (["recovery=lora_text", "recovery.targets=[nonsense]"], "nonsense"),
        (["recovery=lora", "recovery.dataset=text"], "path"),
        (["pruner=sparsegpt", *SINGLE, "pruner.pattern=2"], "2:4"),
        (["pruner=sparsegpt", *SINGLE, "pruner.pattern=2:4", "ratio.target=0.3"], "0.5"),
        (["pruner=sparsegpt", *SINGLE, "pruner.pattern=2:4", "pruner.block=126"], "multiple"),
        (["pruner=sparsegpt", *SINGLE, "pruner.targets=[nonsense]"], "nonsense"),
        (["pruner=obs", "criterion=none", "ratio.target=0.99"], "cannot be removed from"),
        (["pruner=obs", "criterion=none", "ratio=cost", "ratio.target=0.99"], "cannot be removed"),
        (["pruner=slicegpt", "criterion=none", "ratio.target=0.99"], "cannot be removed from"),
        (["pruner=depth", "criterion=random", "ratio.target=0.99"], "cannot be removed from"),
        (["pruner=obs"], "cannot use criterion=taylor; give criterion=none"),
        (["criterion=none"], "criterion=none cannot score; possible: .*taylor"),
        (["pruner=copal", "criterion=none"], "calib="),
        (["exclude=ends", "exclude.first=50"], "leaves nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        check(config(*words))


@pytest.mark.parametrize("lost", ["criterion", "track", "seed"])
def test_a_config_that_lacks_a_part_is_refused_by_name(lost):
    cfg = config()
    del cfg[lost]
    with pytest.raises(ConfigError, match=f"the config lacks {lost}"):
        check(cfg)


def test_an_evaluation_without_a_name_for_it_is_refused():
    with pytest.raises(ConfigError, match=r"eval is one evaluation, size, and must be a mapping"):
        check(config() | {"eval": {"name": "size"}})


def test_what_can_be_passes():
    parts = check(config("objective=pruned/ppl_pydocs_32", "resume=off", "recovery=lora_text"))
    assert parts.recovery.name == "lora"
    assert check(config()).recovery is None
