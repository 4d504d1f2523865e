"""Finding the ops of a family: every folder below it; one that composes other ops may hold no op of its own."""

import importlib
import pkgutil
from typing import Any


def export_ops(package: str, namespace: dict[str, Any]) -> list[str]:
    """Import each folder of the family `package` and copy its public names into `namespace`.

    Returns:
        The names copied, for `__all__`.
    """
    names: list[str] = []
    for module in pkgutil.iter_modules(namespace["__path__"]):
        if not module.ispkg:
            continue
        folder = importlib.import_module(f"{package}.{module.name}")
        for name in folder.__all__:
            if name in names:
                raise ImportError(f"{package}: two ops export {name!r}")
            if name == module.name:
                raise ImportError(f"{package}.{module.name}: a public name may not hide its own folder")
            namespace[name] = getattr(folder, name)
            names.append(name)
    return names
