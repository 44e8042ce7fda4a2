"""What all experiments have in common: their settings and their evaluation."""

import math
from dataclasses import dataclass, fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrnde import experiments
from lrnde.experiments._evaluation import in_batches

WHOLE_NUMBERS = [
    (experiment, setting.name)
    for experiment, config in experiments.EXPERIMENTS.items()
    for setting in fields(config)
    if setting.type is int
]


def with_setting(experiment, name, value):
    config = experiments.EXPERIMENTS[experiment]()
    object.__setattr__(config, name, value)  # past the type check of these tests
    config.__post_init__()


@pytest.mark.parametrize(("experiment", "name"), WHOLE_NUMBERS)
def test_a_whole_number_is_whole_and_has_a_least_value(experiment, name):
    for value in (2.0e4, "8", True, -1):
        with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole num"):
            with_setting(experiment, name, value)
    with_setting(experiment, name, 2)


def test_a_least_value_is_inherited():
    @dataclass(frozen=True)
    class Mine(experiments.PhysioNet):
        least = experiments.PhysioNet.least | {"extra": 5}
        kl_wait: int = 0
        extra: int = 5

    assert Mine().kl_wait == 0
    with pytest.raises(ValueError, match="extra=4 must be .* at least 5"):
        Mine(extra=4)


@given(examples=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_an_evaluation_sees_every_example_once(examples, batch_size):
    seen = []

    def score(number, rows, mask):
        seen.extend(rows[mask])
        return (np.sum(mask),), number, True

    found, nfe = in_batches(score, examples, batch_size)
    assert sorted(seen) == list(range(examples))
    assert sum(count for (count,) in found) == examples
    assert nfe == (len(found) - 1) / 2


def test_an_evaluation_that_did_not_work_out_is_no_result():
    def score(number, rows, mask):
        return (), None, number == 0

    assert math.isnan(in_batches(score, 4, 4)[1])  # of an implicit solver
    with pytest.raises(RuntimeError, match="a solve needs more than"):
        in_batches(score, 5, 4)
