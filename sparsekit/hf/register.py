"""Make transformers know packed checkpoints and side branches, without importing it.

transformers has no entry points for quantizers, and none for what `save_pretrained` writes: both are told by a call. If
the module that a call needs is loaded already, we call; if not, a finder on `sys.meta_path` calls right after it has
been.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def register() -> None:
    """Tell transformers, now or as its modules are first imported; calling it again does nothing."""
    for name, call in _CALLS.items():
        if name in sys.modules:
            call()
        elif not any(isinstance(finder, _Finder) and finder.awaited == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(name))


def _register_quantizer() -> None:
    import sparsekit.hf.quantizer  # noqa: F401  registers itself


def _save_branches() -> None:
    from sparsekit.hf.branches import save_branches_

    save_branches_(sys.modules["transformers.modeling_utils"].PreTrainedModel)


_CALLS: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _register_quantizer,
    "transformers.modeling_utils": _save_branches,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, through the other finders, and calls after it has run."""

    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_call(module: ModuleType) -> None:
            run(module)
            _CALLS[fullname]()

        spec.loader.exec_module = run_then_call  # type: ignore[method-assign]
        return spec
