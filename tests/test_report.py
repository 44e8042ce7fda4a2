import math
import re
import sys

import hypothesis.strategies as st
import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from test_records import make_record

from lrnde import records as lrnde_records
from lrnde import report
from lrnde.report import _published

positive = st.floats(1e-3, 1e3)
samples = st.lists(positive, min_size=1, max_size=5)


def make_records(nfe, **changes):
    """A record for each method and each test NFE in `nfe[method]`."""
    return [
        make_record(method, seed, metrics={"test_nfe": value}, **changes)
        for method, values in nfe.items()
        for seed, value in enumerate(values)
    ]


THREE = {"vanilla": [48, 50, 49], "unbiased": [31, 30, 32], "biased": [30, 30, 33]}


# Numbers


@given(st.dictionaries(st.sampled_from(report.METHODS), samples, min_size=1))
def test_summary_agrees_with_numpy(nfe):
    rows = report.summary(make_records(nfe))
    assert set(rows) == set(nfe)
    base = np.mean(nfe.get("vanilla", math.nan))
    for method, values in nfe.items():
        row = rows[method]
        assert row["seeds"] == len(values)
        assert row["test_nfe"] == pytest.approx(np.mean(values))
        assert row["nfe_ratio"] == pytest.approx(np.mean(values) / base, nan_ok=True)
        if len(values) > 1:
            deviation = np.std(values, ddof=1)
            assert row["test_nfe_std"] == pytest.approx(deviation, abs=1e-9)
        else:
            assert math.isnan(row["test_nfe_std"])


def test_a_training_of_one_step_took_no_time():
    one = make_record(times={"train_step_seconds": 0.0})
    assert math.isnan(report.summary([one])["vanilla"]["train_step_ratio"])
    assert "training step" not in report.findings([one, make_record("biased")])


@given(st.permutations(make_records(THREE)))
def test_summary_does_not_depend_on_the_order(records):
    rows = report.summary(records)
    assert list(rows) == list(report.METHODS)
    assert rows["vanilla"]["nfe_ratio"] == 1
    assert rows["biased"]["nfe_ratio"] == pytest.approx(
        np.mean(THREE["biased"]) / np.mean(THREE["vanilla"])
    )


@pytest.mark.parametrize(
    "change, comparable",
    [
        ({}, True),
        ({"provenance": {"device": "Another"}}, False),
        ({"times": {"predict_seconds": 0.0425, "predict_batch": 64}}, False),
    ],
)
def test_prediction_times_are_compared_on_equal_terms_only(change, comparable):
    change = {"times": {"predict_seconds": 0.0425}} | change
    ours = make_record("biased", **change)
    ratio = report.summary([make_record(), ours])["biased"]["predict_ratio"]
    assert ratio == pytest.approx(0.5 if comparable else math.nan, nan_ok=True)


def test_times_of_two_devices_make_no_ratio_whatever_their_numbers():
    """Two seeds on one and one on the other, and the other way round."""
    found = [
        make_record(method, seed, provenance={"device": device})
        for method, devices in {"vanilla": "aab", "biased": "abb"}.items()
        for seed, device in enumerate(devices)
    ]
    row = report.summary(found)["biased"]
    assert math.isnan(row["predict_ratio"]) and math.isnan(row["train_step_ratio"])
    assert row["nfe_ratio"] == 1


def test_a_table_says_what_its_times_come_from():
    found = [
        make_record(),
        make_record("biased", 0, provenance={"device": "b"}),
        make_record("biased", 1, provenance={"device": "a"}),
    ]
    shown = report.table(found, found[0]["experiment"], found[0]["tier"])["timed on"]
    here = found[0]["provenance"]["device"]
    assert shown.to_dict() == {"vanilla": here, "unbiased": "–", "biased": "a, b"}


def test_an_experiment_of_ones_own_shows_what_it_has():
    metrics = {"train_loss": 0.5, "test_loss": 0.25, "train_nfe": 9, "test_nfe": 9}
    own = make_record(experiment="my-spiral")
    own["metrics"] = metrics
    shown = report.table([own], "my-spiral", own["tier"], methods=["vanilla"])
    assert shown.loc["vanilla", "test loss"] == "0.2500"
    assert "test acc %" not in shown


