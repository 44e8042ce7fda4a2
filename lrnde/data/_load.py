"""Loading by name, in a program and on the command line."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence

from ._cifar10 import cifar10
from ._files import cache, DataError, fetch
from ._images import Dataset, digits, mnist
from ._physionet import physionet2012
from ._series import TimeSeries
from ._sources import SOURCES


def _oscillators() -> TimeSeries:
    # Not above: `simulated` makes a `TimeSeries`, and so needs this package first.
    from ..simulated import oscillators

    return oscillators()


_LOADERS: dict[str, Callable[[], Dataset | TimeSeries]] = {
    "cifar10": cifar10,
    "digits": digits,
    "mnist": mnist,
    "oscillators": _oscillators,
    "physionet2012": physionet2012,
    "physionet2012-a": functools.partial(physionet2012, sets=("a",)),
}

# The source of each data set that is read from files.
_SOURCE_OF = {
    "cifar10": "cifar10",
    "mnist": "mnist",
    "physionet2012": "physionet2012",
    "physionet2012-a": "physionet2012",
}


def load(name: str) -> Dataset | TimeSeries:
    """Load a data set by its name.

    **Arguments:**

    - `name`: `"digits"`, `"mnist"` or `"cifar10"` for images; `"oscillators"`,
        `"physionet2012"` (sets a and b) or `"physionet2012-a"` (set a alone) for time
        series.

    **Returns:**

    The `Dataset` or `TimeSeries`.

    **Raises:**

    - `ValueError` for any other name.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; choose from {sorted(_LOADERS)}")
    return _LOADERS[name]()


def _download_again(name: str) -> None:
    if name not in _SOURCE_OF:
        raise DataError(f"{name} is not downloaded: run without --force")
    if os.environ.get("LRNDE_DATA"):
        raise DataError(
            "--force downloads into the cache, but LRNDE_DATA is set, so the cache is "
            "not used: unset LRNDE_DATA first"
        )
    folder = _SOURCE_OF[name]
    source = SOURCES[folder]
    fetch(source.files, source.urls, cache(folder), force=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and verify one data set and print what it holds.

    **Arguments:**

    - `argv`: The command's arguments; those of the process if left out.

    **Returns:**

    The exit status: 0, or 1 after an error message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lrnde.data", description="Fetch and verify a data set."
    )
    parser.add_argument("name", choices=sorted(_LOADERS))
    parser.add_argument("--force", action="store_true", help="download the files again")
    arguments = parser.parse_args(argv)
    try:
        if arguments.force:
            _download_again(arguments.name)
        print(load(arguments.name))
    except (DataError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
