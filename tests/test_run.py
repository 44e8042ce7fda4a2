"""`python -m lrnde.run`: what is run, what is kept, what is refused."""

import os
import signal
import threading
from dataclasses import replace

import pytest
from filelock import FileLock

from lrnde import experiments, records, run
from lrnde.data import DataError
from lrnde.training import TrainingError

SETTINGS = """
tier: tiny
methods: [vanilla, biased]
seeds: [3]
hidden: 4
solver: bosh3
tolerance: 1.0e-2
batch_size: 32
steps: 3
eval_batch_size: 360
eval_train_size: 360
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An experiment of seconds, with folders of its own."""
    for name in ("PARAMS", "RESULTS", "RUNS"):
        monkeypatch.setattr(run, name, tmp_path / name.lower())
    path = tmp_path / "params" / "tiny" / "mnist_node.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(SETTINGS)
    return path


def test_runs_are_recorded_measured_and_not_repeated(tiny, monkeypatch, capsys):
    def refused(arguments):
        with pytest.raises(SystemExit):
            run.main(arguments)
        return capsys.readouterr().err

    arguments = ["mnist_node", "--tier", "tiny"]
    assert run.main([*arguments, "--max-minutes", "0"]) != 0  # no time for any
    assert run.main(arguments) == 0
    found = records.load_all(run.RESULTS, "mnist-node", "tiny")
    assert {r["method"] for r in found} == {"vanilla", "biased"}
    before = {r["method"]: r["metrics"] for r in found}
    assert run.main([*arguments, "--measure"]) == 0
    for record in records.load_all(run.RESULTS, "mnist-node", "tiny"):
        assert record["metrics"] == before[record["method"]]
        assert record["times"]["train_step_seconds"] > 0
        ran, measured = record["provenance"], record["provenance"]["measured"]
        assert measured["started"] >= ran["started"]
        assert measured["xla_flags"] == os.environ["XLA_FLAGS"]
    # Another model than the recorded one is not measured.
    config = run.plan(["mnist-node"], "tiny")[0]
    checkpoint = run.checkpoint_of(config)
    whole = checkpoint.read_bytes()
    checkpoint.unlink()
    experiments.run(config, checkpoint=checkpoint, deadline=0.0, progress=False)
    assert "not the model that the record is of" in refused([*arguments, "--measure"])
    # All that cannot be measured is named at once.
    for config in run.plan(["mnist-node"], "tiny"):
        run.checkpoint_of(config).unlink()
    said = refused([*arguments, "--measure"])
    assert "vanilla-seed3: has " in said and "biased-seed3: has " in said
    checkpoint.write_bytes(whole)

    monkeypatch.setattr(experiments, "run", None)  # would fail if it were called
    assert run.main(arguments) == 0
    assert run.main([*arguments, "--max-minutes", "0"]) == 0  # nothing is left to do
    capsys.readouterr()
    assert run.main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 2

    # Other settings under the same name are not taken for done.
    tiny.write_text(SETTINGS.replace("steps: 3", "steps: 4"))
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert "another config" in capsys.readouterr().err
    assert run.main([*arguments, "--missing"]) == 0
    listed = capsys.readouterr().out
    assert "0 of 2 runs have records" in listed
    assert listed.count("another config") == 2
    assert "none left" not in listed

    # Times of this machine do not go into the record of another one.
    tiny.write_text(SETTINGS)
    elsewhere = records.whereabouts() | {"device": "other"}
    monkeypatch.setattr(records, "whereabouts", lambda *_: elsewhere)
    assert "measure it there" in refused([*arguments, "--measure"])


