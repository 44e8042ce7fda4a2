"""Records: one JSON file a run, from which every number in the book is made.

A record lies in `<root>/<experiment>/<tier>/<method>-seed<k>.json`. It carries its
whole configuration, where the numbers come from (`provenance`), and two digests:
`config_hash` says which settings it belongs to, `checksum` shows any later edit.
`python -m lrnde.records check book/results` tells whether a folder can be trusted.
"""

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._files import write_atomically

SCHEMA = 1

_PACKAGES = ("jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "lrnde")
_NUMBER = (int, float)
_OPTIONAL = type(None)

# Each leaf lists the exact types allowed, so that `True` does not pass for a number.
# Sections may hold more than is listed here; the record itself may not.
_FIELDS = {
    "schema": (int,),
    "experiment": (str,),
    "tier": (str,),
    "method": (str,),
    "seed": (int,),
    "config": {},
    "config_hash": (str,),
    "metrics": dict.fromkeys(
        ("train_loss", "test_loss", "train_nfe", "test_nfe"), _NUMBER
    ),
    "times": dict.fromkeys(
        (
            "compile_seconds",
            "train_seconds",
            "train_step_seconds",
            "predict_seconds",
            "predict_batch",
        ),
        _NUMBER,
    ),
    "curves": dict.fromkeys(("step", "loss", "penalty", "nfe"), (list,)),
    "provenance": {
        "device": (str,),
        "platform": (str,),
        "precision": (str,),
        "versions": dict.fromkeys(("python", *_PACKAGES), (str,)),
        "git_commit": (str, _OPTIONAL),
        "git_clean": (bool, _OPTIONAL),
        "started": (str,),
    },
    "checksum": (str,),
}


# What of its provenance may differ between a run and the measurement of its times.
MEASURED = ("xla_flags", "versions", "git_commit", "git_clean", "started")


# Digests


def _plain(value: Any) -> Any:
    """Turns NumPy and JAX scalars and arrays into Python numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(
        f"a record holds numbers, strings, lists and dicts, not {type(value).__name__}:"
        f" {value!r}. Turn it into one of those, for instance with `str` or"
        " `dataclasses.asdict`."
    )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(config: dict) -> str:
    """Names a configuration: the SHA-256 of its canonical JSON.

    Canonical means sorted keys and no white space, so neither the order of the keys
    nor the difference between a tuple and a list matters.

    **Arguments:**

    - `config`: The configuration, a dictionary that JSON can hold.

    **Returns:**

    64 hexadecimal digits.
    """
    return _digest(config)


def _checksum(record: dict) -> str:
    return _digest({k: v for k, v in record.items() if k != "checksum"})


def seal(record: dict) -> dict:
    """Completes a record with its schema version, `config_hash` and `checksum`.

    **Arguments:**

    - `record`: The record; NumPy and JAX numbers and arrays are allowed.

    **Returns:**

    A copy of plain JSON values, as `lrnde.records.load` would give it back.
    """
    record = {"schema": SCHEMA, **json.loads(json.dumps(record, default=_plain))}
    record.setdefault("config_hash", _digest(record.get("config")))
    record["checksum"] = _checksum(record)
    return record


# Provenance


def _git(*arguments: str) -> str | None:
    """Runs git in the package's folder; `None` where that is not possible."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache  # what is committed later is not the code that was imported
def _git_state() -> tuple[str | None, bool | None]:
    # An installed copy may sit, ignored, inside the checkout of another project,
    # whose commit says nothing about this code.
    tracked = _git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
    commit = tracked and _git("rev-parse", "HEAD")
    if not commit:
        return None, None
    # Records are what runs write, not what they read: the first of three seeds must
    # not make the tree dirty for the other two.
    everything = ":/", ":(top,exclude)book/results"
    # Whatever the user's settings say of files that git does not know.
    untracked = "--untracked-files=normal"
    changes = _git("status", "--porcelain", untracked, "--", *everything)
    return commit, changes == ""


@functools.cache
def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def provenance(precision: str, devices: int = 1) -> dict:
    """Says where the numbers of a run that starts now will come from.

    **Arguments:**

    - `precision`: The precision of the run's arithmetic, such as `"highest"`.
    - `devices`: How many devices it uses.

    **Returns:**

    The dictionary of `whereabouts`, with `precision`.
    """
    return whereabouts(devices) | {"precision": precision}


def whereabouts(devices: int = 1) -> dict:
    """Says on what machine, with what code, and when.

    **Arguments:**

    - `devices`: How many devices are used.

    **Returns:**

    A dictionary: `device` (the model of the CPU or GPU, with their number if there are
    several), `platform`, `dtype` (JAX's type of a real number),
    `xla_flags` (the environment variable), `versions`, `git_commit` and `git_clean` of
    the checkout that the package lives in (`None` outside one; records under
    `book/results` do not count as changes) when this process first asked, and
    `started`, the time in UTC.
    """
    device = jax.devices()[0]
    commit, clean = _git_state()
    now = datetime.datetime.now(datetime.UTC)
    model = _cpu_name() if device.platform == "cpu" else device.device_kind
    return {
        "device": model if devices == 1 else f"{devices} x {model}",
        "platform": device.platform,
        "dtype": jnp.result_type(float).name,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in _PACKAGES},
        "git_commit": commit,
        "git_clean": clean,
        "started": now.isoformat(timespec="seconds"),
    }


