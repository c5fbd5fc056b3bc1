"""The card: what it is, what its driver can do, and CUDA's answers as values or as advice."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from busigen.errors import BusigenError, CapacityError, ProviderError
from busigen.registry import MIN_BATCH
from busigen.text import install_command

_GIB = 1 << 30
_NO_MEMORY = 2
"""cudaErrorMemoryAllocation."""


@dataclass(frozen=True)
class Device:
    """An NVIDIA card that works.

    Attributes:
        number: CUDA's, among those that this process may use.
        name: such as ``NVIDIA L40S``.
        capability: compute capability, such as ``8.9``.
        driver: highest CUDA version that the driver knows, as CUDA counts it: 13000 is 13.0.
    """

    number: int
    name: str
    capability: str
    driver: int


def cuda() -> Any:
    """cuda-python's binding of CUDA's runtime.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return import_module("cuda.bindings.runtime")


def answered(result: tuple[Any, ...]) -> Any:
    """What a CUDA call returned, without its status.

    Raises:
        CudaFailure: the call failed.
    """
    status, *values = result
    if int(status):
        raise CudaFailure(int(status), status.name)
    return values[0] if len(values) == 1 else tuple(values)


class CudaFailure(BusigenError):
    """A CUDA call that failed, by CUDA's number and name for it."""

    def __init__(self, status: int, name: str) -> None:
        self.status = status
        super().__init__(f"CUDA reports {name} ({status}).", fix="Look at nvidia-smi, and run the same command again.")


def cuda_problem(provider: str, failure: CudaFailure, batch: int) -> ProviderError | CapacityError:
    """A CUDA call's failure as advice.

    Args:
        provider: whose graphs ran, or were to run.
        failure: CUDA's.
        batch: the ``--batch-size``.
    """
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


def card_for(process: str, count: int) -> int:
    """Which card a process takes, so that workers share those that there are evenly.

    Args:
        process: its name: ``worker-3`` for a worker of this machine, anything else for one alone.
        count: cards that the process sees. Ray, and Slurm with ``--gpus-per-task``, show each of theirs one alone.
    """
    _, _, number = process.rpartition("worker-")
    return int(number) % count if number.isdigit() and number != process else 0


def open_device(provider: str) -> Device:
    """The card that this process's graphs are to run on (:func:`card_for`), made this thread's.

    Args:
        provider: whose graphs are to run.

    Raises:
        ProviderError: cuda-python is not installed; there is no card, no driver, or one that is too old.
    """
    try:
        runtime = cuda()
    except ImportError as error:
        raise ProviderError(
            f"--provider {provider} needs the Python package cuda-python, which is not installed.",
            fix=f"Run {install_command(provider)}, or use --provider cpu.",
        ) from error
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


def device_problem(provider: str, status: int, driver: int, needed: int) -> ProviderError | None:
    """What stands against using CUDA here, from what it says of itself.

    Args:
        provider: whose graphs are to run.
        status: of asking for the number of cards: 0, or CUDA's number of the error.
        driver: highest CUDA version that the driver knows, 0 without a driver.
        needed: CUDA version of the library that asks.
    """
    other = "or use --provider cpu"
    if not driver:
        return ProviderError(
            f"--provider {provider}: this machine has no NVIDIA driver.",
            fix=f"Run it on a machine with an NVIDIA card and its driver, {other}.",
        )
    # Minor versions are compatible within a major one (CUDA's minor version compatibility).
    if driver // 1000 < needed // 1000 or status == 35:
        return ProviderError(
            f"--provider {provider}: the NVIDIA driver knows CUDA up to {_version(driver)}, and "
            f"{_version(needed // 1000 * 1000)} is the least that cuda-python {_version(needed)} runs on.",
            fix=f"Install a newer NVIDIA driver, {other}.",
        )
    if status:
        return ProviderError(
            f"--provider {provider}: CUDA finds no card that it can use (error {status}).",
            fix=f"Look at nvidia-smi and at CUDA_VISIBLE_DEVICES, {other}.",
        )
    return None


def memory_problem(provider: str, device: str, batch: int, needed: int, free: int) -> CapacityError | None:
    """What stands against a batch, with the largest one that fits; ``None`` where it fits.

    Args:
        provider: whose graphs are to run.
        device: the card's name.
        batch: the ``--batch-size``.
        needed: bytes that it takes, which grow with the batch.
        free: bytes that the card has left.
    """
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


def free_memory() -> int:
    """Bytes that the current card has left."""
    free, _ = answered(cuda().cudaMemGetInfo())
    return int(free)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def device_memory(size: int) -> int:
    """Address of ``size`` bytes on the current card. They are the process's until it ends.

    Raises:
        CudaFailure: there is no room.
    """
    return int(answered(cuda().cudaMalloc(max(size, 1))))


def pinned_memory(size: int) -> int:
    """Address of ``size`` bytes of host memory that the card can read and write by itself, while the host works on.

    Raises:
        CudaFailure: there is no room.
    """
    return int(answered(cuda().cudaMallocHost(max(size, 1))))
