"""TensorRT and TensorRT for RTX: one API in two modules, imported when they are needed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from platform import machine
from typing import Any

from busigen.errors import BusigenError, CapacityError, InputError, MissingDependencyError, ProviderError, UsageError
from busigen.registry import ENGINE_TARGETS, EngineTarget
from busigen.runtime.backends.base import says_ran_out
from busigen.runtime.backends.onnx_graph import with_conditions
from busigen.runtime.backends.tensorrt.device import Device
from busigen.runtime.backends.tensorrt.engine_cache import Cache
from busigen.runtime.backends.tensorrt.profiles import Profile
from busigen.text import install_command


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


REVISION = 1
"""Of what is done here: counted up when the same graph and options give another engine, so that all are made anew."""

_SHOWN = 300
"""Characters of the library's own message that an error quotes."""

_TIMINGS = "timings"
"""The cache's kind of what kernels were measured to take."""

_NO_DRIVER = re.compile(r"cudaError (35|100):|driver version is insufficient|no CUDA-capable device", re.IGNORECASE)
_CAPABILITY = re.compile(r"\d{1,2}\.\d")


class Timings:
    """What kernels were measured to take on a card, kept for later builds by library version, card and driver.

    Args:
        library: that measured.
        device: the card that it measured on.
        cache: where they are kept, with their hash.
    """

    def __init__(self, library: Library, device: Device, cache: Cache) -> None:
        self._cache = cache
        self._key = {
            "target": library.name,
            "version": library.version,
            "system": library.system,
            "device": device.name,
            "capability": device.capability,
            "driver": device.driver,
        }

    def read(self) -> bytes:
        """What is kept; empty where nothing is."""
        return self._cache.read(_TIMINGS, self._key) or b""

    def write(self, content: bytes) -> None:
        """Keep this in its place."""
        with self._cache.making(_TIMINGS, self._key):
            self._cache.write(_TIMINGS, self._key, content)


@dataclass(frozen=True)
class BuildSpec:
    """A graph to build.

    Attributes:
        name: of the graph.
        path: of its file, beside which its weights lie.
        model: the file's bytes, which were hashed; the path may hold others by now.
        profiles: batches to build for.
        capability: compute capability of the card, such as ``8.9``; empty for the library's own choice.
    """

    name: str
    path: Path
    model: bytes
    profiles: Sequence[Profile]
    capability: str = ""


def build(library: Library, spec: BuildSpec, timings: Timings | None = None) -> bytes:
    """The serialised engine. Numbers are computed as the graph types them: fp32 stays fp32 and is not cut to TF32.

    Args:
        library: what builds.
        spec: what is built.
        timings: of kernels on this card, where the library takes them.

    Raises:
        InputError: the library refuses the graph; its operator and node are named.
        UsageError: it cannot build for these batches, or for this compute capability.
        CapacityError: the memory does not suffice.
        ProviderError: it needs a card, or a newer driver, and there is none.
    """
    module = library.module
    said = len(library.said)
    builder = module.Builder(library.logger)
    network = _parsed(library, builder, spec)
    config = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)
    for profile in spec.profiles:
        config.add_optimization_profile(_profile(builder, network, profile))
    if spec.capability:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(library, spec.capability), 0)
    if timings is not None:
        # Another version's, card's or driver's would mislead: it is kept by all three, and a mismatch is an error.
        config.set_timing_cache(config.create_timing_cache(timings.read()), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _failed(library, spec, library.said[said:])
    if timings is not None:
        timings.write(bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def check_operators(library: Library, spec: BuildSpec) -> None:
    """Refuse a graph that :func:`build` would refuse for what is in it: a tenth of a second in place of minutes.

    Raises:
        InputError: the library refuses the graph; its operator and node are named.
    """
    _parsed(library, library.module.Builder(library.logger), spec)


def _parsed(library: Library, builder: Any, spec: BuildSpec) -> Any:
    module = library.module
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, library.logger)
    try:
        parsed = parser.parse(with_conditions(spec.model), str(spec.path))
    except ValueError as error:
        raise InputError(f"{spec.path} is no ONNX graph: {error}.", fix="Export the bundle again.") from error
    if not parsed or not network.num_outputs:
        raise _refused(library, spec, parser)
    return network


def capabilities(library: Library) -> tuple[str, ...]:
    """Compute capabilities that a library can be told to build for; none where it builds for the card at hand."""
    members = getattr(library.module, "ComputeCapability", None)
    names = [] if members is None or not library.target.ahead else [name for name in members.__members__ if name[2:]]
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in sorted(names) if re.fullmatch(r"SM\d+", name))


def check_capability(library: Library, capability: str) -> None:
    """Refuse a compute capability that a library cannot build for.

    Raises:
        UsageError: it is none of those, or the library builds for the card at hand alone.
    """
    known = capabilities(library)
    if not known and capability:
        raise UsageError(
            f"--compute-capability {capability}: {library.name} builds for the card of this machine alone.",
            fix="Leave it out, and build on each kind of card.",
        )
    if capability and (not _CAPABILITY.fullmatch(capability) or capability not in known):
        raise UsageError(
            f"--compute-capability {capability!r} is none that {library.name} {library.version} builds for.",
            fix=f"Choose from {', '.join(known)}, or leave it out for engines that run on 8.0 and all later ones.",
        )


def _profile(builder: Any, network: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        value = network.get_input(number)
        # The batch comes first, and is all that bundles leave open.
        rest = tuple(value.shape)[1:]
        made.set_shape(value.name, *((rows, *rest) for rows in profile))
    return made


def _capability(library: Library, capability: str) -> Any:
    return library.module.ComputeCapability.__members__[f"SM{capability.replace('.', '')}"]


def _refused(library: Library, spec: BuildSpec, parser: Any) -> InputError:
    found = [parser.get_error(number) for number in range(parser.num_errors)]
    nodes = dict.fromkeys(f"operator {e.node_operator()}, node {e.node_name()!r}" for e in found if e.node_operator())
    reasons = dict.fromkeys(e.desc().strip().rstrip(".") for e in found if e.desc() not in ("", "false"))
    what = f": {'; '.join(nodes)}" if nodes else ""
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return InputError(
        f"{spec.path} has something that {library.name} {library.version} does not take{what}{why}"[:_SHOWN] + ".",
        fix="Run it with --provider cuda or cpu, or export the bundle again with another opset or precision.",
    )


def _failed(library: Library, spec: BuildSpec, said: Sequence[str]) -> BusigenError:
    """Why there is no engine, from what the library said while it built."""
    account = " ".join(said)
    # The first message names the cause, those after it who passed it on.
    reason = " ".join(said[0].split())[:_SHOWN] if said else "it does not say why"
    what = f"{library.name} {library.version} cannot build {spec.name}"
    if _NO_DRIVER.search(account):
        return ProviderError(
            f"{what}: there is no NVIDIA driver, or it is older than the library needs: {reason}.",
            fix="Install a current driver, or build on a machine that has one.",
        )
    if says_ran_out(account):
        rows = spec.profiles[0].most
        return CapacityError(
            f"{what} for {rows} rows: the memory does not suffice: {reason}.",
            fix="End what else uses the card, or give a smaller --batch-size.",
            rows=rows,
        )
    where = f" for compute capability {spec.capability}" if spec.capability else ""
    return UsageError(
        f"{what}{where}: {reason}.",
        fix="Try another --compute-capability, --batch-size or precision, or run it with --provider cuda or cpu.",
    )
