"""Makes transformers know ``quant_method: qalora`` without importing transformers: it is told when it is imported.

The package's entry point in the group ``torch.backends``, torch's own mechanism for extensions that nobody imports,
has every ``import torch`` call :func:`register_with_transformers`. So any tool built on transformers loads merged
checkpoints. This module is imported then: it must stay small, and must not fail.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"  # where its quantizers are listed
# Loading a model imports both. The second is waited for as well, because the first may be half imported already when
# this is called: it may be the one that imports torch.
_AWAITED = (_REGISTRY, "transformers.modeling_utils")


def register_with_transformers() -> None:
    """Register at once if transformers' registry is there already, else once it is. Safe to call again."""
    if _is_ready():
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Finds nothing itself: lets Python find what is awaited, and registers once that has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _AWAITED else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if fullname == _REGISTRY or _is_ready():
                _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


def _is_ready() -> bool:
    """Whether the registry has been imported, and not only begun to be."""
    module = sys.modules.get(_REGISTRY)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register() -> None:
    """Import our loader, which registers at its end.

    If it is what imports transformers, it is half imported now: that end is still to come, and this does nothing.
    """
    import_module(".integrations.transformers.loading", __package__)
