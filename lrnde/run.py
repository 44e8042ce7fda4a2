"""Runs experiments and keeps their records: `python -m lrnde.run --help`.

Without names it runs every experiment of the tier that has a parameters file, in the
order of `lrnde.experiments.EXPERIMENTS`. A run that has its record is not run again;
one that was stopped or killed goes on from its checkpoint. Start the command several
times to share a machine or a GPU: each process takes runs that no other one has. With
`--measure` it times finished runs side by side, for their records.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import jax

from . import experiments, records
from ._extras import import_extra
from .data import DataError
from .experiments import Config
from .training import progress_of, TrainingError

filelock, yaml = import_extra("filelock"), import_extra("yaml", "pyyaml")

ROOT = Path(__file__).parents[1]
PARAMS = ROOT / "notebooks" / "params"
RESULTS = ROOT / "book" / "results"
RUNS = ROOT / "runs"

STOPPED = 75  # EX_TEMPFAIL: call again


# What there is to run


def chapters(tier: str) -> list[str]:
    """The names that have settings at a tier, in the order in which they are run."""
    names = {path.stem.replace("_", "-") for path in PARAMS.glob(f"{tier}/*.yaml")}
    first = [name for name in experiments.EXPERIMENTS if name in names]
    return first + sorted(names - set(first))


def settings(chapter: str, tier: str) -> list[Config]:
    """The runs of a chapter at a tier, as its parameters file has them.

    **Raises:**

    - `FileNotFoundError`, naming the chapters that there are at this tier.
    - `ValueError`, naming the file, if its settings are not those of runs at this tier.
    """
    path = PARAMS / tier / f"{chapter.replace('-', '_')}.yaml"
    if not path.exists():
        known = ", ".join(chapters(tier))
        raise FileNotFoundError(f"no {chapter!r} at tier {tier}; there are {known}")
    found = {"experiment": chapter.replace("_", "-"), "tier": tier}
    try:
        found |= yaml.safe_load(path.read_text()) or {}
        configs = experiments.configs(found)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if found["tier"] != tier:
        raise ValueError(f"{path}: these are settings of the tier {found['tier']!r}.")
    return configs


def plan(names: Iterable[str], tier: str) -> list[Config]:
    """The runs of several chapters; one that two of them share is there once.

    **Raises:**

    - `ValueError` if two chapters mean different runs by one name, and as `settings`.
    - `FileNotFoundError` as `settings`.
    """
    runs: dict[Path, Config] = {}
    for config in (c for name in names for c in settings(name, tier)):
        if runs.setdefault(record_of(config), config) != config:
            raise ValueError(
                f"{title(config)}: two parameters files of tier {tier} give it "
                "different settings."
            )
    return list(runs.values())


def _by_experiment(configs: Iterable[Config]) -> dict[str, list[Config]]:
    groups: dict[str, list[Config]] = {}
    for config in configs:
        groups.setdefault(config.experiment, []).append(config)
    return groups


def title(config: Config) -> str:
    """Names a run in full."""
    return f"{config.experiment}/{config.tier}/{config.name}"


def checkpoint_of(config: Config) -> Path:
    """Where the run of a configuration keeps its checkpoint."""
    return RUNS / config.experiment / config.tier / f"{config.name}.ckpt"


def record_of(config: Config) -> Path:
    """Where the record of a configuration goes."""
    return records.path_of(vars(config), RESULTS)


def _done(config: Config) -> int:
    """The steps behind a run; that its checkpoint is damaged is for the run to say."""
    try:
        return progress_of(checkpoint_of(config)).step
    except TrainingError:
        return 0


def missing(configs: Iterable[Config]) -> list[Config]:
    """Those that have no record."""
    return [config for config in configs if not record_of(config).exists()]


def _guard(config: Config) -> None:
    records.guard({**vars(config), "config": asdict(config)}, RESULTS)


# Several processes


def lock_of(config: Config) -> Path:
    """The file that the process which is at a run holds locked."""
    return checkpoint_of(config).with_suffix(".lock")


@contextmanager
def _claim(path: Path, wait: float) -> Iterator[bool]:
    """Gives whether this process got the lock. One that is killed loses its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def in_progress() -> list[str]:
    """The runs that other processes are at."""
    busy = []
    for path in sorted(RUNS.glob("*/*/*.lock")):
        with _claim(path, wait=0.0) as free:
            if not free:
                busy.append(path.relative_to(RUNS).with_suffix("").as_posix())
    return busy


