"""CIFAR-10."""

import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from ._files import DataError, expected, given_folder, mismatch, read, read_verified
from ._images import Dataset
from ._sources import SOURCES

# One name for the source, the folder of its files and that of the cache.
_NAME = "cifar10"

# The folder that the archive unpacks to.
_UNPACKED = "cifar-10-batches-bin"

_CLASSES = 10
_SIDE = 32
_CHANNELS = 3
_RECORD = 1 + _CHANNELS * _SIDE**2


def cifar10(folder: str | os.PathLike | None = None) -> Dataset:
    """CIFAR-10: photographs of 32x32 pixels in red, green and blue, ten classes.

    A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009). There
    is no formal licence: whoever uses the images is asked to cite the report.

    The classes are airplane, automobile, bird, cat, deer, dog, frog, horse, ship and
    truck. Use `standardised` for the normalisation that is usual, and `averaged_down`
    for smaller images.

    **Arguments:**

    - `folder`: A folder whose sub-folder `cifar10` has the binary version of the data
        set, which is only read: `cifar-10-binary.tar.gz` or, where that is not there,
        the six `.bin` files from it, in `cifar10` itself or its sub-folder
        `cifar-10-batches-bin`. Left out, it is the one that `LRNDE_DATA` names, and
        where that is not set either, the archive is downloaded once into the cache.

    **Returns:**

    A `Dataset` of 50,000 training and 10,000 test images, 737 MB of them.

    **Raises:**

    - `DataError` if a file is missing, damaged, malformed or cannot be downloaded: it
        names the file, what was expected, and what to do.
    """
    batches = _read_unpacked(folder) or _unpack(*read(_NAME, folder))
    names = [file.name for file in SOURCES[_NAME].members]
    records = [_records(name, batches.pop(name)) for name in names]
    x_train, y_train = _decode(records[:-1])
    x_test, y_test = _decode(records[-1:])
    return Dataset(
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        name=_NAME,
        image_shape=(_SIDE, _SIDE, _CHANNELS),
    )


def _read_unpacked(folder: str | os.PathLike | None) -> dict[str, bytes] | None:
    """The verified batches by name, if they are there in place of the archive."""
    given = given_folder(_NAME, folder)
    if given is None:
        return None
    home, remedy = given
    (archive,), _, members = SOURCES[_NAME]
    if os.path.exists(home / archive.name):
        return None
    for place in home, home / _UNPACKED:
        if any(os.path.exists(place / file.name) for file in members):
            return {
                file.name: read_verified(place / file.name, file, remedy)
                for file in members
            }
    return None


def _unpack(content: bytes) -> dict[str, bytes]:
    """The verified batches in the archive by name.

    Nothing is written to a disk, and what else the archive holds is passed over.
    """
    (archive,), _, members = SOURCES[_NAME]
    found = dict(_members(archive.name, content))
    for file in members:
        where = f"{archive.name}, {file.name}"
        if file.name not in found:
            raise DataError(f"{where} is missing. {expected(file)}")
        problem = mismatch(found[file.name], file)
        if problem:
            raise DataError(f"{where} {problem}. {expected(file)}")
    return found


def _members(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Name without folder and contents of each batch in an archive."""
    wanted = {file.name for file in SOURCES[_NAME].members}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            for member in tar:
                base = PurePosixPath(member.name).name
                if member.isfile() and base in wanted:
                    yield base, tar.extractfile(member).read()
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{name} is not a whole .tar.gz file: {error}") from error


def _records(name: str, content: bytes) -> UInt8[np.ndarray, "n record"]:
    """The records of a batch: a label each, then the rows of red, green and blue."""
    if not content or len(content) % _RECORD:
        raise DataError(
            f"{name} has {len(content):,} bytes; expected records of {_RECORD:,} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    wrong = np.flatnonzero(records[:, 0] >= _CLASSES)
    if len(wrong):
        raise DataError(
            f"{name}, record {wrong[0] + 1} has the label {records[wrong[0], 0]}; "
            f"expected 0 to {_CLASSES - 1}"
        )
    return records


def _decode(
    batches: Sequence[UInt8[np.ndarray, "_ record"]],
) -> tuple[Float32[np.ndarray, "n d"], Int32[np.ndarray, " n"]]:
    """Flattened images, values in [0, 1] and channels last, and labels."""
    labels = np.concatenate([records[:, 0] for records in batches])
    images = np.empty((len(labels), _SIDE, _SIDE, _CHANNELS), np.float32)
    start = 0
    for records in batches:
        planes = records[:, 1:].reshape(-1, _CHANNELS, _SIDE, _SIDE)
        part = images[start:][: len(records)]
        np.divide(planes.transpose(0, 2, 3, 1), np.float32(255), out=part)
        start += len(records)
    return images.reshape(len(labels), -1), labels.astype(np.int32)