def test_experiments_are_not_mixed():
    mixed = [make_record(), make_record(tier="paper")]
    for function in (report.summary, report.learning_curves, report.pareto):
        with pytest.raises(ValueError, match="2 experiments or tiers"):
            function(mixed)


# Tables


@given(st.sets(st.sampled_from([*report.METHODS, "error", "mine"])), st.randoms())
def test_missing_methods_are_visible(present, random):
    records = make_records({method: [40, 42] for method in present})
    random.shuffle(records)
    frame = report.table(records, "mnist-node", "cpu")
    extra = [method for method in ("error", "mine") if method in present]
    assert list(frame.index) == [*report.METHODS, *extra]
    for method, row in frame.iterrows():
        assert (row["test NFE"] == report.MISSING) == (method not in present)
        assert (row["test acc %"] == report.MISSING) == (method not in present)
        assert row["seeds"] == ("2" if method in present else "0")
    published = frame["published ratio"]
    assert published["unbiased"] == "0.619" and published["biased"] == "0.602"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_cells_show_the_numbers_of_the_summary(accuracies):
    records = [
        make_record(seed=seed, metrics={"test_accuracy": accuracy})
        for seed, accuracy in enumerate(accuracies)
    ]
    row = report.summary(records)["vanilla"]
    cell = report.table(records, "mnist-node", "cpu")["test acc %"]["vanilla"]
    mean, *deviation = map(float, cell.split(" ± "))
    assert mean == pytest.approx(100 * row["test_accuracy"], abs=0.00501)
    assert len(deviation) == (len(accuracies) > 1)
    for shown in deviation:
        assert shown == pytest.approx(100 * row["test_accuracy_std"], abs=0.00501)


def test_one_seed_has_no_deviation():
    frame = report.table([make_record()], "mnist-node", "cpu", methods=["vanilla"])
    ours = [name for name in frame.columns if not name.startswith("published")]
    assert not frame[ours].map(lambda cell: "±" in cell).to_numpy().any()


def test_other_experiments_and_tiers_stay_out():
    others = [make_record(experiment="other"), make_record(tier="paper")]
    frame = report.table(others, "mnist-node", "cpu")
    assert (frame["test NFE"] == report.MISSING).all()


def test_without_a_baseline_there_are_no_ratios():
    frame = report.table([make_record("biased")], "mnist-node", "cpu")
    assert frame["NFE ratio"]["biased"] == report.EMPTY
    assert frame["test NFE"]["biased"] == "49.5"


def test_an_unpublished_experiment_still_has_a_table():
    frame = report.table([make_record(experiment="new")], "new", "cpu")
    assert (frame["published ratio"] == report.EMPTY).all()
    assert frame["test NFE"]["vanilla"] == "49.5"


@pytest.mark.parametrize("experiment", _published.TABLES)
def test_published_values_are_numbers_with_a_source(experiment):
    frame = report.published_table(experiment)
    assert frame.index[0] == "vanilla"
    assert set(frame.attrs["sources"]) == set(frame.pop("source"))
    for cell in frame.to_numpy().ravel():
        assert cell == report.EMPTY or all(float(x) > 0 for x in cell.split(" ± "))


@pytest.mark.parametrize("experiment", _published.TABLES)
def test_printed_ratios_are_quotients_of_printed_nfe(experiment):
    rows = _published.TABLES[experiment]
    nfe = {
        (row["method"], row["source"]): float(row["test NFE"].split("±")[0])
        for row in rows
    }
    for row in (row for row in rows if row.get("NFE ratio")):
        method, source = row["method"], row["source"]
        quotient = nfe[method, source] / nfe["vanilla", source]
        # Some ratios were rounded and some were cut off.
        assert float(row["NFE ratio"]) == pytest.approx(quotient, abs=1e-3)


def test_an_unknown_experiment_is_an_error():
    with pytest.raises(ValueError, match="'nothing'.*mnist-node"):
        report.published_table("nothing")


# Provenance


def test_the_note_names_everything_that_differs():
    origins = [
        {"device": "One", "git_commit": 40 * "1", "started": "2026-01-02T00:00:00"},
        {"device": "Two", "git_commit": 40 * "2", "started": "2026-03-04T00:00:00"},
    ]
    records = [make_record(seed=k, provenance=o) for k, o in enumerate(origins)]
    note = report.provenance_note(records)
    for text in ("One", "Two", 10 * "1", 10 * "2", "2026-01-02", "2026-03-04"):
        assert text in note
    assert "2 records in `book/results/mnist-node/cpu`; seeds 0, 1;" in note
    assert "jax 1.0" in note and "\n" not in note and "changed" not in note