def _measurement() -> "filelock.FileLock":
    """Held while times are measured; no run starts meanwhile."""
    RUNS.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(RUNS / "measurement.lock")


def _wait_for_measurement(config: Config, deadline: float) -> None:
    """Waits for the end of a measurement; a `Timeout` if there is no time for that."""
    lock = _measurement()
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{title(config)}: waits for the end of a measurement", flush=True)
        left = deadline - time.monotonic()
        lock.acquire(timeout=-1 if math.isinf(left) else max(left, 0))
    lock.release()


# How long it will take


def _seconds_of_a_run(config: Config, device: str) -> float | None:
    """What such runs took on this device: of the same method, or else of any."""
    try:
        there = records.load_all(RESULTS, config.experiment, config.tier)
    except ValueError:  # which `check-results` tells; this is only an estimate
        return None
    took = [
        (r["method"], r["times"]["train_seconds"] + r["times"]["compile_seconds"])
        for r in there
        if r["provenance"]["device"] == device
    ]
    same = [seconds for method, seconds in took if method == config.method]
    anyone = [seconds for _, seconds in took]
    return mean(same or anyone) if took else None


def seconds_left(configs: Iterable[Config], device: str) -> tuple[float, int]:
    """Estimates the time that runs still take, one after another.

    **Arguments:**

    - `configs`: The runs.
    - `device`: Only records made on this device count.

    **Returns:**

    The seconds, from what records of the same experiment and tier took and from how far
    the checkpoints are; and the number of runs for which there is no such record.
    """
    total, unknown = 0.0, 0
    for config in configs:
        seconds = _seconds_of_a_run(config, device)
        if seconds is None:
            unknown += 1
        else:
            # A checkpoint that is further on is refused; that is for the run to say.
            total += seconds * max(0.0, 1 - _done(config) / config.steps)
    return total, unknown


def _outlook(left: Sequence[Config], device: str, helping: bool) -> str:
    if not left:
        return "none left"
    seconds, unknown = seconds_left(left, device)
    # Processes that share the work finish it so much sooner; this one is among them
    # if it is `helping`, and not if it only lists what is left.
    others = set(in_progress()) & {title(config) for config in left}
    workers = max(1, min(len(others) + helping, len(left)))
    hours, minutes = divmod(round(seconds / workers / 60), 60)
    about = f"about {hours} h {minutes} min"
    if unknown == len(left):
        about = "time unknown"
    elif unknown:
        about += f" and {unknown} of unknown length"
    return f"{len(left)} left, {about}"


# Running


def _first_line(origin: dict) -> str:
    """Says in a line where runs are made, and whether their records will count."""
    at = f"on {origin['device']}"
    if (commit := origin["git_commit"]) is None:
        return f"{at}, without a commit: `make check-results` will refuse the records"
    if origin["git_clean"]:
        return f"{at}, commit {commit[:10]}"
    return (
        f"{at}, commit {commit[:10]} WITH CHANGES: `make check-results` will refuse "
        "the records; see `git status`"
    )


