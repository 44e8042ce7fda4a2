"""Labelled images."""

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float64, Int32, UInt8

from .._extras import import_extra
from ._files import DataError, read
from ._sources import SOURCES


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images, split into a training and a test part.

    **Arguments:**

    - `x_train`: Training images, one flattened image a row, values in [0, 1] unless
        they are `standardised`.
    - `y_train`: Training labels, 0 up to the number of classes less one.
    - `x_test`: Test images, as `x_train`.
    - `y_test`: Test labels, as `y_train`.
    - `name`: What the data set is called in tables and records.
    - `image_shape`: Shape of an image before flattening: (rows, columns) if it is
        grey, (rows, columns, channels) if it has colours.

    **Raises:**

    - `ValueError` if the arrays do not fit together.
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

    - `ImportError` if scikit-learn is not installed.
    """
    images = import_extra("sklearn.datasets", "scikit-learn").load_digits()
    split = import_extra("sklearn.model_selection", "scikit-learn").train_test_split
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

    - `DataError` if a file is missing, damaged or cannot be downloaded: it names the
        file, what was expected, and what to do.
    """
    names = [file.name for file in SOURCES["mnist"].files]
    x_train, y_train, x_test, y_test = map(
        _parse_idx, names, read("mnist", folder), (3, 1, 3, 1)
    )
    return Dataset(
        x_train=_unit_interval(x_train, 255),
        y_train=y_train.astype(np.int32),
        x_test=_unit_interval(x_test, 255),
        y_test=y_test.astype(np.int32),
        name="mnist",
        image_shape=x_train.shape[1:],
    )


def averaged_down(dataset: Dataset, factor: int) -> Dataset:
    """Smaller images: each square block of pixels becomes one pixel, its mean.

    **Arguments:**

    - `dataset`: The data set whose images are averaged.
    - `factor`: Rows and columns in a block.

    **Returns:**

    The `Dataset` of the smaller images, with their size at the end of its name, as in
    `cifar10-16x16`.

    **Raises:**

    - `ValueError` unless the blocks fill the images.
    """
    rows, columns, *channels = dataset.image_shape
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(
            f"factor must divide the {rows} rows and {columns} columns of the images "
            f"of {dataset.name!r}, got {factor}"
        )
    small = rows // factor, columns // factor
    shape = (*small, *channels)

    def average(x):
        blocks = x.reshape(-1, small[0], factor, small[1], factor, *channels)
        places = np.ndindex(factor, factor)
        total = sum(blocks[:, :, row, :, column] for row, column in places)
        return (total / factor**2).reshape(-1, math.prod(shape))

    return replace(
        dataset,
        x_train=average(dataset.x_train),
        x_test=average(dataset.x_test),
        name=f"{dataset.name}-{small[0]}x{small[1]}",
        image_shape=shape,
    )


def standardised(dataset: Dataset) -> Dataset:
    """The same images with mean 0 and standard deviation 1 in each channel.

    Both are those of the training part, over all its images and pixels; the test part
    plays no role and is only transformed alike. A channel that is constant in the
    training part is only shifted.

    **Arguments:**

    - `dataset`: The data set to standardise; a grey one has one channel.

    **Returns:**

    The standardised `Dataset`, of the same name.
    """
    x = dataset.x_train
    moments = _moments(x, channels=math.prod(dataset.image_shape[2:]))
    mean, deviation = (np.resize(m, x.shape[1]).astype(x.dtype) for m in moments)

    def standardise(x):
        shifted = x - mean
        shifted /= deviation  # in place: another copy of the images may be too many
        return shifted

    return replace(
        dataset,
        x_train=standardise(dataset.x_train),
        x_test=standardise(dataset.x_test),
    )


def _moments(
    x: Float[np.ndarray, "n d"], channels: int
) -> tuple[Float64[np.ndarray, " channels"], Float64[np.ndarray, " channels"]]:
    """Mean of each channel and its standard deviation, or 1 where it is constant."""
    mean = x.mean(axis=0, dtype=float).reshape(-1, channels).mean(axis=0)
    centre = np.resize(mean, x.shape[1])
    squares = np.zeros(x.shape[1])
    # A few images at a time, since all of them in double precision take gigabytes.
    for start in range(0, len(x), 1000):
        squares += np.sum((x[start : start + 1000] - centre) ** 2, axis=0)
    variance = squares.reshape(-1, channels).mean(axis=0) / len(x)
    least = x.min(axis=0).reshape(-1, channels).min(axis=0)
    largest = x.max(axis=0).reshape(-1, channels).max(axis=0)
    return mean, np.where(least < largest, np.sqrt(variance), 1)


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
