"""torchdiffeq with the same fields, weights and tolerances. Needs the extra `bench`."""

import itertools

import numpy as np
import torch
import torchdiffeq

from lrnde.models import TimeMLP

from .contenders import Contender, Cost
from .problems import ConvNet, Problem


class _Field(torch.nn.Module):
    """Counts its evaluations; the parameters are those of the JAX field."""

    def __init__(self, layers, device):
        super().__init__()
        self.evaluations = 0
        self.weights = torch.nn.ParameterList()
        self.times = torch.nn.ParameterList()
        self.biases = torch.nn.ParameterList()
        for weight, time, bias in layers:
            for target, array in (
                (self.weights, weight),
                (self.times, time),
                (self.biases, bias),
            ):
                tensor = torch.tensor(np.asarray(array), device=device)
                target.append(torch.nn.Parameter(tensor))


class _MLP(_Field):
    def forward(self, t, y):
        self.evaluations += 1
        hidden = torch.addmm(t * self.times[0] + self.biases[0], y, self.weights[0])
        return torch.addmm(
            t * self.times[1] + self.biases[1], torch.tanh(hidden), self.weights[1]
        )


class _Conv(_Field):
    """Channels first in shape, as torch has it; `channels_last` in memory."""

    def forward(self, t, y):
        self.evaluations += 1
        bias = [t * a + b for a, b in zip(self.times, self.biases, strict=True)]
        hidden = torch.nn.functional.conv2d(y, self.weights[0], bias[0], padding=1)
        return torch.nn.functional.conv2d(
            torch.tanh(hidden), self.weights[1], bias[1], padding=1
        )


def _translate(problem: Problem, device):
    field, y0 = problem.field, np.asarray(problem.y0)
    if isinstance(field, TimeMLP):
        layers = [(x.weight, x.time, x.bias) for x in (field.first, field.second)]
        return _MLP(layers, device), torch.tensor(y0, device=device)
    assert isinstance(field, ConvNet)
    layers = [
        (np.transpose(x.kernel, (3, 2, 0, 1)), x.time, x.bias)
        for x in (field.first, field.second)
    ]
    y0 = torch.tensor(y0.transpose(0, 3, 1, 2).copy(), device=device)
    return _Conv(layers, device), y0


def _peak_bytes(call, device) -> int:
    """The most memory that one run holds at a time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def _contenders(problem: Problem, gradient: bool) -> dict[str, Contender]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    field, y0 = _translate(problem, device)
    times = torch.tensor([0.0, 1.0], device=device)

    def solve():
        return torchdiffeq.odeint(
            field,
            y0,
            times,
            rtol=problem.tolerance,
            atol=problem.tolerance,
            method="dopri5",
        )[-1]

    def predict():
        with torch.no_grad():
            solve()
        _wait(device)

    def differentiate():
        field.zero_grad()
        (solve() ** 2).mean().backward()
        _wait(device)

    call = differentiate if gradient else predict
    call()
    field.evaluations = 0
    predict()
    # A first stage, two evaluations for the first step size and six a step.
    cost = Cost(field.evaluations, (field.evaluations - 2) // 6)
    return {"torchdiffeq": Contender(call, _peak_bytes(call, device), cost)}


def _wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def predictions(problem: Problem) -> dict[str, Contender]:
    """Solves without a gradient."""
    return _contenders(problem, gradient=False)


def gradients(problem: Problem) -> dict[str, Contender]:
    """Solves with a gradient."""
    return _contenders(problem, gradient=True)