@pytest.mark.parametrize("kind", [TrainingError, ValueError, MemoryError])
def test_the_work_is_shared_and_one_failure_does_not_end_it(
    tiny, monkeypatch, capsys, kind
):
    """A run that another process has is left to it, and is no reason to measure."""

    def fake(config, **kwargs):
        if config.method == "vanilla":
            raise kind("step 2: the loss is not finite")
        raise AssertionError("another process is at this one")

    monkeypatch.setattr(experiments, "run", fake)
    biased = run.plan(["mnist-node"], "tiny")[1]
    run.lock_of(biased).parent.mkdir(parents=True)
    with FileLock(run.lock_of(biased)):
        assert run.in_progress() == ["mnist-node/tiny/biased-seed3"]
        assert run.main(["--tier", "tiny"]) == 1
        with pytest.raises(SystemExit):
            run.main(["--tier", "tiny", "--measure"])
    out, err = capsys.readouterr()
    assert "biased-seed3 in progress" in err
    assert "vanilla-seed3: failed: step 2" in out
    assert "biased-seed3: another process is at it" in out
    assert run.in_progress() == []
    assert run.main(["--tier", "tiny", "--missing"]) == 0
    out = capsys.readouterr().out
    assert "0 of 2 runs have records" in out and "2 left, time unknown" in out


def test_data_that_cannot_be_had_are_asked_for_once(tiny, monkeypatch, capsys):
    asked = []

    def fake(config, **kwargs):
        asked.append(config.dataset)
        raise DataError("train-images could not be downloaded")

    monkeypatch.setattr(experiments, "run", fake)
    tiny.with_name("cifar10.yaml").write_text(SETTINGS + "dataset: cifar10\n")
    assert run.main(["mnist-node", "cifar10", "--tier", "tiny"]) == 1
    assert asked == ["digits", "cifar10"]
    out = capsys.readouterr().out
    assert "vanilla-seed3: failed: train-images could not" in out
    assert "No other run with digits is tried." in out


def test_what_runs_says_where_and_whether_its_records_will_count(monkeypatch):
    origin = {"device": "a GPU", "git_commit": 40 * "a", "git_clean": True}
    assert run._first_line(origin) == "on a GPU, commit aaaaaaaaaa"
    for changes in ({"git_clean": False}, {"git_commit": None, "git_clean": None}):
        assert "`make check-results` will refuse" in run._first_line(origin | changes)


def test_there_may_be_nothing_to_measure(tiny, capsys):
    assert run.main(["--tier", "tiny", "--measure"]) == 0
    assert "nothing to measure" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--tier", "tiny", "--measure", "--max-minutes", "5"])
    assert "leave out --max-minutes" in capsys.readouterr().err


def test_what_is_timed_on_different_data_is_not_compared(tiny):
    configs = run.plan(["mnist-node"], "tiny")
    other = replace(configs[1], batch_size=64)
    with pytest.raises(ValueError, match="different batch_size"):
        experiments.measure([configs[0], other], run.checkpoint_of)
    images = experiments.CIFAR10()
    with pytest.raises(ValueError, match="different averaging"):
        experiments.measure([images, replace(images, averaging=4)], run.checkpoint_of)


def test_a_failure_shows_in_the_exit_code_of_a_run_that_is_stopped(tiny, monkeypatch):
    outcomes = iter(
        [TrainingError("step 2: the loss is not finite"), KeyboardInterrupt()]
    )

    def fake(config, **kwargs):
        raise next(outcomes)

    monkeypatch.setattr(experiments, "run", fake)
    assert run.main(["--tier", "tiny"]) == 1
    outcomes = iter([KeyboardInterrupt()])
    assert run.main(["--tier", "tiny"]) == run.STOPPED


def test_no_run_starts_while_times_are_measured(tiny, monkeypatch, capsys):
    started, waits, wait = [], threading.Event(), run._wait_for_measurement

    def noted(*args):
        waits.set()
        wait(*args)

    monkeypatch.setattr(experiments, "run", lambda config, **_: started.append(config))
    monkeypatch.setattr(run, "_wait_for_measurement", noted)
    records.whereabouts()  # asks for the commit once, which takes its time
    with run._measurement():
        assert run.main(["--tier", "tiny", "--max-minutes", "0.005"]) == run.STOPPED
        assert "waits for the end of a measurement" in capsys.readouterr().out
        assert waits.is_set() and not started
        waits.clear()
        waiting = threading.Thread(target=run.main, args=[["--tier", "tiny"]])
        waiting.daemon = True
        waiting.start()
        assert waits.wait(timeout=60)
        waiting.join(timeout=0.5)
        assert not started
    waiting.join(timeout=60)
    assert started


