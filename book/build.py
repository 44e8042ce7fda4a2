"""Build the book, running its chapters side by side and only where needed.

`jupyter-book build .` makes the same pages, but it runs the chapters one after another,
and its notebook cache sees nothing but their code cells. Here the cache is emptied when
anything else that the outputs depend on has changed, and the chapters that it lacks are
run in parallel before the pages are built.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from tqdm.contrib.concurrent import thread_map

ROOT = Path(__file__).resolve().parents[1]


def chapters(root: Path) -> list[Path]:
    """The notebooks in the table of contents, in its order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [root / f"{file}.ipynb" for file in files if file.startswith("notebooks/")]


def fingerprint(root: Path) -> str:
    """A hash of what the outputs depend on and the notebook cache does not see."""
    digest = hashlib.sha256()
    for part in _inputs(root):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _inputs(root: Path) -> Iterator[bytes]:
    patterns = ["lrnde/**/*.py", "benchmarks/*.py", "notebooks/params/**/*"]
    patterns += ["book/results/**/*", "book/benchmarks/*"]
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        if path.is_file():
            yield path.relative_to(root).as_posix().encode()
            yield path.read_bytes()
    for path in chapters(root):
        # The cache keeps the cells' tags and would bring back those of the last run.
        cells = json.loads(path.read_text())["cells"]
        yield json.dumps([cell["metadata"] for cell in cells]).encode()
    versions = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    yield "\n".join([sys.version, *sorted(versions)]).encode()


def drop_stale(root: Path) -> None:
    """Empty the notebook cache, unless its fingerprint is the present one."""
    stamp = root / "_build" / "fingerprint"
    current = fingerprint(root)
    if stamp.exists() and stamp.read_text() == current:
        return
    for name in [".jupyter_cache", ".doctrees"]:
        shutil.rmtree(root / "_build" / name, ignore_errors=True)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(current)


def run_chapters(root: Path) -> None:
    """Run the chapters that the cache lacks, as many at a time as there are cores."""
    config = yaml.safe_load((root / "_config.yml").read_text())
    folder = root / "_build" / ".jupyter_cache"

    def run(path: Path) -> list[str]:
        cache = get_cache(folder)
        cache.add_nb_to_project(str(path))
        result = load_executor("local-serial", cache).run_and_cache(
            filter_uris=[str(path)], timeout=config["execute"]["timeout"]
        )
        return result.excepted + result.errored  # what went wrong has been logged

    # A core each: threads of one chapter would only get in the way of the others.
    os.environ["NPROC"] = "1"  # XLA asks for it
    os.environ["PYTHONSTARTUP"] = str(root / "book" / "startup.py")  # IPython runs it
    get_cache(folder).list_cache_records()  # makes the database before the threads do
    options = {"max_workers": os.cpu_count(), "desc": "Running chapters"}
    # Later chapters are longer. With a short one at the end no core is idle for long.
    failed = sum(thread_map(run, chapters(root)[::-1], **options), [])
    if failed:
        sys.exit(f"Failed, with the errors shown above: {', '.join(failed)}")


def main() -> None:
    drop_stale(ROOT)
    run_chapters(ROOT)
    command = Path(sys.executable).with_name("jupyter-book")
    build = [command, "build", ".", "-W", "--keep-going", "-n"]
    sys.exit(subprocess.run(build, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
