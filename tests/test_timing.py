"""Wall times of functions that take turns."""

from functools import partial
from types import SimpleNamespace

import equinox as eqx

from lrnde import experiments, timing
from lrnde.timing import interleave


def set_clock(monkeypatch, clock):
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))


def test_functions_take_turns_in_changing_order():
    calls = []
    functions = {name: partial(calls.append, name) for name in "abcd"}
    seconds = interleave(functions, 30)
    assert list(seconds) == list("abcd")
    assert {len(times) for times in seconds.values()} == {30}
    assert all(time >= 0 for times in seconds.values() for time in times)
    rounds = [tuple(calls[k : k + 4]) for k in range(0, len(calls), 4)]
    assert len(rounds) == 31  # the first is not timed
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(set(rounds)) > 10


def test_the_first_call_is_not_counted(monkeypatch):
    """It compiles; here every call takes as many seconds as were before it."""
    now, calls = [0.0], [0]

    def slower():
        now[0] += calls[0]
        calls[0] += 1

    set_clock(monkeypatch, lambda: now[0])
    assert interleave({"one": slower}, 3) == {"one": [1.0, 2.0, 3.0]}


def test_a_prediction_takes_its_median_time(monkeypatch):
    # Between the two looks at the clock of a call go 5 s in the first, then 1, 9 and 2.
    clock = iter([0.0, 5.0, 0.0, 1.0, 0.0, 9.0, 0.0, 2.0])
    set_clock(monkeypatch, lambda: next(clock))
    models = {"model": eqx.nn.Identity()}
    assert experiments.time_predictions(lambda model: model(1.0), models, 3) == {
        "model": 2.0
    }
