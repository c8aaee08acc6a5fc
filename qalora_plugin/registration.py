"""Makes transformers know ``quant_method: qalora``, and PEFT ``peft_type: QALORA``, without importing them: they are
told when they are imported.

The package's entry point in the group ``torch.backends``, torch's own mechanism for extensions that nobody imports,
has every ``import torch`` call :func:`register_with_transformers`. So any tool built on transformers loads merged
checkpoints, and PEFT reads adapters. This module is imported then: it must stay small, and must not fail.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any
from warnings import warn

_REGISTRY = "transformers.quantizers.auto"  # where its quantizers are listed
# Loading a model imports both. The second is waited for as well, because the first may be half imported already when
# this is called: it may be the one that imports torch.
_AWAITED = (_REGISTRY, "transformers.modeling_utils")
_PEFT = "peft.mapping"  # where its types are listed; PEFT imports torch before it


def register_with_transformers() -> None:
    """Register at once if transformers' registry is there already, else once it is. Safe to call again."""
    if _is_imported(_REGISTRY):
        _try(_register, "transformers")
    if _is_imported(_PEFT):
        _try(_register_with_peft, "PEFT")
    everything = _is_imported(_REGISTRY) and _is_imported(_PEFT)
    if not everything and not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Finds nothing itself: lets Python find what is awaited, and registers once that has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in (*_AWAITED, _PEFT) else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if fullname == _PEFT:
                _try(_register_with_peft, "PEFT")
            elif fullname == _REGISTRY or _is_imported(_REGISTRY):
                _try(_register, "transformers")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


def _try(register: Callable[[], None], library: str) -> None:
    """An exception here would break the import of a library, for tools that have nothing to do with us."""
    try:
        register()
    except Exception as error:
        _warn(f"qalora cannot register with {library}, which works without it: {error!r}")


@cache
def _warn(message: str) -> None:
    """Once, however often it is tried."""
    warn(message, RuntimeWarning, stacklevel=3)


def _is_imported(name: str) -> bool:
    """And not only begun to be."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register() -> None:
    """Import our loader, which registers at its end.

    If it is what imports transformers, it is half imported now: that end is still to come, and this does nothing.
    """
    import_module(".integrations.transformers.loading", __package__)


def _register_with_peft() -> None:
    """List our type of adapter, unless our config has done so itself."""
    sys.modules[_PEFT].PEFT_TYPE_TO_CONFIG_MAPPING.setdefault("QALORA", _Config())


class _Config:
    """Stands in for our class of configs until PEFT asks something of it: what that imports needs all of PEFT."""

    def __call__(self, **fields: Any) -> Any:
        return self._own()(**fields)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own(), name)

    @staticmethod
    def _own() -> Any:
        return import_module(".integrations.peft.adapter", __package__).QALoraConfig
