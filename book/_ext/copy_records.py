"""Puts the records beside the pages, so that links to them work in the built book."""

import shutil
from pathlib import Path

RECORDS = Path("book", "results")


def copy_records(app, exception):
    if exception is None and app.builder.format == "html":
        target = Path(app.outdir, RECORDS)
        shutil.rmtree(target, ignore_errors=True)  # one may have been taken back
        shutil.copytree(Path(app.srcdir, RECORDS), target)


def setup(app):
    app.connect("build-finished", copy_records)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
