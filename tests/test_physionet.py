"""The reader of PhysioNet's archives, and the sets of time series it makes."""

import dataclasses
import functools
import gzip
import io
import os
import sys
import tarfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from downloads import DAMAGE, describe, flip, read_all, Server, write_all
from hypothesis import given, settings

from lrnde import data
from lrnde.data import (
    _files,
    _physionet,
    _sources,
    DataError,
    normalised_split,
    TimeSeries,
    validation_split,
)

REAL_DATA = os.environ.get("LRNDE_DATA")
CHANNELS = _physionet._CHANNELS
DESCRIPTORS = "RecordID", "Age", "Gender", "Height", "ICUType"
HEADER = "Time,Parameter,Value"
TAR = "set-a.tar.gz"


# Archives made here


def record(number, *rows):
    return "\n".join([HEADER, f"00:00,RecordID,{number}", *rows]) + "\n"


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def pack(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(file.getvalue(), 1, mtime=0)


def archive(texts, letter="a"):
    """The archive of a set of records, a dictionary from their numbers."""
    files = {f"set-{letter}/{number}.txt": text for number, text in texts.items()}
    return pack(*(member(name, text.encode()) for name, text in files.items()))


def means(records):
    """What was parsed as a dictionary; each entry is there once."""
    entries = list(zip(records.stay, records.hour, records.channel, strict=True))
    assert len(set(entries)) == len(entries) == len(records.value)
    return {
        (int(records.ids[stay]), int(hour), CHANNELS[channel]): value
        for (stay, hour, channel), value in zip(entries, records.value, strict=True)
    }


def parse_one(*rows):
    """The means of a record of the given rows, without its number."""
    entries = means(_physionet._parse({TAR: archive({7: record(7, *rows)})}))
    return {key[1:]: value for key, value in entries.items()}


# Often the same hour, half past, and the same variable.
MINUTES = st.one_of(
    st.integers(0, 180),
    st.integers(0, 48 * 60),
    st.integers(0, 47).map(lambda hour: 60 * hour + 30),
)
TIMES = MINUTES.map(lambda minutes: f"{minutes // 60:02}:{minutes % 60:02}")
NAMES = st.one_of(
    st.sampled_from(["HR", "pH", "Weight"]),
    st.sampled_from(CHANNELS),
    st.sampled_from(["", *DESCRIPTORS[1:]]),
)
NUMBERS = st.one_of(
    st.sampled_from(
        ["-1", "-1.0", "-1e0", "0", "-17.8", "1.234e+04", "+3", ".5", "4."]
    ),
    st.integers(-1000, 1000).map(lambda n: f"{n / 10:g}"),
    st.floats(-1e9, 1e9).map(repr),
)
ROWS = st.lists(st.tuples(TIMES, NAMES, NUMBERS), max_size=30)
RECORDS = st.dictionaries(st.integers(0, 10**9), ROWS, min_size=1, max_size=6)


def nearest_hour(time):
    """The nearest hour by comparison, so not by the rounding that is tested."""
    hour, minute = map(int, time.split(":"))
    return hour + (minute > 30 or (minute == 30 and hour % 2 == 1))


def expected(records):
    """A plain reading of the rules: the means and the counts."""
    groups, missing, unnamed = {}, 0, 0
    for number, rows in records.items():
        for time, name, value in rows:
            if name == "":
                unnamed += 1
            elif name not in DESCRIPTORS and float(value) == -1:
                missing += 1
            elif name not in DESCRIPTORS:
                key = number, nearest_hour(time), name
                groups.setdefault(key, []).append(float(value))
    observations = sum(map(len, groups.values()))
    counts = {
        "observations": observations,
        "observations averaged with an earlier one": observations - len(groups),
        "missing values (-1)": missing,
        "rows without a parameter": unnamed,
        "stays": len(records),
        "stays without observations": len(records) - len({key[0] for key in groups}),
    }
    return {key: np.mean(values) for key, values in groups.items()}, counts


@given(
    records=RECORDS,
    draw=st.data(),
    newline=st.sampled_from(["\n", "\r\n"]),
    final=st.booleans(),
    prefix=st.sampled_from(["", "./"]),
    folder=st.booleans(),
)
def test_records_are_read_by_the_rules(records, draw, newline, final, prefix, folder):
    letters = {number: draw.draw(st.sampled_from("ab")) for number in records}
    tars = {}
    for letter in "ab":
        members = [member(f"{prefix}set-{letter}", kind=tarfile.DIRTYPE)] * folder
        for number, rows in records.items():
            text = record(number, *map(",".join, rows)).replace("\n", newline)
            text = text if final else text.removesuffix(newline)
            if letters[number] == letter:
                name = f"{prefix}set-{letter}/{number}.txt"
                members.append(member(name, text.encode()))
        if letter in letters.values():
            tars[f"set-{letter}.tar.gz"] = pack(*members)
    parsed = _physionet._parse(tars)
    entries, counts = expected(records)
    assert parsed.counts == counts
    assert parsed.ids.tolist() == sorted({key[0] for key in entries})
    found = means(parsed)
    assert found.keys() == entries.keys()
    for key, value in entries.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-12, atol=1e-6)


def test_channels():
    assert len(CHANNELS) == len(set(CHANNELS)) == 37
    assert list(CHANNELS) == sorted(CHANNELS, key=str.lower)
    assert not set(CHANNELS) & set(DESCRIPTORS)
    for name in CHANNELS:
        assert parse_one(f"00:00,{name},2") == {(0, name): 2}


