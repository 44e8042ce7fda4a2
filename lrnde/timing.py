"""Wall times of functions that take turns."""

import random
import time
from collections.abc import Callable, Mapping

import jax


def interleave(
    functions: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Times functions side by side.

    They take turns, so that a change in the machine's speed meets all of them, and in a
    new order each round, so that none always runs after the same other one, whose
    memory it finds in the cache. Compare them by ratios of medians within one call.

    **Arguments:**

    - `functions`: From a name to a function of no arguments. Arrays that it returns are
        waited for.
    - `repeats`: How often each is timed, after one call that compiles and warms up.

    **Returns:**

    From the name to `repeats` wall times, in seconds.
    """
    seconds = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(repeats + 1):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}
