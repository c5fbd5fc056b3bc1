"""TensorRT and TensorRT for RTX: one API in two modules, imported when they are needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import import_module
from platform import machine
from typing import Any

from busigen.errors import MissingDependencyError, UsageError
from busigen.registry import ENGINE_TARGETS, EngineTarget
from busigen.runtime.install import install_command


@dataclass(frozen=True)
class Library:
    """An imported engine library.

    Attributes:
        name: of the target, as in ``registry.ENGINE_TARGETS``.
        module: the Python module.
        version: its version.
        logger: what it logs through.
        said: its warnings and errors so far, the last one last; it has no other way to say why it returns nothing.
    """

    name: str
    module: Any
    version: str
    logger: Any
    said: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, name: str) -> Library:
        """Import the library of a target.

        Raises:
            UsageError: there is no such target.
            MissingDependencyError: the library is not installed, or cannot be loaded.
        """
        target = target_named(name)
        try:
            module = import_module(target.library)
        except (ImportError, OSError) as error:  # OSError: a shared library of the package cannot be loaded.
            what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
            raise MissingDependencyError(
                f"--target {name} needs the Python package {target.library}, which {what}.",
                fix=f"Run {install_command(target.extra)}.",
            ) from error
        said: list[str] = []
        return cls(name, module, str(module.__version__), _listener(module, said), said)

    @property
    def target(self) -> EngineTarget:
        """What the registry says of it."""
        return ENGINE_TARGETS[self.name]

    @property
    def system(self) -> str:
        """The operating system and processor that an engine is bound to; empty where it is to none."""
        return "" if self.target.portable else f"{sys.platform}-{machine()}"


def target_named(name: str) -> EngineTarget:
    """The target of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in ENGINE_TARGETS:
        raise UsageError(
            f"unknown target {name!r}.", fix=f"Choose from: {', '.join(ENGINE_TARGETS)}; `busigen export` also: onnx."
        )
    return ENGINE_TARGETS[name]


def _listener(module: Any, said: list[str]) -> Any:
    class Listener(module.ILogger):  # type: ignore[misc]  # Its base is known only once the library is loaded.
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.ERROR:
                said.append(message)

    return Listener()
