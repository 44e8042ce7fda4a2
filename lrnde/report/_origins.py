"""Where numbers come from: records, devices, commits."""

import math
from collections import Counter
from collections.abc import Sequence

from ..records import all_origins, path_of
from ._methods import by_method


def setup(records: Sequence[dict]) -> set[tuple]:
    """What has to agree before prediction times may be compared."""
    return {(timed_on(r), r["times"]["predict_batch"]) for r in records}


def timed_on(record: dict) -> frozenset[str]:
    """The devices that the times of a record come from."""
    origins = all_origins(record)
    if "measured" in record["provenance"]:
        origins = origins[:1]
    return frozenset(origin["device"] for origin in origins)


def timed_apart(record: dict) -> bool:
    """Whether the time of a training step is not the mean over the training itself."""
    if "measured" in record["provenance"]:
        return True  # older records do not say
    mean = record["times"]["train_seconds"] / record["config"]["steps"]
    return not math.isclose(record["times"]["train_step_seconds"], mean, rel_tol=1e-9)


def distinct(values: Sequence) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


def _commit(origin: dict) -> str:
    if origin["git_commit"] is None:
        return "unknown"
    return f"`{origin['git_commit'][:10]}`" + " (changed)" * (not origin["git_clean"])


def _measured(records: Sequence[dict]) -> str:
    """How times were measured after the runs, as far as the records say it."""
    origins = [r["provenance"].get("measured", {}) for r in records]
    # One command measures side by side, and notes when it started.
    commands = len({o.get("started") for o in origins})
    several = f", by {commands} commands" if commands > 1 else ""
    text = f"times of {len(records)} measured side by side afterwards{several}"
    found = [o for o in origins if o]
    if not found:
        return text
    flags = distinct([f"`{o['xla_flags']}`" for o in found if o["xla_flags"]])
    with_flags = f", XLA_FLAGS {flags}" if flags else ""
    return f"{text} (commit {distinct([_commit(o) for o in found])}{with_flags})"


def provenance_note(records: Sequence[dict], root: str = "book/results") -> str:
    """Says in a line of Markdown where the numbers of a table come from.

    **Arguments:**

    - `records`: Records of one experiment in one tier.
    - `root`: The folder of all records, as the reader should see it.

    **Returns:**

    Number and folder of the records, seeds, devices, precision, `XLA_FLAGS` if there
    were any in the training, versions, commits and dates, each with all of its values
    where the records differ; and how many of the times were measured side by side after
    the runs, by how many commands if not by one, and with what commits and flags, where
    the records say it.
    """
    if not records:
        return "**Provenance.** No records."
    by_method(records)
    origins = [origin for record in records for origin in all_origins(record)]
    names = origins[0]["versions"]
    versions = (f"{n} {distinct([o['versions'][n] for o in origins])}" for n in names)
    devices = [
        f"{o['device']} ({o['platform']}, precision {o['precision']})" for o in origins
    ]
    # Records from before they were noted have none.
    flags = Counter(
        text
        for record in records
        for text in {o.get("xla_flags") for o in all_origins(record)} - {None, ""}
    )
    parts = (
        f"{len(records)} records in `{root}/{records[0]['experiment']}/"
        f"{records[0]['tier']}`",
        f"seeds {distinct([record['seed'] for record in records])}",
        distinct(devices),
        *(f"{n} trained with XLA_FLAGS `{text}`" for text, n in sorted(flags.items())),
        ", ".join(versions),
        f"commit {distinct([_commit(origin) for origin in origins])}",
        f"run on {distinct([origin['started'][:10] for origin in origins])}",
        _measured([record for record in records if timed_apart(record)]),
    )
    return f"**Provenance.** {'; '.join(parts)}."


def record_links(records: Sequence[dict], root: str = "../book/results") -> str:
    """Links to the files of records, in a line of Markdown.

    **Arguments:**

    - `records`: Records of one experiment in one tier.
    - `root`: The folder of all records, as the page sees it.

    **Returns:**

    A link for each seed, by method.
    """
    groups = by_method(records)
    if not groups:
        return "**Records.** None."

    def seeds(group):
        ordered = sorted(group, key=lambda record: record["seed"])
        return ", ".join(f"[{r['seed']}]({path_of(r, root)})" for r in ordered)

    parts = (f"*{method}* {seeds(group)}" for method, group in groups.items())
    return f"**Records,** by seed. {'; '.join(parts)}."
