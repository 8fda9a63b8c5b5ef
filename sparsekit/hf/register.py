"""Make `from_pretrained` know packed checkpoints, without importing transformers.

transformers has no entry points for quantizers: they are registered by a call. If `transformers.quantizers.auto` is
loaded already, we call; if not, a finder on `sys.meta_path` calls right after it has been.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantizer, now or when transformers is first imported; calling it again does nothing."""
    if _AWAITED in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_now() -> None:
    import sparsekit.hf.quantizer  # noqa: F401  registers itself


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, through the other finders, and registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_register(module: ModuleType) -> None:
            run(module)
            _register_now()

        spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec
