import copy
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from lrnde import records
from lrnde._files import write_atomically

VERSIONS = ("python", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "lrnde")

floats = st.floats(allow_nan=False, allow_infinity=False)
fractions = st.floats(0, 1)
scalars = st.none() | st.booleans() | st.integers() | floats | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def make_record(method="vanilla", seed=0, **changes):
    """An unsealed record; `changes` go into the section that has their name."""
    record = {
        "experiment": "mnist-node",
        "tier": "cpu",
        "method": method,
        "seed": seed,
        "config": {"method": method, "seed": seed, "rtol": 1e-6, "steps": 1200},
        "metrics": {
            "train_accuracy": 0.98,
            "test_accuracy": 0.95,
            "train_loss": 0.1,
            "test_loss": 0.2,
            "train_nfe": 50,
            "test_nfe": 49.5,
        },
        "times": {
            "compile_seconds": 4.0,
            "train_seconds": 170.0,
            "train_step_seconds": 0.14,
            "predict_seconds": 0.085,
            "predict_batch": 512,
        },
        "curves": {
            "step": [0, 100, 200],
            "loss": [2.3, 1.0, 0.5],
            "penalty": [0.1, 0.05, 0.04],
            "nfe": [60, 55, 50],
            "accuracy": [0.1, 0.8, 0.9],
        },
        "provenance": {
            "device": "A processor",
            "platform": "cpu",
            "precision": "highest",
            "dtype": "float32",
            "xla_flags": "",
            "versions": dict.fromkeys(VERSIONS, "1.0"),
            "git_commit": 40 * "a",
            "git_clean": True,
            "started": "2026-01-02T03:04:05+00:00",
        },
    }
    for name, change in changes.items():
        if isinstance(change, dict) and name in record:
            record[name] = record[name] | change
        else:
            record[name] = change
    return record


IDENTITY = ("experiment", "tier", "method", "seed")
settings_names = st.text(min_size=1).filter(lambda name: name not in IDENTITY)


@st.composite
def any_record(draw):
    length = draw(st.integers(0, 4))
    curve = st.lists(floats, min_size=length, max_size=length)
    return make_record(
        draw(st.sampled_from(["vanilla", "steer+global-error", "x.1"])),
        draw(st.integers(0, 10**6)),
        config=draw(st.dictionaries(settings_names, values, max_size=3)),
        metrics={"test_loss": draw(floats), "test_accuracy": draw(fractions)},
        curves={
            name: draw(curve if name != "accuracy" else st.just([0.5] * length))
            for name in ("step", "loss", "penalty", "nfe", "accuracy")
        },
    )


def leaves(value, path=()):
    """The places of all values that are not containers."""
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [place for key, inner in items for place in leaves(inner, (*path, key))]


def edited(record, place, value):
    record = copy.deepcopy(record)
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return record


def get(record, place):
    for key in place:
        record = record[key]
    return record


