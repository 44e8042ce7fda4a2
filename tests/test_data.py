import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from downloads import DAMAGE, describe, read_all, Server, write_all
from hypothesis import given, settings

from lrnde import data
from lrnde.data import (
    _batches,
    _files,
    _images,
    _sources,
    Batches,
    DataError,
    Dataset,
    padded_batches,
    training_subset,
    validation_split,
)

REAL_DATA = os.environ.get("LRNDE_DATA")
RNG = np.random.default_rng(0)


def encode_idx(array, kind=8):
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return gzip.compress(header + array.tobytes(), mtime=0)


# A small MNIST: random images under the canonical names, whatever their compression.
ARRAYS = {
    "train-images-idx3-ubyte.gz": RNG.integers(0, 256, (60, 28, 28), np.uint8),
    "train-labels-idx1-ubyte.gz": np.arange(60, dtype=np.uint8) % 10,
    "t10k-images-idx3-ubyte.gz": RNG.integers(0, 256, (20, 28, 28), np.uint8),
    "t10k-labels-idx1-ubyte.gz": np.arange(20, dtype=np.uint8)[::-1] % 10,
}
CONTENTS = {name: encode_idx(array) for name, array in ARRAYS.items()}
FIRST, *OTHERS = CONTENTS


@pytest.fixture(autouse=True)
def cache(empty_cache):
    return empty_cache / "mnist"


@pytest.fixture
def use(monkeypatch):
    """Replaces MNIST's files and mirrors by the small ones."""

    def use(*urls, contents=CONTENTS):
        files = tuple(describe(*item) for item in contents.items())
        monkeypatch.setitem(_sources.SOURCES, "mnist", _sources.Source(files, urls))

    return use


def assert_is_small_mnist(dataset):
    assert dataset.name == "mnist"
    assert dataset.image_shape == (28, 28)
    assert dataset.num_classes == 10
    for part, prefix in ("train", "train"), ("test", "t10k"):
        x, y = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}")
        images = ARRAYS[f"{prefix}-images-idx3-ubyte.gz"]
        assert x.dtype == np.float32 and y.dtype == np.int32
        np.testing.assert_array_equal(np.rint(255 * x).reshape(images.shape), images)
        np.testing.assert_array_equal(y, ARRAYS[f"{prefix}-labels-idx1-ubyte.gz"])


# The data sets


def test_digits():
    dataset = data.load("digits")
    assert dataset.x_train.shape == (1437, 64) and dataset.x_test.shape == (360, 64)
    assert dataset.image_shape == (8, 8) and dataset.num_classes == 10
    for x in dataset.x_train, dataset.x_test:
        assert x.dtype == np.float32 and x.min() == 0 and x.max() == 1
    # Stratified: each class has the same share of both parts, up to one row.
    train, test = (np.bincount(y) for y in (dataset.y_train, dataset.y_test))
    assert np.all(np.abs(test - 0.2 * (train + test)) <= 1)
    again = data.digits()
    np.testing.assert_array_equal(dataset.x_train, again.x_train)
    np.testing.assert_array_equal(dataset.y_test, again.y_test)


