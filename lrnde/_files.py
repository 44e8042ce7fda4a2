"""Writing files so that they are never half written."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file; at any moment it holds either the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a file can only be renamed within its file system.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp lets nobody else read it
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
