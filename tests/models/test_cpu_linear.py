"""Linear layers through oneDNN give the results of PyTorch's own, forward and backward, and are used only where they apply."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rlhf_ray.models.cpu_linear import OneDnnLinear, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


def pair(bias: bool = True) -> tuple[nn.Linear, OneDnnLinear]:
    """The same layer twice."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias)
    fast = copy.deepcopy(plain)
    fast.__class__ = OneDnnLinear
    return plain, fast


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48), (1, 48), (48,)])
def test_results_and_gradients_are_those_of_a_plain_layer(bias, shape):
    outputs, gradients = [], []
    for layer in pair(bias):
        states = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = layer(states)
        (output * torch.linspace(-1, 1, 80)).sum().backward()
        outputs.append(output)
        gradients.append([states.grad, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0.1 for gradient in gradients[0])


def test_gradient_of_a_plain_sum():
    """The incoming gradient of a sum is one number expanded to a matrix."""
    gradients = []
    for layer in pair():
        layer(torch.ones(3, 48)).sum().backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients)


def test_frozen_parameters_get_no_gradient():
    _, fast = pair()
    fast.requires_grad_(False)
    states = torch.randn(3, 48, requires_grad=True)
    fast(states).sum().backward()
    assert states.grad is not None and fast.weight.grad is None and fast.bias.grad is None


def test_no_rows():
    _, fast = pair()
    assert fast(torch.zeros(0, 48)).shape == (0, 80)


def test_other_dtypes_use_the_plain_layer():
    plain, fast = pair()
    states = torch.randn(4, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(states).dtype == torch.bfloat16
        assert torch.equal(fast(states), plain(states))
    assert torch.equal(fast.bfloat16()(states.bfloat16()), plain.bfloat16()(states.bfloat16()))
    assert torch.equal(fast.double()(states.double()), plain.double()(states.double()))


def test_a_model_keeps_its_parameters():
    model = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 1, bias=False))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert use_onednn(model) is model
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
