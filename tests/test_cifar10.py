"""The reader of CIFAR-10, and what is done to images."""

import gzip
import io
import math
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from downloads import DAMAGE, describe, flip, read_all, Server, write_all
from hypothesis import given, settings

from lrnde import data
from lrnde.data import (
    _cifar10,
    _sources,
    averaged_down,
    cifar10,
    DataError,
    Dataset,
    standardised,
    training_subset,
    validation_split,
)
from lrnde.experiments import CIFAR10

REAL_DATA = os.environ.get("LRNDE_DATA")
TAR = "cifar-10-binary.tar.gz"
UNPACKED = "cifar-10-batches-bin"
RNG = np.random.default_rng(0)
BYTES = st.integers(0, 255)
TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]


# Batches and archives made here


def encode(labels, images):
    """A batch of images, an array (number, row, column, channel)."""
    records = [
        bytes([label, *red.ravel(), *green.ravel(), *blue.ravel()])
        for label, (red, green, blue) in zip(
            labels, np.moveaxis(images, -1, 1), strict=True
        )
    ]
    return b"".join(records)


def pack(contents, folder=UNPACKED, kinds=None):
    """An archive; `kinds` are members of these names that are no files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (kinds or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return gzip.compress(file.getvalue(), 1, mtime=0)


# A small CIFAR-10: random images, of which not every batch has as many.
IMAGES = {
    name: RNG.integers(0, 256, (number, 32, 32, 3), np.uint8)
    for name, number in zip([*TRAIN, "test_batch.bin"], [2, 3, 2, 2, 3, 4], strict=True)
}
LABELS = {name: RNG.integers(0, 10, len(array)) for name, array in IMAGES.items()}
LABELS[TRAIN[0]][0] = 9
BATCHES = {name: encode(LABELS[name], IMAGES[name]) for name in IMAGES}
OTHERS = {"batches.meta.txt": b"airplane\n", "readme.html": b"<html>"}
# In no particular order, as is the real one.
ARCHIVE = pack(OTHERS | dict(reversed(BATCHES.items())))
FORMS = {"": BATCHES, UNPACKED: BATCHES | OTHERS, "archive": {TAR: ARCHIVE}}


@pytest.fixture(autouse=True)
def cache(empty_cache):
    return empty_cache / "cifar10"


@pytest.fixture
def use(monkeypatch):
    """Replaces the archive, its members and mirrors by the small ones."""

    def use(*urls, archive=ARCHIVE, batches=BATCHES):
        members = tuple(describe(*item) for item in batches.items())
        source = _sources.Source((describe(TAR, archive),), urls, members)
        monkeypatch.setitem(_sources.SOURCES, "cifar10", source)

    return use


@pytest.fixture
def home(tmp_path, monkeypatch, use):
    """The place of files in the folder that `LRNDE_DATA` names, yet to be made."""
    use()
    monkeypatch.setenv("LRNDE_DATA", str(tmp_path / "given"))
    return tmp_path / "given" / "cifar10"


@pytest.fixture(params=FORMS)
def given_folder(request, home):
    """A good folder in one of the forms that are read; there is no mirror."""
    return write_all(home / request.param.removeprefix("archive"), FORMS[request.param])


def assert_is_small_cifar10(dataset):
    assert dataset.name == "cifar10"
    assert dataset.image_shape == (32, 32, 3)
    assert dataset.num_classes == 10
    for part, names in ("train", TRAIN), ("test", ["test_batch.bin"]):
        x, y = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}")
        images = np.concatenate([IMAGES[name] for name in names])
        assert x.dtype == np.float32 and y.dtype == np.int32
        assert x.shape == (len(images), 3072)
        assert x.min() == 0 and x.max() == 1
        np.testing.assert_array_equal(np.rint(255 * x).reshape(images.shape), images)
        np.testing.assert_array_equal(y, np.concatenate([LABELS[n] for n in names]))


# The data set


@pytest.mark.skipif(
    not any(
        Path(REAL_DATA or "/nowhere", "cifar10", name).is_file()
        for name in (TAR, TRAIN[0], f"{UNPACKED}/{TRAIN[0]}")
    ),
    reason="set LRNDE_DATA to a folder with cifar10/",
)
def test_real_cifar10(monkeypatch):
    monkeypatch.setenv("LRNDE_DATA", str(REAL_DATA))
    dataset = data.load("cifar10")
    assert repr(dataset) == (
        "cifar10: 50000 training and 10000 test images of 32x32x3 pixels, 10 classes"
    )
    assert np.bincount(dataset.y_train).tolist() == [5000] * 10
    assert np.bincount(dataset.y_test).tolist() == [1000] * 10
    assert dataset.y_train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert dataset.y_test[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    # The first pixel of the first image, as published in many a tutorial.
    assert np.rint(255 * dataset.x_train[0, :3]).tolist() == [59, 62, 63]
    assert dataset.x_train.min() == 0 and dataset.x_train.max() == 1
    mean = dataset.x_train.mean(axis=0, dtype=float).reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=5e-5)
    # What the least and the largest value, 0 and 1 in each channel, become.
    normal = standardised(dataset).x_train
    least = normal.min(axis=0).reshape(-1, 3).min(axis=0)
    largest = normal.max(axis=0).reshape(-1, 3).max(axis=0)
    deviation = 1 / (largest - least)
    np.testing.assert_allclose(deviation, [0.2470, 0.2435, 0.2616], atol=5e-5)
    np.testing.assert_allclose(-least * deviation, mean, rtol=1e-5)


def test_official_checksums_are_known():
    (archive,), (url,), members = _sources.SOURCES["cifar10"]
    assert url + archive.name == f"https://www.cs.toronto.edu/~kriz/{TAR}"
    assert [file.name for file in members] == [*BATCHES]
    assert {file.size for file in members} == {10_000 * 3073}
    digests = {file.sha256 for file in (archive, *members)}
    assert len(digests) == 7 and {len(digest) for digest in digests} == {64}


PLACES = st.tuples(
    st.integers(0, 2), st.integers(0, 31), st.integers(0, 31), st.integers(0, 2)
)


@given(labels=st.tuples(*[st.integers(0, 9)] * 3), marks=st.dictionaries(PLACES, BYTES))
def test_each_pixel_and_label_ends_in_its_place(labels, marks):
    content = bytearray(3 * 3073)
    for image, label in enumerate(labels):
        content[image * 3073] = label
    for (image, row, column, channel), value in marks.items():
        content[image * 3073 + 1 + channel * 1024 + row * 32 + column] = value
    # In batches of two and one.
    parts = bytes(content[:6146]), bytes(content[6146:])
    x, y = _cifar10._decode([_cifar10._records("batch", part) for part in parts])
    assert tuple(y) == labels
    for (image, row, column, channel), value in marks.items():
        place = (row * 32 + column) * 3 + channel
        assert x[image, place] == np.float32(value) / np.float32(255)
    assert np.count_nonzero(x) == np.count_nonzero([*marks.values()])


# Malformed batches, of the right checksum


@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 2 * 3073 - 1, 2 * 3073 + 1])
def test_batch_of_a_wrong_length(size, home, use):
    batches = BATCHES | {TRAIN[2]: bytes(size)}
    use(batches=batches)
    write_all(home, batches)
    problem = f"{TRAIN[2]} has {size:,} bytes; expected records of 3,073 bytes"
    with pytest.raises(DataError, match=f"^{problem}$"):
        data.load("cifar10")


@given(labels=st.lists(st.integers(0, 255), min_size=1, max_size=5))
def test_label_above_nine(labels):
    content = b"".join(bytes([label]) + bytes(3072) for label in labels)
    first = next((n for n, label in enumerate(labels, 1) if label > 9), None)
    if first is None:
        assert _cifar10._records("batch", content)[:, 0].tolist() == labels
    else:
        problem = f"^batch, record {first} has the label {labels[first - 1]}; expected"
        with pytest.raises(DataError, match=problem):
            _cifar10._records("batch", content)


# Files in LRNDE_DATA


def test_reads_the_folder_in_lrnde_data(given_folder, cache):
    before = read_all(given_folder)
    assert_is_small_cifar10(data.load("cifar10"))
    assert read_all(given_folder) == before and not cache.exists()


def test_reads_the_folder_given(given_folder, monkeypatch):
    folder = os.environ["LRNDE_DATA"]
    monkeypatch.setenv("LRNDE_DATA", "/nowhere")
    assert_is_small_cifar10(cifar10(folder))


def test_archive_comes_before_batches(home):
    write_all(home, {TAR: ARCHIVE, TRAIN[0]: b""})
    assert_is_small_cifar10(cifar10())
    (home / TAR).write_bytes(flip(ARCHIVE))
    with pytest.raises(DataError, match=f"^{home / TAR} is corrupt"):
        cifar10()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_in_lrnde_data(given_folder, damage):
    contents = read_all(given_folder)
    name = TAR if TAR in contents else TRAIN[1]
    (given_folder / name).write_bytes(DAMAGE[damage](contents[name]))
    before = read_all(given_folder)
    with pytest.raises(DataError) as caught:
        cifar10()
    message = str(caught.value)
    file = describe(name, contents[name])
    assert message.startswith(f"{given_folder / name} is ")
    assert f"{file.size:,} bytes with SHA-256 {file.sha256}" in message
    assert f"{TAR} or else all of {TRAIN[0]} to test_batch.bin" in message
    assert "LRNDE_DATA" in message and "`python -m lrnde.data cifar10`" in message
    assert read_all(given_folder) == before


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("place", ["", UNPACKED])
def test_missing_batch_in_lrnde_data(place, name, home):
    (write_all(home / place, BATCHES) / name).unlink()
    with pytest.raises(DataError, match=f"^{home / place / name} is missing"):
        cifar10()


def test_nothing_in_lrnde_data(home):
    for _ in range(2):  # no folder, then an empty one
        with pytest.raises(DataError, match=f"^{home / TAR} is missing.*or else all"):
            cifar10()
        home.mkdir(parents=True, exist_ok=True)


def test_lrnde_data_that_is_a_file(home):
    home.parent.write_bytes(b"")
    with pytest.raises(DataError, match=f"^{home / TAR} cannot be read"):
        cifar10()


# Archives, of the right checksum


def unpack(archive):
    """The batches of an archive whose checksum is right, whatever it holds."""
    members = tuple(describe(*item) for item in BATCHES.items())
    source = _sources.Source((describe(TAR, archive),), (), members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_sources.SOURCES, "cifar10", source)
        return _cifar10._unpack(archive)


@pytest.mark.parametrize("folder", [UNPACKED, f"./{UNPACKED}", ".", "/etc", "../x"])
def test_other_members_are_passed_over(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {f"._{TRAIN[0]}": b"x", f"{TRAIN[0]}.sig": b"x", "sub/x.bin": b"x"}
    kinds = {
        UNPACKED: tarfile.DIRTYPE,
        f"other/{TRAIN[0]}": tarfile.DIRTYPE,
        f"link/{TRAIN[0]}": tarfile.SYMTYPE,
        "pipe": tarfile.FIFOTYPE,
    }
    assert unpack(pack(BATCHES | OTHERS | more, folder, kinds)) == BATCHES
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", BATCHES)
def test_archive_without_a_batch(name):
    rest = {other: BATCHES[other] for other in BATCHES if other != name}
    file = describe(name, BATCHES[name])
    for kind in tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE:
        archive = pack(rest, kinds={f"{UNPACKED}/{name}": kind})
        with pytest.raises(DataError) as caught:
            unpack(archive)
        assert str(caught.value) == (
            f"{TAR}, {name} is missing. Expected {file.size:,} bytes with SHA-256 "
            f"{file.sha256}."
        )


@pytest.mark.parametrize("damage", DAMAGE)
def test_archive_with_a_damaged_batch(damage, home, use):
    bad = pack(BATCHES | {TRAIN[3]: DAMAGE[damage](BATCHES[TRAIN[3]])})
    use(archive=bad)
    write_all(home, {TAR: bad})
    digest = describe(TRAIN[3], BATCHES[TRAIN[3]]).sha256
    with pytest.raises(DataError, match=f"^{TAR}, {TRAIN[3]} is .*{digest}"):
        cifar10()


@pytest.mark.parametrize("content", [b"", b"PNG", gzip.compress(b"PNG", mtime=0)])
def test_file_that_is_no_archive(content):
    with pytest.raises(DataError, match=f"^{TAR} is not a whole .tar.gz file"):
        unpack(content)


RAW = gzip.decompress(ARCHIVE)


@settings(max_examples=30)
@given(cut=st.integers(0, len(ARCHIVE) - 1), raw=st.integers(0, len(RAW) - 1))
def test_truncated_archive(cut, raw):
    for content in ARCHIVE[:cut], gzip.compress(RAW[:raw], 1):
        try:  # of the end, no byte is needed
            assert unpack(content) == BATCHES
        except DataError as error:
            assert str(error).startswith(TAR)


@settings(max_examples=30)
@given(at=st.integers(0, len(RAW) - 1), bits=st.integers(1, 255))
def test_damaged_archive(at, bits):
    damaged = bytearray(RAW)
    damaged[at] ^= bits
    try:
        assert unpack(gzip.compress(bytes(damaged), 1)) == BATCHES
    except DataError as error:
        assert str(error).startswith(TAR)


# Downloads


def test_download_is_kept(serve, use, cache, capsys):
    server = Server({TAR: ARCHIVE})
    use(serve(server))
    assert data.main(["cifar10"]) == 0
    output = capsys.readouterr()
    assert output.out == (
        "cifar10: 12 training and 4 test images of 32x32x3 pixels, 10 classes\n"
    )
    assert TAR in output.err  # the progress bar
    assert read_all(cache) == {TAR: ARCHIVE}  # nothing is unpacked there
    assert_is_small_cifar10(data.load("cifar10"))
    assert server.requests == [TAR]


@pytest.mark.parametrize("damage", DAMAGE)
def test_failed_download_names_file_and_remedy(damage, serve, use, cache):
    url = serve(Server({TAR: DAMAGE[damage](ARCHIVE)}))
    use(url)
    with pytest.raises(DataError) as caught:
        cifar10()
    message = str(caught.value)
    assert message.startswith(f"{cache / TAR} could not be downloaded:\n  {url}{TAR}: ")
    assert describe(TAR, ARCHIVE).sha256 in message
    assert "`python -m lrnde.data cifar10 --force`" in message
    assert f"LRNDE_DATA to a folder that holds cifar10/{TAR}" in message
    assert read_all(cache) == {}


def test_force_mends_a_damaged_cache(serve, use, cache, capsys):
    server = Server({TAR: ARCHIVE})
    use(serve(server))
    write_all(cache, {TAR: flip(ARCHIVE)})
    assert data.main(["cifar10"]) == 1
    error = capsys.readouterr().err
    assert f"{cache / TAR} is corrupt" in error
    assert "`python -m lrnde.data cifar10 --force`" in error
    assert server.requests == []
    assert data.main(["cifar10", "--force"]) == 0
    assert read_all(cache) == {TAR: ARCHIVE} and server.requests == [TAR]


# Averaged down, standardised


def make(x_train, x_test):
    """A data set of images, arrays (number, row, column[, channel])."""
    shape = x_train.shape[1:]
    return Dataset(
        x_train=x_train.reshape(len(x_train), math.prod(shape)),
        y_train=np.arange(len(x_train), dtype=np.int32),
        x_test=x_test.reshape(len(x_test), math.prod(shape)),
        y_test=np.arange(len(x_test), dtype=np.int32),
        name="made",
        image_shape=shape,
    )


def images(draw, shape, dtype=np.float32):
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32)))
    return rng.random(shape).astype(dtype)


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    factor=st.integers(1, 4),
    channels=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from([np.float32, np.float64]),
    draw=st.data(),
)
def test_averaged_down(rows, columns, factor, channels, dtype, draw):
    shape = factor * rows, factor * columns, *channels
    parts = {n: images(draw, (n, *shape), dtype) for n in (3, 2)}
    small = averaged_down(make(parts[3], parts[2]), factor)
    assert small.name == f"made-{rows}x{columns}"
    assert small.image_shape == (rows, columns, *channels)
    assert small.y_train.tolist() == [0, 1, 2] and small.y_test.tolist() == [0, 1]
    for x, part in (small.x_train, parts[3]), (small.x_test, parts[2]):
        assert x.dtype == dtype
        found = x.reshape(-1, rows, columns, *channels)
        for image, row, column in np.ndindex(len(part), rows, columns):
            top, left = factor * row, factor * column
            block = part[image, top : top + factor, left : left + factor]
            expected = np.mean(block, axis=(0, 1), dtype=float)
            np.testing.assert_allclose(found[image, row, column], expected, rtol=1e-6)


def test_averaged_down_digits():
    digits = data.digits()
    small = averaged_down(digits, 2)
    assert repr(small) == (
        "digits-4x4: 1437 training and 360 test images of 4x4 pixels, 10 classes"
    )
    total = digits.x_test[7].reshape(8, 8)[2:4, 6:8].sum()
    assert small.x_test[7].reshape(4, 4)[1, 3] == total / 4


@pytest.mark.parametrize("factor", [-2, 0, 3, 5, 8, 12, 24])
def test_factor_that_does_not_divide(factor):
    x = np.zeros((1, 8, 12, 3), np.float32)
    with pytest.raises(ValueError, match=f"8 rows and 12 columns .* got {factor}$"):
        averaged_down(make(x, x), factor)


def test_a_part_without_images():
    train, none = np.ones((1, 4, 4, 3), np.float32), np.ones((0, 4, 4, 3), np.float32)
    assert averaged_down(make(train, none), 2).x_test.shape == (0, 12)
    assert standardised(make(train, none)).x_test.shape == (0, 48)


@given(
    n=st.integers(2, 9),
    channels=st.sampled_from([(), (1,), (2,), (3,)]),
    draw=st.data(),
)
def test_standardised(n, channels, draw):
    scale = np.float32([0.1, 1, 0.5][: math.prod(channels)])
    train, test = (images(draw, (k, 4, 3, *channels)) * scale for k in (n, 2))
    dataset = make(train, test)
    before = dataset.x_train.copy(), dataset.x_test.copy()
    normal = standardised(dataset)
    assert normal.name == "made" and normal.image_shape == dataset.image_shape
    assert normal.x_train.dtype == normal.x_test.dtype == np.float32
    np.testing.assert_array_equal(dataset.x_train, before[0])
    np.testing.assert_array_equal(dataset.x_test, before[1])
    mean = train.mean(axis=(0, 1, 2), dtype=float)
    deviation = train.std(axis=(0, 1, 2), dtype=float)
    for x, part in (normal.x_train, train), (normal.x_test, test):
        found = x.reshape(part.shape)
        np.testing.assert_allclose(found, (part - mean) / deviation, atol=1e-5)
    found = normal.x_train.reshape(train.shape)
    np.testing.assert_allclose(found.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=(0, 1, 2)), 1, atol=1e-5)


def test_standardised_uses_nothing_of_the_test_part():
    train = RNG.random((5, 4, 4, 3), np.float32)
    tests = [train[:2], np.full((3, 4, 4, 3), 1e6, np.float32), train[:0]]
    first, *others = (standardised(make(train, test)) for test in tests)
    np.testing.assert_array_equal(first.x_test, first.x_train[:2])
    for other in others:
        np.testing.assert_array_equal(other.x_train, first.x_train)


def test_standardised_in_a_validation_split_uses_nothing_held_out():
    dataset = make(RNG.random((20, 2, 2, 3)), RNG.random((5, 2, 2, 3)))
    split = validation_split(dataset, 4, 0)
    held_out = replace(split, x_test=0 * split.x_test)
    np.testing.assert_array_equal(
        standardised(split).x_train, standardised(held_out).x_train
    )


@pytest.mark.parametrize("n", [999, 1000, 1001, 2500])
def test_standardised_when_images_are_taken_in_parts(n):
    train = RNG.random((n, 1, 2, 3)) ** np.array([1, 2, 3])
    found = standardised(make(train, train)).x_train.reshape(train.shape)
    expected = (train - train.mean(axis=(0, 1, 2))) / train.std(axis=(0, 1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0, 0.1, 1])
def test_constant_channel_is_only_shifted(value):
    train = RNG.random((7, 3, 3, 2), np.float32)
    train[..., 1] = value
    test = RNG.random((4, 3, 3, 2), np.float32)
    normal = standardised(make(train, test))
    assert np.all(normal.x_train[:, 1::2] == 0)
    shifted = test[..., 1].reshape(4, -1) - np.float32(value)
    np.testing.assert_array_equal(normal.x_test[:, 1::2], shifted)


# What the experiments make of a data set


def test_an_experiment_standardises_the_small_images_of_its_subset():
    config, digits = CIFAR10(validation=200, train_size=100, averaging=2), data.digits()
    dataset = config.load_data()
    assert dataset.name == "digits-validation-100-4x4"
    assert dataset.image_shape == (4, 4)
    chosen = training_subset(validation_split(digits, 200, 0), 100, 0)
    train, test = (
        x.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
        for x in (chosen.x_train, chosen.x_test)
    )
    for found, x in (dataset.x_train, train), (dataset.x_test, test):
        expected = (x - train.mean()) / train.std()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    for other in dataset, replace(config, seed=1).load_data():
        np.testing.assert_array_equal(other.x_train, dataset.x_train)
        np.testing.assert_array_equal(other.y_train, chosen.y_train)
        np.testing.assert_array_equal(other.y_test, chosen.y_test)


def test_an_experiment_reports_on_the_whole_test_set_by_default():
    dataset, digits = CIFAR10().load_data(), data.digits()
    assert dataset.name == "digits" and len(dataset.x_train) == 1437
    np.testing.assert_array_equal(dataset.y_test, digits.y_test)


@pytest.mark.parametrize("name", ["validation", "train_size"])
def test_an_experiment_refuses_parts_that_cannot_be(name):
    with pytest.raises(ValueError, match="from 1 to 1436, not 1437"):
        CIFAR10(**{name: 1437}).load_data()


def test_an_experiment_refuses_blocks_that_cannot_be():
    with pytest.raises(ValueError, match="averaging=0 must be a whole number"):
        CIFAR10(averaging=0)
    with pytest.raises(ValueError, match="factor must divide the 8 rows .* got 3"):
        CIFAR10(averaging=3).load_data()
