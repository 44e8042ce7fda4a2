"""Each chapter is committed clean, runs at its smoke setting, and shows what it says.

A chapter whose parameter `results_path` is not empty writes its results there, one JSON
object; the tests judge these and not the exit status.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
PARAMS = sorted(NOTEBOOKS.glob("params/*/*.yaml"))


def check_first_look(results):
    assert 0 < results["nfe_ratio"] < 1
    assert 0 < results["predict_ratio"] < math.inf
    for method in ["vanilla", "regularized"]:
        assert 0 <= results[f"accuracy_{method}"] <= 1


def check_adaptive_solvers(results):
    assert abs(results["order_slope"] - 5) < 0.5
    assert abs(results["local_slope"] - 6) < 0.5
    assert abs(results["estimate_slope"] - 5) < 0.5
    # The solver that the chapter writes takes the steps of diffrax's.
    assert results["step_difference"] < 1e-9
    assert results["step_time_difference"] < 1e-9
    assert results["nfe"] == results["nfe_by_formula"]
    assert results["stability_residual"] < 1e-9
    assert results["stiffness_difference"] < 1e-9
    assert results["robertson_steps"] > 20


def check_local_regularization(results):
    deviations = [results[f"{name}_z"] for name in ("unbiased", "biased", "error")]
    deviations += [results["stiffness_z"], *results["gradient_z"]]
    assert all(abs(z) < 4 for z in deviations)
    assert results["gradient_relative_error"] < 1e-4
    assert results["gradient_initial_state"] == 0
    assert results["step_mismatch"] < 1e-6


def check_adjoints_and_memory(results):
    assert results["max_gradient_difference"] < 1e-4
    extra = results["extra_bytes"]  # of the regularizer, one entry a number of steps
    assert len(extra) > 1
    assert max(extra) - min(extra) <= 1024 + 0.05 * max(extra)


def check_mnist_node(results):
    assert 0 < results["nfe_ratio_unbiased"] < 1
    assert 0 < results["nfe_ratio_biased"] < 1
    assert results["losses_finite"] is True
    assert results["record_written"] is True


def check_performance(results):
    assert results["nfe"]["lrnde"] >= 13
    assert results["predict_over_bare"] > 0.5
    # diffrax gets ready for 4096 steps; this solve takes a handful.
    assert results["gradient_speedup"] > 1


def check_stochastic_solvers(results):
    orders = results["orders"]
    for equation in ("geometric", "nonlinear"):
        for solver in ("SOSRI", "SOSRI2", "SRIW2"):
            assert 1.2 < orders[equation][solver] < 2.2
    assert orders["nonlinear"]["SOSRI, H hidden"] < 1.3
    assert results["variance_forgotten"] < 0.9 < results["variance_remembered"] < 1.1
    assert all(abs(z) < 4 for z in results["mean_z"].values())
    assert results["tree_over_path"] > 1


def check_spiral_sde(results):
    assert results["losses_finite"] is True
    assert results["record_written"] is True
    assert results["floor"] > 0
    assert all(nfe >= 4 * 4 for nfe in results["nfe"].values())


def check_mnist_nsde(results):
    assert 0 < results["nfe_ratio_biased"] < 1
    assert results["losses_finite"] is True
    assert results["record_written"] is True
    assert all(deviation > 0 for deviation in results["deviations"].values())


def check_physionet(results):
    assert results["losses_finite"] is True
    assert results["record_written"] is True
    for method, mse in results["test_mse"].items():
        assert 0 < mse < 0.5 * results["first_mse"][method]
        assert 0 < results["coverage"][method] <= 1
    assert 0 < results["nfe_ratio"]["biased"] <= 1


def check_cifar10(results):
    assert results["losses_finite"] is True
    assert results["record_written"] is True
    assert 0 < results["nfe_ratio"]["biased"] <= 1
    assert all(accuracy > 0.2 for accuracy in results["test_accuracy"].values())
    company = results["company"]  # the larger the batch, the less it matters
    assert company == sorted(company, reverse=True)
    in_loop = results["milliseconds"]["in a loop"]
    assert in_loop["by lrnde"] < in_loop["by JAX"]


def check_cifar10_multiscale(results):
    assert results["losses_finite"] is True
    assert results["record_written"] is True
    assert all(accuracy > 0.2 for accuracy in results["test_accuracy"].values())
    assert set(results["fallen_back"].values()) == {0}
    # The least: the first evaluation and three a step, of which there are three.
    assert all(nfe >= 10 for nfe in results["nfe"].values())


def check_comparison(results):
    assert results["losses_finite"] is True
    dropin = results["dropin"]
    assert all(dropin["LocalError"].values())
    assert all(dropin["Steer"].values())
    assert dropin["GlobalError"] == {"continuous adjoint": False}
    assert results["train_step"]["vanilla"] < results["train_step"]["taylor"]
    # Four samples have half the deviation of one.
    assert 1.4 < results["noise_ratio"] < 2.8
    assert all(len(points) for points in results["sweep"].values())


def check_choosing_the_weight(results):
    moved = results["moved"]
    heaviest, none = max(moved, key=float), min(moved, key=float)
    assert moved[heaviest] < moved[none]
    assert results["nfe"][heaviest] <= results["nfe"][none]
    assert all(0 <= error < 1 for error in results["largest_error"].values())
    spiral, field = results["spiral_nfe"], results["field_error"]
    heaviest, none = max(spiral, key=float), min(spiral, key=float)
    assert spiral[heaviest] < spiral[none]
    assert field[heaviest] > field[none]


def check_own_model(results):
    nfe = results["nfe"]
    highest, none = max(nfe, key=float), min(nfe, key=float)
    assert 0 < nfe[highest] < nfe[none]
    assert math.isfinite(results["lost"][highest])
    plain, regularized = results["steps_of_drawing"]
    assert 0 < regularized <= plain


def check_numerics(results):
    assert 4.5 < results["truncation_slope"] < 5.5
    floors = results["floor_slopes"]
    assert 0.9 < floors["float32"] < 1.1
    assert all(0.8 < slope < 2 for slope in floors.values())
    # Each format is the dearer the fewer bits it has, and the solution is no better.
    finest = [results["nfe"][name][-1] for name in ("float32", "TF32", "bfloat16")]
    assert finest[0] * 5 < finest[1] < finest[2]
    assert results["distance"]["TF32"][-1] > 10 * results["distance"]["float32"][-1]
    assert results["cosines"]["float32"][-1] > 0.99
    assert results["cosines"]["float32"][0] < 0.8
    assert results["permuted_change"][0] > 100 * results["permuted_change"][-1]
    assert results["losses_finite"] is True


def check_results_tables(results):
    tables = results["tables"]
    assert len(tables) == 6
    for seeds in tables.values():
        assert all(int(seeds[m]) >= 3 for m in ("vanilla", "unbiased", "biased"))
    absent = sum(count == "0" for seeds in tables.values() for count in seeds.values())
    assert results["missing"] == absent


def check_learning_curves(results):
    assert all(count >= 9 for count in results["drawn"].values())
    assert results["last"].keys() == results["first"].keys()
    assert all(0.9 < quotient <= 1.1 for quotient in results["first"].values())
    assert 0 < results["last"]["physionet/cpu"] < results["first"]["physionet/cpu"]


def check_what_reproduces(results):
    verdicts = results["verdicts"]
    assert sum(verdicts.values()) == results["claims"] == 5 * 2 * 3
    assert verdicts.keys() <= {"yes", "no", "in part", "unclear"}
    assert results["missing"] == 0


CHECKS = {
    "first_look": check_first_look,
    "adaptive_solvers": check_adaptive_solvers,
    "local_regularization": check_local_regularization,
    "adjoints_and_memory": check_adjoints_and_memory,
    "performance": check_performance,
    "numerics": check_numerics,
    "stochastic_solvers": check_stochastic_solvers,
    "mnist_node": check_mnist_node,
    "mnist_nsde": check_mnist_nsde,
    "spiral_sde": check_spiral_sde,
    "physionet": check_physionet,
    "cifar10": check_cifar10,
    "cifar10_multiscale": check_cifar10_multiscale,
    "comparison": check_comparison,
    "choosing_the_weight": check_choosing_the_weight,
    "own_model": check_own_model,
    "results_tables": check_results_tables,
    "learning_curves": check_learning_curves,
    "what_reproduces": check_what_reproduces,
}

# What compiles a chapter soonest. Two programs that agree to rounding without it can
# differ by 4e-7 with it, in double precision too, so the other tests do without.
HASTY = " --xla_cpu_use_fusion_emitters=false"


@functools.cache
def hasty():
    """The flag, if XLA knows it (not from jaxlib 0.12.0.1 on): it dies of others."""
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + HASTY}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    known = subprocess.run(command, env=environment, capture_output=True)
    return HASTY if known.returncode == 0 else ""


def parameters(chapter):
    """The chapter's parameters: for each name its type, default and comment."""
    return papermill.inspect_notebook(str(NOTEBOOKS / f"{chapter}.ipynb"))


