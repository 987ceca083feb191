"""2:4 matrices become sparse tensors where there is a kernel for them; elsewhere each
says why not.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunekit.checkpoint.semi_structured import semi_structured, two_of_four

cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs CUDA with sparse tensor cores (8.0)",
)


def halved(outputs: int = 64, inputs: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.Linear(outputs, 64))
    model[0].weight.data.view(outputs, -1, 4)[..., [1, 3]] = 0
    return model


def test_pattern_is_recognised():
    model = halved()
    assert two_of_four(model[0].weight)
    assert not two_of_four(model[1].weight)
    assert not two_of_four(torch.zeros(4, 6))


def test_without_cuda_everything_is_left_alone_and_says_why():
    model = halved()
    before = [p.clone() for p in model.parameters()]
    assert semi_structured(model) == {
        n: "it is on cpu: the sparse kernels are CUDA's" for n in ("0", "1")
    }
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@cuda
def test_converted_modules_give_the_same():
    model = halved().half().cuda()
    x = torch.randn(64, 128, dtype=torch.half, device="cuda")
    expected = model(x)
    assert semi_structured(model) == {"1": "it does not have two zeros in every four inputs"}
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
