"""Have the Ray nodes that a command of ours or `ray start` begins fork their workers, as `ray_workers.py` describes.

Python imports this file at its start if PYTHONPATH has this folder. No argument or variable of Ray names the scripts of
a node's workers, so their default is set in Ray's parameters once those are imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_PARAMETERS = "ray._private.parameter"


class _Finder:
    """Finds the module of Ray's parameters, and has them name the shim when it is loaded."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _PARAMETERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_set(module: ModuleType) -> None:
            load(module)
            _set_scripts(module)

        spec.loader.exec_module = load_and_set  # type: ignore[method-assign]
        return spec


def _set_scripts(module: ModuleType) -> None:
    links = os.environ["RAY_WORKER_SHIM_LINKS"]
    parameters = module.RayParams
    plain = parameters.update_if_absent

    def update_if_absent(self: object, **values: object) -> None:
        scripts = {name: f"{links}/{os.path.basename(str(values[name]))}" for name in _SCRIPTS & values.keys()}  # noqa: PTH119 - pathlib takes a tenth of a second here
        plain(self, **values | scripts)

    parameters.update_if_absent = update_if_absent


_SCRIPTS = {"worker_path", "setup_worker_path"}
sys.meta_path.insert(0, _Finder())
