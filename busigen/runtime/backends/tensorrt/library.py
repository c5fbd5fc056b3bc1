"""TensorRT, or TensorRT for RTX, and the card: importing and opening them, building an engine, errors as advice."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from platform import machine
from typing import TYPE_CHECKING, Any

from busigen.errors import BusigenError, CapacityError, InputError, MissingDependencyError, ProviderError, UsageError
from busigen.registry import ENGINE_TARGETS, MIN_BATCH, EngineTarget
from busigen.runtime.backends.base import ran_out
from busigen.runtime.backends.onnx_graph import with_conditions
from busigen.runtime.backends.tensorrt.profiles import Profile
from busigen.text import install_command

if TYPE_CHECKING:
    from busigen.runtime.backends.tensorrt.engine_builder import Cache, Key

TIMINGS = "timings"  # the cache's kind of what kernels were measured to take on a card
_SHOWN = 300  # characters of the library's own message that an error quotes
_GIB = 1 << 30
_NO_MEMORY = 2  # cudaErrorMemoryAllocation
_NO_DRIVER = re.compile(r"cudaError (35|100):|driver version is insufficient|no CUDA-capable device", re.IGNORECASE)


@dataclass(frozen=True)
class Library:
    """An imported engine library, by its name and entry in ``registry.ENGINE_TARGETS``."""

    name: str
    target: EngineTarget
    module: Any
    version: str
    logger: Any
    said: list[str] = field(default_factory=list)  # its errors: it has no other way to say why it returns nothing

    @classmethod
    def load(cls, name: str) -> Library:
        """Import the library of a target; a ``MissingDependencyError`` if it is not installed or cannot be loaded."""
        target = target_named(name)
        try:
            module: Any = import_module(target.library)
        except (ImportError, OSError) as error:  # OSError: a shared library of the package cannot be loaded.
            what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
            needed = f"--target {name} needs the Python package {target.library}, which {what}."
            raise MissingDependencyError(needed, fix=f"Run {install_command(target.extra)}.") from error
        said: list[str] = []

        class Listener(module.ILogger):  # type: ignore[misc]  # Its base is known only once the library is loaded.
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= module.ILogger.ERROR:
                    said.append(message)

        return cls(name, target, module, str(module.__version__), Listener(), said)

    @property
    def key(self) -> dict[str, Any]:
        """What the cache's entries depend on that belongs to the library, and the system if engines are bound to it."""
        system = "" if self.target.portable else f"{sys.platform}-{machine()}"
        return {"target": self.name, "version": self.version, "system": system}


def target_named(name: str) -> EngineTarget:
    """The target of that name; a ``UsageError`` if there is none."""
    if name not in ENGINE_TARGETS:
        fix = f"Choose from: {', '.join(ENGINE_TARGETS)}; `busigen export` also: onnx."
        raise UsageError(f"unknown target {name!r}.", fix=fix)
    return ENGINE_TARGETS[name]


def capabilities(library: Library) -> tuple[str, ...]:
    """Compute capabilities, such as ``8.9``, that a library can build for; none if it builds for the card at hand."""
    if (members := getattr(library.module, "ComputeCapability", None)) is None or not library.target.ahead:
        return ()
    names = sorted(name for name in members.__members__ if re.fullmatch(r"SM\d+", name))
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in names)


def check_capability(library: Library, capability: str) -> None:
    """Refuse a compute capability that a library cannot build for, with a ``UsageError``."""
    if not (known := capabilities(library)):
        wrong = f"--compute-capability {capability}: {library.name} builds for the card of this machine alone."
        raise UsageError(wrong, fix="Leave it out, and build on each kind of card.")
    if capability not in known:
        wrong = f"--compute-capability {capability!r} is none that {library.name} {library.version} builds for."
        fix = f"Choose from {', '.join(known)}, or leave it out for engines that run on 8.0 and all later ones."
        raise UsageError(wrong, fix=fix)


@dataclass(frozen=True)
class BuildSpec:
    """A graph to build for some batches."""

    name: str
    path: Path
    model: bytes  # what the file held when it was hashed; its weights lie beside it
    profiles: Sequence[Profile]
    capability: str = ""  # empty for the library's own choice


