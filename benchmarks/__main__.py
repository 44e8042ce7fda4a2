"""Measures everything and writes a record: `python -m benchmarks`."""

import argparse
from pathlib import Path

import jax
from tqdm import tqdm

from lrnde import records

from . import compare, record

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument(
    "what", nargs="*", default=["ode", "sde"], help="ode, sde or both (both)"
)
parser.add_argument(
    "--folder", type=Path, default=record.ROOT, help="where to write (book/benchmarks)"
)
parser.add_argument("--repeats", type=int, default=9, help="timings of each (9)")
arguments = parser.parse_args()
if arguments.repeats < 1:
    parser.error("--repeats must be at least 1.")
SECTIONS = {"ode": compare.sections, "sde": compare.sde_sections}
if unknown := set(arguments.what) - set(SECTIONS):
    parser.error(f"{', '.join(unknown)}: choose from {', '.join(SECTIONS)}.")
if "ode" in arguments.what and not compare.TORCH:
    print("torchdiffeq is left out: `pip install '.[bench]'` installs it.")
for what in arguments.what:
    provenance = records.provenance("highest")
    rows = []
    with jax.default_matmul_precision("highest"):
        pieces = SECTIONS[what](arguments.repeats)
        for section, piece in tqdm(pieces, unit="comparison"):
            rows += [{"section": section} | row for row in piece]
    output = arguments.folder / record.path(provenance["platform"], what).name
    record.save(output, record.make(rows, arguments.repeats, provenance))
    print(f"wrote {output}")
