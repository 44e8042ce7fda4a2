"""The PhysioNet/Computing in Cardiology Challenge 2012."""

import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from .._files import write_atomically
from ._files import cache, DataError, read
from ._series import normalised_split, TimeSeries

# One name for the source, the folder of its files and that of the cache.
_NAME = "physionet2012"

# Change it whenever the same files are to give other records.
_PARSER = 1

_HOURS = 49

_HEADER = "Time,Parameter,Value"

# What is not a series. In the place of a channel, `_DESCRIPTOR` stands for these and
# `_UNNAMED` for no name at all.
_DESCRIPTORS = ("RecordID", "Age", "Gender", "Height", "ICUType")
_DESCRIPTOR, _UNNAMED = -1, -2

_CHANNELS = (
    *("Albumin", "ALP", "ALT", "AST", "Bilirubin", "BUN", "Cholesterol", "Creatinine"),
    *("DiasABP", "FiO2", "GCS", "Glucose", "HCO3", "HCT", "HR", "K", "Lactate", "MAP"),
    *("MechVent", "Mg", "Na", "NIDiasABP", "NIMAP", "NISysABP", "PaCO2", "PaO2", "pH"),
    *("Platelets", "RespRate", "SaO2", "SysABP", "Temp", "TroponinI", "TroponinT"),
    *("Urine", "WBC", "Weight"),
)


def physionet2012(
    sets: Sequence[str] = ("a", "b"),
    seed: int = 0,
    folder: str | os.PathLike | None = None,
) -> TimeSeries:
    """The first 48 hours of stays in intensive care, in 37 variables.

    The PhysioNet/Computing in Cardiology Challenge 2012, version 1.0.0: I. Silva et
    al., Predicting in-hospital mortality of ICU patients, Computing in Cardiology 39
    (2012); A. L. Goldberger et al., PhysioBank, PhysioToolkit, and PhysioNet,
    Circulation 101 (2000). Licence ODC-By 1.0.

    The records are read as follows; `counts` says how often.

    - A time is rounded to the nearest full hour, and half an hour to the even one, as
        in Y. Rubanova et al., Latent ODEs for irregularly-sampled time series (2019).
        There are 49 times, `hour / 48`.
    - The weight on admission is an observation of Weight at hour 0. The descriptors
        RecordID, Age, Gender, Height and ICUType are left out: they are not series.
    - Several observations of a variable in one hour become their mean.
    - A value of -1 means that it is missing. Other odd values are kept as recorded,
        such as a temperature of -17.8 degrees Celsius (0 degrees Fahrenheit).
    - Rows without the name of a parameter are skipped.
    - Stays without any observation are left out. The others are in the order of their
        record numbers.

    Everything else that is not as the Challenge describes it is an error. What was
    read is kept in the user's cache, so that the next time takes less of it.

    **Arguments:**

    - `sets`: Which of the Challenge's sets of 4,000 stays to take together: some of
        `"a"`, `"b"` and `"c"`.
    - `seed`: Which fifth of the stays is held out for testing is a function of this.
    - `folder`: A folder with the files `set-a.tar.gz` and so on in its sub-folder
        `physionet2012`; it is only read. Left out, it is the one that `LRNDE_DATA`
        names, and where that is not set either, the files are downloaded once into
        the cache.

    **Returns:**

    A `TimeSeries`.

    **Raises:**

    - `ValueError` for other sets or none.
    - `DataError` if a file is missing, damaged, malformed or cannot be downloaded: it
        names the file, what was expected, and what to do, or the row that is malformed.
    """
    chosen = sorted(set(sets))
    if not chosen or not set(chosen) <= {"a", "b", "c"}:
        raise ValueError(f"sets must be some of 'a', 'b' and 'c', not {sets!r}")
    names = [f"set-{letter}.tar.gz" for letter in chosen]
    tars = dict(zip(names, read(_NAME, folder, names), strict=True))
    records = _load_or_parse(tars)
    values = np.zeros((len(records.ids), _HOURS, len(_CHANNELS)))
    mask = np.zeros(values.shape, bool)
    entries = records.stay, records.hour, records.channel
    values[entries], mask[entries] = records.value, True
    return normalised_split(
        name=_NAME if chosen == ["a", "b"] else f"{_NAME}-{''.join(chosen)}",
        times=np.arange(_HOURS) / (_HOURS - 1),
        values=values,
        mask=mask,
        channels=_CHANNELS,
        seed=seed,
        counts=records.counts,
    )


class _Records(NamedTuple):
    """Stays with observations, and the means of these that are not missing.

    - `ids`: Record numbers of the stays, increasing.
    - `stay`: For each mean, the row of its stay in `ids`.
    - `hour`: Its hour.
    - `channel`: Its number in `_CHANNELS`.
    - `value`: The mean itself.
    - `counts`: What was found and done.
    """

    ids: Int[np.ndarray, " stays"]
    stay: Int[np.ndarray, " entries"]
    hour: Int[np.ndarray, " entries"]
    channel: Int[np.ndarray, " entries"]
    value: Float64[np.ndarray, " entries"]
    counts: dict[str, int]


def _load_or_parse(tars: Mapping[str, bytes]) -> _Records:
    """Parses the files unless the cache has what was parsed from the same ones."""
    digests = [hashlib.sha256(content).hexdigest() for content in tars.values()]
    key = hashlib.sha256(" ".join([str(_PARSER), *digests]).encode()).hexdigest()
    try:
        path = cache(_NAME) / f"records-{key[:16]}.npz"
    except ImportError:  # only a download needs pooch
        return _parse(tars)
    try:
        return _decode(path.read_bytes())
    except (OSError, ValueError):
        records = _parse(tars)
    try:
        write_atomically(path, _encode(records))
    except OSError:
        pass  # a cache that cannot be written to only costs time
    return records