@pytest.mark.parametrize(
    "origin, text",
    [
        ({"git_commit": None, "git_clean": None}, "commit unknown"),
        ({"git_clean": False}, "(changed)"),
    ],
)
def test_the_note_admits_doubts(origin, text):
    assert text in report.provenance_note([make_record(provenance=origin)])


def test_the_note_names_flags_of_the_compiler():
    flags = "--xla_gpu_enable_command_buffer=WHILE"
    flagged = make_record(seed=1, provenance={"xla_flags": flags})
    note = report.provenance_note([make_record(), flagged])
    assert f"; 1 trained with XLA_FLAGS `{flags}`;" in note
    early = make_record()
    del early["provenance"]["xla_flags"]
    assert "XLA_FLAGS" not in report.provenance_note([early])


@pytest.mark.parametrize("apart", [True, False])
def test_the_note_says_whether_times_were_measured_apart(apart):
    record = make_record()
    mean = record["times"]["train_seconds"] / record["config"]["steps"]
    record["times"]["train_step_seconds"] = mean * (0.9 if apart else 1)
    assert f"times of {int(apart)} measured" in report.provenance_note([record])


def test_every_record_has_a_link(tmp_path):
    made = make_records(THREE)
    for record in made:
        lrnde_records.save(record, tmp_path)
    links = re.findall(r"\[(\d)\]\(([^)]*)\)", report.record_links(made, str(tmp_path)))
    found = {(m, r["seed"]) for r in made for m in [r["method"]]}
    linked = [(lrnde_records.load(path), int(seed)) for seed, path in links]
    assert {(record["method"], seed) for record, seed in linked} == found
    assert all(record["seed"] == seed for record, seed in linked)
    assert "None" in report.record_links([])


def test_no_records_have_a_note_too():
    assert "No records" in report.provenance_note([])


# Settings and findings


def test_settings_stand_side_by_side():
    table = report.settings_table(
        {
            "published": {"steps": 7500, "rate": {"kind": "constant", "value": 1e-3}},
            "ours": {"rate": {"kind": "cosine", "start": 0.1, "end": 0.01}, "more": 1},
        }
    )
    assert table.index.tolist() == ["steps", "rate"]
    assert table["published"].tolist() == ["7500", "0.001 (constant)"]
    assert table["ours"].tolist() == ["–", "0.1, 0.01 (cosine)"]


def test_a_setting_for_each_method_is_readable():
    weights = {"taylor": {"kind": "constant", "value": 0.1}, "kinetic": 2}
    table = report.settings_table({"ours": {"weights": weights}})
    assert table.loc["weights", "ours"] == "taylor: 0.1 (constant); kinetic: 2"


def series_records(mse):
    """Records of an experiment in which nothing is classified."""
    made = []
    for method, values in mse.items():
        for seed, value in enumerate(values):
            record = make_record(method, seed, experiment="physionet")
            record["metrics"] |= {"test_mse": value, "train_mse": value / 2}
            del record["metrics"]["test_accuracy"], record["metrics"]["train_accuracy"]
            made.append(record)
    return made


@given(st.dictionaries(st.sampled_from(["unbiased", "biased"]), samples), samples)
def test_findings_compare_with_vanilla(others, vanilla):
    text = report.findings(series_records({"vanilla": vanilla} | others))
    first, *rest = text.splitlines()
    assert first.startswith("- *vanilla*: NFE 49.5")
    assert len(rest) == len(others)
    for method, values in others.items():
        change = 100 * (np.mean(values) / np.mean(vanilla) - 1)
        (line,) = [line for line in rest if f"*{method}*" in line]
        assert "1.000 times the NFE of vanilla" in line
        assert line.endswith(f"test error {change:+z.1f} %.") or abs(change) > 1e6


