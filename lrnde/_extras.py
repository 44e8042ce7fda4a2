"""Packages that only some parts of the package need."""

import importlib
from types import ModuleType


def import_extra(module: str, package: str | None = None) -> ModuleType:
    """Imports a module, or says how to install what it comes with."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        problem = f"this needs {package or module}: pip install 'lrnde[book]'"
        raise ModuleNotFoundError(problem, name=error.name) from error