@pytest.mark.parametrize(
    "time, hour",
    [
        *(("00:00", 0), ("00:29", 0), ("00:30", 0), ("00:31", 1), ("01:29", 1)),
        *(("01:30", 2), ("02:30", 2), ("46:30", 46), ("47:29", 47), ("47:30", 48)),
        ("48:00", 48),
    ],
)
def test_half_an_hour_goes_to_the_even_one(time, hour):
    assert parse_one(f"{time},HR,70") == {(hour, "HR"): 70}


def test_observations_of_one_hour_become_their_mean():
    rows = "01:10,HR,60", "01:10,HR,70", "01:29,HR,-1", "01:31,HR,90", "00:45,HR,83"
    assert parse_one(*rows) == {(1, "HR"): 71, (2, "HR"): 90}


# Malformed records

BAD_ROWS = {
    "": "expected three fields",
    "00:10": "expected three fields",
    "00:10,HR": "expected three fields",
    "00:10,HR,70,": "expected three fields",
    "00:10,HR,70,71": "expected three fields",
    "00:10,hr,70": "unknown parameter",
    "00:10, HR,70": "unknown parameter",
    "00:10,Pulse,70": "unknown parameter",
    "00:10,HR\xff,70": "unknown parameter",
    "00:60,HR,70": "expected a time",
    "48:01,HR,70": "expected a time",
    "99:00,HR,70": "expected a time",
    "1:10,HR,70": "expected a time",
    "001:10,HR,70": "expected a time",
    "00:10:00,HR,70": "expected a time",
    "-1:10,HR,70": "expected a time",
    "00:1\u0660,HR,70": "expected a time",
    ",HR,70": "expected a time",
    "00:10 ,HR,70": "expected a time",
    "00:10,HR,": "expected a finite number",
    "00:10,HR,nan": "expected a finite number",
    "00:10,HR,inf": "expected a finite number",
    "00:10,HR,1e999": "expected a finite number",
    "00:10,HR,7_0": "expected a finite number",
    "00:10,HR, 70": "expected a finite number",
    "00:10,HR,7\r0": "expected a finite number",
    "00:10,HR,0x46": "expected a finite number",
    "00:10,HR,\u0667": "expected a finite number",
    "00:10,HR,.": "expected a finite number",
    "00:10,HR,--": "expected a finite number",
    "00:10,Gender,male": "expected a finite number",
    "00:10,,": "expected a finite number",
    "00:99,,70": "expected a time",
    "00:00,RecordID,8": "expected RecordID 7",
    "00:00,RecordID,-1": "expected RecordID 7",
    HEADER: "expected a time",
}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("row, problem", BAD_ROWS.items())
def test_malformed_row(row, problem, at, encoding):
    rows = ["00:07,HR,73", "00:37,HR,77", "01:37,HR,60"]
    rows.insert(at, row)
    text = record(7, *rows).encode(encoding, "replace").replace(b"?", b"\xd9")
    tar = pack(member("set-a/7.txt", text))
    line = at + 3
    with pytest.raises(DataError) as caught:
        _physionet._parse({TAR: tar})
    message = str(caught.value)
    assert message.startswith(f"set-a.tar.gz, set-a/7.txt, line {line}: {problem}")
    quoted = text.split(b"\n")[line - 1].decode("ascii", "backslashreplace")
    assert message.endswith(f": {quoted!r}")


@pytest.mark.parametrize("at", range(3))
def test_row_that_is_not_utf_8(at):
    lines = record(7, "00:07,HR,73").encode().splitlines(keepends=True)
    lines[at] = b"\xff" + lines[at]
    tar = pack(member("set-a/7.txt", b"".join(lines)))
    with pytest.raises(DataError, match=rf"set-a/7\.txt, line {at + 1}: .*xff"):
        _physionet._parse({TAR: tar})


@pytest.mark.parametrize(
    "header", ["", "Time,Parameter", "time,parameter,value", HEADER + ",", " " + HEADER]
)
def test_wrong_header(header):
    text = record(7, "00:07,HR,73").replace(HEADER, header)
    with pytest.raises(DataError, match=r"a\.tar\.gz, set-a/7\.txt, line 1: .*Time,"):
        _physionet._parse({TAR: archive({7: text})})
    assert parse_one("00:07,HR,73")  # with its header it is a good record


@pytest.mark.parametrize(
    "text", ["", HEADER, HEADER + "\n", record(7)[:-2], HEADER + "\n00:07,HR,73\n"]
)
def test_record_without_its_number(text):
    with pytest.raises(DataError, match=r"set-a\.tar\.gz, set-a/7\.txt"):
        _physionet._parse({TAR: archive({7: text})})


@pytest.mark.parametrize("second", ["set-b/7.txt", "set-b/007.txt"])
def test_record_in_two_sets(second):
    good = archive({7: record(7), 8: record(8)})
    other = pack(member(second, record(7).encode()))
    with pytest.raises(DataError, match=rf"{second} repeats .* of .*set-a/7\.txt"):
        _physionet._parse({TAR: good, "set-b.tar.gz": other})


def test_record_twice_in_a_set():
    twice = pack(*[member("set-a/7.txt", record(7).encode())] * 2)
    with pytest.raises(DataError, match=r"set-a/7\.txt repeats"):
        _physionet._parse({TAR: twice})


# Archives that are not as they should be

GOOD = member("set-a/7.txt", record(7, "00:07,HR,73").encode())
TEXT = record(8, "00:07,HR,73").encode()


