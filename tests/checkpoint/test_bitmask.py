"""Packed zeros come back to the bit, in the size that the formula says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from prunekit.checkpoint import bitmask
from prunekit.checkpoint.integrity import CheckpointError


def sparse(dtype, zeros, *shape):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=rng)
    order = torch.rand(x.numel(), generator=rng).argsort()[: int(zeros * x.numel())]
    x.view(-1)[order] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [0.5, 0.7])
def test_packed_zeros_come_back_in_the_size_of_the_formula(dtype, zeros, tmp_path):
    x = sparse(dtype, zeros, 512, 768)
    bitmask.write({"w": x}, tmp_path / "w.bitmask.safetensors")
    found = bitmask.read(tmp_path / "w.bitmask.safetensors")["w"]
    assert found.dtype == dtype
    assert torch.equal(found, x)
    formula = (1 - zeros + 1 / (8 * x.element_size())) * x.numel() * x.element_size()
    assert (tmp_path / "w.bitmask.safetensors").stat().st_size == pytest.approx(formula, rel=0.01)


def test_odd_sizes_dense_tensors_and_signed_zeros_come_back(tmp_path):
    x = torch.zeros(3, 7)
    x[0, 0], x[2, 6], x[1, 1] = -0.0, float("nan"), 2.0
    tensors = {
        "odd": x,
        "dense": torch.ones(5, 3),
        "scalar": torch.tensor(0.0),
        "empty": torch.empty(0, 4),
    }
    bitmask.write(tensors, tmp_path / "t.bitmask.safetensors")
    found = bitmask.read(tmp_path / "t.bitmask.safetensors")
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].shape == t.shape
        assert bitmask.raw(found[name]).equal(bitmask.raw(t)), name


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "t.bitmask.safetensors"
    save_file(
        {"w.bitmask": torch.tensor([255], dtype=torch.uint8), "w.values": torch.ones(3)},
        path,
        {bitmask.SHAPES: '{"w": [8]}'},
    )
    with pytest.raises(CheckpointError, match="w.values has 3 elements, its mask says 8"):
        bitmask.read(path)