@pytest.mark.parametrize(
    "points, told", [(-1.29, "-1.29"), (-0.001, "+0.00"), (0.5, "+0.50")]
)
def test_findings_of_classifiers_are_in_points(points, told):
    vanilla = make_record()
    accuracy = vanilla["metrics"]["test_accuracy"] + points / 100
    records = [vanilla, make_record("biased", metrics={"test_accuracy": accuracy})]
    assert f"test accuracy {told} points." in report.findings(records)


def test_findings_leave_out_times_of_another_device():
    provenance = make_record()["provenance"]
    elsewhere = provenance | {"earlier": [provenance | {"device": "another"}]}
    records = [make_record(), make_record("biased", provenance=elsewhere)]
    text = report.findings(records)
    assert "times the NFE" in text and "nan" not in text
    assert "prediction time" not in text and "training step" not in text
    note = report.provenance_note(records)
    assert "another (" in note and provenance["device"] in note
    # Measured afterwards, on one device, they are comparable again.
    origin = {name: provenance[name] for name in lrnde_records.MEASURED}
    records = [
        make_record(method, provenance=x | {"measured": origin | {"git_commit": "c"}})
        for method, x in (("vanilla", provenance), ("biased", elsewhere))
    ]
    assert "prediction time" in report.findings(records)
    assert "times of 2 measured" in report.provenance_note(records)
    assert "(commit `c`)" in report.provenance_note(records)
    assert "commands" not in report.provenance_note(records)
    records[0]["provenance"]["measured"]["started"] = "2026-01-01T00:00:00+00:00"
    assert "afterwards, by 2 commands (commit" in report.provenance_note(records)


def test_findings_want_vanilla():
    assert "no records of vanilla" in report.findings([make_record("biased")])
    assert "no records of vanilla" in report.findings([])


def test_errors_stand_beside_the_published_ones():
    records = series_records({"vanilla": [0.004, 0.005], "biased": [0.003]})
    table = report.table(records, "physionet", "cpu")
    column = table["test MSE x1e-3"]
    assert column.tolist() == ["4.500 ± 0.707", "missing", "3.000"]
    assert table["published test MSE x1e-3"].tolist() == [
        *("3.41 ± 0.10", "3.64 ± 0.07", "3.63 ± 0.08")
    ]
    assert table["extrapolation MSE x1e-3"].tolist() == ["–", "missing", "–"]


# What reproduces


def judged(nfe, published="unbiased", **changes):
    frame = report.claims(
        make_records(nfe, **changes), "mnist-node", "cpu", [published]
    )
    return frame.loc[published, "NFE"]


pairs = st.lists(st.tuples(positive, positive), min_size=2, max_size=6)


@given(pairs, st.lists(positive, max_size=3))
def test_the_error_of_a_quotient_is_that_of_a_linear_expansion(both, unpaired):
    ours, vanilla = map(list, zip(*both, strict=True))
    # Vanilla's further seeds have no partner.
    row = judged({"vanilla": vanilla + unpaired, "unbiased": ours})
    a, b = np.mean(ours), np.mean(vanilla)
    gradient = np.array([1 / b, -a / b**2])  # of the quotient, by both means
    variance = gradient @ np.cov(ours, vanilla) @ gradient / len(ours)
    assert row["here"] == pytest.approx(a / b)
    scale = 1e-6 * a / b
    assert row["error"] == pytest.approx(max(variance, 0) ** 0.5, rel=1e-4, abs=scale)


def test_what_two_runs_of_a_seed_share_is_no_error():
    row = judged({"vanilla": [100, 140, 180], "unbiased": [70, 98, 126]})
    assert row["here"] == pytest.approx(0.7)
    assert row["error"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "ours, verdict",
    [
        ([60, 62, 61], "yes"),  # the published factor is 0.619
        ([67, 68, 67], "yes"),  # a tenth more is near enough
        ([80, 81, 80], "in part"),
        ([70, 90, 120], "no"),  # nothing for certain
        ([120, 121, 120], "no"),
        ([60], "unclear"),
        ([], "missing"),
    ],
)
def test_a_claim_of_a_saving_is_judged(ours, verdict):
    row = judged({"vanilla": [100, 100, 101], "unbiased": ours})
    assert row["verdict"] == verdict
    assert row["published"] == pytest.approx(187.961 / 303.559)


