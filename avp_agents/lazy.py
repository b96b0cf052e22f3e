"""Public names of a package that are imported on first use (PEP 562), so that importing the package costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module

from avp_agents.errors import ConfigurationError


def lazy_names(
    package: str, homes: Mapping[str, str], *, needs: str | None = None, without: str = ""
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``.

    Args:
        package: Its name.
        homes: Where each of its public names is: a module's name, relative to the package where it begins with a dot.
        needs: A module that they need and that not everybody installs.
        without: What to say where it is missing.

    Raises (``__getattr__``):
        ConfigurationError: The module is missing.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if needs is not None:
            try:
                import_module(needs)
            except ModuleNotFoundError as error:
                raise ConfigurationError(without) from error
        value = getattr(import_module(homes[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