@pytest.mark.skipif(
    not (REAL_DATA and Path(REAL_DATA, "mnist").is_dir()),
    reason="set LRNDE_DATA to a folder with mnist/",
)
def test_real_mnist(monkeypatch):
    monkeypatch.setenv("LRNDE_DATA", str(REAL_DATA))
    dataset = data.load("mnist")
    assert dataset.x_train.shape == (60_000, 784)
    assert dataset.x_test.shape == (10_000, 784)
    assert np.bincount(dataset.y_train).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert np.bincount(dataset.y_test).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
    assert dataset.x_train.min() == 0 and dataset.x_train.max() == 1
    assert dataset.x_train.mean(dtype=float) == pytest.approx(0.1307, abs=1e-4)
    assert dataset.x_train.std(dtype=float) == pytest.approx(0.3081, abs=1e-4)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'minst'.*\['cifar10', 'digits', 'mnist', "):
        data.load("minst")


@pytest.mark.parametrize(
    "load, modules",
    [
        (data.digits, ["sklearn", "sklearn.datasets"]),
        (data.mnist, ["pooch"]),
        (data.cifar10, ["pooch"]),
    ],
)
def test_missing_package_names_the_extra(load, modules, monkeypatch):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'lrnde\[book\]'"):
        load()


@pytest.mark.parametrize(
    "name, value, wrong",
    [
        ("x_train", np.zeros((3, 4), np.float32), "x_train"),
        ("x_test", np.zeros((2, 5), np.float32), "x_test"),
        ("y_train", np.zeros(1, np.int32), "x_train"),
        ("y_test", np.zeros(3, np.int32), "x_test"),
        ("image_shape", (2, 3), "x_train"),
    ],
)
def test_dataset_rejects_arrays_that_do_not_fit(name, value, wrong):
    x, y = np.zeros((2, 4), np.float32), np.zeros(2, np.int32)
    dataset = Dataset(x, y, x, y, name="d", image_shape=(2, 2))
    object.__setattr__(dataset, name, value)  # past the type check of these tests
    with pytest.raises(ValueError, match=f"^{wrong} of 'd' has shape"):
        dataset.__post_init__()


# Files in LRNDE_DATA


@pytest.fixture
def given_folder(tmp_path, monkeypatch, use):
    """A good folder that `LRNDE_DATA` names; there is no mirror to turn to."""
    use()
    monkeypatch.setenv("LRNDE_DATA", str(tmp_path / "given"))
    return write_all(tmp_path / "given" / "mnist", CONTENTS)


def test_reads_the_folder_in_lrnde_data(given_folder, cache):
    assert_is_small_mnist(data.load("mnist"))
    assert not cache.exists()


def test_folder_argument_comes_before_lrnde_data(given_folder, monkeypatch):
    monkeypatch.setenv("LRNDE_DATA", "/nowhere")
    assert_is_small_mnist(data.mnist(given_folder.parent))
    monkeypatch.delenv("LRNDE_DATA")
    (given_folder / FIRST).unlink()
    with pytest.raises(DataError, match="leave the argument `folder` unset"):
        data.mnist(given_folder.parent)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_in_lrnde_data(given_folder, name, damage):
    (given_folder / name).write_bytes(DAMAGE[damage](CONTENTS[name]))
    before = read_all(given_folder)
    file = describe(name, CONTENTS[name])
    with pytest.raises(DataError) as caught:
        data.mnist()
    message = str(caught.value)
    assert str(given_folder / name) in message
    assert f"{file.size:,} bytes" in message and file.sha256 in message
    assert "LRNDE_DATA" in message and "`python -m lrnde.data mnist`" in message
    assert read_all(given_folder) == before


@pytest.mark.parametrize("name", CONTENTS)
def test_missing_file_in_lrnde_data(given_folder, name):
    (given_folder / name).unlink()
    with pytest.raises(DataError, match=f"{given_folder / name} is missing"):
        data.mnist()
    assert not (given_folder / name).exists()


def test_missing_folder_in_lrnde_data(use, monkeypatch, tmp_path):
    use()
    monkeypatch.setenv("LRNDE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere/mnist/.* is missing"):
        data.mnist()
    assert not (tmp_path / "nowhere").exists()


def test_lrnde_data_that_is_a_file(use, monkeypatch, tmp_path):
    use()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LRNDE_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be read"):
        data.mnist()


@pytest.mark.parametrize(
    "content, problem",
    [
        (encode_idx(ARRAYS[FIRST], kind=13), "begins with 00 00 0d 03"),
        (encode_idx(ARRAYS[FIRST].reshape(60, -1)), "begins with 00 00 08 02"),
        (gzip.compress(b"PNG", mtime=0), "not an IDX file"),
        (CONTENTS[FIRST][:-9], "not a whole gzip file"),
        (b"PNG", "not a whole gzip file"),
        (
            gzip.compress(gzip.decompress(CONTENTS[FIRST])[:-1], mtime=0),
            r"holds 47039 entries; its header says \(60, 28, 28\)",
        ),
    ],
)
def test_file_that_is_not_idx(tmp_path, use, content, problem):
    contents = CONTENTS | {FIRST: content}
    use(contents=contents)
    write_all(tmp_path / "given" / "mnist", contents)
    with pytest.raises(DataError, match=f"{FIRST} .*{problem}"):
        data.mnist(tmp_path / "given")


# Downloads


def test_download_is_kept(serve, use, cache, capsys):
    server = Server(CONTENTS)
    use(serve(server))
    assert_is_small_mnist(data.load("mnist"))
    assert FIRST in capsys.readouterr().err  # the progress bar
    assert read_all(cache) == CONTENTS
    assert_is_small_mnist(data.load("mnist"))
    assert server.requests == [*CONTENTS]


@pytest.fixture(params=["dead", "404", "dying", *DAMAGE])
def broken_url(request, serve, dead_url):
    """A mirror that fails to deliver the first file."""
    if request.param == "dead":
        return dead_url
    if request.param == "404":
        return serve(Server({name: CONTENTS[name] for name in OTHERS}))
    if request.param == "dying":
        return serve(Server(CONTENTS, dying=[FIRST]))
    return serve(Server(CONTENTS | {FIRST: DAMAGE[request.param](CONTENTS[FIRST])}))


def test_next_mirror_is_tried(broken_url, serve, use, cache):
    good = Server(CONTENTS)
    use(broken_url, serve(good))
    assert_is_small_mnist(data.mnist())
    assert FIRST in good.requests
    assert read_all(cache) == CONTENTS


def test_failed_download_names_file_mirrors_and_remedy(broken_url, use, cache):
    use(broken_url, broken_url + "again/")
    with pytest.raises(DataError) as caught:
        data.mnist()
    message = str(caught.value)
    file = describe(FIRST, CONTENTS[FIRST])
    assert f"{cache / FIRST} could not be downloaded" in message
    assert f"{broken_url}{FIRST}: " in message
    assert f"{broken_url}again/{FIRST}: " in message
    assert f"{file.size:,} bytes" in message and file.sha256 in message
    assert "`python -m lrnde.data mnist --force`" in message
    assert read_all(cache) == {}


def test_failed_download_keeps_the_good_file(broken_url, use, cache, capsys):
    use(broken_url)
    write_all(cache, CONTENTS)
    assert data.main(["mnist", "--force"]) == 1
    assert f"{cache / FIRST} could not be downloaded" in capsys.readouterr().err
    assert read_all(cache) == CONTENTS
    assert_is_small_mnist(data.mnist())


@pytest.mark.parametrize("damage", DAMAGE)
def test_force_mends_a_damaged_cache(damage, serve, use, cache, capsys):
    server = Server(CONTENTS)
    use(serve(server))
    damaged = CONTENTS | {OTHERS[0]: DAMAGE[damage](CONTENTS[OTHERS[0]])}
    write_all(cache, damaged)
    with pytest.raises(DataError, match=OTHERS[0]) as caught:
        data.mnist()
    assert "`python -m lrnde.data mnist --force`" in str(caught.value)
    assert read_all(cache) == damaged and server.requests == []
    assert data.main(["mnist", "--force"]) == 0
    assert capsys.readouterr().out == (
        "mnist: 60 training and 20 test images of 28x28 pixels, 10 classes\n"
    )
    assert read_all(cache) == CONTENTS and server.requests == [*CONTENTS]


def test_only_missing_files_are_downloaded(serve, use, cache):
    server = Server(CONTENTS)
    use(serve(server))
    write_all(cache, {name: CONTENTS[name] for name in OTHERS})
    assert_is_small_mnist(data.mnist())
    assert server.requests == [FIRST]


# The command


def test_force_leaves_lrnde_data_alone(given_folder, cache, capsys):
    (given_folder / FIRST).unlink()
    before = read_all(given_folder)
    assert data.main(["mnist", "--force"]) == 1
    assert "unset LRNDE_DATA" in capsys.readouterr().err
    assert read_all(given_folder) == before and not cache.exists()


def test_force_of_an_embedded_data_set(capsys):
    assert data.main(["digits", "--force"]) == 1
    assert "digits is not downloaded" in capsys.readouterr().err


def test_command_reports_an_error_without_a_traceback(given_folder, capsys):
    (given_folder / FIRST).unlink()
    assert data.main(["mnist"]) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(f"error: {given_folder / FIRST}")


def test_command_line():
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "lrnde.data", "digits"],
        cwd=Path(data.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (
        0,
        "digits: 1437 training and 360 test images of 8x8 pixels, 10 classes\n",
    ), done.stderr


# IDX files and checksums


@given(draw=st.data())
def test_idx_round_trip_and_damage(draw):
    shape = draw.draw(hnp.array_shapes(max_dims=3, min_side=0, max_side=5))
    array = draw.draw(hnp.arrays(np.uint8, shape))
    content = encode_idx(array)
    parsed = _images._parse_idx("file", content, array.ndim)
    assert parsed.dtype == np.uint8
    np.testing.assert_array_equal(parsed, array)
    with pytest.raises(DataError, match="file is not an IDX file"):
        _images._parse_idx("file", content, array.ndim + 1)
    cut = draw.draw(st.integers(0, len(content) - 1))
    with pytest.raises(DataError, match="file is not"):
        _images._parse_idx("file", content[:cut], array.ndim)
    raw = gzip.decompress(content)
    for wrong in raw[: draw.draw(st.integers(0, len(raw) - 1))], raw + b"\0":
        with pytest.raises(DataError, match="file (is not|holds)"):
            _images._parse_idx("file", gzip.compress(wrong, mtime=0), array.ndim)


@given(content=st.binary(min_size=1), draw=st.data())
def test_checksum_catches_every_change(content, draw):
    file = describe("file", content)
    assert _files.mismatch(content, file) is None
    at = draw.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= draw.draw(st.integers(1, 255))
    assert "is corrupt" in str(_files.mismatch(bytes(changed), file))
    assert "is truncated" in str(_files.mismatch(content[:at], file))
    assert "not the right file" in str(_files.mismatch(content + b"\0", file))


# Batches


SIZES = {"n": st.integers(1, 40), "batch_size": st.integers(1, 50)}
SEEDS = st.integers(0, 2**32)


@given(**SIZES, seed=SEEDS, steps=st.integers(1, 12))
def test_batches_share_a_shape_and_cover_each_epoch(n, batch_size, seed, steps):
    batches = Batches(n, batch_size, seed)
    drawn = [batches[step] for step in range(steps)]
    assert {rows.shape for rows in drawn} == {(batch_size,)}
    stream = np.concatenate(drawn)
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n]) == list(range(n))
    rest = stream[len(stream) // n * n :]
    assert len(set(rest)) == len(rest) and np.all((0 <= rest) & (rest < n))


@given(**SIZES, seed=SEEDS, steps=st.lists(st.integers(0, 10**6), max_size=5))
def test_batches_are_a_function_of_seed_and_step(n, batch_size, seed, steps):
    sequential = Batches(n, batch_size, seed)
    expected = {step: sequential[step].copy() for step in steps}
    for rows in expected.values():
        sequential[0][:] = rows[0]  # what a caller does to a batch stays there
    _batches.permutation.cache_clear()
    for step in reversed(steps):
        resumed = Batches(n, batch_size, seed)[step]
        np.testing.assert_array_equal(resumed, expected[step])


@settings(max_examples=20)
@given(seed=SEEDS)
def test_epochs_and_seeds_differ(seed):
    # 100 rows: two of 100! orders agree by chance with negligible probability.
    first, second = Batches(100, 100, seed)[0], Batches(100, 100, seed)[1]
    other = Batches(100, 100, seed + 1)[0]
    assert len({tuple(rows) for rows in (first, second, other, range(100))}) == 4


def test_order_is_uniform():
    # Each row in each place equally often: chi-squared with (n - 1)^2 degrees of
    # freedom, at five standard deviations.
    n, epochs = 6, 3000
    rows = np.stack([Batches(n, n, 0)[epoch] for epoch in range(epochs)])
    counts = np.stack([np.bincount(column, minlength=n) for column in rows.T])
    chi_squared = np.sum((counts - epochs / n) ** 2) / (epochs / n)
    freedom = (n - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_order_never_changes():
    # The order of a recorded run must stay what it was, whatever NumPy's version.
    assert Batches(8, 5, 0)[0].tolist() == [3, 2, 1, 6, 0]
    assert Batches(8, 5, 7)[10**6].tolist() == [5, 7, 0, 4, 6]


@given(**SIZES)
def test_padded_batches_cover_every_row_once(n, batch_size):
    batches = padded_batches(n, batch_size)
    assert {part.shape for pair in batches for part in pair} == {(batch_size,)}
    rows = np.concatenate([indices[mask] for indices, mask in batches])
    np.testing.assert_array_equal(rows, np.arange(n))
    assert all(np.all((0 <= i) & (i < n)) for i, _ in batches)
    assert all(mask.any() for _, mask in batches)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: Batches(0, 1, 0), "n"),
        (lambda: Batches(1, 0, 0), "batch_size"),
        (lambda: Batches(1, 1, -1), "seed"),
        (lambda: padded_batches(0, 1), "n"),
        (lambda: padded_batches(1, 0), "batch_size"),
    ],
)
def test_batches_reject_bad_sizes(make, name):
    with pytest.raises(ValueError, match=f"^{name} must be at least"):
        make()


