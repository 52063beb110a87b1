"""Gradients of weights in a stream of their own are those of PyTorch."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from mifo.acceleration.graphs import GraphedStep
from mifo.acceleration.weight_gradients import AHEAD, WeightGradientsBeside

CPU = torch.device("cpu")


class Network(nn.Module):
    """Each kind of layer, one without a bias, one frozen, one used twice, one made of others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=(1, 1), groups=2, bias=False)
        self.named = nn.Conv2d(8, 8, 3, padding="same")
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.shared = nn.Linear(8, 8)
        self.made = weight_norm(nn.Linear(8, 8))
        self.last = nn.ModuleList(nn.Linear(8, 8, bias=bool(i % 2)) for i in range(2 * AHEAD))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.named(self.grouped(self.first(x))).flatten(2).transpose(1, 2))
        tokens = self.made(self.shared(F.silu(self.frozen(self.shared(tokens)))))
        for layer in self.last:
            tokens = tokens + layer(tokens)
        return tokens.square().mean()


def network(device: torch.device = CPU) -> tuple[Network, Tensor, list[nn.Parameter]]:
    torch.manual_seed(0)
    model, x = Network().to(device), torch.randn(2, 3, 16, 16, device=device, requires_grad=True)
    return model, x, [each for each in model.parameters() if each.requires_grad]


def test_gradients_are_those_of_pytorch():
    model, x, learnt = network()
    plain = torch.autograd.grad(model(x), [x, *learnt])
    with WeightGradientsBeside(CPU):
        beside = torch.autograd.grad(model(x), [x, *learnt])
    for ours, theirs in zip(beside, plain, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def computed_beside(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    asked, own = [], WeightGradientsBeside.beside
    monkeypatch.setattr(WeightGradientsBeside, "beside", lambda *args: asked.append(args[1]) or own(*args))
    with WeightGradientsBeside(CPU):
        run()
    return len(asked)


def test_every_layer_that_learns_takes_part(monkeypatch):
    model, x, learnt = network()
    # three before the others, and two uses of the shared layer
    assert computed_beside(monkeypatch, lambda: model(x).backward()) == 5 + 2 * AHEAD
    assert all(each.grad is not None for each in learnt) and model.frozen.weight.grad is None


def test_what_autocast_would_convert_stays_as_it_is(monkeypatch):
    model, x, _ = network()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x)
        loss.backward()

    assert computed_beside(monkeypatch, run) == 0


class Stream:
    """What two streams are told, in order."""

    def __init__(self, name: str, told: list[tuple[str, str, object]]) -> None:
        self.name, self.told, self.device, self.events = name, told, CPU, 0

    def wait_stream(self, other: "Stream") -> None:
        self.told.append((self.name, "waits for", other.name))

    def wait_event(self, event: int) -> None:
        self.told.append((self.name, "waits for", event))

    def record_event(self) -> int:
        self.events += 1
        self.told.append((self.name, "records", self.events))
        return self.events


def test_the_streams_wait_for_each_other(monkeypatch):
    model, x, _ = network()
    told: list[tuple[str, str, object]] = []
    here, beside = Stream("here", told), Stream("beside", told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with WeightGradientsBeside(CPU) as mode:
        mode._stream = beside
        model(x.detach()).backward()
    # three layers before the others; the shared one takes no part
    count = 3 + 2 * AHEAD
    expected = []
    for number in range(1, count + 1):
        expected += [("beside", "waits for", "here"), ("beside", "records", number)]
        if number > AHEAD:
            expected.append(("here", "waits for", number - AHEAD))
    assert told == [*expected, ("here", "waits for", "beside")]
    told.clear()
    # as a capture would, which may not wait for a stream outside it
    with mode:
        model.requires_grad_(False)(x).backward()
    assert told == []


@pytest.mark.gpu
def test_a_captured_step_has_the_gradients_of_an_ordinary_one():
    model, x, learnt = network(torch.device("cuda"))
    step = GraphedStep(lambda x: (model(x), None), learnt, wanted=True)
    for _ in range(3):
        x = torch.randn_like(x)
        plain = torch.autograd.grad(model(x), learnt)
        for parameter in learnt:
            parameter.grad = None
        loss, _ = step(x)
        step.backward(loss)
        assert step._replay is not None
        for parameter, theirs in zip(learnt, plain, strict=True):
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_step_without_such_layers_is_captured_too():
    rows = nn.Parameter(torch.randn(4, 8, device="cuda"))
    step = GraphedStep(lambda x: ((rows * x).square().sum(), None), [rows], wanted=True)
    x = torch.randn(8, device="cuda")
    loss, _ = step(x)
    step.backward(loss)
    assert step._replay is not None
    torch.testing.assert_close(rows.grad, (2 * rows * x.square()).detach())
