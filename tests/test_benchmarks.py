"""The benchmark: contenders that solve the same problem, rows, records."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks import compare, contenders, problems, record, sde_contenders
from benchmarks.problems import conv, mlp
from lrnde import records

TINY = mlp(3, size=4, hidden=5, tolerance=1e-3)


def ends(problem):
    return {
        name: np.asarray(contender.call())
        for name, contender in contenders.predictions(problem, ()).items()
    }


def test_contenders_solve_the_same_problem():
    # In single precision rounding may change the size of a step, so not to rounding.
    found = ends(TINY)
    np.testing.assert_allclose(found["lrnde"], found["diffrax"], atol=0.02)
    scale = np.abs(found["lrnde"]).max()
    np.testing.assert_allclose(found["lrnde"], found["fixed steps"], atol=0.05 * scale)
    gradients = {
        name: ravel_pytree(contender.call())[0]
        for name, contender in contenders.gradients(TINY, contenders.SAMPLINGS).items()
    }
    size = jnp.abs(gradients["lrnde"]).max()
    for name, tolerance in (("lrnde, checkpoints", 1e-5), ("diffrax", 0.02)):
        difference = jnp.abs(gradients["lrnde"] - gradients[name]).max()
        assert difference < tolerance * size


def test_three_ways_to_write_a_field():
    y = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
    expected = TINY.field(jnp.array(0.3), y)
    for write in (problems.separate_arrays, problems.appended_time):
        np.testing.assert_allclose(
            write(TINY.field)(jnp.array(0.3), y), expected, atol=1e-5
        )


@pytest.mark.parametrize("make", [mlp, conv])
def test_torch_has_the_same_field(make):
    problem = make(3)
    torch = pytest.importorskip("torch", reason="needs the extra `bench`")
    torch_contenders = pytest.importorskip("benchmarks.torch_contenders")
    field, y0 = torch_contenders._translate(problem, torch.device("cpu"))
    found = field(torch.tensor(0.3), y0).detach().numpy()
    if found.ndim == 4:
        found = found.transpose(0, 2, 3, 1)
    expected = problem.field(jnp.array(0.3), problem.y0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    (contender,) = torch_contenders.predictions(problem).values()
    assert contender.peak_bytes > 7 * problem.y0.nbytes  # all stages of a step


@pytest.mark.parametrize("mode", ["predict", "gradient"])
def test_rows(mode):
    without = ("error", "biased", "lrnde, checkpoints", "torchdiffeq")
    rows = compare.compare(TINY, mode, 2, without)
    names = [row["contender"] for row in rows]
    assert names[:3] == ["bare", "fixed steps", "lrnde"] and "error" not in names
    for row in rows:
        assert len(row["seconds"]) == 2 and row["median"] > 0
        assert row["batch"] == 3 and row["size"] == 4
        assert (row["nfe"] is None) == (row["contender"] in names[:2])


def test_a_record_that_was_edited_is_refused(tmp_path):
    rows = compare.compare_fields(2, 1)
    file = tmp_path / "cpu.json"
    record.save(file, record.make(rows, 1, records.provenance("highest")))
    assert record.load(file)["rows"] == rows
    edited = json.loads(file.read_text())
    edited["rows"][0]["median"] /= 2
    file.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="was edited"):
        record.load(file)


ODE_SECTIONS = {"batch", "size", "tolerance", "depth", "field", "budget"}


@pytest.mark.parametrize("what, wanted", [("ode", ODE_SECTIONS), ("sde", {"batch"})])
def test_the_record_in_the_book_is_whole(what, wanted):
    loaded = record.load(record.path("cpu", what))
    assert {row["section"] for row in loaded["rows"]} == wanted
    assert loaded["provenance"]["git_clean"]


def test_sde_contenders_are_ready():
    problem = problems.sde(3)
    found = sde_contenders.predictions(problem)
    assert found["lrnde"].cost.nfe == 4 * found["lrnde"].cost.num_steps
    for contender in found.values():
        y1 = ravel_pytree(contender.call())[0]
        assert np.all(np.isfinite(y1)) and contender.peak_bytes > problem.y0.nbytes