@pytest.mark.parametrize(
    "bad",
    [
        *(member(name, TEXT) for name in ["../8.txt", "/etc/8.txt", "8.txt"]),
        *(member(name, TEXT) for name in ["set-b/8.txt", "set-a/../set-a/8.txt"]),
        *(member(name, TEXT) for name in ["set-a/../../8.txt", "set-a/sub/8.txt"]),
        *(member(name, TEXT) for name in ["/set-a/8.txt", "../set-a/8.txt"]),
        *(member(name, TEXT) for name in ["set-a/8", "set-a/x.txt", "set-a/.8.txt"]),
        *(member(name, TEXT) for name in ["set-a/8.txt\n", "set-a/\u0668.txt"]),
        member("set-a/8.txt", kind=tarfile.SYMTYPE, link="7.txt"),
        member("set-a/8.txt", kind=tarfile.LNKTYPE, link="set-a/7.txt"),
        member("set-a/8.txt", kind=tarfile.FIFOTYPE),
        member("set-a/8.txt", kind=tarfile.CHRTYPE),
        member("set-a/8.txt", kind=tarfile.BLKTYPE),
        member("set-a/8.txt", kind=tarfile.DIRTYPE),
        member("set-a/sub", kind=tarfile.DIRTYPE),
        member("set-b", kind=tarfile.DIRTYPE),
        member("..", kind=tarfile.DIRTYPE),
        member("/", kind=tarfile.DIRTYPE),
        member("set-a", kind=tarfile.SYMTYPE, link="/etc"),
    ],
    ids=lambda bad: f"{bad[0].name!r}-{bad[0].type.decode()}",
)
@pytest.mark.parametrize("first", [True, False])
def test_member_that_is_no_record_in_its_place(bad, first):
    members = [bad, GOOD] if first else [GOOD, bad]
    with pytest.raises(
        DataError, match=r"set-a\.tar\.gz holds .*; expected nothing but"
    ):
        _physionet._parse({TAR: pack(*members)})


@pytest.mark.parametrize("members", [[], [member("set-a", kind=tarfile.DIRTYPE)]])
def test_archive_without_records(members):
    with pytest.raises(DataError, match=r"set-a\.tar\.gz holds no records"):
        _physionet._parse({TAR: pack(*members)})


SMALL = pack(GOOD, member("set-a/8.txt", TEXT))
ENTRIES = means(_physionet._parse({TAR: SMALL}))
RAW = gzip.decompress(SMALL)


@given(cut=st.integers(0, len(SMALL) - 1))
def test_truncated_archive(cut):
    assert len(ENTRIES) == 2
    with pytest.raises(DataError, match=r"set-a\.tar\.gz (is not a whole|holds no)"):
        _physionet._parse({TAR: SMALL[:cut]})


@given(cut=st.one_of(st.integers(0, 2048 + 1023), st.sampled_from([512, 1024, 2048])))
def test_truncated_archive_in_a_whole_gzip_file(cut):
    # Each record takes two blocks of 512 bytes; after them come two of zeros.
    assert RAW[: 2048 + 1024].endswith(bytes(1024)) and RAW[1024:1029] == b"set-a"
    with pytest.raises(DataError, match=r"set-a\.tar\.gz is not a whole"):
        _physionet._parse({TAR: gzip.compress(RAW[:cut], 1)})


@given(at=st.integers(0, len(SMALL) - 1), bits=st.integers(1, 255))
def test_damaged_archive(at, bits):
    damaged = bytearray(SMALL)
    damaged[at] ^= bits
    try:  # a gzip file has bits that do not matter
        assert means(_physionet._parse({TAR: bytes(damaged)})) == ENTRIES
    except DataError as error:
        assert TAR in str(error)


@given(at=st.integers(0, 2048 + 1023), bits=st.integers(1, 255))
def test_damaged_archive_in_a_whole_gzip_file(at, bits):
    damaged = bytearray(RAW)
    damaged[at] ^= bits
    try:  # nothing guards the text itself: 73 becomes 72
        parsed = _physionet._parse({TAR: gzip.compress(bytes(damaged), 1)})
    except DataError as error:
        assert TAR in str(error)
    else:
        assert 512 <= at % 1024 and at < 2048 and len(means(parsed)) in (1, 2)


def test_nothing_is_written_but_the_cache(use, given_folder, tmp_path):
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    data.load("physionet2012")
    after = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert after == before
    assert read_all(given_folder) == CONTENTS


# The data set as a whole, from archives that are known by their checksums


def number_as_weight(numbers):
    """Records that can be told apart: at hour 0 the weight is the record's number."""
    rng = np.random.default_rng(0)
    return {
        number: record(
            number,
            f"00:00,Weight,{number}",
            *(
                f"{hour:02}:10,HR,{60 + 40 * rng.random():.1f}"
                for hour in range(0, 48, 5)
            ),
            "12:00,Temp,-17.8",
        )
        for number in numbers
    }


SETS = {
    letter: number_as_weight(range(first, first + 20))
    for letter, first in (("a", 100), ("b", 200), ("c", 300))
}
CONTENTS = {
    f"set-{letter}.tar.gz": archive(texts, letter) for letter, texts in SETS.items()
}


@pytest.fixture(autouse=True)
def cache(empty_cache):
    return empty_cache / "physionet2012"