def run(chapter, output, results_path):
    """Run a chapter at its smoke setting; papermill shows the error if it fails."""
    command = [sys.executable, "-m", "papermill", f"{chapter}.ipynb", output]
    command += ["--parameters_file", f"params/smoke/{chapter}.yaml"]
    command += ["--parameters_raw", "results_path", results_path, "--no-progress-bar"]
    subprocess.run(command, cwd=NOTEBOOKS, check=True)


def records():
    """Every committed record with the time of its last change."""
    return {p: p.stat().st_mtime_ns for p in ROOT.glob("book/results/**/*.json")}


def test_every_chapter_is_checked():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    chapters = {Path(page).name for page in pages if page.startswith("notebooks/")}
    assert chapters == set(CHECKS)
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == chapters


@pytest.mark.parametrize("chapter", CHECKS)
def test_committed_clean(chapter):
    notebook = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert sum("parameters" in cell_tags for cell_tags in tags) == 1


@pytest.mark.parametrize("chapter", CHECKS)
def test_parameters_are_typed_and_explained(chapter):
    found = parameters(chapter)
    assert found["results_path"]["default"] == '""'
    for name, parameter in found.items():
        assert parameter["inferred_type_name"] != "None", f"{name} has no annotation"
        assert parameter["help"], f"{name} has no comment"


def test_every_chapter_has_a_smoke_setting():
    assert {path.stem for path in PARAMS if path.parent.name == "smoke"} == set(CHECKS)


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_settings_name_parameters(path):
    # papermill only warns about a name that the notebook does not have.
    assert path.parent.name in {"smoke", "cpu", "paper"}
    settings = yaml.safe_load(path.read_text())
    assert settings.keys() <= parameters(path.stem).keys() - {"results_path"}


@pytest.mark.parametrize("chapter", CHECKS)
def test_results(chapter, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")  # figures go where they go in the book
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + hasty())
    before = records()
    run(chapter, tmp_path / "executed.ipynb", tmp_path / "results.json")
    CHECKS[chapter](json.loads((tmp_path / "results.json").read_text()))
    assert records() == before, "a smoke run must leave the committed records alone"