@pytest.mark.parametrize(
    "ours, verdict", [([50, 51, 50], "no"), ([99, 101, 100], "yes")]
)
def test_where_nothing_was_saved_in_print_nothing_should_be(ours, verdict):
    # Published: 265.0 with STEER, 253.0 without, in the same source.
    row = judged({"vanilla": [100, 101, 102], "steer": ours}, "steer")
    assert row["published"] == pytest.approx(265 / 253)
    assert row["verdict"] == verdict


@pytest.mark.parametrize(
    "lost, verdict", [(-0.01, "yes"), (0.0005, "yes"), (0.02, "no")]
)
def test_quality_may_be_lost_as_far_as_in_print(lost, verdict):
    shaken = [0.0001, 0.0, -0.0001]
    made = [
        make_record(method, seed, metrics={"test_accuracy": 0.95 - loss + shaken[seed]})
        for method, loss in {"vanilla": 0, "biased": lost}.items()
        for seed in range(3)
    ]
    frame = report.claims(made, "mnist-node", "cpu", ["biased"])
    row = frame.loc["biased", "accuracy lost (points)"]
    assert row["here"] == pytest.approx(100 * lost, abs=1e-9)
    assert row["published"] == pytest.approx(97.612 - 97.488)
    assert row["verdict"] == verdict


def test_an_error_that_grows_is_told_in_per_cent():
    made = series_records({"vanilla": [0.004, 0.0041], "biased": [0.005, 0.0051]})
    row = report.claims(made, "physionet", "cpu").loc["biased", "error added (%)"]
    assert row["here"] == pytest.approx(100 * (0.0101 / 0.0081 - 1))
    assert row["published"] == pytest.approx(100 * (3.63 / 3.41 - 1))
    assert row["verdict"] == "no"


def test_times_of_two_machines_are_not_judged():
    made = make_records({"vanilla": [100, 101]})
    made += make_records({"unbiased": [60, 61]}, provenance={"device": "Another"})
    frame = report.claims(made, "mnist-node", "cpu", ["unbiased"])
    time = frame.loc["unbiased", "prediction time"]
    assert time["verdict"] == "unclear" and time["text"] == report.EMPTY
    assert frame.loc["unbiased", "NFE"]["verdict"] == "yes"


def test_times_of_the_runs_themselves_are_not_judged():
    made = make_records({"vanilla": [100, 101], "unbiased": [60, 61]})
    for record in made[:1]:
        mean = record["times"]["train_seconds"] / record["config"]["steps"]
        record["times"]["train_step_seconds"] = mean
    frame = report.claims(made, "mnist-node", "cpu", ["unbiased"])
    assert frame.loc["unbiased", "prediction time"]["verdict"] == "unclear"
    assert frame.loc["unbiased", "NFE"]["verdict"] == "yes"


def test_what_was_not_published_has_no_verdict():
    row = judged({"vanilla": [100, 101], "error": [50, 51]}, "error")
    assert row["verdict"] == report.EMPTY
    with pytest.raises(ValueError, match="'nothing'.*mnist-node"):
        report.claims([], "nothing", "cpu")


# Figures


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


@settings(max_examples=20)
@given(st.integers(1, 4), st.data())
def test_curves_are_means_over_seeds(seeds, data):
    curve = st.lists(st.floats(1, 100), min_size=3, max_size=3)
    values = [data.draw(curve) for _ in range(seeds)]
    records = [
        make_record("biased", seed, curves={"nfe": curve})
        for seed, curve in enumerate(values)
    ]
    (axes,) = report.learning_curves(records, ["nfe"]).axes
    line = lines(axes)["biased"]
    np.testing.assert_allclose(line.get_xdata(), [0, 100, 200])
    np.testing.assert_allclose(line.get_ydata(), np.mean(values, axis=0))
    assert len(axes.collections) == (seeds > 1)
    for band in axes.collections:
        heights = band.get_paths()[0].vertices[:, 1]
        top = np.max(np.mean(values, axis=0) + np.std(values, axis=0, ddof=1))
        assert heights.max() == pytest.approx(top)


def test_curves_are_cut_to_the_steps_in_common():
    early = make_record(seed=1, curves={"step": [0, 200, 400], "nfe": [9, 8, 7]})
    steps, nfe = report.curves([make_record(), early], "nfe")
    assert steps.tolist() == [0, 200]
    assert nfe.tolist() == [[60, 50], [9, 8]]
    with pytest.raises(ValueError, match="no records"):
        report.curves([], "nfe")
    with pytest.raises(ValueError, match="no curve of speed in these records: step"):
        report.curves([make_record()], "speed")


