"""Runs experiments and keeps their records: `python -m lrnde.run --help`."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from . import experiments, records
from .experiments import Config

ROOT = Path(__file__).parents[1]
PARAMS = ROOT / "notebooks" / "params"
RESULTS = ROOT / "book" / "results"
RUNS = ROOT / "runs"


def settings(experiment: str, tier: str) -> list[Config]:
    """The runs of an experiment at a tier, as its chapter's parameters file has them.

    **Raises:**

    - `FileNotFoundError`, naming the experiments and tiers that there are.
    """
    path = PARAMS / tier / f"{experiment.replace('-', '_')}.yaml"
    if not path.exists():
        known = sorted(p.relative_to(PARAMS).as_posix() for p in PARAMS.glob("*/*"))
        raise FileNotFoundError(f"no {path}; there are: {', '.join(known)}")
    return experiments.configs(
        {"experiment": experiment, **yaml.safe_load(path.read_text())}
    )


def checkpoint_of(config: Config) -> Path:
    """Where the run of a configuration keeps its checkpoint."""
    return RUNS / config.experiment / config.tier / f"{config.name}.ckpt"


def record_of(config: Config) -> Path:
    """Where the record of a configuration goes."""
    return records.path_of(vars(config), RESULTS)


def run(configs: Sequence[Config], deadline: float) -> bool:
    """Runs what has no record yet; `False` if the time was up before the end.

    **Raises:**

    - `FileExistsError` if there is a record of other settings in a run's place.
    """
    for config in configs:
        records.guard({**vars(config), "config": asdict(config)}, RESULTS)
        if record_of(config).exists():
            print(f"{config.name}: has its record, {record_of(config)}")
            continue
        started = time.monotonic()
        finished = experiments.run(
            config,
            checkpoint=checkpoint_of(config),
            deadline=deadline,
            progress=sys.stderr.isatty(),
        )
        if finished is None:
            print(f"{config.name}: stopped; the next run goes on from its checkpoint")
            return False
        path = records.save(finished.record, RESULTS)
        metrics = finished.record["metrics"]
        figures = [
            f"{name.replace('_', ' ')} {metrics[name]:.4g}"
            for name in ("test_accuracy", "test_loss", "test_nfe")
            if name in metrics
        ]
        seconds = time.monotonic() - started
        print(
            f"{config.name}: {seconds:.0f} s, {', '.join(figures)}, record {path}",
            flush=True,
        )
    return True


def measure(configs: Sequence[Config]) -> None:
    """Times all finished runs side by side and puts that into their records.

    **Raises:**

    - `ValueError` if a run was made on another device.
    - `FileNotFoundError` if the trained model of a run is not at hand.
    """
    done = [config for config in configs if record_of(config).exists()]
    here = records.provenance("")["device"]
    for config in done:
        record = records.load(record_of(config))
        _check_measurable(config, record["provenance"]["device"], here)
    times = experiments.measure(done, checkpoint_of) if done else {}
    for config in done:
        record = records.load(record_of(config))
        del record["checksum"]
        record["times"].update(times[config.name]._asdict())
        records.save(record, RESULTS)
        predict, step = (1e3 * seconds for seconds in times[config.name])
        print(f"{config.name}: predict {predict:.2f} ms, training step {step:.2f} ms")


def _check_measurable(config: Config, device: str, here: str) -> None:
    if device != here:
        raise ValueError(
            f"{config.name} ran on {device}, this is {here}: measure it there, or its "
            "record would mix two machines."
        )
    if not checkpoint_of(config).exists():
        raise FileNotFoundError(
            f"{config.name} has a record, but no trained model in "
            f"{checkpoint_of(config)}: copy that file here, or run it again."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lrnde.run", description=__doc__)
    parser.add_argument("experiment", help="for example mnist-node")
    parser.add_argument("--tier", required=True, help="cpu or paper")
    parser.add_argument("--method", nargs="+", help="only these methods")
    parser.add_argument("--seed", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--max-minutes", type=float, default=math.inf)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list runs and records")
    what.add_argument(
        "--measure",
        action="store_true",
        help="time finished runs side by side; run nothing else meanwhile",
    )
    options = parser.parse_args(arguments)
    experiment = options.experiment.replace("_", "-")
    configs = [
        config
        for config in settings(experiment, options.tier)
        if config.method in (options.method or [config.method])
        and config.seed in (options.seed or [config.seed])
    ]
    if not configs:
        parser.error("no run of this tier has that method and seed; see --list")
    if options.list:
        for config in configs:
            state = "done" if record_of(config).exists() else "missing"
            print(f"{config.name}: {state}")
        return 0
    if options.measure:
        measure(configs)
        return 0
    deadline = time.monotonic() + 60 * options.max_minutes
    return 0 if run(configs, deadline) else 75  # EX_TEMPFAIL: call again


if __name__ == "__main__":
    sys.exit(main())
