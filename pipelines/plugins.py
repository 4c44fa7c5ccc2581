"""Discovery: a new method or recipe is one new file in its folder, nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def discover(folder: ModuleType, attribute: str) -> dict[str, Any]:
    """Import every module of a package and collect `attribute` of each by its `name`.

    Args:
        folder: The package to walk, such as `intarsia.training.recipes`.
        attribute: The module attribute that holds the plug-in, such as `RECIPE`.

    Returns:
        Plug-ins by name, in the order of the file names.

    Raises:
        ImportError: A module lacks the attribute, or two plug-ins share a name: loud, at import.
    """
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{info.name}")
        if not hasattr(module, attribute):
            raise ImportError(f"{module.__name__} has no {attribute}")
        plugin = getattr(module, attribute)
        if plugin.name in found:
            raise ImportError(f"two files define the {attribute} called {plugin.name}")
        found[plugin.name] = plugin
    return found