def test_a_record_names_all_processes_of_its_run(tiny, monkeypatch):
    here, commit = records.provenance("highest"), 40 * "a"

    def provenance(*_):
        return here | {"git_commit": commit, "git_clean": True}

    def ctrl_c(step):
        os.kill(os.getpid(), signal.SIGINT)
        return first(step)

    config = run.plan(["mnist-node"], "tiny")[0]
    first = config.batches(config.load_data())
    monkeypatch.setattr(records, "provenance", provenance)
    with monkeypatch.context() as patched:
        patched.setattr(type(config), "batches", lambda *_: ctrl_c)
        assert run.run([config]) == run.STOPPED
    commit = 40 * "b"
    assert run.run([config]) == 0
    found = records.load(run.record_of(config))["provenance"]
    assert found["git_commit"] == 40 * "b"
    assert [origin["git_commit"] for origin in found["earlier"]] == [40 * "a"]


def test_a_damaged_record_does_not_stop_the_others(tiny, capsys):
    path = run.RESULTS / "mnist-node" / "tiny" / "vanilla-seed1.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert run.main(["--tier", "tiny"]) == 0
    assert "1 left, time unknown" in capsys.readouterr().out


def test_what_cannot_be_divided_is_said_before_anything_runs(tiny, capsys):
    tiny.with_name("spiral_sde.yaml").write_text(
        "tier: tiny\nmethods: [vanilla]\nseeds: [0]\n"
    )
    with pytest.raises(SystemExit):
        run.main(["--tier", "tiny", "--shard"])
    assert "spiral-sde/tiny/vanilla-seed0 with --shard" in capsys.readouterr().err
    assert not run.RESULTS.exists()


def test_times_are_those_of_one_device(tiny, capsys):
    with pytest.raises(SystemExit):
        run.main(["--tier", "tiny", "--measure", "--shard"])
    assert "leave out --shard" in capsys.readouterr().err


def test_the_time_left_follows_records_and_checkpoints(tiny, monkeypatch):
    config = run.plan(["mnist-node"], "tiny")[0]
    took = {"train_seconds": 90.0, "compile_seconds": 10.0}
    record = {"method": "error", "times": took, "provenance": {"device": "here"}}
    monkeypatch.setattr(records, "load_all", lambda *_: [record])
    assert run.seconds_left([config, config], "here") == (200.0, 0)
    assert run.seconds_left([config, config], "elsewhere") == (0.0, 2)
    for step, seconds in ((2, 100 / 3), (3, 0.0), (9, 0.0)):  # of three
        monkeypatch.setattr(run, "_done", lambda config, step=step: step)
        assert run.seconds_left([config], "here")[0] == pytest.approx(seconds)


def test_the_outlook_tells_what_is_known(tiny, monkeypatch):
    config = run.plan(["mnist-node"], "tiny")[0]
    for found, says in (
        ((0.0, 0), "2 left, about 0 h 0 min"),
        ((7260.0, 1), "2 left, about 2 h 1 min and 1 of unknown length"),
        ((0.0, 2), "2 left, time unknown"),
    ):
        monkeypatch.setattr(run, "seconds_left", lambda *_, found=found: found)
        assert run._outlook([config, config], "here", helping=False) == says


def test_a_damaged_checkpoint_is_no_obstacle_to_the_other_runs(tiny, capsys):
    vanilla, biased = run.plan(["mnist-node"], "tiny")
    run.checkpoint_of(biased).parent.mkdir(parents=True)
    run.checkpoint_of(biased).write_bytes(b"GIF89a")
    assert run.main(["--tier", "tiny"]) == 1
    out = capsys.readouterr().out
    assert "biased-seed3: failed:" in out and "Move or delete" in out
    assert run.missing([vanilla, biased]) == [biased]
    assert run.checkpoint_of(biased).read_bytes() == b"GIF89a"