def parsed(library: Library, spec: BuildSpec) -> tuple[Any, Any]:
    """The library's builder and the network that it is to build; an ``InputError`` names the node that it refuses."""
    module = library.module
    builder = module.Builder(library.logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, library.logger)
    try:
        accepted = parser.parse(with_conditions(spec.model), str(spec.path))
    except ValueError as error:
        raise InputError(f"{spec.path} is no ONNX graph: {error}.", fix="Export the bundle again.") from error
    if accepted and network.num_outputs:
        return builder, network
    found = [parser.get_error(number) for number in range(parser.num_errors)]
    nodes = dict.fromkeys(f"operator {e.node_operator()}, node {e.node_name()!r}" for e in found if e.node_operator())
    reasons = dict.fromkeys(e.desc().strip().rstrip(".") for e in found if e.desc() not in ("", "false"))
    what = f": {'; '.join(nodes)}" if nodes else ""
    why = f" ({'; '.join(reasons)})" if reasons else ""
    refused = f"{spec.path} has something that {library.name} {library.version} does not take{what}{why}"[:_SHOWN]
    fix = "Run it with --provider cuda or cpu, or export the bundle again with another opset or precision."
    raise InputError(f"{refused}.", fix=fix)


def build(library: Library, spec: BuildSpec, timings: tuple[Cache, Key] | None = None) -> bytes:
    """A serialised engine. Numbers are computed as the graph types them: fp32 stays fp32 and is not cut to TF32.

    ``timings`` are cache and key of what kernels take on this card; None where nothing is measured. Raises what
    :func:`parsed` does; a UsageError, CapacityError or ProviderError says why the library cannot build here.
    """
    module, said = library.module, len(library.said)
    builder, network = parsed(library, spec)
    config = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)
    for rows in spec.profiles:
        profile = builder.create_optimization_profile()
        for value in map(network.get_input, range(network.num_inputs)):
            # The batch comes first, and is all that bundles leave open.
            profile.set_shape(value.name, *((count, *tuple(value.shape)[1:]) for count in rows))
        config.add_optimization_profile(profile)
    if spec.capability:
        config.num_compute_capabilities = 1
        members = module.ComputeCapability.__members__
        config.set_compute_capability(members[f"SM{spec.capability.replace('.', '')}"], 0)
    if timings:
        cache, key = timings
        # False: a timing cache of another version, card or driver is an error.
        config.set_timing_cache(config.create_timing_cache(cache.read(TIMINGS, key) or b""), False)
    if (engine := builder.build_serialized_network(network, config)) is None:
        raise _failed(library, spec, library.said[said:])
    if timings:
        with cache.making(TIMINGS, key):
            cache.write(TIMINGS, key, bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def _failed(library: Library, spec: BuildSpec, said: Sequence[str]) -> BusigenError:
    account = " ".join(said)
    # The first message names the cause, those after it who passed it on.
    reason = " ".join(said[0].split())[:_SHOWN] if said else "it does not say why"
    what = f"{library.name} {library.version} cannot build {spec.name}"
    if _NO_DRIVER.search(account):
        what += ": there is no NVIDIA driver, or it is older than the library needs"
        return ProviderError(f"{what}: {reason}.", fix="Install a current driver, or build on a machine that has one.")
    if ran_out(account):
        rows = spec.profiles[0].most
        fix = "End what else uses the card, or give a smaller --batch-size."
        return CapacityError(f"{what} for {rows} rows: the memory does not suffice: {reason}.", fix=fix, rows=rows)
    where = f" for compute capability {spec.capability}" if spec.capability else ""
    fix = "Try another --compute-capability, --batch-size or precision, or run it with --provider cuda or cpu."
    return UsageError(f"{what}{where}: {reason}.", fix=fix)


@dataclass(frozen=True)
class Device:
    """An NVIDIA card that works: CUDA's number of it, name, compute capability (``8.9``) and newest CUDA (13000)."""

    number: int
    name: str
    capability: str
    driver: int

    @property
    def key(self) -> dict[str, Any]:
        """What the cache's entries depend on that belongs to a card and its driver."""
        return {"device": self.name, "capability": self.capability, "driver": self.driver}


class CudaFailure(BusigenError):
    """A CUDA call that failed, by CUDA's number and name for it."""

    def __init__(self, status: int, name: str) -> None:
        self.status = status
        super().__init__(f"CUDA reports {name} ({status}).", fix="Look at nvidia-smi, and run the same command again.")


def cuda() -> Any:
    """cuda-python's binding of CUDA's runtime; a ``ModuleNotFoundError`` if it is not installed."""
    return import_module("cuda.bindings.runtime")


def answered(result: tuple[Any, ...]) -> Any:
    """What a CUDA call returned, without its status; a `CudaFailure` if it failed."""
    status, *values = result
    if int(status):
        raise CudaFailure(int(status), status.name)
    return values[0] if len(values) == 1 else tuple(values)


def device_memory(size: int) -> int:
    """Address of ``size`` bytes on the current card, which are the process's until it ends; a `CudaFailure` if full."""
    return int(answered(cuda().cudaMalloc(max(size, 1))))


def open_device(provider: str) -> Device:
    """The card that this process's graphs are to run on, made this thread's; a ``ProviderError`` if there is none."""
    try:
        runtime = cuda()
    except ImportError as error:
        missing = f"--provider {provider} needs the Python package cuda-python, which is not installed."
        raise ProviderError(missing, fix=f"Run {install_command(provider)}, or use --provider cpu.") from error
    driver = int(answered(runtime.cudaDriverGetVersion()))
    needed = int(answered(runtime.cudaRuntimeGetVersion()))
    status, count = runtime.cudaGetDeviceCount()
    if problem := device_problem(provider, int(status), driver, needed):
        raise problem
    number = card_for(multiprocessing.current_process().name, count)
    answered(runtime.cudaSetDevice(number))
    found = answered(runtime.cudaGetDeviceProperties(number))
    name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
    return Device(number, name.strip("\0"), f"{found.major}.{found.minor}", driver)


def card_for(process: str, count: int) -> int:
    """The number of the card, of ``count``, that a process of this name takes: ``worker-3`` and others share evenly."""
    # Ray, and Slurm with ``--gpus-per-task``, show each process a card of its own.
    _, _, number = process.rpartition("worker-")
    return int(number) % count if number.isdigit() and number != process else 0


def device_problem(provider: str, status: int, driver: int, needed: int) -> ProviderError | None:
    """Why a provider cannot use CUDA here; None if it can.

    ``status`` is CUDA's answer when it was asked for cards, ``driver`` the newest CUDA that the driver knows and
    ``needed`` that of the library that asks, as CUDA counts (13000 is 13.0; 0 is no error, or no driver).
    """
    other = "or use --provider cpu"
    if not driver:
        fix = f"Run it on a machine with an NVIDIA card and its driver, {other}."
        return ProviderError(f"--provider {provider}: this machine has no NVIDIA driver.", fix=fix)
    # Minor versions are compatible within a major one (CUDA's minor version compatibility).
    if driver // 1000 < needed // 1000 or status == 35:
        known, least, own = (f"{n // 1000}.{n % 1000 // 10}" for n in (driver, needed // 1000 * 1000, needed))
        return ProviderError(
            f"--provider {provider}: the NVIDIA driver knows CUDA up to {known}, and {least} is the least that "
            f"cuda-python {own} runs on.",
            fix=f"Install a newer NVIDIA driver, {other}.",
        )
    if status:
        fix = f"Look at nvidia-smi and at CUDA_VISIBLE_DEVICES, {other}."
        return ProviderError(f"--provider {provider}: CUDA finds no card that it can use (error {status}).", fix=fix)
    return None


def memory_problem(provider: str, device: str, batch: int, needed: int, free: int) -> CapacityError | None:
    """The error for a ``--batch-size`` that needs more bytes than a card has free, with one that fits; else None."""
    if needed <= free:
        return None
    fits, end = min(batch - 1, free * batch // needed), "end what else uses the card"
    return CapacityError(
        f"--provider {provider}: --batch-size {batch} needs {needed / _GIB:.2f} GiB on {device}, of which "
        f"{free / _GIB:.2f} GiB are free.",
        fix=f"Give --batch-size {fits}, or {end}." if fits else f"No batch fits: {end}, or use --provider cpu.",
        rows=batch,
        fits=fits,
    )


def cuda_problem(provider: str, failure: CudaFailure, batch: int) -> ProviderError | CapacityError:
    """The error for a CUDA call that failed while a provider's graphs ran with this ``--batch-size``."""
    described = f"--provider {provider}: {failure.problem}"
    if failure.status != _NO_MEMORY:
        return ProviderError(described, fix=failure.fix)
    # What was planned fitted into what was free: something else has taken memory since.
    half = batch // 2 if batch // 2 >= MIN_BATCH else 0
    smaller = f"give --batch-size {half}, " if half else ""
    return CapacityError(
        f"{described.removesuffix('.')} with --batch-size {batch}: the card's memory does not suffice.",
        fix=f"End what else uses the card (nvidia-smi shows it), {smaller}or use --provider cpu.",
        rows=batch,
    )


def unusable(name: str, version: str, said: Sequence[str]) -> ProviderError | CapacityError:
    """The error for an engine that cannot be loaded or run, from what its library said, oldest first."""
    account = " ".join(" ".join(said).split())
    what = f"--provider {name}: {version} cannot run an engine here: {account[:_SHOWN] or 'it does not say why'}."
    if ran_out(account):
        fix = "End what else uses the card (nvidia-smi shows it), or give a smaller --batch-size."
        return CapacityError(what, fix=fix)
    return ProviderError(what, fix="Install a newer NVIDIA driver, or use --provider cuda or cpu.")