def run(
    configs: Sequence[Config], deadline: float = math.inf, shard: bool = False
) -> int:
    """Runs what has no record yet and no other process is at.

    **Arguments:**

    - `configs`: The runs, in their order.
    - `deadline`: Stop cleanly at this `time.monotonic()`.
    - `shard`: Whether to divide every training batch over all devices.

    **Returns:**

    An exit code: 1 if a run failed (the others are still run, but none with data that
    could not be had); else `STOPPED` if the time was up or the process was asked to
    stop (Ctrl-C, or SIGTERM in the training), and 0 if there is nothing left to do
    here.

    **Raises:**

    - `FileExistsError` if there is a record of other settings in a run's place.
    """
    for config in configs:
        _guard(config)
    # This also takes note of the commit before it may change.
    origin = records.whereabouts(jax.device_count() if shard else 1)
    if missing(configs):
        print(_first_line(origin), flush=True)
    code, unavailable = 0, set()  # data sets
    for config in configs:
        if record_of(config).exists() or getattr(config, "dataset", "") in unavailable:
            continue
        if time.monotonic() > deadline:
            return code or STOPPED
        # `in_progress` of another process may have the lock for a moment.
        with _claim(lock_of(config), wait=1.0) as mine:
            if not mine:
                print(f"{title(config)}: another process is at it", flush=True)
                continue
            if record_of(config).exists():  # written since
                continue
            try:
                _wait_for_measurement(config, deadline)
                line = _run_one(config, deadline, shard)
            except (RuntimeError, ValueError, MemoryError) as error:
                # One that diverges or is out of memory shall not hold up the others.
                unavailable |= _report_failure(config, error)
                code = 1
                continue
            except (KeyboardInterrupt, filelock.Timeout):
                line = None  # not between two training steps
        if line is None:
            print(f"{title(config)}: stopped at step {_done(config)}; call again")
            return code or STOPPED
        outlook = _outlook(missing(configs), origin["device"], helping=True)
        print(f"{title(config)}: {line}; {outlook}", flush=True)
    return code


def _report_failure(config: Config, error: Exception) -> set[str]:
    """Says why a run failed; gives the data sets that there is no use in trying."""
    reason = str(error) or type(error).__name__
    print(f"{title(config)}: failed: {reason}", flush=True)
    if not isinstance(error, DataError):
        return set()
    print(f"No other run with {config.dataset} is tried.", flush=True)
    return {config.dataset}


def _run_one(config: Config, deadline: float, shard: bool) -> str | None:
    """Runs and records; what came out in a line, or `None` if it was stopped."""
    started = time.monotonic()
    finished = experiments.run(
        config,
        checkpoint=checkpoint_of(config),
        deadline=deadline,
        progress=sys.stderr.isatty(),
        shard=shard,
    )
    if finished is None:
        return None
    records.save(finished.record, RESULTS)
    metrics = finished.record["metrics"]
    figures = [
        f"{name.replace('_', ' ')} {metrics[name]:.4g}"
        for name in ("test_accuracy", "test_mse", "test_loss", "test_nfe")
        if name in metrics
    ]
    return f"{time.monotonic() - started:.0f} s, {', '.join(figures)}"


# Measuring


class NotMeasured(RuntimeError):
    """Times cannot be measured; the message says why."""


def measure(configs: Sequence[Config]) -> None:
    """Times all finished runs, those of an experiment side by side, for their records.

    A record's `provenance.measured` says with what code and compiler flags, and when.

    **Raises:**

    - `NotMeasured` if runs are in progress, which would take their share of the time;
        naming all of them, if runs were made on another device, or their trained models
        are not at hand, or are not those that were evaluated.
    - `lrnde.data.DataError` if the data cannot be had; `ValueError` if runs of an
        experiment differ in what they are timed on.
    - `TrainingError` if a checkpoint is damaged, or of another version of lrnde.
    """
    with _measurement():
        if busy := in_progress():
            raise NotMeasured(
                f"{', '.join(busy)} in progress: a busy machine gives no times. "
                "Measure when nothing runs."
            )
        done = [config for config in configs if record_of(config).exists()]
        if not done:
            print("nothing to measure: none of these runs has a record")
        here = records.whereabouts()
        origin = {name: here[name] for name in records.MEASURED}
        found = [(c, _unmeasurable(c, here["device"])) for c in done]
        if problems := [f"{title(c)}: {why}" for c, why in found if why]:
            rest = "Choose others with --method and --seed, if only these cannot be."
            raise NotMeasured("\n".join(["nothing was measured.", *problems, rest]))
        for group in _by_experiment(done).values():
            _measure_side_by_side(group, origin)