def test_methods_keep_their_colours_in_every_panel():
    records = make_records(THREE)
    figure = report.learning_curves(records, ["nfe", "accuracy", "loss"])
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel()
        shown = {name: line.get_color() for name, line in lines(axes).items()}
        assert shown == {method: report.COLORS[method] for method in report.METHODS}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(report.METHODS)
    assert len(set(report.COLORS.values())) == len(report.COLORS)


def test_accuracy_is_drawn_in_percent():
    (axes,) = report.learning_curves([make_record()], ["accuracy"]).axes
    np.testing.assert_allclose(lines(axes)["vanilla"].get_ydata(), [10, 80, 90])
    assert "%" in axes.get_ylabel()


def test_seeds_are_averaged_where_all_have_a_value():
    short = {"step": [0, 200], "loss": [1, 1], "penalty": [0, 0], "nfe": [20, 10]}
    early = make_record(seed=1, curves=short | {"accuracy": [0.5, 0.5]})
    (axes,) = report.learning_curves([make_record(), early], ["nfe"]).axes
    np.testing.assert_allclose(lines(axes)["vanilla"].get_xdata(), [0, 200])
    np.testing.assert_allclose(lines(axes)["vanilla"].get_ydata(), [40, 30])


def test_a_penalty_of_zero_is_not_drawn():
    none = make_record(curves={"penalty": [0, 0, 0]})
    (axes,) = report.learning_curves([none, make_record("biased")], ["penalty"]).axes
    assert list(lines(axes)) == ["biased"]


def test_pareto_has_a_marker_a_seed():
    (axes,) = report.pareto(make_records(THREE)).axes
    assert [group.get_label() for group in axes.collections] == list(report.METHODS)
    for group in axes.collections:
        nfe, accuracy = group.get_offsets().T
        np.testing.assert_allclose(nfe, THREE[group.get_label()])
        np.testing.assert_allclose(accuracy, 95)
        color = matplotlib.colors.to_hex(group.get_facecolor()[0])
        assert color == report.COLORS[group.get_label()].lower()


def test_pareto_draws_errors_where_nothing_is_classified():
    records = series_records({"vanilla": [0.004, 0.005]})
    (axes,) = report.pareto(records).axes
    (group,) = axes.collections
    np.testing.assert_allclose(group.get_offsets()[:, 1], [4, 5])
    assert "error" in axes.get_ylabel()
    mixed = report.pareto([*records, make_record(experiment="physionet")])
    assert mixed.axes[0].get_ylabel() == "Test loss"  # what all records have


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="'speed'.*nfe, accuracy"):
        report.learning_curves([make_record()], ["speed"])
    for figure in (report.learning_curves, report.pareto):
        with pytest.raises(ValueError, match="'mine'.*COLORS"):
            figure([make_record("mine")])


def test_a_method_of_ones_own_needs_a_colour_alone(monkeypatch):
    monkeypatch.setitem(report.COLORS, "mine", "#123456")
    for figure in (report.learning_curves, report.pareto):
        panel = figure([make_record("mine")]).axes[0]
        assert panel.get_legend_handles_labels()[1] == ["mine"]


def test_figures_leave_nothing_open_and_no_setting_changed(tmp_path):
    before = dict(plt.rcParams)
    for figure in (report.learning_curves, report.pareto):
        path = tmp_path / f"{figure.__name__}.png"
        figure(make_records(THREE)).savefig(path)
        assert path.stat().st_size > 0
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def test_style_is_that_of_the_figures():
    with plt.rc_context():
        plt.rcdefaults()
        report.style()
        assert not plt.rcParams["axes.spines.top"]
    panel = report.pareto([make_record()]).axes[0]
    assert not panel.spines["top"].get_visible()


@pytest.mark.parametrize(
    "package, call",
    [
        ("pandas", lambda: report.table([], "mnist-node", "cpu")),
        ("pandas", lambda: report.published_table("mnist-node")),
        ("matplotlib", report.style),
        ("matplotlib.pyplot", lambda: report.pareto([])),
        ("matplotlib.pyplot", lambda: report.learning_curves([])),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'lrnde\[book\]'"):
        call()