@pytest.fixture
def use(monkeypatch):
    """Replaces the archives and mirrors by the small ones."""

    def use(*urls, contents=CONTENTS, also=()):
        files = tuple(
            describe(name, content, size=False)._replace(also=also)
            for name, content in contents.items()
        )
        source = _sources.Source(files, urls)
        monkeypatch.setitem(_sources.SOURCES, "physionet2012", source)

    return use


@pytest.fixture
def given_folder(tmp_path, monkeypatch, use):
    """A good folder that `LRNDE_DATA` names; there is no mirror to turn to."""
    use()
    monkeypatch.setenv("LRNDE_DATA", str(tmp_path / "given"))
    return write_all(tmp_path / "given" / "physionet2012", CONTENTS)


@pytest.fixture
def parsings(monkeypatch):
    """The names of the archives of each parsing, in a list that grows."""
    calls, parse = [], _physionet._parse

    def counting(tars):
        calls.append([*tars])
        return parse(tars)

    monkeypatch.setattr(_physionet, "_parse", counting)
    return calls


def weights(series, part):
    """The numbers of the records in a part, in order; see `number_as_weight`."""
    column = series.channels.index("Weight")
    x = getattr(series, f"x_{part}")[:, 0, column].astype(float)
    low, high = series.low[column], series.high[column]
    return np.rint(low + x * (high - low)).astype(int).tolist()


def assert_same(a, b):
    assert (a.name, a.channels, a.counts) == (b.name, b.channels, b.counts)
    for field in dataclasses.fields(TimeSeries):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("sets", ["a", "b", "c", "ab", "ba", "ac", "abc", "aab"])
def test_sets(sets, given_folder):
    series = data.physionet2012(tuple(sets), seed=3)
    chosen = sorted(set(sets))
    numbers = [number for letter in chosen for number in SETS[letter]]
    train, test = weights(series, "train"), weights(series, "test")
    assert sorted(train + test) == numbers
    assert train == sorted(train) and test == sorted(test)
    assert len(test) == len(numbers) // 5
    suffix = "" if chosen == ["a", "b"] else f"-{''.join(chosen)}"
    assert series.name == f"physionet2012{suffix}"
    np.testing.assert_allclose(series.times, np.arange(49) / 48, rtol=1e-15)
    assert series.channels == CHANNELS and series.counts["stays"] == len(numbers)


def test_values_are_those_of_the_records(given_folder):
    series = data.physionet2012()
    seen = 0
    for part in "train", "test":
        x, mask = getattr(series, f"x_{part}"), getattr(series, f"mask_{part}")
        assert x.dtype == np.float32 and np.all(x[~mask] == 0)
        values = series.low + x.astype(float) * (series.high - series.low)
        for row, number in enumerate(weights(series, part)):
            letter = "a" if number < 200 else "b"
            tar = {TAR: archive({number: SETS[letter][number]})}
            entries = means(_physionet._parse(tar))
            assert mask[row].sum() == len(entries)
            for (_, hour, name), value in entries.items():
                place = row, hour, CHANNELS.index(name)
                assert mask[place]
                np.testing.assert_allclose(values[place], value, rtol=1e-5)
                seen += 1
    assert seen == 40 * 12


@pytest.mark.parametrize("sets", [(), ("d",), ("a", "d"), ("A",), ("",)])
def test_unknown_sets(sets, given_folder):
    with pytest.raises(ValueError, match="sets must be some of 'a', 'b' and 'c'"):
        data.physionet2012(sets)


def test_load_by_name(given_folder):
    assert_same(data.load("physionet2012"), data.physionet2012(("a", "b")))
    assert_same(data.load("physionet2012-a"), data.physionet2012(("a",)))


