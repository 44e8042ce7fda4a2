"""Writing files so that they are never half written."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file; at any moment it holds either the old content or the new one."""
    path = path.resolve()  # where a link leads, or the link would be replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a file can only be renamed within its file system.
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with open(scratch, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
