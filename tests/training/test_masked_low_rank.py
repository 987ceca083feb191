"""Low-rank updates that leave zeros zero: the authors' numbers, the start, the merge."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from paths import GOLDEN
from tiny_models import tiny_model
from torch import nn

from prunekit.training.masked_low_rank import (
    MaskedUpdates,
    MaskLowRank,
    ScaleLowRank,
    masked_updates,
)


@pytest.fixture(scope="module")
def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "perp.npz").items() if v.shape}


@pytest.mark.parametrize("r", [4, 16])
def test_the_authors_mask_lora(golden, r):
    W, key = golden["W"], f"mask_lora.r{r}"
    update = MaskLowRank(W, r, 32 / r, W != 0)
    assert torch.equal(update(W), W)
    update.A.data, update.B.data = golden[f"{key}.A"], golden[f"{key}.B"]
    scaling = float(np.load(GOLDEN / "perp.npz")[f"{key}.scaling"])
    update.scaling = scaling
    torch.testing.assert_close(update(W), golden[f"{key}.merged"], rtol=0, atol=1e-5)
    out = nn.functional.linear(golden["x"], update(W), golden["bias"])
    torch.testing.assert_close(out, golden[f"{key}.forward"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [1, 4, 16])
def test_the_authors_scale_lora(golden, r):
    W = golden["W"]
    update = ScaleLowRank(W, r)
    torch.testing.assert_close(update(W), W, rtol=0, atol=1e-6)
    if r > 1:
        key = f"scale_lora.r{r}"
        update.A.data, update.B.data = golden[f"{key}.A_trained"], golden[f"{key}.B_trained"]
        torch.testing.assert_close(update(W), golden[f"{key}.merged"], rtol=0, atol=1e-5)


def test_components_of_scale_lora_learn_different_things():
    """Where all start alike they stay alike."""
    W = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    update, target = ScaleLowRank(W, 4), W * torch.rand(10, 12)
    step = torch.optim.Adam(update.parameters(), 1e-2)
    for _ in range(200):
        step.zero_grad()
        ((update(W) - target) ** 2).mean().backward()
        step.step()
    assert (torch.linalg.svdvals((update.B @ update.A).detach()) > 0.1).sum() == 4


@pytest.mark.parametrize("form", ["mask", "scale"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merged_is_what_was_trained(arch, form, tokens):
    model = tiny_model(arch)
    names = [n for n, m in model.named_modules() if n.endswith(("down_proj", "mlp.c_proj"))]
    keep = {f"{n}.weight": model.get_parameter(f"{n}.weight") > -0.01 for n in names}
    for name, mask in keep.items():
        model.get_parameter(name).data.masked_fill_(~mask, 0)
    before = copy.deepcopy(model.state_dict())
    with masked_updates(model, MaskedUpdates(names, form, 2, 4), keep):
        start = model(tokens, use_cache=False).logits
        for name in names:
            update = model.get_submodule(name).parametrizations["weight"][0]
            update.B.data += torch.randn_like(update.B) / 5
            assert not model.get_submodule(name).parametrizations["weight"].original.requires_grad
        trained = model(tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens, use_cache=False).logits, trained)
    assert not torch.allclose(start, trained)
    assert set(model.state_dict()) == set(before)
    for name, weight in model.named_parameters():
        assert weight.requires_grad
        if name in keep:
            assert not weight[~keep[name]].any()
            assert not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name])


def test_the_update_of_mask_lora_is_alpha_over_r_of_the_product():
    model = tiny_model("llama")
    name = "model.layers.0.mlp.down_proj"
    before = model.get_parameter(f"{name}.weight").detach().clone()
    mask = before > 0
    with masked_updates(model, MaskedUpdates([name], "mask", 2, 6), {f"{name}.weight": mask}):
        update = model.get_submodule(name).parametrizations["weight"][0]
        update.B.data.fill_(0.1)
        product = update.B.detach() @ update.A.detach()
    after = model.get_parameter(f"{name}.weight").detach()
    torch.testing.assert_close(after, before + 3 * product * mask)