def test_batches_have_no_negative_step():
    with pytest.raises(IndexError, match="-1"):
        Batches(3, 2, 0)[-1]


# Parts of a training set


def numbers(n):
    number = np.arange(n)  # each row carries its own number, in image and label
    return Dataset(
        x_train=np.repeat(number[:, None], 4, axis=1).astype(np.float32),
        y_train=number.astype(np.int32),
        x_test=np.full((3, 4), -1, np.float32),
        y_test=np.full(3, -1, np.int32),
        name="numbers",
        image_shape=(2, 2),
    )


@given(n=st.integers(2, 50), draw=st.data(), seed=SEEDS)
def test_validation_split(n, draw, seed):
    size = draw.draw(st.integers(1, n - 1))
    dataset = numbers(n)
    split = validation_split(dataset, size, seed)
    assert split.name == "numbers-validation" and split.image_shape == (2, 2)
    assert len(split.y_test) == size
    rows = np.concatenate([split.y_train, split.y_test])  # none of the test set
    np.testing.assert_array_equal(np.sort(rows), np.arange(n))
    np.testing.assert_array_equal(split.x_train[:, 0], split.y_train)
    np.testing.assert_array_equal(split.x_test[:, 0], split.y_test)
    again = validation_split(dataset, size, seed)
    np.testing.assert_array_equal(split.y_test, again.y_test)


@given(n=st.integers(2, 50), draw=st.data(), seed=SEEDS)
def test_training_subset(n, draw, seed):
    size = draw.draw(st.integers(1, n - 1))
    dataset = numbers(n)
    subset = training_subset(dataset, size, seed)
    assert subset.name == f"numbers-{size}" and subset.image_shape == (2, 2)
    assert len(subset.y_train) == size
    assert np.all(np.diff(subset.y_train) > 0)  # no row twice, and in their order
    np.testing.assert_array_equal(subset.x_train[:, 0], subset.y_train)
    np.testing.assert_array_equal(subset.x_test, dataset.x_test)
    again = training_subset(dataset, size, seed)
    np.testing.assert_array_equal(subset.y_train, again.y_train)


@pytest.mark.parametrize("part", [training_subset, validation_split])
@pytest.mark.parametrize("size", [-1, 0, 1437, 2000])
def test_bad_sizes_of_parts_are_rejected(part, size):
    with pytest.raises(ValueError, match=f"from 1 to 1436, not {size}"):
        part(data.digits(), size, 0)