def test_two_chapters_may_share_a_run_but_not_a_name(tiny):
    other = tiny.with_name("wider.yaml")
    other.write_text("experiment: mnist-node\n" + SETTINGS)
    assert run.chapters("tiny") == ["mnist-node", "wider"]
    assert len(run.plan(["mnist-node", "wider"], "tiny")) == 2
    other.write_text(
        "experiment: mnist-node\n" + SETTINGS.replace("steps: 3", "steps: 5")
    )
    with pytest.raises(ValueError, match="different settings"):
        run.plan(["mnist-node", "wider"], "tiny")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--method", "unbaised"],
        ["--method", "vanilla", "unbaised"],
        ["--method", "vanilla", "mnist-node"],  # meant as a name
        ["--seed", "3", "99"],
    ],
)
def test_what_does_not_exist_is_an_error(tiny, wrong, capsys):
    with pytest.raises(SystemExit):
        run.main(["--tier", "tiny", *wrong])
    assert f"no run has {wrong[0][2:]} {wrong[-1]}; there" in capsys.readouterr().err


def test_a_method_may_have_a_weight_of_its_own(tiny):
    own = "weights: {biased: {kind: constant, value: 7.0}}\n"
    tiny.write_text(SETTINGS + own)
    weights = {c.method: c.weight["value"] for c in run.settings("mnist-node", "tiny")}
    assert weights == {"vanilla": 1.0, "biased": 7.0}
    tiny.write_text(SETTINGS + own.replace("biased", "unbiased"))
    with pytest.raises(ValueError, match="unbiased"):
        run.settings("mnist-node", "tiny")


def test_an_unknown_experiment_lists_what_there_is(tiny, capsys):
    with pytest.raises(SystemExit):
        run.main(["mnist-nope", "--tier", "tiny"])
    said = capsys.readouterr().err
    assert "no 'mnist-nope' at tier tiny; there are mnist-node" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hidden: 8\n", "no methods in these settings"),
        (SETTINGS + "hiden: 8\n", "mnist-node has no setting hiden"),
        (SETTINGS.replace("[3]", "3"), "seeds=3 must be a list"),
        (SETTINGS.replace("[3]", "[-1]"), "seed=-1 must be a whole number"),
        (SETTINGS.replace("tier: tiny", "tier: cpu"), "settings of the tier 'cpu'"),
        (SETTINGS + "hidden: [8\n", "expected ',' or ']'"),
        ("", "no methods in these settings"),
    ],
)
def test_settings_that_are_not_those_of_runs_name_their_file(tiny, text, says, capsys):
    tiny.write_text(text)
    with pytest.raises(SystemExit):
        run.main(["--tier", "tiny", "--list"])
    said = capsys.readouterr().err
    assert "mnist_node.yaml: " in said and says in said


RECORDED = [
    (chapter, tier) for tier in ("cpu", "paper") for chapter in run.chapters(tier)
]


@pytest.mark.parametrize(("chapter", "tier"), RECORDED)
def test_the_committed_records_are_those_of_the_settings(chapter, tier):
    """No record of the book belongs to other settings than those in the repository."""
    for config in run.settings(chapter, tier):
        if run.record_of(config).exists():
            record = records.load(run.record_of(config))
            assert record["config_hash"] == records.config_hash(vars(config))


def test_nothing_is_missing_that_needs_no_gpu():
    assert not run.missing(run.plan(run.chapters("cpu"), "cpu"))


@pytest.mark.parametrize("tier", ["cpu", "paper"])
def test_no_record_is_of_a_run_that_is_not_planned(tier):
    planned = {run.record_of(c) for c in run.plan(run.chapters(tier), tier)}
    assert set(run.RESULTS.glob(f"*/{tier}/*.json")) <= planned
