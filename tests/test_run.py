"""`python -m lrnde.run`: what is run, what is kept, what is refused."""

import pytest

from lrnde import experiments, records, run

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
    monkeypatch.setattr(experiments, "run", None)  # would fail if it were called
    assert run.main(arguments) == 0
    capsys.readouterr()
    assert run.main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 2

    # Other settings under the same name are not taken for done.
    tiny.write_text(SETTINGS.replace("steps: 3", "steps: 4"))
    with pytest.raises(FileExistsError, match="another config"):
        run.main(arguments)

    # Times of this machine do not go into the record of another one.
    tiny.write_text(SETTINGS)
    monkeypatch.setattr(records, "provenance", lambda precision: {"device": "other"})
    with pytest.raises(ValueError, match="measure it there"):
        run.main([*arguments, "--measure"])


@pytest.mark.parametrize("wrong", [["--method", "unbaised"], ["--seed", "99"]])
def test_what_does_not_exist_is_an_error(tiny, wrong, capsys):
    with pytest.raises(SystemExit):
        run.main(["mnist-node", "--tier", "tiny", *wrong])
    assert "no run of this tier" in capsys.readouterr().err


def test_a_method_may_have_a_weight_of_its_own(tiny):
    own = "weights: {biased: {kind: constant, value: 7.0}}\n"
    tiny.write_text(SETTINGS + own)
    weights = {c.method: c.weight["value"] for c in run.settings("mnist-node", "tiny")}
    assert weights == {"vanilla": 1.0, "biased": 7.0}
    tiny.write_text(SETTINGS + own.replace("biased", "unbiased"))
    with pytest.raises(ValueError, match="unbiased"):
        run.settings("mnist-node", "tiny")


def test_an_unknown_experiment_lists_what_there_is(tiny):
    with pytest.raises(FileNotFoundError, match="tiny/mnist_node.yaml"):
        run.main(["mnist-nope", "--tier", "tiny"])


@pytest.mark.parametrize(
    ("chapter", "tier"),
    [("mnist-node", "cpu"), ("mnist-node", "paper"), ("comparison", "cpu")],
)
def test_the_committed_records_are_those_of_the_settings(chapter, tier):
    """No record of the book belongs to other settings than those in the repository."""
    for config in run.settings(chapter, tier):
        record = records.load(run.record_of(config))
        assert record["config_hash"] == records.config_hash(vars(config))
