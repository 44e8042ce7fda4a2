"""Measures everything and writes a record: `python -m benchmarks`."""

import argparse
from pathlib import Path

import jax
from tqdm import tqdm

from lrnde import records

from . import compare, record

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument(
    "--output",
    type=Path,
    help="where to write (book/benchmarks/<platform>.json)",
)
parser.add_argument("--repeats", type=int, default=9, help="timings of each (9)")
arguments = parser.parse_args()
if arguments.repeats < 1:
    parser.error("--repeats must be at least 1.")
if not compare.TORCH:
    print("torchdiffeq is left out: `pip install '.[bench]'` installs it.")
provenance = records.provenance("highest")
rows = []
with jax.default_matmul_precision("highest"):
    for section, piece in tqdm(compare.sections(arguments.repeats), unit="comparison"):
        rows += [{"section": section} | row for row in piece]
output = arguments.output or record.path(provenance["platform"])
record.save(output, record.make(rows, arguments.repeats, provenance))
print(f"wrote {output}")