def _measure_side_by_side(configs: list[Config], origin: dict) -> None:
    times = experiments.measure(configs, checkpoint_of)
    for config in configs:
        record = records.load(record_of(config))
        del record["checksum"]
        record["times"].update(times[config.name]._asdict())
        record["provenance"]["measured"] = origin
        records.save(record, RESULTS)
        predict, step = (1e3 * seconds for seconds in times[config.name])
        print(f"{title(config)}: predict {predict:.2f} ms, training step {step:.2f} ms")


def _unmeasurable(config: Config, here: str) -> str | None:
    """Why a run that has a record cannot be measured here; `None` if it can."""
    record, checkpoint = records.load(record_of(config)), checkpoint_of(config)
    device = record["provenance"]["device"]
    if device != here:
        return (
            f"ran on {device}, this is {here}: measure it there, or its record would "
            "mix two machines. (What was trained with --shard is not measured.)"
        )
    if not checkpoint.exists():
        return (
            f"has a record, but no trained model in {checkpoint}: copy that file here, "
            "or run it again."
        )
    step, history = progress_of(checkpoint)
    if step != config.steps or history.curves != record["curves"]:
        return (
            f"{checkpoint} is not the model that the record is of. Bring back the "
            "right one, or delete both and run it again."
        )
    return None


# The command line


def _state(config: Config) -> str:
    try:
        _guard(config)
    except FileExistsError as error:
        return f"in its place: {error}"
    if record_of(config).exists():
        return "done"
    done = _done(config)
    return f"missing, at step {done} of {config.steps}" if done else "missing"


def show(configs: Sequence[Config], all_of_them: bool) -> None:
    """Lists the experiments with what is missing, or with all of their runs."""
    left = []
    for experiment, runs in _by_experiment(configs).items():
        states = [(config, _state(config)) for config in runs]
        to_do = [config for config, state in states if state != "done"]
        print(
            f"{experiment}: {len(runs) - len(to_do)} of {len(runs)} runs have records"
        )
        for config, state in states:
            if all_of_them or state != "done":
                print(f"  {config.name}: {state}")
        left += to_do
    print(_outlook(left, records.whereabouts()["device"], helping=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lrnde.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="for example mnist-node; none: all")
    parser.add_argument("--tier", required=True, help="cpu or paper")
    parser.add_argument("--method", nargs="+", help="only these methods")
    parser.add_argument("--seed", nargs="+", type=int, help="only these seeds")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="stop cleanly after that"
    )
    parser.add_argument(
        "--shard", action="store_true", help="divide every batch over all devices"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list all runs")
    what.add_argument("--missing", action="store_true", help="list runs without record")
    what.add_argument(
        "--measure",
        action="store_true",
        help="time finished runs side by side; run nothing else meanwhile",
    )
    options = parser.parse_args(arguments)
    if options.measure and options.shard:
        parser.error("--measure times one device: leave out --shard")
    if options.measure and math.isfinite(options.max_minutes):
        parser.error("--measure runs to its end: leave out --max-minutes")
    deadline = time.monotonic() + 60 * options.max_minutes
    try:
        configs = _chosen(options)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if options.list or options.missing:
        show(configs, all_of_them=options.list)
        return 0
    try:
        if options.measure:
            measure(configs)
            return 0
        return run(configs, deadline, options.shard)
    except (FileExistsError, NotMeasured, TrainingError, DataError) as error:
        parser.error(str(error))


def _chosen(options: argparse.Namespace) -> list[Config]:
    if not chapters(options.tier):
        raise ValueError(
            f"no tier {options.tier!r} in {PARAMS}, which is part of a checkout"
        )
    configs = plan(options.names or chapters(options.tier), options.tier)
    for name in ("method", "seed"):
        there = {getattr(config, name) for config in configs}
        chosen = getattr(options, name) or there
        if unknown := set(chosen) - there:
            raise ValueError(
                f"no run has {name} {', '.join(map(str, sorted(unknown)))}; there are "
                f"{', '.join(map(str, sorted(there)))}"
            )
        configs = [config for config in configs if getattr(config, name) in chosen]
    for config in missing(configs) if options.shard else ():
        try:
            config.sharding()
        except ValueError as error:
            raise ValueError(f"{title(config)} with --shard: {error}") from error
    return configs


if __name__ == "__main__":
    sys.exit(main())
