"""Data sets, where their files come from, and the order in which they are seen.

The image sets come as one `Dataset`. Files are read from the folder that the
environment variable `LRNDE_DATA` names (one sub-folder a data set, never written
to), or else downloaded once into the user's cache. Either way each file must have
its known size and SHA-256 before a byte of it is used.

`python -m lrnde.data NAME` fetches and verifies a data set; `--force` downloads its
files anew.
"""

import argparse
import functools
import gzip
import hashlib
import importlib
import math
import operator
import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt8
from tqdm import tqdm


class DataError(RuntimeError):
    """A data file is missing, damaged, or could not be downloaded."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images, split into a training and a test part.

    **Arguments:**

    - `x_train`: Training images, one flattened image a row, values in [0, 1].
    - `y_train`: Training labels, 0 up to the number of classes less one.
    - `x_test`: Test images, as `x_train`.
    - `y_test`: Test labels, as `y_train`.
    - `name`: What the data set is called in tables and records.
    - `image_shape`: Shape of an image before flattening, (rows, columns).

    **Raises:**

    A `ValueError` if the arrays do not fit together.
    """

    x_train: Float[np.ndarray, "n_train d"]
    y_train: Int32[np.ndarray, " n_train"]
    x_test: Float[np.ndarray, "n_test d"]
    y_test: Int32[np.ndarray, " n_test"]
    name: str
    image_shape: tuple[int, ...]

    def __post_init__(self):
        d = math.prod(self.image_shape)
        for part in ("train", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if x.shape != (len(y), d):
                raise ValueError(
                    f"x_{part} of {self.name!r} has shape {x.shape}; {len(y)} labels "
                    f"and images of shape {self.image_shape} need {(len(y), d)}"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes, that is, one more than the largest training label."""
        return int(self.y_train.max()) + 1

    def __repr__(self):
        return (
            f"{self.name}: {len(self.y_train)} training and {len(self.y_test)} test "
            f"images of {'x'.join(map(str, self.image_shape))} pixels, "
            f"{self.num_classes} classes"
        )


def digits() -> Dataset:
    """The handwritten digits that come with scikit-learn: 1797 images of 8x8 pixels.

    One in five is held out for testing, drawn class by class; the split is always
    the same.

    **Returns:**

    A `Dataset` of 1437 training and 360 test images.

    **Raises:**

    An `ImportError` if scikit-learn is not installed.
    """
    images = _import("sklearn.datasets", "scikit-learn").load_digits()
    split = _import("sklearn.model_selection", "scikit-learn").train_test_split
    x_train, x_test, y_train, y_test = split(
        images.data,
        images.target,
        test_size=0.2,
        stratify=images.target,
        random_state=0,
    )
    return Dataset(
        x_train=_unit_interval(x_train, 16),
        y_train=y_train.astype(np.int32),
        x_test=_unit_interval(x_test, 16),
        y_test=y_test.astype(np.int32),
        name="digits",
        image_shape=(8, 8),
    )


def mnist(folder: str | os.PathLike | None = None) -> Dataset:
    """The MNIST database of handwritten digits: 28x28 pixels, ten classes.

    Y. LeCun, C. Cortes and C. Burges; licence CC BY-SA 3.0.

    **Arguments:**

    - `folder`: A folder with the four canonical `.gz` files in its sub-folder
        `mnist`; it is only read. Left out, it is the one that `LRNDE_DATA` names, and
        where that is not set either, the files are downloaded once into the cache.

    **Returns:**

    A `Dataset` of 60,000 training and 10,000 test images.

    **Raises:**

    A `DataError` if a file is missing, damaged or cannot be downloaded: it names the
    file, what was expected, and what to do.
    """
    names = [file.name for file in _SOURCES["mnist"].files]
    x_train, y_train, x_test, y_test = map(
        _parse_idx, names, _read("mnist", folder), (3, 1, 3, 1)
    )
    return Dataset(
        x_train=_unit_interval(x_train, 255),
        y_train=y_train.astype(np.int32),
        x_test=_unit_interval(x_test, 255),
        y_test=y_test.astype(np.int32),
        name="mnist",
        image_shape=x_train.shape[1:],
    )


_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": digits, "mnist": mnist}


def load(name: str) -> Dataset:
    """Load a data set by its name.

    **Arguments:**

    - `name`: `"digits"` or `"mnist"`.

    **Returns:**

    The `Dataset`.

    **Raises:**

    A `ValueError` for any other name.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; choose from {sorted(_LOADERS)}")
    return _LOADERS[name]()


def validation_split(dataset: Dataset, size: int, seed: int) -> Dataset:
    """Hold out a part of the training set, to choose settings by.

    The test set plays no part in the result, so nothing can be tuned on it.

    **Arguments:**

    - `dataset`: The data set whose training part is split.
    - `size`: Number of training rows to hold out.
    - `seed`: The held-out rows are a function of this alone.

    **Returns:**

    A `Dataset` that trains on the rows that remain and whose test part is the rows
    held out. Its name ends in `-validation`.

    **Raises:**

    A `ValueError` unless at least one row is held out and at least one remains.
    """
    n = len(dataset.y_train)
    if not 0 < size < n:
        raise ValueError(f"size must be from 1 to {n - 1}, not {size}")
    held_out = np.zeros(n, bool)
    held_out[_permutation(n, seed, 0)[:size]] = True
    return replace(
        dataset,
        x_train=dataset.x_train[~held_out],
        y_train=dataset.y_train[~held_out],
        x_test=dataset.x_train[held_out],
        y_test=dataset.y_train[held_out],
        name=f"{dataset.name}-validation",
    )


@dataclass(frozen=True)
class Batches:
    """An endless sequence of training batches with random access.

    `batches[step]` holds the row numbers of batch number `step`. Each epoch is a
    fresh permutation of all rows; the epochs are laid end to end and cut every
    `batch_size` rows, so the rows left over at the end of an epoch open the batch
    that continues with the next one. No row is dropped and every batch has the same
    shape. Nothing is replayed to reach a batch: a run that resumes at step k gets
    the very same batch k.

    **Arguments:**

    - `n`: Number of rows.
    - `batch_size`: Rows in a batch.
    - `seed`: The order is a function of this alone.

    **Raises:**

    A `ValueError` if `n` or `batch_size` is below one, or `seed` is negative.
    """

    n: int
    batch_size: int
    seed: int

    def __post_init__(self):
        _check_at_least("n", self.n, 1)
        _check_at_least("batch_size", self.batch_size, 1)
        _check_at_least("seed", self.seed, 0)

    def __getitem__(self, step: int) -> Int[np.ndarray, " batch_size"]:
        if operator.index(step) < 0:
            raise IndexError(f"step must not be negative, got {step}")
        start = operator.index(step) * self.batch_size
        stop = start + self.batch_size
        epochs = range(start // self.n, (stop - 1) // self.n + 1)
        rows = np.concatenate([_permutation(self.n, self.seed, e) for e in epochs])
        return rows[start % self.n :][: self.batch_size]


def padded_batches(
    n: int, batch_size: int
) -> list[tuple[Int[np.ndarray, " batch_size"], Bool[np.ndarray, " batch_size"]]]:
    """Batches for evaluation: every row once and in order, all of one shape.

    The last batch is filled up with rows from the beginning, whose mask is `False`.
    (Real rows rather than zeros: a batch is one ODE state, so what it is filled up
    with takes part in the choice of step sizes.)

    **Arguments:**

    - `n`: Number of rows.
    - `batch_size`: Rows in a batch.

    **Returns:**

    A list of pairs `(indices, mask)`; the rows `indices[mask]` of all pairs together
    are 0 to n - 1.

    **Raises:**

    A `ValueError` if `n` or `batch_size` is below one.
    """
    _check_at_least("n", n, 1)
    _check_at_least("batch_size", batch_size, 1)
    positions = np.arange(math.ceil(n / batch_size) * batch_size)
    positions = positions.reshape(-1, batch_size)
    return list(zip(positions % n, positions < n, strict=True))


def _check_at_least(name: str, value: int, least: int) -> None:
    if operator.index(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@functools.lru_cache(maxsize=8)
def _permutation(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    # Sorting raw bits, not `Generator.permutation`: NumPy keeps the bit stream of a
    # seed the same in every version, but not what a Generator makes of it.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n), kind="stable")


def _unit_interval(images: np.ndarray, largest: int) -> Float[np.ndarray, "n d"]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(largest)


def _parse_idx(name: str, content: bytes, ndim: int) -> UInt8[np.ndarray, "..."]:
    # IDX: two zero bytes, the type (8: unsigned byte), the number of dimensions; each
    # dimension as a big-endian 32-bit integer; the entries, last index fastest.
    try:
        raw = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a whole gzip file: {error}") from error
    header = 4 + 4 * ndim
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) < header:
        raise DataError(
            f"{name} is not an IDX file of bytes in {ndim} dimensions: it begins with "
            f"{raw[:header].hex(' ')}, expected 00 00 08 {ndim:02x} and {ndim} lengths"
        )
    shape = struct.unpack_from(f">{ndim}I", raw, 4)
    if len(raw) - header != math.prod(shape):
        raise DataError(
            f"{name} holds {len(raw) - header} entries; its header says {shape}, that "
            f"is, {math.prod(shape)}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


class _File(NamedTuple):
    name: str
    size: int
    sha256: str


class _Source(NamedTuple):
    files: Sequence[_File]
    urls: Sequence[str]  # mirrors: each file is at url + name


_SOURCES = {
    "mnist": _Source(
        files=(
            _File(
                "train-images-idx3-ubyte.gz",
                9912422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            _File(
                "train-labels-idx1-ubyte.gz",
                28881,
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            _File(
                "t10k-images-idx3-ubyte.gz",
                1648877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            _File(
                "t10k-labels-idx1-ubyte.gz",
                4542,
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        urls=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://raw.githubusercontent.com/fgnt/mnist/master/",
        ),
    ),
}


def _read(name: str, folder: str | os.PathLike | None) -> list[bytes]:
    """The verified contents of a data set's files, downloaded first where needed."""
    source = _SOURCES[name]
    origin = "the argument `folder`" if folder else "LRNDE_DATA"
    given = folder or os.environ.get("LRNDE_DATA")
    if given:
        home = Path(given).expanduser() / name
        remedy = (
            f"The folder comes from {origin} and is never written to: put a good copy "
            f"of the file there, or leave {origin} unset and run "
            f"`python -m lrnde.data {name}` to download the data into the cache."
        )
    else:
        home = _cache(name)
        _fetch(source.files, source.urls, home)
        remedy = f"Run `python -m lrnde.data {name} --force` to download it again."
    return [_read_verified(home / file.name, file, remedy) for file in source.files]


def _read_verified(path: Path, file: _File, remedy: str) -> bytes:
    content = b""
    try:
        content = path.read_bytes()
        problem = _mismatch(content, file)
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        raise DataError(f"{path} {problem}. {_expected(file)} {remedy}")
    return content


def _mismatch(content: bytes, file: _File) -> str | None:
    if len(content) < file.size:
        return f"is truncated: it has {len(content):,} bytes"
    if len(content) > file.size:
        return f"is not the right file: it has {len(content):,} bytes"
    digest = hashlib.sha256(content).hexdigest()
    return None if digest == file.sha256 else f"is corrupt: its SHA-256 is {digest}"


def _expected(file: _File) -> str:
    return f"Expected {file.size:,} bytes with SHA-256 {file.sha256}."


def _cache(name: str) -> Path:
    return Path(_import("pooch", "pooch").os_cache("lrnde")) / name


def _fetch(
    files: Sequence[_File], urls: Sequence[str], folder: Path, force: bool = False
) -> None:
    """Download the files that the folder lacks, or all of them with `force`."""
    for file in files:
        if force or not (folder / file.name).exists():
            _download_from_any(file, urls, folder)


def _download_from_any(file: _File, urls: Sequence[str], folder: Path) -> None:
    failures = []
    for url in urls:
        try:
            return _download(url + file.name, file, folder)
        except (OSError, DataError) as error:  # those of requests are OSErrors
            failures.append(f"  {url}{file.name}: {error}")
    raise DataError(
        "\n".join([f"{folder / file.name} could not be downloaded:", *failures])
        + f"\n{_expected(file)} Whatever was there before is untouched. Run "
        f"`python -m lrnde.data {folder.name} --force` to try again, or set LRNDE_DATA "
        f"to a folder that holds {folder.name}/{file.name}."
    )


def _download(url: str, file: _File, folder: Path) -> None:
    # Into a folder beside its final place, so that only a verified file takes that
    # place, and takes it in one stroke.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        part = Path(scratch) / file.name
        with (
            open(part, "w+b") as out,
            tqdm(total=file.size, desc=file.name, unit="B", unit_scale=True) as bar,
        ):
            _downloader(bar)(url, out, None)
            os.fsync(out.fileno())
        problem = _mismatch(part.read_bytes(), file)
        if problem:
            raise DataError(f"what arrived {problem}")
        os.replace(part, folder / file.name)


def _downloader(bar: tqdm) -> Callable:
    # "identity": a server that calls a .gz file a compressed transfer of its contents
    # would otherwise have it unpacked on arrival.
    return _import("pooch", "pooch").HTTPDownloader(
        progressbar=bar, chunk_size=2**16, headers={"Accept-Encoding": "identity"}
    )


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"this needs {package}: pip install 'lrnde[book]'") from error


def _download_again(name: str) -> None:
    if name not in _SOURCES:
        raise DataError(f"{name} is not downloaded: run without --force")
    if os.environ.get("LRNDE_DATA"):
        raise DataError(
            "--force downloads into the cache, but LRNDE_DATA is set, so the cache is "
            "not used: unset LRNDE_DATA first"
        )
    _fetch(*_SOURCES[name], _cache(name), force=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and verify one data set and print a line about it.

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


if __name__ == "__main__":
    sys.exit(main())
