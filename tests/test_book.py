import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from docutils import nodes
from docutils.core import publish_doctree
from pybtex.database import parse_file

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"]] + [c["file"] for part in TOC["parts"] for c in part["chapters"]]
BIBLIOGRAPHY = parse_file(str(ROOT / "book" / "references.bib")).entries


def load(path):
    """Import a script of the book, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load(ROOT / "book" / "build.py")
docstrings = load(ROOT / "book" / "_ext" / "markdown_docstrings.py")


def prose(page):
    """The Markdown of a page; of a notebook, that of its Markdown cells."""
    if (ROOT / f"{page}.md").exists():
        return (ROOT / f"{page}.md").read_text()
    cells = nbformat.read(ROOT / f"{page}.ipynb", as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("page", PAGES)
def test_page_has_one_title(page):
    text = re.sub(
        r"^(```+|:::+).*?^\1", "", prose(page), flags=re.DOTALL | re.MULTILINE
    )
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


@pytest.mark.parametrize("page", PAGES)
def test_citations_are_in_the_bibliography(page):
    cited = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(page))
    keys = {key.strip() for group in cited for key in group.split(",")}
    assert keys <= set(BIBLIOGRAPHY)


@pytest.mark.parametrize("key", BIBLIOGRAPHY)
def test_bibliography_entry_is_complete(key):
    entry = BIBLIOGRAPHY[key]
    assert entry.persons["author"]
    assert re.fullmatch(r"\d{4}", entry.fields["year"])
    assert (
        key.endswith(entry.fields["title"].split()[0].lower())
        or entry.fields["year"] in key
    )
    assert {"doi", "eprint", "url", "publisher"} & entry.fields.keys()


@pytest.mark.parametrize("page", PAGES)
def test_page_loads_nothing_from_outside(page):
    outside = r"(?:https?:)?//"
    loads = [r"!\[[^]]*\]\(\s*", r"src=[\"']?", r"\{(?:image|figure)\} *"]
    assert not re.search(f"(?:{'|'.join(loads)}){outside}", prose(page))


def test_theme_loads_nothing_from_outside():
    sphinx = CONFIG["sphinx"]["config"]
    (static,) = sphinx["html_static_path"]
    assert (ROOT / static / sphinx["mathjax_path"]).is_file()
    assert (ROOT / static / "mathjax" / "LICENSE").is_file()
    assert "http" not in (ROOT / "_config.yml").read_text()


def test_plain_build_runs_the_chapters():
    assert CONFIG["execute"]["execute_notebooks"] == "cache"
    assert CONFIG["execute"]["timeout"] >= 300


@pytest.fixture
def book(tmp_path):
    """A book of one chapter, with one module and one record."""
    write(tmp_path / "book" / "build.py", (ROOT / "book" / "build.py").read_text())
    parts = [{"caption": "All", "chapters": [{"file": "notebooks/one"}]}]
    toc = {"format": "jb-book", "root": "book/intro", "parts": parts}
    write(tmp_path / "_toc.yml", json.dumps(toc))
    execute = {"execute_notebooks": "cache", "timeout": 60}
    write(tmp_path / "_config.yml", json.dumps({"execute": execute}))
    write(tmp_path / "book" / "intro.md", "# Introduction\n")
    write(tmp_path / "book" / "results" / "mnist" / "run.json", "{}\n")
    write(tmp_path / "lrnde" / "sub" / "solve.py", "x = 1\n")
    write_chapter(tmp_path, "1 + 1")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_chapter(root, source, prose="# One", tags=()):
    cells = [
        nbformat.v4.new_markdown_cell(prose),
        nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    write(root / "notebooks" / "one.ipynb", nbformat.writes(notebook))


STALE = {
    "module": lambda root: write(root / "lrnde" / "sub" / "solve.py", "x = 2\n"),
    "new module": lambda root: write(root / "lrnde" / "fit.py", ""),
    "record": lambda root: write(root / "book/results/mnist/run.json", "[]\n"),
    "new record": lambda root: write(root / "book/results/mnist/two.json", ""),
    "benchmark": lambda root: write(root / "book" / "benchmarks" / "cpu.json", "[]\n"),
    "timing": lambda root: write(root / "benchmarks" / "compare.py", "x = 2\n"),
    "settings": lambda root: write(root / "notebooks/params/cpu/mnist.yaml", "a: 2\n"),
    "tags": lambda root: write_chapter(root, "1 + 1", tags=["hide-input"]),
}
# The notebook cache itself sees a change of code, and needs none for one of prose.
FRESH = {
    "nothing": lambda root: None,
    "code": lambda root: write_chapter(root, "2 + 2"),
    "prose": lambda root: write_chapter(root, "1 + 1", prose="# Two"),
    "page": lambda root: write(root / "book" / "intro.md", "# Introduction"),
}


@pytest.mark.parametrize("change", [*STALE, *FRESH])
def test_cache_is_dropped_when_it_is_stale(book, change):
    build.drop_stale(book)
    cached = book / "_build" / ".jupyter_cache" / "notebook"
    write(cached, "output")
    (STALE | FRESH)[change](book)
    build.drop_stale(book)
    assert cached.exists() == (change in FRESH)


def test_chapter_runs_once(book):
    write_chapter(book, "with open('runs', 'a') as f:\n    f.write('x')")
    # A process of its own, since Jupyter's clients leave their event loops behind.
    code = "import build; [build.run_chapters(build.ROOT) for _ in range(2)]"
    subprocess.run([sys.executable, "-c", code], cwd=book / "book", check=True)
    assert (book / "notebooks" / "runs").read_text() == "x"


def make_book(root):
    command = [sys.executable, root / "book" / "build.py"]
    return subprocess.run(command, capture_output=True, text=True)


def test_build_fails_with_a_chapter(book):
    write_chapter(book, "1 / 0")
    result = make_book(book)
    assert result.returncode != 0
    assert "ZeroDivisionError" in result.stderr
    assert "one.ipynb" in result.stderr.splitlines()[-1]


def test_build_fails_with_a_warning(book):
    write(book / "book" / "intro.md", "# Introduction\n\n{doc}`nowhere`\n")
    result = make_book(book)
    assert result.returncode != 0
    assert "unknown document" in result.stderr


def test_markdown_docstring_becomes_rst():
    text = "Mean of $\\sum_j |E_j|$ over `n` keys.\n\n- `n`: How\n    many $n$."
    tree = publish_doctree(docstrings.to_rst(text))
    assert [node.astext() for node in tree.findall(nodes.math)] == [
        r"\sum_j |E_j|",
        "n",
    ]
    (item,) = tree.findall(nodes.list_item)
    (paragraph,) = item.children
    assert paragraph.astext() == "n: How\nmany n."
    assert not list(tree.findall(nodes.system_message))


def test_records_lie_where_the_pages_link_to(tmp_path):
    copy = load(ROOT / "book" / "_ext" / "copy_records.py").copy_records
    stale = tmp_path / "book" / "results" / "gone.json"
    stale.parent.mkdir(parents=True)
    stale.touch()
    app = SimpleNamespace(
        srcdir=ROOT, outdir=tmp_path, builder=SimpleNamespace(format="html")
    )
    copy(app, None)
    # A page in notebooks/ names them as the notebook does: ../book/results.
    made = {p.relative_to(tmp_path) for p in tmp_path.glob("book/results/*/*/*.json")}
    kept = {p.relative_to(ROOT) for p in ROOT.glob("book/results/*/*/*.json")}
    assert made == kept
    assert not stale.exists()
