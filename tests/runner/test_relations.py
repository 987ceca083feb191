"""Configurations that cannot mean anything are refused before a weight is read, with the option's
name and what is possible.
"""

from __future__ import annotations

import logging

import pytest
from compositions import config

from prunekit.errors import ConfigError
from prunekit.runner.preflight import check

BAD = r"""
calib.samples=0                          | samples=0: .*greater than 0
calib.samples=-3                         | samples=-3
calib.samples=true                       | samples=True: .*integer
calib.samples=1.5                        | samples=1.5
calib.samples='"4"'                      | samples='"?4"?'
calib.length=0                           | length=0
calib.length=1                           | length=1: .*greater than or equal to 2
calib.length=4096                        | crop: length = 4096 tokens, and the model has 2048 positions
calib.seed=-1                            | seed=-1
calib.seed=9223372036854775808           | seed=9223372036854775808: .*less than
seed=18446744073709551616 calib.seed=1   | seed=18446744073709551616
seed=one calib.seed=1                    | seed='one'
seed=true calib.seed=1                   | seed=True
criterion=flap criterion.skip=16         | flap: skip=16 leaves nothing of samples of 16 tokens
pruner=depth criterion=block_influence criterion.skip=20 | block_influence: skip=20 leaves nothing
pruner.compensate=bias pruner.skip=16    | oneshot: skip=16 leaves nothing
pruner.kinds=[]                          | kinds=\[\]
pruner.kinds=heads                       | kinds='heads'
pruner.steps=1000                        | pruner.steps=1000: .* units at most
pruner.steps=5 pruner.redraw=true        | redraw=true shares calib.samples=4 out among steps=5
pruner.steps=0                           | steps=0
ratio.multiple=1000                      | ratio.multiple=1000: neurons.0 has 128 units
ratio.multiple=0                         | multiple=0
ratio.target=nan                         | target=nan
ratio.target=1                           | target=1.*less than 1
ratio.target=-0.1                        | target=-0.1
ratio.of=units ratio.per_kind={experts:0.1} | ratio.per_kind: experts are not pruned here; possible: heads, neurons
ratio.of=units ratio.per_kind={heads:2}  | per_kind
model.heads=3                            | hidden=64 channels are not an even number for each of heads=3
model.kv_heads=3                         | kv_heads=3 do not divide heads=4
model.layers=1000000000                  | layers=1000000000
model.device=banana                      | device='banana': .*this machine has cpu
model.device=cuda:99                     | device='cuda:99'
model.device=meta                        | device='meta'
pruner=obs criterion=none pruner.ridge=-1 | ridge=-1
recovery=lora_text recovery.lr=inf       | lr=inf
recovery=lora_text recovery.lr=1000      | lr=1000
recovery=distill recovery.lr=1000        | lr=1000
ratio=besa pruner=unstructured criterion=wanda ratio.rate=126 | rate=126
recovery=lora_text recovery.lr=0         | lr=0
recovery=lora_text recovery.epochs=inf  | epochs=inf
recovery=lora_text recovery.max_length=1 | max_length=1
recovery=lora_text recovery.max_length=9999 | lora: max_length = 9999 tokens
recovery=lora_text recovery.batch=7      | batch=7 is no multiple of micro_batch=8
recovery=lora_text recovery.targets=[nonsense] | nonsense
+data_root=/no/such/folder               | data_root='/no/such/folder'
exclude=range exclude.heads=[3,1]        | heads=\[3, 1\]: .*first block comes after the last
exclude=range                            | exclude=range has no range
exclude=range exclude.heads=[1]          | heads=\[1\]
exclude=range exclude.heads=[-1,2]       | heads=\[-1, 2\]
exclude=range exclude.neurons=[0,99]     | exclude.neurons=\[0, 99\]: the model has 4 blocks
exclude=range exclude.heads=[0,0] exclude.neurons=[0,0] | leaves nothing
cache=perhaps                            | cache='perhaps'
resume=sometimes                         | resume='sometimes'
resume=[strict]                          | resume=\['strict'\]
save=perhaps                             | save='perhaps'
objective=foo                            | objective='foo'
objective=recovered/ppl_pydocs_32        | objective='recovered/ppl_pydocs_32'; possible: .*dense, pruned
objective=[a]                            | objective=\['a'\]
base={seed:1}                            | base=
+a={b:1}                                 | no key 'a'; possible
+track.foo=1                             | track has no option 'foo'
track.mode=loud                          | track: mode='loud'
track.tags=x                             | track: tags='x'
+criterion.foo=1                         | criterion=taylor has no option 'foo'
+eval.size.foo=1                         | eval=size has no option 'foo'
+eval.twice={name:size}                  | eval.size and eval.twice both report the same
+eval.twice={name:perplexity,window:32,limit:1} | eval.ppl and eval.twice both report ppl_pydocs_32
eval.ppl=3                               | eval.ppl=3 must be a mapping
+eval.extra.limit=4                      | eval.extra=.*limit.* name of an eval; there are: answers
eval=3                                   | eval=3 must be a mapping
eval.ppl.window=1                        | window=1
eval.ppl.window=4096                     | perplexity: window = 4096 tokens
eval.ppl.block=33                        | block=33 is no multiple of window=32
eval.ppl.split=nonsense                  | no split 'nonsense'
eval.ppl.path=/no/such/file              | /no/such/file is not a file
+eval.l={name:latency,prompt:2000,new_tokens:100} | latency: prompt \+ new_tokens = 2100 tokens
criterion=3                              | criterion must be a mapping
criterion.name=[taylor]                  | criterion
calib.dataset=nonsense                   | dataset='nonsense'
"""  # noqa: E501  (a table)


def composed(line: str) -> dict:
    """Hydra's composition; what it would refuse itself is put in afterwards."""
    import yaml

    chosen, late = [], []
    for word in line.split():
        key, _, value = word.partition("=")
        whole = key in ("eval", "criterion") and value.isdigit()
        (late if whole or key == "criterion.name" else chosen).append(word)
    cfg = config(*chosen)
    for word in late:
        key, _, value = word.partition("=")
        node, parts = cfg, key.split(".")
        for part in parts[:-1]:
            node = node[part]
        node[parts[-1]] = yaml.safe_load(value)
    return cfg


@pytest.mark.parametrize("line", [line for line in BAD.splitlines() if line])
def test_what_cannot_be_is_refused_from_shapes_alone(line, monkeypatch):
    words, says = (part.strip() for part in line.split("|", 1))
    cfg = composed(words.replace("+data_root", "data_root"))
    with pytest.raises(ConfigError, match=says):
        check(cfg)


def test_a_text_that_is_calibrated_and_tested_on_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="prunekit"):
        check(config("calib.split=test"))
    assert "calib=crop reads pydocs (test), which perplexity is measured on" in caplog.text
    caplog.clear()
    check(config())
    assert not caplog.records


def test_what_can_be_is_not_refused():
    check(config("seed=9223372036854775807", "calib.seed=1"))
    check(config("calib.length=2048"))
    check(config("criterion=flap", "criterion.skip=15"))
    check(config("exclude=range", "exclude.heads=[0,0]", "exclude.neurons=[0,4]"))
    check(config("model.device=cpu", "pruner.steps=each", "ratio.multiple=16"))
