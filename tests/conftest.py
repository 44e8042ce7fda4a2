import contextlib
import itertools
import os
import runpy
import socket
from pathlib import Path

import hypothesis
import jax
import jax.random as jr
import pytest
from jaxtyping import install_import_hook

os.environ["MPLBACKEND"] = "Agg"  # no test opens a window
os.environ["NPROC"] = "1"  # threads of XLA: as many tests run as there are cores

# What the chapters' kernels run first; it saves the tests a tenth of their time, too.
STARTUP = Path(__file__).parents[1] / "book" / "startup.py"
os.environ["PYTHONSTARTUP"] = str(STARTUP)
runpy.run_path(str(STARTUP))

# Most of the time of a test is compilation, so the compiler shall not try hard. The
# chapters whose results are times run without this.
LAZY = " --xla_backend_optimization_level=0"
if LAZY not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + LAZY

# The first example of a test often compiles something, which takes its time. The
# same examples each run: a change is judged by what it changed.
# `--hypothesis-profile random` looks for new ones.
hypothesis.settings.register_profile("lrnde", deadline=None, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("lrnde")

# On a GPU the tests are of the methods, not of TF32. (On a CPU this does nothing.)
jax.config.update("jax_default_matmul_precision", "highest")

# Every annotation in the package is checked at run time, shapes included.
install_import_hook("lrnde", "beartype.beartype")


@pytest.fixture
def getkey():
    """Call it for a key; each call gives another, and a test always gets the same."""
    seeds = itertools.count()
    return lambda: jr.key(next(seeds))


@pytest.fixture
def float64():
    """The test runs in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def serve():
    """Starts a `downloads.Server` and gives its address."""
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(server.listen())


@pytest.fixture
def dead_url():
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/files/"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache of the test's own, and no `LRNDE_DATA`."""
    import pooch

    monkeypatch.delenv("LRNDE_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "lrnde"