def joined(origins: Sequence[dict]) -> dict:
    """The provenance of a run at which several processes worked, one after another.

    **Arguments:**

    - `origins`: The `provenance` of each, in their order; at least one.

    **Returns:**

    The last one, which evaluated the run, with the first one's `started`; in `earlier`
    those before it that differ from it in more than the time, if there are any.
    """

    def same(one, other):
        return one | {"started": None} == other | {"started": None}

    last, earlier = origins[-1], []
    for origin in origins:
        if not any(same(origin, known) for known in [last, *earlier]):
            earlier.append(origin)
    found = last | {"started": origins[0]["started"]}
    return found | {"earlier": earlier} if earlier else found


def all_origins(record: dict) -> list[dict]:
    """Where the numbers of a record come from: one provenance or several."""
    return [record["provenance"], *record["provenance"].get("earlier", [])]


# Validation


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"record field `{field}` {problem}")


def _check_types(value: Any, expected: dict | tuple, name: str = "") -> None:
    if isinstance(expected, tuple):
        names = " or ".join(kind.__name__ for kind in expected)
        _require(type(value) in expected, name, f"is {value!r}, not {names}")
        return
    _require(isinstance(value, dict), name or "(top)", f"is {value!r}, not an object")
    for key, inner in expected.items():
        field = f"{name}.{key}".lstrip(".")
        _require(key in value, field, "is missing")
        _check_types(value[key], inner, field)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict | list):
        yield name, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield from _leaves(inner, f"{name}.{key}".lstrip("."))


def _check_numbers(record: dict) -> None:
    for name, leaf in _leaves(record):
        finite = not isinstance(leaf, float) or math.isfinite(leaf)
        _require(finite, name, f"is {leaf}, not finite")
    measured = {section: record[section] for section in ("metrics", "times", "curves")}
    for name, leaf in _leaves(measured):
        _require(type(leaf) in _NUMBER, name, f"is {leaf!r}, not a number")
        if name.split(".")[1].endswith("accuracy"):
            _require(0 <= leaf <= 1, name, f"is {leaf}, not a fraction in [0, 1]")


def _check_curves(curves: dict) -> None:
    for name, curve in curves.items():
        _require(isinstance(curve, list), f"curves.{name}", "is not a list")
        problem = f"has {len(curve)} entries, `curves.step` {len(curves['step'])}"
        _require(len(curve) == len(curves["step"]), f"curves.{name}", problem)


def _check_time(text: str) -> None:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        _require(False, "provenance.started", f"is {text!r}, not an ISO 8601 time")