def test_only_the_files_of_the_sets_are_read(given_folder, tmp_path):
    (given_folder / "set-a.tar.gz").unlink()
    (given_folder / "set-c.tar.gz").write_bytes(b"")
    assert data.physionet2012(("b",)).counts["stays"] == 20
    for letter, problem in ("a", "is missing"), ("c", "is not the right file"):
        path = given_folder / f"set-{letter}.tar.gz"
        with pytest.raises(DataError, match=f"^{path} {problem}"):
            data.physionet2012((letter, "b"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_in_lrnde_data(damage, given_folder, cache):
    (given_folder / TAR).write_bytes(DAMAGE[damage](CONTENTS[TAR]))
    before = read_all(given_folder)
    with pytest.raises(DataError) as caught:
        data.load("physionet2012")
    message = str(caught.value)
    assert f"{given_folder / TAR} is not the right file: its SHA-256 is " in message
    digest = describe(TAR, CONTENTS[TAR]).sha256
    assert f"Expected a file with SHA-256 {digest}. The folder" in message
    assert "`python -m lrnde.data physionet2012`" in message
    assert read_all(given_folder) == before and not cache.exists()


def test_other_archive_of_the_same_records(given_folder, use):
    first = data.load("physionet2012-a")
    texts = dict(reversed(SETS["a"].items()))
    other = archive(texts)
    assert other != CONTENTS[TAR]
    use(also=("0" * 64, describe(TAR, other).sha256))
    (given_folder / TAR).write_bytes(other)
    assert_same(data.load("physionet2012-a"), first)
    (given_folder / TAR).write_bytes(flip(other))
    with pytest.raises(DataError, match=f"SHA-256 [0-9a-f]{{64}} or {'0' * 64} or "):
        data.load("physionet2012-a")


def test_official_and_other_checksums_are_known():
    files = _sources.SOURCES["physionet2012"].files
    assert [file.name for file in files] == [*CONTENTS]
    digests = [digest for file in files for digest in (file.sha256, *file.also)]
    assert len(set(digests)) == 6 and {len(digest) for digest in digests} == {64}


# The cache of what was parsed


def test_records_are_parsed_once(given_folder, cache, parsings):
    first = data.load("physionet2012")
    (file,) = cache.iterdir()
    content, stamp = file.read_bytes(), file.stat().st_mtime_ns
    assert_same(data.load("physionet2012"), first)
    assert parsings == [["set-a.tar.gz", "set-b.tar.gz"]]
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (content, stamp)
    other = data.physionet2012(seed=1)
    assert weights(other, "test") != weights(first, "test") and len(parsings) == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_replaced(damage, given_folder, cache, parsings):
    first = data.load("physionet2012")
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(DAMAGE[damage](content))
    assert_same(data.load("physionet2012"), first)
    assert len(parsings) == 2
    assert len(read_all(cache)) == 1
    assert_same(data.load("physionet2012"), first)
    assert len(parsings) == 2


@settings(max_examples=100)
@given(at=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_cache_file_is_known_by_its_checksum(at, bits):
    records = _physionet._parse({TAR: SMALL})
    content = bytearray(_physionet._encode(records))
    again = _physionet._decode(bytes(content))
    assert again.counts == records.counts and means(again) == means(records)
    content[int(at * len(content))] ^= bits
    with pytest.raises(ValueError):
        _physionet._decode(bytes(content))
    with pytest.raises(ValueError):
        _physionet._decode(bytes(content[: int(at * len(content))]))


def test_other_files_or_another_parser_are_parsed_anew(
    given_folder, use, parsings, monkeypatch
):
    before = data.load("physionet2012-a")
    changed = archive(SETS["a"] | {100: record(100, "00:00,Weight,110")})
    use(contents=CONTENTS | {TAR: changed})
    (given_folder / TAR).write_bytes(changed)
    after = data.load("physionet2012-a")
    assert after.counts["observations"] == before.counts["observations"] - 11
    assert len(parsings) == 2
    monkeypatch.setattr(_physionet, "_PARSER", _physionet._PARSER + 1)
    assert_same(data.load("physionet2012-a"), after)
    assert len(parsings) == 3


def test_cache_that_cannot_be_written_to(given_folder, cache, parsings):
    cache.parents[1].mkdir()
    cache.parent.write_bytes(b"a file in the place of the folder")
    first = data.load("physionet2012-a")
    assert_same(data.load("physionet2012-a"), first)
    assert len(parsings) == 2 and cache.parent.is_file()


def test_records_are_read_without_pooch(given_folder, cache, monkeypatch):
    first = data.load("physionet2012-a")
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert_same(data.load("physionet2012-a"), first)
    monkeypatch.delenv("LRNDE_DATA")
    with pytest.raises(ImportError, match=r"pip install 'lrnde\[book\]'"):
        data.load("physionet2012-a")


# Downloads


def test_download_is_kept(serve, use, cache):
    server = Server(CONTENTS)
    use(serve(server))
    first = data.load("physionet2012-a")
    assert server.requests == [TAR]
    assert_same(data.load("physionet2012-a"), first)
    data.load("physionet2012")
    assert server.requests == [TAR, "set-b.tar.gz"]
    kept = {name: c for name, c in read_all(cache).items() if name.endswith(".gz")}
    assert kept == {name: CONTENTS[name] for name in server.requests}


@pytest.mark.parametrize("way", ["dead", "404", "dying", *DAMAGE])
def test_failed_download(way, serve, dead_url, use, cache):
    contents = dict(CONTENTS)
    if way == "404":
        del contents[TAR]
    elif way in DAMAGE:
        contents[TAR] = DAMAGE[way](CONTENTS[TAR])
    dying = [TAR] if way == "dying" else []
    url = dead_url if way == "dead" else serve(Server(contents, dying))
    use(url)
    with pytest.raises(DataError) as caught:
        data.load("physionet2012")
    message = str(caught.value)
    assert f"{cache / TAR} could not be downloaded:\n  {url}{TAR}: " in message
    assert describe(TAR, CONTENTS[TAR]).sha256 in message
    assert "`python -m lrnde.data physionet2012 --force`" in message
    assert read_all(cache) == {}


@pytest.mark.parametrize("name", ["physionet2012", "physionet2012-a"])
def test_command_mends_a_damaged_cache(name, serve, use, cache, capsys):
    server = Server(CONTENTS)
    use(serve(server))
    write_all(cache, CONTENTS | {TAR: b""})
    assert data.main([name]) == 1
    assert "`python -m lrnde.data physionet2012 --force`" in capsys.readouterr().err
    assert data.main([name, "--force"]) == 0
    stays = 20 if name.endswith("-a") else 40
    assert capsys.readouterr().out == (
        f"{name}: {stays * 4 // 5} training and {stays // 5} test series of 37 "
        "channels at 49 times, 0.7 % observed\n"
        f"  observations: {stays * 12}\n"
        "  observations averaged with an earlier one: 0\n"
        "  missing values (-1): 0\n"
        "  rows without a parameter: 0\n"
        f"  stays: {stays}\n"
        "  stays without observations: 0\n"
    )
    assert server.requests == [*CONTENTS]


# Splitting and normalising


def random_series(n, seed, truth=False):
    """The arguments of `normalised_split`; values not observed are anything."""
    rng = np.random.default_rng(seed)
    values = rng.normal(10, 5, (n, 4, 3))
    mask = rng.random(values.shape) < 0.6
    noise_free = values + 1 if truth else None
    return {
        "name": "made",
        "times": np.linspace(0, 1, 4),
        "values": np.where(mask, values, rng.choice([np.nan, np.inf, 1e9])),
        "mask": mask,
        "channels": ("u", "v", "w"),
        "truth": noise_free,
    }


def part_rows(n, seed):
    """The rows of each part, found by carrying the row number through the split."""
    numbers = np.broadcast_to(np.arange(n, dtype=float)[:, None, None], (n, 2, 1))
    everywhere = np.ones(numbers.shape, bool)
    times = np.array([0.0, 1.0])
    split = normalised_split("n", times, numbers, everywhere, ("n",), seed)
    span = split.high - split.low
    train, test = (
        np.rint(split.low + x[:, 0, 0].astype(float) * span).astype(int)
        for x in (split.x_train, split.x_test)
    )
    return train, test


@given(n=st.integers(3, 60), seed=st.integers(0, 2**32))
def test_split_is_disjoint_whole_and_a_function_of_the_seed(n, seed):
    train, test = part_rows(n, seed)
    assert sorted([*train, *test]) == list(range(n))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(test) > 0)
    assert abs(len(test) - n / 5) <= 0.5
    arguments = random_series(n, 1)
    split = normalised_split(**arguments, seed=seed)
    np.testing.assert_array_equal(split.mask_train, arguments["mask"][train])
    np.testing.assert_array_equal(split.mask_test, arguments["mask"][test])


def test_seeds_differ():
    assert len({tuple(part_rows(100, seed)[1]) for seed in range(5)}) == 5


@given(n=st.integers(3, 30), seed=st.integers(0, 99), truth=st.booleans())
def test_normalisation(n, seed, truth):
    arguments = random_series(n, seed, truth)
    split = normalised_split(**arguments, seed=seed)
    span = split.high - split.low
    assert np.all(span > 0)
    for part, rows in zip(("train", "test"), part_rows(n, seed), strict=True):
        x, mask = getattr(split, f"x_{part}"), getattr(split, f"mask_{part}")
        assert x.dtype == np.float32 and x.shape == (len(rows), 4, 3)
        assert np.all(x[~mask] == 0)
        values = arguments["values"][rows]
        back = split.low + x.astype(float) * span
        np.testing.assert_allclose(back[mask], values[mask], atol=1e-4)
        noise_free = getattr(split, f"truth_{part}")
        assert (noise_free is None) == (not truth)
        if truth:
            back = split.low + noise_free.astype(float) * span
            np.testing.assert_allclose(back, arguments["truth"][rows], atol=1e-4)
    for channel in range(3):
        observed = split.x_train[..., channel][split.mask_train[..., channel]]
        assert observed.size == 0 or observed.min() == 0
        assert observed.size < 2 or observed.max() == 1


@given(n=st.integers(3, 30), seed=st.integers(0, 99))
def test_normalisation_ignores_the_test_part(n, seed):
    arguments = random_series(n, seed)
    before = normalised_split(**arguments, seed=seed)
    train, test = part_rows(n, seed)
    arguments["values"][test] = 1e6
    arguments["mask"][test] = True
    after = normalised_split(**arguments, seed=seed)
    np.testing.assert_array_equal(after.low, before.low)
    np.testing.assert_array_equal(after.high, before.high)
    np.testing.assert_array_equal(after.x_train, before.x_train)
    assert np.all(after.x_test > 1)


def test_channels_that_are_constant_or_never_observed():
    arguments = random_series(10, 0)
    arguments["values"][..., 0], arguments["mask"][..., 0] = 7, True
    arguments["mask"][..., 1] = False
    _, test = part_rows(10, 0)
    arguments["values"][test, :, 0] = 9
    arguments["values"][test, :, 1], arguments["mask"][test, :, 1] = 3, True
    split = normalised_split(**arguments)
    assert split.low[:2].tolist() == [7, 0] and split.high[:2].tolist() == [8, 1]
    assert np.all(split.x_train[..., :2] == 0)
    assert np.all(split.x_test[..., 0] == 2) and np.all(split.x_test[..., 1] == 3)


@pytest.mark.parametrize("n", range(3))
def test_too_few_series_to_split(n):
    with pytest.raises(ValueError, match=f"'made' has {n} series"):
        normalised_split(**random_series(n, 0))


@given(n=st.integers(4, 30), draw=st.data(), seed=st.integers(0, 99))
def test_validation_split(n, draw, seed):
    truth = draw.draw(st.booleans())
    series = normalised_split(**random_series(n, seed, truth), counts={"found": n})
    n_train = len(series.x_train)
    size = draw.draw(st.integers(1, n_train - 1))
    split = validation_split(series, size, seed)
    assert split.name == "made-validation" and split.counts == {"found": n}
    assert len(split.x_test) == size and len(split.x_train) == n_train - size

    def rows(dataset, *parts):
        kinds = "x", "mask", *(["truth"] * truth)
        arrays = [[getattr(dataset, f"{k}_{p}") for k in kinds] for p in parts]
        return sorted(
            tuple(np.concatenate([array[i].ravel() for array in part]))
            for part in arrays
            for i in range(len(part[0]))
        )

    # Value, mask and truth of a row stay together, and no row is of the test part.
    assert rows(split, "train", "test") == rows(series, "train")
    assert (split.truth_test is None) == (split.truth_train is None) == (not truth)
    for name in "times", "low", "high":
        np.testing.assert_array_equal(getattr(split, name), getattr(series, name))
    assert_same(split, validation_split(series, size, seed))


def test_validation_split_depends_on_the_seed():
    series = normalised_split(**random_series(60, 0))
    a, b = (validation_split(series, 20, seed) for seed in (0, 1))
    assert not np.array_equal(a.x_test, b.x_test)


@pytest.mark.parametrize("size", [-1, 0, 8, 9])
def test_validation_split_rejects_bad_sizes(size):
    series = normalised_split(**random_series(10, 0))
    with pytest.raises(ValueError, match=f"from 1 to 7, not {size}"):
        validation_split(series, size, 0)


@pytest.mark.parametrize(
    "name, value, wrong",
    [
        ("times", np.linspace(0, 1, 5), "x_train"),
        ("channels", ("u", "v"), "low"),
        ("low", np.zeros(2), "low"),
        ("high", np.zeros(4), "high"),
        ("x_train", np.zeros((7, 4, 3), np.float32), "mask_train"),
        ("x_test", np.zeros((2, 4, 2), np.float32), "x_test"),
        ("mask_train", np.zeros((8, 3, 3), bool), "mask_train"),
        ("mask_test", np.zeros((8, 4, 3), bool), "mask_test"),
        ("truth_train", np.zeros((8, 5, 3), np.float32), "truth_train"),
        ("truth_test", np.zeros((2, 4, 1), np.float32), "truth_test"),
    ],
)
def test_time_series_rejects_arrays_that_do_not_fit(name, value, wrong):
    good = normalised_split(**random_series(10, 0, truth=True))
    object.__setattr__(good, name, value)  # past the type check of these tests
    with pytest.raises(ValueError, match=f"^{wrong} of 'made' has shape"):
        good.__post_init__()


def test_time_series_rejects_one_truth_alone():
    good = normalised_split(**random_series(10, 0, truth=True))
    with pytest.raises(ValueError, match="only one part of 'made'"):
        dataclasses.replace(good, truth_test=None)


@pytest.mark.parametrize(
    "times", [[0, 0.5, 0.5, 1], [0, 0.6, 0.5, 1], [-0.1, 0, 0.5, 1], [0, 0.5, 1, 1.1]]
)
def test_time_series_rejects_bad_times(times):
    good = normalised_split(**random_series(10, 0))
    with pytest.raises(ValueError, match=r"increase within \[0, 1\]"):
        dataclasses.replace(good, times=np.array(times))


def test_repr():
    arguments = random_series(1250, 0)
    arguments["mask"][:] = False
    arguments["mask"][:123] = True
    split = normalised_split(**arguments, counts={"stays": 1250, "stays left out": 7})
    assert repr(split) == (
        "made: 1,000 training and 250 test series of 3 channels at 4 times, "
        "9.8 % observed\n  stays: 1,250\n  stays left out: 7"
    )


# The records of the Challenge

real_data = pytest.mark.skipif(
    not (REAL_DATA and Path(REAL_DATA, "physionet2012").is_dir()),
    reason="set LRNDE_DATA to a folder with physionet2012/",
)


@functools.cache
def parse_real(letter):
    name = f"set-{letter}.tar.gz"
    (content,) = _files.read("physionet2012", REAL_DATA, [name])
    return _physionet._parse({name: content})


@real_data
@pytest.mark.parametrize(
    "letter, counts",
    [
        ("a", (1_737_654, 301_861, 326, 0, 4000, 3)),
        ("b", (1_742_188, 302_586, 347, 0, 4000, 6)),
        ("c", (1_742_348, 306_684, 552, 2403, 4000, 1)),
    ],
)
def test_real_counts(letter, counts):
    parsed = parse_real(letter)
    assert tuple(parsed.counts.values()) == counts
    assert len(parsed.ids) == 4000 - counts[-1]
    assert len(parsed.value) == counts[0] - counts[1]


@real_data
def test_real_records():
    parsed = parse_real("a")
    entries = means(parsed)

    def of(number, *hours):
        return {
            key[1:]: value
            for key, value in entries.items()
            if key[0] == number and key[1] in hours
        }

    # A short stay as a whole. 12:30 is a tie that stays at 12, 36:36 goes to 37.
    #   00:00,RecordID,135841  00:00,Age,69     00:00,Gender,1  00:00,Height,-1
    #   00:00,ICUType,3        00:00,Weight,-1
    #   01:43,Lactate,0.9      02:08,HCT,26.1   02:08,Platelets,544   02:08,WBC,8.5
    #   12:30,Albumin,3.2      12:30,ALP,37     12:30,ALT,11          12:30,AST,11
    #   12:30,Bilirubin,0.2    12:30,BUN,11     12:30,Creatinine,0.9
    #   12:30,Glucose,126      12:30,HCO3,21    12:30,HCT,23.5        12:30,Mg,1.5
    #   12:30,Platelets,519    12:30,K,3.7      12:30,Na,138          12:30,WBC,7.5
    #   22:14,HCT,26.5
    #   36:36,BUN,6            36:36,Creatinine,1                     36:36,Glucose,89
    #   36:36,HCO3,20          36:36,HCT,23.4   36:36,Mg,1.6   36:36,Platelets,488
    #   36:36,K,3.6            36:36,Na,134     36:36,WBC,6.7
    #   43:23,HCT,27.4         43:23,Platelets,574                    43:23,WBC,7.9
    assert of(135841, *range(49)) == {
        (2, "Lactate"): 0.9,
        (2, "HCT"): 26.1,
        (2, "Platelets"): 544,
        (2, "WBC"): 8.5,
        (12, "Albumin"): 3.2,
        (12, "ALP"): 37,
        (12, "ALT"): 11,
        (12, "AST"): 11,
        (12, "Bilirubin"): 0.2,
        (12, "BUN"): 11,
        (12, "Creatinine"): 0.9,
        (12, "Glucose"): 126,
        (12, "HCO3"): 21,
        (12, "HCT"): 23.5,
        (12, "Mg"): 1.5,
        (12, "Platelets"): 519,
        (12, "K"): 3.7,
        (12, "Na"): 138,
        (12, "WBC"): 7.5,
        (22, "HCT"): 26.5,
        (37, "BUN"): 6,
        (37, "Creatinine"): 1,
        (37, "Glucose"): 89,
        (37, "HCO3"): 20,
        (37, "HCT"): 23.4,
        (37, "Mg"): 1.6,
        (37, "Platelets"): 488,
        (37, "K"): 3.6,
        (37, "Na"): 134,
        (37, "WBC"): 6.7,
        (43, "HCT"): 27.4,
        (43, "Platelets"): 574,
        (43, "WBC"): 7.9,
    }

    # 39:30 is a tie that goes up to 40.
    #   39:30,pH,7.41   39:30,PaCO2,43   39:30,PaO2,50   39:30,SaO2,86
    #   40:41,pH,7.38   40:41,PaCO2,48   40:41,PaO2,66   40:41,SaO2,91   41:14,HCT,23
    assert of(137769, 39, 40, 41) == {
        (40, "pH"): 7.41,
        (40, "PaCO2"): 43,
        (40, "PaO2"): 50,
        (40, "SaO2"): 86,
        (41, "pH"): 7.38,
        (41, "PaCO2"): 48,
        (41, "PaO2"): 66,
        (41, "SaO2"): 91,
        (41, "HCT"): 23,
    }

    # No weight, and twice the same variable at the same minute.
    #   00:00,Weight,-1   00:07,GCS,15       00:07,HR,73         00:07,NIDiasABP,65
    #   00:07,NIMAP,92.33 00:07,NISysABP,147 00:07,RespRate,19   00:07,Temp,35.1
    #   00:07,Urine,900   (next 00:37)
    #   27:37,GCS,15      27:37,HR,80        27:37,NIDiasABP,39  27:37,NIMAP,60.67
    #   27:37,NISysABP,104                   27:37,RespRate,18   27:37,Temp,37.9
    #   27:37,Urine,400   27:37,Urine,0      (next 28:37)
    assert of(132539, 0, 28) == {
        (0, "GCS"): 15,
        (0, "HR"): 73,
        (0, "NIDiasABP"): 65,
        (0, "NIMAP"): 92.33,
        (0, "NISysABP"): 147,
        (0, "RespRate"): 19,
        (0, "Temp"): 35.1,
        (0, "Urine"): 900,
        (28, "GCS"): 15,
        (28, "HR"): 80,
        (28, "NIDiasABP"): 39,
        (28, "NIMAP"): 60.67,
        (28, "NISysABP"): 104,
        (28, "RespRate"): 18,
        (28, "Temp"): 37.9,
        (28, "Urine"): 200,
    }

    # Many observations in an hour, and a weight on admission.
    #   00:00,Weight,76   00:42,pH,7.45     01:38,pH,7.44
    #   01:11,DiasABP,67  01:26,DiasABP,69
    #   01:31,DiasABP,64  01:46,DiasABP,81  01:56,DiasABP,54  02:11,DiasABP,62
    #   01:11,Temp,35.2   01:26,Temp,35.1
    #   01:31,Temp,34.8   01:46,Temp,34.5   01:56,Temp,34.8   02:11,Temp,35.1
    #   01:26,Urine,770   01:27,Urine,0     01:41,Urine,180   02:11,Urine,45
    #   (next 02:31)
    assert of(132540, 0) == {(0, "Weight"): 76}
    found = of(132540, 1, 2)
    for (hour, name), value in {
        (1, "pH"): 7.45,
        (2, "pH"): 7.44,
        (1, "DiasABP"): 68,
        (2, "DiasABP"): 65.25,
        (1, "Temp"): 35.15,
        (2, "Temp"): 34.8,
        (1, "Urine"): 385,
        (2, "Urine"): 112.5,
    }.items():
        assert found[hour, name] == pytest.approx(value, rel=1e-14)

    # 0 degrees Fahrenheit is kept:  28:42,Temp,37.6  30:42,Temp,-17.8  32:42,Temp,37.4
    temperatures = [of(137803, hour).get((hour, "Temp")) for hour in range(29, 34)]
    assert temperatures == [37.6, None, -17.8, None, 37.4]

    # Nothing but descriptors and a weight of -1.
    assert not {140501, 140936, 141264} & set(parsed.ids.tolist())


@real_data
def test_real_data_set(monkeypatch, cache):
    monkeypatch.setenv("LRNDE_DATA", str(REAL_DATA))
    series = data.load("physionet2012")
    assert series.x_train.shape == (6393, 49, 37)
    assert series.x_test.shape == (1598, 49, 37)
    assert series.mask_train.sum() + series.mask_test.sum() == 2_875_395
    assert series.x_train.min() == 0 and series.x_train.max() == 1
    assert dict(zip(series.channels, series.low, strict=True))["Temp"] == -17.8
    assert series.counts["stays without observations"] == 9
    assert len(read_all(cache)) == 1
    assert_same(data.load("physionet2012"), series)
