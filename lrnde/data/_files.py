"""Files: found in a folder or downloaded, and verified either way."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from .._extras import import_extra
from ._sources import File, SOURCES


class DataError(RuntimeError):
    """A data file is missing, damaged, malformed, or could not be downloaded."""


def read(
    name: str, folder: str | os.PathLike | None, names: Sequence[str] | None = None
) -> list[bytes]:
    """The verified contents of a source's files, downloaded first where needed.

    With `names`, of the files of these names alone.
    """
    source = SOURCES[name]
    files = [file for file in source.files if names is None or file.name in names]
    given = given_folder(name, folder)
    if given:
        home, remedy = given
    else:
        home = cache(name)
        fetch(files, source.urls, home)
        remedy = f"Run `python -m lrnde.data {name} --force` to download it again."
    return [read_verified(home / file.name, file, remedy) for file in files]


def given_folder(
    name: str, folder: str | os.PathLike | None
) -> tuple[Path, str] | None:
    """A source's folder in the one given, and what to do about a bad file in it."""
    origin = "the argument `folder`" if folder else "LRNDE_DATA"
    given = folder or os.environ.get("LRNDE_DATA")
    if not given:
        return None
    files, _, members = SOURCES[name]
    wanted = ""
    if members:
        every = f"all of {members[0].name} to {members[-1].name}"
        wanted = f" (wanted is {files[0].name} or else {every})"
    remedy = (
        f"The folder comes from {origin} and is never written to: put a good copy "
        f"of the file there{wanted}, or leave {origin} unset and run "
        f"`python -m lrnde.data {name}` to download the data into the cache."
    )
    return Path(given).expanduser() / name, remedy


def read_verified(path: Path, file: File, remedy: str) -> bytes:
    """The contents of a file on disk, if they are what they should be."""
    content = b""
    try:
        content = path.read_bytes()
        problem = mismatch(content, file)
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        raise DataError(f"{path} {problem}. {expected(file)} {remedy}")
    return content


def mismatch(content: bytes, file: File) -> str | None:
    """What is wrong with a file of this content, or `None`."""
    digest = hashlib.sha256(content).hexdigest()
    if digest in (file.sha256, *file.also):
        return None
    if file.size is None:
        return f"is not the right file: its SHA-256 is {digest}"
    if len(content) < file.size:
        return f"is truncated: it has {len(content):,} bytes"
    if len(content) > file.size:
        return f"is not the right file: it has {len(content):,} bytes"
    return f"is corrupt: its SHA-256 is {digest}"


def expected(file: File) -> str:
    """What is known about a file, as a sentence."""
    size = "a file" if file.size is None else f"{file.size:,} bytes"
    return f"Expected {size} with SHA-256 {' or '.join([file.sha256, *file.also])}."


def cache(name: str) -> Path:
    """The folder of a data set in the user's cache."""
    return Path(import_extra("pooch").os_cache("lrnde")) / name


def fetch(
    files: Sequence[File], urls: Sequence[str], folder: Path, force: bool = False
) -> None:
    """Download the files that the folder lacks, or all of them with `force`."""
    for file in files:
        if force or not (folder / file.name).exists():
            _download_from_any(file, urls, folder)


def _download_from_any(file: File, urls: Sequence[str], folder: Path) -> None:
    failures = []
    for url in urls:
        try:
            return _download(url + file.name, file, folder)
        except (OSError, DataError) as error:  # those of requests are OSErrors
            failures.append(f"  {url}{file.name}: {error}")
    raise DataError(
        "\n".join([f"{folder / file.name} could not be downloaded:", *failures])
        + f"\n{expected(file)} Whatever was there before is untouched. Run "
        f"`python -m lrnde.data {folder.name} --force` to try again, or set LRNDE_DATA "
        f"to a folder that holds {folder.name}/{file.name}."
    )


def _download(url: str, file: File, folder: Path) -> None:
    # Into a folder beside its final place, so that only a verified file takes that
    # place, and takes it in one stroke.
    folder.mkdir(parents=True, exist_ok=True)
    total = file.size or 1  # of the bar: pooch sets what the server says, but not None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        part = Path(scratch) / file.name
        with (
            open(part, "w+b") as out,
            tqdm(total=total, desc=file.name, unit="B", unit_scale=True) as bar,
        ):
            _downloader(bar)(url, out, None)
            os.fsync(out.fileno())
        problem = mismatch(part.read_bytes(), file)
        if problem:
            raise DataError(f"what arrived {problem}")
        os.replace(part, folder / file.name)


def _downloader(bar: tqdm) -> Callable:
    # "identity": a server that calls a .gz file a compressed transfer of its contents
    # would otherwise have it unpacked on arrival.
    return import_extra("pooch").HTTPDownloader(
        progressbar=bar, chunk_size=2**16, headers={"Accept-Encoding": "identity"}
    )
