"""The record of a benchmark: a JSON file with the machine and the versions in it."""

import importlib.metadata
import json
from pathlib import Path

from lrnde import records
from lrnde._files import write_atomically

ROOT = Path(__file__).parents[1] / "book" / "benchmarks"


def path(platform: str, what: str = "ode") -> Path:
    """Where the book looks for the record of a platform, such as "cpu".

    **Arguments:**

    - `platform`: "cpu" or "gpu".
    - `what`: "ode" or "sde".
    """
    return ROOT / (f"{platform}.json" if what == "ode" else f"{platform}-{what}.json")


def make(rows: list[dict], repeats: int, provenance: dict) -> dict:
    """A record of timings; see `benchmarks.compare.compare` for the rows."""
    for package in ("torch", "torchdiffeq"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        provenance["versions"][package] = version
    return records.seal(
        dict(config=dict(repeats=repeats), provenance=provenance, rows=rows)
    )


def save(file: Path, record: dict) -> None:
    """Writes a record."""
    write_atomically(file, (json.dumps(record, indent=1) + "\n").encode())


def load(file: Path) -> dict:
    """Reads a record.

    **Raises:**

    - `ValueError` if it has been edited.
    """
    record = json.loads(file.read_text())
    rest = {name: value for name, value in record.items() if name != "checksum"}
    if records.seal(rest)["checksum"] != record.get("checksum"):
        raise ValueError(f"{file} was edited after it was written; run `make bench`.")
    return record
