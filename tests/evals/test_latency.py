"""What a request takes: its parts, its passes, what is waited for, and the memory of both."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prunekit.architecture.timing import wait_for
from prunekit.errors import ConfigError
from prunekit.evals.latency import latency
from prunekit.evals.memory import loaded_mib, memory
from prunekit.registry import evals

KEYS = {
    "prefill_ms",
    "prefill_ms_spread",
    "decode_ms_per_token",
    "decode_ms_per_token_spread",
    "latency_ms",
    "tokens_per_s",
}


@pytest.fixture
def model():
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=2))


def test_latency_gives_finite_numbers_that_fit_together(model):
    out = latency(model.train(), None, batch=2, prompt=8, new_tokens=4, repeats=3)
    assert set(out) == KEYS
    assert all(math.isfinite(v) and v >= 0 for v in out.values())
    assert out["tokens_per_s"] == pytest.approx(2000 / out["decode_ms_per_token"])
    assert model.training


def test_every_new_token_is_one_pass_over_one_id(model):
    seen = []
    model.register_forward_pre_hook(
        lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    latency(model, None, batch=2, prompt=8, new_tokens=3, repeats=2, warmup=1)
    assert seen == [(2, 8), (2, 1), (2, 1), (2, 1)] * 3


def test_a_model_without_cache_reads_everything_again(model):
    seen = []

    class NoCache(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, past_key_values=None, use_cache=False):
            seen.append(input_ids.shape[1])
            return self.inner(input_ids=input_ids, use_cache=False)

    latency(NoCache(), None, prompt=8, new_tokens=2, repeats=2, warmup=0)
    assert seen == [8, 9, 10] * 2


def test_one_repeat_has_no_spread_and_is_refused():
    with pytest.raises(ConfigError, match="repeats=1"):
        evals.build({"name": "latency", "repeats": 1})


def test_each_module_comes_back_in_its_own_mode(model):
    """A part of a model that trains is often held in another mode than the rest."""
    model.train().model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    latency(model, None, prompt=4, new_tokens=1, repeats=2, warmup=0)
    assert [m.training for m in model.modules()] == modes
    memory(model, None, tokens=8)
    assert [m.training for m in model.modules()] == modes


def test_memory_counts_what_is_loaded_and_what_the_pass_adds(model):
    bytes_ = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert loaded_mib(model) == pytest.approx(bytes_ / 2**20, rel=0.01)
    small, big = (memory(model.train(), None, batch=b, tokens=128) for b in (1, 512))
    assert set(small) == {"loaded_memory_mib", "peak_memory_mib"}
    assert small["peak_memory_mib"] >= small["loaded_memory_mib"]
    assert big["peak_memory_mib"] > small["peak_memory_mib"] + 20, (
        "65,536 x 128 float32 logits alone are 32 MiB"
    )
    assert model.training


def test_every_part_is_waited_for(model, monkeypatch):
    said = []
    monkeypatch.setattr(
        "prunekit.architecture.timing.wait_for", lambda devices: said.append("wait")
    )
    model.register_forward_hook(lambda *_: said.append("pass"))
    latency(model, None, prompt=8, new_tokens=2, repeats=2, warmup=0)
    assert said == ["wait", "pass", "wait", "pass", "pass", "wait"] * 2


def test_what_is_waited_for_is_the_models_devices_not_the_current_one(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "synchronize", asked.append)
    wait_for(torch.device(d) for d in ("cpu", "cuda:1", "cuda:3", "meta"))
    assert asked == [torch.device("cuda:1"), torch.device("cuda:3")]
