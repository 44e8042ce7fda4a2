"""Schedules of learning rates and weights."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import optax


def schedule(spec: dict[str, Any], steps: int) -> optax.Schedule:
    """A schedule of a learning rate or a weight, as an optax schedule.

    **Arguments:**

    - `spec`: One of `{"kind": "constant", "value": v}`,
        `{"kind": "exponential", "start": a, "end": b}` (a to b over all steps),
        `{"kind": "cosine", "start": a, "end": b}`,
        `{"kind": "inverse", "start": a, "rate": r}` ($a / (1 + r k)$ at step $k$).
    - `steps`: The number of training steps.

    **Returns:**

    A function from the step to the value.

    **Raises:**

    - `ValueError` for an unknown kind, a missing or surplus number, what is not a
        finite number, or a start, an end or a rate that such a schedule cannot have.
    """
    _check_schedule(spec)
    match spec["kind"]:
        case "constant":
            return optax.constant_schedule(spec["value"])
        case "exponential":
            rate = spec["end"] / spec["start"]
            return optax.exponential_decay(spec["start"], steps, rate)
        case "cosine":
            end = spec["end"] / spec["start"]
            return optax.cosine_decay_schedule(spec["start"], steps, end)
        case "inverse":
            start, rate = spec["start"], spec["rate"]
            return lambda step: start / (1 + rate * step)


_NUMBERS = {
    "constant": {"value"},
    "exponential": {"start", "end"},
    "cosine": {"start", "end"},
    "inverse": {"start", "rate"},
}


def _check_schedule(spec: dict[str, Any]) -> None:
    if not isinstance(spec, Mapping):
        raise ValueError(f"schedule {spec}: write {{kind: constant, value: {spec}}}.")
    given = {name: value for name, value in spec.items() if name != "kind"}
    for name, value in given.items():
        if not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise ValueError(
                f"schedule {spec}: {name} is not a finite number. (YAML takes 1e-3 for "
                "a text; write 1.0e-3.)"
            )
    kind = spec.get("kind")
    if kind not in _NUMBERS:
        raise ValueError(f"schedule {spec}: kind must be one of {', '.join(_NUMBERS)}.")
    if set(given) != _NUMBERS[kind]:
        names = ", ".join(sorted(_NUMBERS[kind]))
        raise ValueError(f"schedule {spec}: {kind} takes {names}.")
    # An exponential never reaches zero; a cosine may.
    if "end" in given and not (given["start"] > 0 and given["end"] >= 0):
        raise ValueError(f"schedule {spec}: start must be positive, end not negative.")
    if kind == "exponential" and given["end"] == 0:
        raise ValueError(
            f"schedule {spec}: the end of an exponential must be positive."
        )
    if kind == "inverse" and given["rate"] < 0:
        raise ValueError(f"schedule {spec}: rate must not be negative.")
