"""Train and tune Qwen and StarCoder on any Ray cluster, and lose nothing when machines die.

`import llm_training_toolkit as ltt` offers the functions of `api.py`, each imported when it is first used. `ltt.plan`
and `ltt.train` are packages that can be called: they have the names of two verbs.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Problem",
    "Run",
    "SearchResult",
    "ToolkitError",
    "TrainResult",
    "estimate",
    "load_batch",
    "load_config",
    "load_model",
    "open_run",
    "plan",
    "prepare",
    "train",
    "tune",
]
_CALLABLE = ("plan", "train")


class _CallablePackage(ModuleType):
    """Subpackage that is called like the function of its name in `api.py`."""

    def __call__(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - typed in __init__.pyi
        verb = getattr(import_module(f"{__name__}.api"), self.__name__.rpartition(".")[2])
        return verb(*args, **options)


class _RootPackage(ModuleType):
    """This package: Python sets each subpackage as its attribute when it is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _RootPackage


def __getattr__(name: str) -> Any:  # noqa: ANN401 - typed in __init__.pyi
    if name in _CALLABLE:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