def _encode(records: _Records) -> bytes:
    arrays = records._asdict() | {"counts": np.array(json.dumps(records.counts))}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return hashlib.sha256(file.getvalue()).digest() + file.getvalue()


def _decode(content: bytes) -> _Records:
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("damaged")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        arrays = dict(arrays)
    return _Records(**arrays | {"counts": json.loads(arrays["counts"].item())})


def _parse(tars: Mapping[str, bytes]) -> _Records:
    texts: dict[int, tuple[str, bytes]] = {}
    for name, content in tars.items():
        for record, where, text in _members(name, content):
            if record in texts:
                raise DataError(f"{where} repeats the record of {texts[record][0]}")
            texts[record] = where, text
    ids = sorted(texts)
    tables = [np.array(list(_rows(record, *texts[record]))) for record in ids]
    rows = np.concatenate(tables)
    hour, channel = rows[:, :2].T.astype(int)
    stay = np.repeat(np.arange(len(ids)), [len(table) for table in tables])
    named = channel >= 0
    observed = named & (rows[:, 2] != -1)
    shape = len(ids), _HOURS, len(_CHANNELS)
    cells, cell = np.unique(
        np.ravel_multi_index(
            (stay[observed], hour[observed], channel[observed]), shape
        ),
        return_inverse=True,
    )
    means = np.bincount(cell, weights=rows[observed, 2]) / np.bincount(cell)
    counts = {
        "observations": len(cell),
        "observations averaged with an earlier one": len(cell) - len(cells),
        "missing values (-1)": np.sum(named & ~observed),
        "rows without a parameter": np.sum(channel == _UNNAMED),
    }
    stay, hour, channel = np.unravel_index(cells, shape)
    kept, stay = np.unique(stay, return_inverse=True)
    counts |= {"stays": len(ids), "stays without observations": len(ids) - len(kept)}
    return _Records(
        ids=np.array(ids)[kept],
        stay=stay.astype(np.int32),
        hour=hour.astype(np.int8),
        channel=channel.astype(np.int8),
        value=means,
        counts={name: int(count) for name, count in counts.items()},
    )


def _members(name: str, content: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Record number, place and text of each record in an archive.

    Nothing is written to a disk, whatever the archive says.
    """
    folder = name.removesuffix(".tar.gz")
    pattern = re.compile(rf"(?:\./)?{folder}/([0-9]{{1,18}})\.txt")
    try:
        # Unpacked as a whole, since only the end of a gzip file says that it is sound.
        raw = gzip.decompress(content)
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                match = pattern.fullmatch(member.name)
                if member.isfile() and match:
                    text = tar.extractfile(member).read()
                    yield int(match[1]), f"{name}, {folder}/{match[1]}.txt", text
                elif not (member.isdir() and member.name in (folder, f"./{folder}")):
                    raise DataError(
                        f"{name} holds {member.name!r}; expected nothing but plain "
                        f"files {folder}/NUMBER.txt"
                    )
            if not any(member.isfile() for member in tar.getmembers()):
                raise DataError(f"{name} holds no records")
            # What follows the last member is all zeros. (To tarfile, a damaged header
            # is the end like any other.)
            if not re.fullmatch(rb"\0{1024,}", raw[tar.offset :]):
                raise tarfile.ReadError(f"no end after {tar.offset} bytes")
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{name} is not a whole .tar.gz file: {error}") from error


def _rows(record: int, where: str, text: bytes) -> Iterator[tuple[int, int, float]]:
    """Hour, channel and value of each row of a record.

    A row that is no observation has a negative number in the place of the channel.
    """
    # What is valid has no backslash, so whatever is not ASCII is found below.
    lines = text.decode("ascii", "backslashreplace").replace("\r\n", "\n")
    header, *rows = lines.removesuffix("\n").split("\n")
    if header != _HEADER:
        raise DataError(f"{where}, line 1: expected {_HEADER!r}: {header!r}")
    identified = False
    for number, row in enumerate(rows, 2):
        try:
            time, name, value = _fields(row)
            hour, channel, value = _hour(time), _channel(name), _number(value)
            if name == "RecordID" and value != record:
                raise ValueError(f"expected RecordID {record}")
        except ValueError as error:
            raise DataError(f"{where}, line {number}: {error}: {row!r}") from error
        yield hour, channel, value
        identified |= name == "RecordID"
    if not identified:
        raise DataError(f"{where} has no RecordID in its {len(rows) + 1} lines")


def _fields(row: str) -> list[str]:
    fields = row.split(",")
    if len(fields) != 3:
        raise ValueError("expected three fields")
    return fields


# Cached, since millions of rows share few different times, names and values.


@functools.lru_cache(maxsize=2**12)
def _hour(time: str) -> int:
    match = re.fullmatch("([0-9]{2}):([0-5][0-9])", time)
    minutes = 60 * int(match[1]) + int(match[2]) if match else math.inf
    if minutes > 48 * 60:
        raise ValueError("expected a time HH:MM up to 48:00")
    return round(minutes / 60)  # and half an hour to even


@functools.lru_cache(maxsize=2**6)
def _channel(name: str) -> int:
    if name in _CHANNELS:
        return _CHANNELS.index(name)
    if name in _DESCRIPTORS:
        return _DESCRIPTOR
    if name:
        raise ValueError("unknown parameter")
    return _UNNAMED


@functools.lru_cache(maxsize=2**16)
def _number(text: str) -> float:
    match = re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text)
    if not match or math.isinf(float(text)):
        raise ValueError("expected a finite number")
    return float(text)
