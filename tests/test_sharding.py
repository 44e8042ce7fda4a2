"""Batches divided over devices and processes: the same training as on one device."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lrnde import experiments

# What both scripts begin with.
SAME = """
import math, os, signal, sys
from pathlib import Path
import equinox as eqx, jax, numpy as np
from lrnde import experiments, training
from lrnde.training import _processes


def assert_same(one, other, rtol):
    for a, b in zip(one.history.pending, other.history.pending, strict=True):
        assert a.keys() == b.keys() and a["nfe"] == b["nfe"], (a, b)
        np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=rtol)
    models = [eqx.filter(state.model, eqx.is_array) for state in (one, other)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol / 100)
        assert len(b.sharding.device_set) == 1


"""

TRAIN = (
    SAME
    + """
assert jax.device_count() == 8
name, method, rtol = *sys.argv[1:3], float(sys.argv[3])
small = dict(
    experiment=name, method=method, batch_size=16, tolerance=1e-3, steps=3, hidden=8,
    solver="bosh3",
)
if name == "physionet":
    small |= dict(latent=3, depth=1, dataset="oscillators")
config = experiments.EXPERIMENTS[name](**small)
dataset = config.load_data()
one, eight = (
    experiments.train(config, dataset, progress=False, shard=shard)
    for shard in (False, True)
)
assert len(one.history.pending) == 3
assert_same(one, eight, rtol)
try:
    experiments.EXPERIMENTS[name](**small | dict(batch_size=20)).sharding()
except ValueError as error:
    assert "20 cannot be divided evenly over 8 devices" in str(error)
else:
    raise AssertionError("20 examples on 8 devices")
"""
)


# Two processes, one device each. One has a deadline. The other is asked to stop, and
# the first as well, while it saves. A disk is full. Then both go on.
TOGETHER = (
    SAME
    + """
port, rank, checkpoint = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}", 2, rank, initialization_timeout=60, shutdown_timeout_seconds=10
)
assert jax.device_count() == 2


class Interrupted(experiments.MNISTNode):
    def batches(self, dataset):
        batch = super().batches(dataset)

        def interrupting(step):
            if rank == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return batch(step)

        return interrupting


small = dict(
    experiment="mnist-node", method="unbiased", batch_size=16, tolerance=1e-3, steps=4,
    hidden=8, solver="bosh3",
)
config = experiments.MNISTNode(**small)
dataset = config.load_data()


def train(config, **kwargs):
    return experiments.train(config, dataset, progress=False, **kwargs)


alone = train(config)
late = train(config, shard=True, deadline=0.0 if rank == 0 else math.inf)
assert late.step == 0
save = _processes.save_checkpoint


def interrupted(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    save(*args)


def full(*args):
    raise OSError("no space left")


def refused(message, **kwargs):
    try:
        train(config, shard=True, **kwargs)
    except (training.TrainingError, OSError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


_processes.save_checkpoint = interrupted
stopped = train(Interrupted(**small), shard=True, checkpoint=checkpoint)
assert stopped.step == 2
_processes.save_checkpoint = full
elsewhere = checkpoint.with_name("other.ckpt")
refused("could not be written" if rank else "no space left", checkpoint=elsewhere)
_processes.save_checkpoint = save
refused("do not see the same", checkpoint=elsewhere if rank else checkpoint)
resumed = train(config, shard=True, checkpoint=checkpoint)
assert resumed.step == 4 and len(resumed.history.pending) == 4
assert_same(alone, resumed, 1e-9)
"""
)


# A penalty is compared in double precision: in single precision the estimate of a small
# error is itself mostly rounding.
@pytest.mark.parametrize(
    ("name", "method", "double", "rtol"),
    [("mnist-node", "unbiased", "1", "1e-9"), ("physionet", "vanilla", "0", "1e-3")],
)
def test_as_on_one_device(name, method, double, rtol):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": double}
    command = [sys.executable, "-c", TRAIN, name, method, rtol]
    root = Path(__file__).parents[1]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=300)


def free_port() -> str:
    """Below those that systems hand out by themselves, so that nobody else gets it."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            return str(port)
    raise RuntimeError("no free port")


def test_processes_stop_together_and_go_on_together(tmp_path):
    port = free_port()
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    environment = {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, port, rank, tmp_path / "run.ckpt"],
            cwd=Path(__file__).parents[1],
            env=os.environ | environment,
        )
        for rank in ("0", "1")
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:  # one that waits for the other would wait for ever
            process.kill()
            process.wait()


def test_an_experiment_without_batches_says_so():
    with pytest.raises(ValueError, match="spiral-sde has no batch to divide"):
        experiments.Spiral(experiment="spiral-sde").sharding()