def contents(root):
    return {path: path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


# Digests


@given(st.dictionaries(st.text(), values), st.randoms())
def test_config_hash_ignores_the_order_of_keys(config, random):
    keys = list(config)
    random.shuffle(keys)
    shuffled = {key: config[key] for key in keys}
    assert records.config_hash(shuffled) == records.config_hash(config)


@given(st.dictionaries(st.text(), values), st.text(), values)
def test_config_hash_separates_configs(config, key, value):
    other = config | {key: value}
    same = json.dumps(config, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (records.config_hash(config) == records.config_hash(other)) == same


def test_config_hash_takes_tuples_and_arrays_for_lists():
    plain = records.config_hash({"widths": [100, 784], "rtol": 0.5})
    assert plain == records.config_hash({"widths": (100, 784), "rtol": np.float32(0.5)})
    assert plain == records.config_hash(
        {"widths": jnp.array([100, 784]), "rtol": jnp.array(0.5)}
    )


def test_what_json_cannot_hold_is_named():
    with pytest.raises(TypeError, match="not object"):
        records.seal(make_record(config={"solver": object()}))


# Round trip


@given(any_record())
def test_save_and_load_is_the_identity(record):
    with tempfile.TemporaryDirectory() as root:
        path = records.save(record, root)
        loaded = records.load(path)
        assert loaded == records.seal(record)
        assert path == records.path_of(record, root) == records.path_of(loaded, root)
        assert {key: loaded[key] for key in record} == record
        before = path.read_bytes()
        assert records.save(loaded, root).read_bytes() == before
        assert list(contents(root)) == [path]


def test_arrays_become_plain_numbers(tmp_path):
    metrics = {"test_loss": jnp.array(0.25), "test_nfe": np.int64(49)}
    record = make_record(metrics=metrics, curves={"nfe": np.array([3, 2, 1])})
    loaded = records.load(records.save(record, tmp_path))
    assert loaded["metrics"]["test_loss"] == 0.25
    assert type(loaded["metrics"]["test_nfe"]) is int
    assert loaded["curves"]["nfe"] == [3, 2, 1]


def test_load_all_goes_by_method_and_number_of_the_seed(tmp_path):
    runs = [("vanilla", 10), ("biased", 0), ("vanilla", 9), ("biased", 1)]
    for method, seed in runs:
        records.save(make_record(method, seed), tmp_path)
    records.save(make_record(tier="smoke"), tmp_path)
    loaded = records.load_all(tmp_path, "mnist-node", "cpu")
    assert [(record["method"], record["seed"]) for record in loaded] == sorted(runs)
    assert records.load_all(tmp_path, "mnist-node", "paper") == []


# Validation


@settings(max_examples=300)
@given(any_record(), st.data())
def test_any_edited_leaf_is_detected(record, data):
    record = records.seal(record)
    records.validate(record)
    place = data.draw(st.sampled_from(leaves(record)))
    old = json.dumps(get(record, place))
    near = st.sampled_from([math.nan, math.inf, 0, 1, 0.5, "", "vanilla"])
    value = data.draw((near | scalars).filter(lambda new: json.dumps(new) != old))
    with pytest.raises(ValueError, match="record field `"):
        records.validate(edited(record, place, value))


@given(st.sampled_from(leaves(make_record())), st.data())
def test_an_edited_file_is_detected_and_named(place, data):
    with tempfile.TemporaryDirectory() as root:
        path = records.save(make_record(), root)
        record = json.loads(path.read_text())
        new = data.draw(scalars.filter(lambda new: new != get(record, place)))
        path.write_text(json.dumps(edited(record, place, new)))
        with pytest.raises(ValueError, match=path.name):
            records.load(path)


@pytest.mark.parametrize("place", [(name,) for name in records.seal(make_record())])
def test_a_missing_field_is_named(place):
    record = records.seal(make_record())
    del record[place[0]]
    with pytest.raises(ValueError, match=f"`{place[0]}` is missing"):
        records.validate(record)


@pytest.mark.parametrize(
    "place, value",
    [
        (("schema",), 2),
        (("seed",), True),
        (("seed",), -1),
        (("method",), "a/b"),
        (("experiment",), ".."),
        (("config",), []),
        (("config", "rtol"), math.inf),
        (("metrics", "test_nfe"), "49"),
        (("metrics", "test_loss"), math.nan),
        (("metrics", "test_accuracy"), 95.0),
        (("metrics", "extra"), None),
        (("times", "predict_seconds"), None),
        (("curves", "nfe"), [1, 2]),
        (("curves", "nfe", 1), math.nan),
        (("curves", "accuracy", 1), 80),
        (("curves", "extra"), 3),
        (("provenance", "git_clean"), 1),
        (("provenance", "started"), "yesterday"),
        (("provenance", "versions", "jax"), None),
        (("note",), "by hand"),
    ],
)
def test_a_sealed_fault_is_named(place, value):
    name = ".".join(map(str, place)).replace(".", r"\.")
    with pytest.raises(ValueError, match=f"record field `{name}` "):
        records.validate(records.seal(edited(make_record(), place, value)))


@pytest.mark.parametrize("field", ["experiment", "tier", "method", "seed"])
def test_a_record_must_fit_its_config(field):
    other = 7 if field == "seed" else "other"
    with pytest.raises(ValueError, match=f"`{field}`.*config says otherwise"):
        records.validate(records.seal(make_record(config={field: other})))


def test_an_edited_config_is_told_from_an_edited_metric():
    record = records.seal(make_record())
    with pytest.raises(ValueError, match="`config_hash`"):
        records.validate(edited(record, ("config", "rtol"), 1e-3))
    with pytest.raises(ValueError, match="`checksum`"):
        records.validate(edited(record, ("metrics", "test_nfe"), 12))


def test_saving_does_not_launder_an_edit(tmp_path):
    record = records.seal(make_record())
    record["metrics"]["test_accuracy"] = 0.99
    with pytest.raises(ValueError, match="`checksum`"):
        records.save(record, tmp_path)
    assert not contents(tmp_path)


# Files


def test_a_record_of_the_same_config_is_replaced(tmp_path):
    records.save(make_record(), tmp_path)
    path = records.save(make_record(metrics={"test_nfe": 12}), tmp_path)
    assert records.load(path)["metrics"]["test_nfe"] == 12


def test_a_record_of_another_config_is_kept(tmp_path):
    path = records.save(make_record(), tmp_path)
    before = contents(tmp_path)
    other = make_record(config={"rtol": 1e-3})
    for attempt in (records.save, records.guard):
        with pytest.raises(FileExistsError, match=f"{path.name} .*another config"):
            attempt(other, tmp_path)
    assert contents(tmp_path) == before


def test_a_link_stays_a_link_and_the_umask_counts(tmp_path):
    target, link = tmp_path / "scratch" / "record", tmp_path / "record"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    before = os.umask(0o077)
    try:
        write_atomically(link, b"new")
    finally:
        os.umask(before)
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600


@given(cut=st.integers(0, 400))
def test_a_damaged_record_is_named_and_kept(cut):
    with tempfile.TemporaryDirectory() as root:
        path = records.save(make_record(), root)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=f"{path.name} is not JSON"):
            records.load(path)
        with pytest.raises(FileExistsError, match=path.name):
            records.save(make_record(), root)
        assert path.stat().st_size == cut


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("crash", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_leaves_the_old_record_and_no_litter(
    tmp_path, monkeypatch, call, crash
):
    records.save(make_record(), tmp_path)
    before = contents(tmp_path)

    def fail(*_):
        raise crash

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(crash)):
        records.save(make_record(metrics={"test_nfe": 12}), tmp_path)
    assert contents(tmp_path) == before


# Provenance


def test_provenance_belongs_in_a_record():
    origin = records.provenance("highest")
    assert set(origin) == set(make_record()["provenance"])
    assert origin["device"] and origin["precision"] == "highest"
    assert origin["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    records.validate(records.seal(make_record(provenance=origin)))


def load_copy(folder):
    """The module, from a copy of the package's folder as far as it needs it."""
    source = Path(records.__file__)
    for path in (source, source.with_name("_files.py")):
        shutil.copy(path, folder)
    spec = importlib.util.spec_from_file_location(
        "copied.records", folder / source.name
    )
    module = importlib.util.module_from_spec(spec)
    package = types.ModuleType("copied")
    package.__path__ = [str(folder)]
    sys.modules["copied"] = package
    spec.loader.exec_module(module)
    return module


def test_the_commit_is_that_of_the_checkout_the_package_lives_in(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", *identity, "-c", "commit.gpgsign=false", *arguments]
        run = subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return run.stdout.strip()

    def state():
        module._git_state.cache_clear()  # as a new process
        origin = module.provenance("highest")
        return origin["git_commit"], origin["git_clean"]

    (tmp_path / "package").mkdir()
    module = load_copy(tmp_path / "package")
    assert state() == (None, None)  # not a checkout
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    assert state() == (None, None)  # installed inside the checkout of another project
    git("add", "package/records.py", "package/_files.py")
    git("commit", "-q", "-m", "ours")
    commit = git("rev-parse", "HEAD")
    shutil.rmtree(tmp_path / "package" / "__pycache__", ignore_errors=True)
    assert state() == (commit, True)
    records.save(make_record(), tmp_path / "book" / "results")
    assert state() == (commit, True)  # what runs write does not make a tree dirty
    (tmp_path / "package" / "new.py").write_text("")
    assert state() == (commit, False)
    git("config", "status.showUntrackedFiles", "no")
    assert state() == (commit, False)
    git("add", "package/new.py")
    git("commit", "-q", "-m", "later")
    origin = module.provenance("highest")  # of the code that was imported
    assert (origin["git_commit"], origin["git_clean"]) == (commit, False)
    assert state() == (git("rev-parse", "HEAD"), True)


def test_a_run_has_the_provenance_of_all_its_processes(tmp_path):
    last = records.provenance("highest") | {"git_commit": "b", "git_clean": True}
    other = last | {"git_commit": "a", "git_clean": False}
    started = [f"2026-01-0{day}" for day in (1, 2, 3, 4)]
    origins = [other, other, last, last]
    origins = [o | {"started": t} for o, t in zip(origins, started, strict=True)]
    joined = records.joined(origins)
    assert joined == origins[-1] | {"started": started[0], "earlier": origins[:1]}
    assert records.joined(origins[2:]) == origins[2]
    records.save(make_record(provenance=joined), tmp_path)
    (problem,) = records.check(tmp_path)
    assert "uncommitted changes" in problem  # those of an earlier process


def test_no_git_is_no_crash(monkeypatch):
    monkeypatch.setattr(records, "_git_state", records._git_state.__wrapped__)
    monkeypatch.setenv("PATH", "")
    origin = records.provenance("highest")
    assert origin["git_commit"] is None and origin["git_clean"] is None


# Checking a folder


def spoil_metric(root):
    path = records.save(make_record(), root)
    path.write_text(path.read_text().replace("0.95", "0.99"))


def measured(**changes):
    provenance = make_record()["provenance"] | changes
    return {name: provenance[name] for name in records.MEASURED}


def misplace(root):
    path = records.save(make_record(), root)
    shutil.move(path, path.with_name("vanilla-seed7.json"))


FAULTS = {
    "checksum": spoil_metric,
    "belongs in": misplace,
    "no git commit": lambda root: records.save(
        make_record(provenance={"git_commit": None, "git_clean": None}), root
    ),
    "uncommitted changes": lambda root: records.save(
        make_record(provenance={"git_clean": False}), root
    ),
    "no committed code": lambda root: records.save(
        make_record(provenance={"measured": measured(git_clean=False)}), root
    ),
    "more than the seed": lambda root: records.save(
        make_record(seed=6, config={"rtol": 1e-3}), root
    ),
    "in more than the seed": lambda root: records.save(
        make_record(seed=6, provenance={"dtype": "float64"}), root
    ),
    "cannot be read": lambda root: (root / "folder.json").mkdir(),
    "not JSON": lambda root: (root / "notes.json").write_text("{"),
}


def save_sound(root):
    for method in ("vanilla", "biased"):
        for seed in (4, 5):
            records.save(make_record(method, seed), root)


def test_sound_records_pass(tmp_path, capsys):
    save_sound(tmp_path)
    assert records.check(tmp_path) == []
    assert records.main(["check", str(tmp_path)]) == 0
    assert "sound" in capsys.readouterr().out


@pytest.mark.parametrize("problem", FAULTS)
def test_each_fault_is_reported_once(tmp_path, capsys, problem):
    save_sound(tmp_path)
    FAULTS[problem](tmp_path)
    assert records.main(["check", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert problem in line and str(tmp_path) in line


def test_all_faults_are_reported_together(tmp_path):
    records.save(make_record(seed=1, provenance={"git_clean": False}), tmp_path)
    records.save(make_record(seed=2, provenance={"git_commit": None}), tmp_path)
    assert len(records.check(tmp_path)) == 2


def test_a_folder_without_records_does_not_pass(tmp_path):
    assert records.main(["check", str(tmp_path)]) == 1
    assert records.main(["check", str(tmp_path / "nowhere")]) == 1
