import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from packaging.requirements import Requirement

import lrnde
from lrnde import records, report

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RESULTS = ROOT / "book" / "results"
TARGETS = ["book", "test", "lint", "lab", "data", "bench", "clean", "help"]


def blocks(language):
    """The README's code blocks in one language."""
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def make(*arguments):
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def ranges(requirements):
    parsed = [Requirement(requirement) for requirement in requirements]
    return {requirement.name: requirement.specifier for requirement in parsed}


def test_conda_environment_mirrors_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    found = ranges(line.replace("matplotlib-base", "matplotlib") for line in conda)
    extras = PROJECT["optional-dependencies"]
    wanted = [f"python{PROJECT['requires-python']}", "pip", *PROJECT["dependencies"]]
    assert found == ranges([*wanted, *extras["book"], *extras["test"]])
    assert pip == {"pip": ["-e ."]}
    assert environment["channels"] == ["conda-forge", "nodefaults"]


def test_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == lrnde.__version__
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("target", TARGETS)
def test_make_target(target):
    assert make("--dry-run", target)
    assert re.search(rf"^  make {target} +\S", make("help"), re.MULTILINE)


def test_readme_commands_exist():
    commands = re.findall(r"^make (\w+)", "".join(blocks("sh")), re.MULTILINE)
    assert {"test", "book"} <= set(commands) <= set(TARGETS)


def test_readme_example_runs():
    (example,) = blocks("python")
    assert len(example.split("\n")) < 20
    namespace = {}
    exec(example, namespace)
    gradient = namespace["gradient"]
    assert jnp.isfinite(gradient).all()
    assert (gradient != 0).any()


def test_core_imports_without_the_extras():
    names = PROJECT["optional-dependencies"]["book"]
    blocked = {Requirement(name).name.replace("-", "_") for name in names}
    blocked |= {"sklearn", "IPython"}
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)})); "
    subprocess.run([sys.executable, "-c", code + "import lrnde"], cwd=ROOT, check=True)


def test_the_readme_has_the_figures_of_the_records():
    """Its table says what the records of the paper tier say, in the same order."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (\w.*?) \|$", text, re.MULTILINE)
    for experiment, row in zip(
        ("mnist-node", "mnist-nsde", "physionet"), rows, strict=True
    ):
        found = records.load_all(RESULTS, experiment, "paper")
        claims = report.claims(found, experiment, "paper").loc["unbiased"]
        nfe, time, quality = claims["here"]
        kind = "accuracy {:+z.2f} ± {:.2f} points"
        if experiment == "physionet":
            kind = "error {:+z.1f} ± {:.1f} %"
        sign = 1 if experiment == "physionet" else -1
        expected = [
            f"{nfe:.2f}",
            f"{claims['published'].iloc[0]:.2f}",
            f"{time:.2f}",
            kind.format(sign * quality, claims["error"].iloc[2]),
        ]
        assert row.split(" | ")[1:] == expected
