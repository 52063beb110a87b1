"""Fused norms: the same numbers and gradients as the libraries' own, nearer to the truth in 16 bits."""

import copy

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mifo.acceleration.rms_norm import fuse_rms_norms

NORMS = {"diffusers": lambda: RMSNorm(32, eps=1e-5), "qwen3": lambda: Qwen3RMSNorm(32, eps=1e-5)}


def _norm(kind: str) -> nn.Module:
    norm: nn.Module = NORMS[kind]()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 32))
    return norm


def _fused(norm: nn.Module) -> nn.Module:
    network = nn.Sequential(copy.deepcopy(norm))
    fuse_rms_norms(network)
    assert type(network[0]) is not type(norm)
    return network[0]


def _results(norm: nn.Module, states: Tensor) -> list[Tensor]:
    states = states.clone().requires_grad_()
    out = norm(states)
    (out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out, states.grad, norm.weight.grad]


@pytest.mark.parametrize("kind", NORMS)
def test_numbers_and_gradients_are_the_libraries(kind: str) -> None:
    norm = _norm(kind)
    states = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for fused, own in zip(_results(_fused(norm), states), _results(norm, states), strict=True):
        torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_16_bits_are_rounded_once(kind: str) -> None:
    norm = _norm(kind).bfloat16()
    states = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = nn.functional.rms_norm(states.double(), (32,), norm.weight.double(), 1e-5)
    fused, own = ((each(states).double() - exact).abs().mean() for each in (_fused(norm), norm))
    assert fused < 0.8 * own


@pytest.mark.parametrize("kind", NORMS)
def test_states_of_another_precision_go_the_libraries_way(kind: str) -> None:
    norm = _norm(kind).bfloat16()
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_fused(norm)(states), norm(states))


def test_norms_that_differ_stay() -> None:
    network = nn.Sequential(RMSNorm(8, 1e-5, bias=True), RMSNorm(8, 1e-5, elementwise_affine=False))
    fuse_rms_norms(network)
    assert [type(each) for each in network] == [RMSNorm, RMSNorm]