def _check_origins(origin: dict) -> None:
    fields = _FIELDS["provenance"]
    _check_time(origin["started"])
    earlier = origin.get("earlier", [])
    _check_types(earlier, (list,), "provenance.earlier")
    for other in earlier:
        _check_types(other, fields, "provenance.earlier")
    if "measured" in origin:
        expected = {name: fields[name] for name in MEASURED if name in fields}
        _check_types(origin["measured"], expected, "provenance.measured")


def _check_identity(record: dict, path: pathlib.Path | None) -> None:
    config = record["config"]
    for field in ("experiment", "tier", "method", "seed"):
        same = config.get(field, record[field]) == record[field]
        _require(same, field, f"is {record[field]!r}, its config says otherwise")
    place = path_of(record, "")
    here = path is None or path.resolve().parts[-3:] == place.parts
    _require(here, "experiment/tier/method/seed", f"belongs in `{place}`, not `{path}`")
    problem = "is not the hash of `config`: the settings were edited; run again"
    _require(record["config_hash"] == config_hash(config), "config_hash", problem)
    problem = "does not fit the record: it was edited; restore it or run again"
    _require(record["checksum"] == _checksum(record), "checksum", problem)


def validate(record: dict, path: str | os.PathLike | None = None) -> None:
    """Checks that a record is whole, well-formed and unedited.

    **Arguments:**

    - `record`: A sealed record.
    - `path`: The file that it came from, which must fit its fields. Optional.

    **Raises:**

    - `ValueError` naming the field at fault: a field is missing, unknown or of another
        type, a number is not finite, an accuracy is not a fraction, curves differ in
        length, the record does not fit its config, its place or its digests.
    """
    _check_types(record, _FIELDS)
    for name in record:
        _require(name in _FIELDS, name, f"is unknown; known: {', '.join(_FIELDS)}")
    _require(record["schema"] == SCHEMA, "schema", f"is not {SCHEMA}")
    _check_numbers(record)
    _check_curves(record["curves"])
    _check_origins(record["provenance"])
    _check_identity(record, None if path is None else pathlib.Path(path))


# Files


def path_of(fields: dict, root: str | os.PathLike) -> pathlib.Path:
    """Says where a record lies.

    **Arguments:**

    - `fields`: A record, or any dictionary with `experiment`, `tier`, `method` and
        `seed`.
    - `root`: The folder of all records.

    **Returns:**

    `<root>/<experiment>/<tier>/<method>-seed<seed>.json`.

    **Raises:**

    - `ValueError` if one of the names cannot be the name of a file or folder.
    """
    for field in ("experiment", "tier", "method"):
        good = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]*", fields[field])
        problem = f"is {fields[field]!r}; use letters, digits and `+._-`"
        _require(good is not None, field, problem)
    _require(fields["seed"] >= 0, "seed", f"is {fields['seed']}, less than 0")
    name = f"{fields['method']}-seed{fields['seed']}.json"
    return pathlib.Path(root) / fields["experiment"] / fields["tier"] / name


def _dump(value: Any, indent: str = "") -> str:
    """JSON with a line a field: curves stay on one line, and diffs readable."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    deeper = indent + "  "
    lines = (f"{deeper}{json.dumps(k)}: {_dump(v, deeper)}" for k, v in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        problem = f"{path} is not JSON ({error}): restore it from git or run again"
        raise ValueError(problem) from error


def guard(fields: dict, root: str | os.PathLike) -> None:
    """Refuses if a record of other settings is in the place of this one.

    `lrnde.records.save` asks this; ask it before a long run to learn it early.

    **Arguments:**

    - `fields`: A record, or a dictionary with `experiment`, `tier`, `method`, `seed`
        and `config`.
    - `root`: The folder of all records.

    **Raises:**

    - `FileExistsError` naming the file and the remedy.
    """
    path = path_of(fields, root)
    if not path.exists():
        return
    try:
        same = load(path)["config_hash"] == config_hash(fields["config"])
        reason = "holds a run with another config"
    except ValueError as error:
        same, reason = False, f"cannot be read as a record ({error})"
    if not same:
        raise FileExistsError(
            f"{path} {reason}. Move or delete it, or choose another root."
        )


def save(record: dict, root: str | os.PathLike) -> pathlib.Path:
    """Writes a record into its place, whole or not at all.

    A record without a `checksum` is sealed first; one that carries a checksum must
    fit it. A record of the same config is replaced: it is the same run, done again.

    **Arguments:**

    - `record`: The record, sealed or not.
    - `root`: The folder of all records.

    **Returns:**

    The path of the file.

    **Raises:**

    - `ValueError` if the record is not valid, `FileExistsError` if it would overwrite a
        record of another config.
    """
    if "checksum" not in record:
        record = seal(record)
    validate(record)
    guard(record, root)
    path = path_of(record, root)
    write_atomically(path, f"{_dump(record)}\n".encode())
    return path


def load(path: str | os.PathLike) -> dict:
    """Reads and validates one record.

    **Arguments:**

    - `path`: Its file.

    **Returns:**

    The record.

    **Raises:**

    - `ValueError` naming the file and the field at fault.
    """
    path = pathlib.Path(path)
    record = _read(path)
    try:
        validate(record, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def load_all(root: str | os.PathLike, experiment: str, tier: str) -> list[dict]:
    """Reads every record of an experiment in one tier, by method and seed.

    **Arguments:**

    - `root`: The folder of all records.
    - `experiment`: For instance `"mnist-node"`.
    - `tier`: `"smoke"`, `"book"`, `"cpu"` or `"paper"`.

    **Returns:**

    The records; none if there is no such folder, which the tables show as missing.
    """
    files = (pathlib.Path(root) / experiment / tier).glob("*.json")
    return sorted(
        map(load, files), key=lambda record: (record["method"], record["seed"])
    )


# Checking a folder


def _doubts(record: dict) -> Iterator[str]:
    again = "delete the record and its checkpoint, and run again"
    origins = all_origins(record)
    if any(origin["git_commit"] is None for origin in origins):
        yield f"no git commit: {again} from a checkout"
    elif not all(origin["git_clean"] for origin in origins):
        yield f"made from a tree with uncommitted changes: commit them, {again}"
    elif not record["provenance"].get("measured", origins[0])["git_clean"]:
        yield "its times are of no committed code: commit it and measure again"


def _mixtures(records: dict[pathlib.Path, dict]) -> Iterator[str]:
    """Seeds of one method must differ in nothing but the seed, and the machine."""
    settings: dict[tuple, str] = {}
    for path, record in records.items():
        group = (path.parent, record["method"])
        config = {k: v for k, v in record["config"].items() if k != "seed"}
        # Records from before it was noted are all of this type.
        config["dtype"] = record["provenance"].get("dtype", "float32")
        if settings.setdefault(group, config_hash(config)) != config_hash(config):
            yield f"{path}: its config or dtype differs in more than the seed"


def check(root: str | os.PathLike) -> list[str]:
    """Looks for reasons not to trust a folder of records.

    **Arguments:**

    - `root`: The folder of all records.

    **Returns:**

    The problems, each beginning with the file: a record that does not validate, one
    made without a commit or from a changed tree, seeds run with different settings;
    or that there are no records at all.
    """
    problems, records = [], {}
    paths = sorted(pathlib.Path(root).rglob("*.json"))
    for path in paths:
        try:
            records[path] = load(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        except (OSError, RecursionError) as error:
            problems.append(f"{path}: cannot be read ({error})")
            continue
        problems += [f"{path}: {doubt}" for doubt in _doubts(records[path])]
    problems += _mixtures(records)
    return problems if paths else [f"{root}: no records here"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if there are problems and 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m lrnde.records")
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="report records not to be trusted")
    checker.add_argument("root", help="the folder of all records: book/results")
    problems = check(parser.parse_args(arguments).root)
    print("\n".join(problems) or "every record is sound")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
