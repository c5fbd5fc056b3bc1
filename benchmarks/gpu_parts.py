"""The parts of gpu_check.py. Each is given the options and yields results as they come, so that none is lost."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import BusigenError, CapacityError
from busigen.registry import MIN_BATCH, PROVIDERS, RESOLUTION
from busigen.runtime.backends.base import Backend, EngineOptions, open_backend
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.probe import probe
from busigen.runtime.sampling.sampler import Sampler

ROOT = Path(__file__).parents[1]
BATCHES = (64, 256, 16, 1, 128, 4, 32, 2, 8)
"""The order in which batches are measured: those that a long run would use first."""

ENGINE_BATCHES = (256, 64, 16, 4)
"""What TensorRT's engines are built for: each more makes each of them larger, and the batches in between are padded."""

TESTS = ("tests/gpu", "tests/runtime/backends/test_engine_backend.py")
"""Where the tests marked ``gpu`` are; the second builds all engines first, which takes minutes."""

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
SIDE, LABEL = 128, "benign"
Found = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured, on a card and in a dry run."""

    matrix: int
    seconds: float
    batches: tuple[int, ...]
    draws: int
    counts: tuple[int, int]


CARD = Scale(matrix=8192, seconds=0.5, batches=BATCHES, draws=16, counts=(2_000, 6_000))
DRY = Scale(matrix=256, seconds=0.05, batches=(2, 1), draws=2, counts=(2, 4))


def scale(options: argparse.Namespace) -> Scale:
    """The sizes of this run."""
    return DRY if options.dry_run else CARD


def late(options: argparse.Namespace, seconds: float = 0.0) -> bool:
    """Whether what takes so long would end after the part's slice."""
    return time.time() + seconds > options.deadline


def doctor(options: argparse.Namespace) -> Found:
    """What the machine can run."""
    done = subprocess.run(
        [sys.executable, "-m", "busigen.cli", "doctor", "--json"], capture_output=True, text=True, check=False
    )
    yield json.loads(done.stdout)


def tests(options: argparse.Namespace) -> Found:
    """The tests that need a card; in a dry run they skip themselves."""
    for place in TESTS:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-rs", place]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        said = done.stdout.splitlines()
        yield {"of": place, "exit_code": done.returncode, "summary": said[-1] if said else "", "output": said[-40:]}


def peak(options: argparse.Namespace) -> Found:
    """TFLOP/s of a large square matrix product in PyTorch, per precision."""
    torch = _torch(options)
    if torch is None:
        yield {"left_out": "PyTorch is not installed"}
        return
    device, n = _device(options), scale(options).matrix
    for precision in PRECISIONS:
        with _precision(torch, precision) as dtype:
            a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            seconds = timed(lambda a=a, b=b: a @ b, scale(options).seconds, _wait(torch, options))
            yield {"precision": precision, "size": n, "tflops": 2 * n**3 / seconds / 1e12}


def parity(options: argparse.Namespace) -> Found:
    """Every provider that works against the processor's: graph by graph on the same inputs, then whole images."""
    bundle = Bundle.open(options.bundle)
    noted = Noted(open_backend(bundle))
    jobs = [(index, 0) for index in range(scale(options).draws)]
    accepted, refused = _sampler(bundle, noted).attempt(7, jobs)
    for name, backend in _backends(bundle, options):
        if isinstance(backend, str):
            yield {"provider": name, "left_out": f"{name}: {backend}"}
            continue
        errors = {}
        for graph, (inputs, output) in noted.seen.items():
            other = backend.run(graph, inputs)
            errors[graph] = float(np.sqrt(((other - output) ** 2).mean()) / (np.sqrt((output**2).mean()) + 1e-12))
        mine, others = _sampler(bundle, backend).attempt(7, jobs)
        pairs = [(a, b) for a in accepted for b in mine if a.index == b.index]
        yield {
            "provider": name,
            "relative_error": errors,
            "worst": max(errors.values()),
            "draws": len(jobs),
            "same_gates": [(r.index, r.reason) for r in refused] == [(r.index, r.reason) for r in others],
            "dice": min((_dice(a.mask, b.mask) for a, b in pairs), default=None),
            "grey_difference": max((_grey(a.image, b.image) for a, b in pairs), default=None),
        }


def eager(options: argparse.Namespace) -> Found:
    """PyTorch eager with the bundle's weights, and how many operations an image takes."""
    yield from _torch_rates(options, "eager", lambda torch, unet: unet)


def compiled(options: argparse.Namespace) -> Found:
    """PyTorch compiled, which on a card records CUDA graphs: a minute or so per shape and precision."""
    # On the processor, Inductor compiles C++ for minutes, which would say nothing about a card.
    how = {"backend": "eager"} if options.dry_run else {"mode": "reduce-overhead"}
    yield from _torch_rates(options, "torch.compile", lambda torch, unet: torch.compile(unet, dynamic=False, **how))


def _torch_rates(options: argparse.Namespace, engine: str, prepared: Callable[[Any, Any], Any]) -> Found:
    torch = _torch(options)
    if torch is None or importlib.util.find_spec("diffusers") is None:
        yield {"left_out": "PyTorch or diffusers is not installed"}
        return
    from torch.utils.flop_counter import FlopCounterMode

    from busigen.export.import_bundle import restore
    from busigen.training.checkpoint import load_networks

    folder = options.checkpoint or options.work / f"checkpoint-{options.part}"
    if options.checkpoint is None:
        restore(Bundle.open(options.bundle), folder)
    networks = load_networks(folder)[0]
    own = {name: unet for name, unet in networks.denoisers.items() if name.endswith(f"-{LABEL}")}
    if engine == "eager":
        with FlopCounterMode(display=False) as counter:
            _denoise(torch, networks, _inputs(options.bundle, 1), "cpu", torch.float32)()
        yield {"flops_per_image": counter.get_total_flops(), "counted": "multiplications and additions, each as one"}
    device, wait = _device(options), _wait(torch, options)
    slowest = 0.0
    for batch in scale(options).batches:
        for precision in PRECISIONS[:1] if options.dry_run else reversed(PRECISIONS):
            if late(options, slowest):
                yield {"left_out": f"{engine} {precision} from batch {batch} on"}
                return
            began = time.perf_counter()
            with _precision(torch, precision) as dtype:
                networks.denoisers = {name: prepared(torch, unet.to(device, dtype)) for name, unet in own.items()}
                call = _denoise(torch, networks, _inputs(options.bundle, batch), device, dtype)
                yield from _rate(call, "torch", engine, precision, batch, options, wait)
            torch.compiler.reset()
            slowest = max(slowest, time.perf_counter() - began)


def engine_rates(options: argparse.Namespace) -> Found:
    """Every provider that works, on the shipped bundle and on those of other precisions."""
    bundles = {"fp32": options.bundle, **{k: Path(v) for k, _, v in (b.partition("=") for b in options.other_bundles)}}
    for precision, folder in bundles.items():
        bundle = Bundle.open(folder)
        for name, backend in _backends(bundle, options):
            if isinstance(backend, str):
                yield {"engine": name, "precision": precision, "left_out": f"{name} {precision}: {backend}"}
                continue
            for batch in dict.fromkeys(max(MIN_BATCH, batch) for batch in scale(options).batches):
                if late(options):
                    yield {"left_out": f"{name} {precision} from batch {batch} on"}
                    break
                inputs = _inputs(options.bundle, batch)
                call = partial(_run_denoisers, backend, inputs)
                described = "tf32" if name == "cuda-tf32" and precision == "fp32" else precision
                yield from _rate(call, "engine", name, described, batch, options, lambda: None)


def whole(options: argparse.Namespace) -> Found:
    """`busigen generate` as a user runs it, at two counts: the slope is the rate of a long run."""
    names = [name for name, found in _probes(options) if found]
    for name in reversed(names):
        seconds = []
        for count in scale(options).counts:
            out = options.work / f"{name}-{count}"
            command = [sys.executable, "-m", "busigen.cli", "generate", "--out", str(out), "--count", str(count)]
            command += ["--provider", name, "--batch-size", "2" if options.dry_run else "256"]
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds.append(time.perf_counter() - began)
            if done.returncode != 0:
                yield {"provider": name, "left_out": f"{name}: {done.stderr.splitlines()[-1]}"}
                break
        else:
            few, many = scale(options).counts
            rate = (many - few) / max(1e-9, seconds[1] - seconds[0])
            start = max(0.0, seconds[0] - few / rate)
            yield {
                "provider": name,
                "counts": [few, many],
                "seconds": seconds,
                "pairs_per_second": rate,
                "seconds_for_goal": start + 100_000 / rate,
            }
        if late(options, sum(seconds)):
            yield {"left_out": f"providers after {name}"}
            return


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "doctor": doctor,
    "tests": tests,
    "peak": peak,
    "parity": parity,
    "eager": eager,
    "compile": compiled,
    "engines": engine_rates,
    "whole": whole,
}


def timed(call: Callable[[], Any], seconds: float, wait: Callable[[], None]) -> float:
    """Seconds of one call: the best of three rounds, each of as many calls as last about so long."""
    call()
    wait()
    began = time.perf_counter()
    call()
    wait()
    calls = max(1, int(seconds / 3 / max(1e-6, time.perf_counter() - began)))
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        best = min(best, (time.perf_counter() - began) / calls)
    return best


class Noted(Backend):
    """A backend that keeps what each graph was last given, and what came of it."""

    def __init__(self, backend: Backend) -> None:
        self.name, self.version, self._backend = backend.name, backend.version, backend
        self.seen: dict[str, tuple[dict[str, NDArray[Any]], NDArray[np.float32]]] = {}

    def run(self, graph: str, inputs: Any) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backends.base.Backend`."""
        output = self._backend.run(graph, inputs)
        self.seen[graph] = ({name: array.copy() for name, array in inputs.items()}, output)
        return output


def _rate(
    call: Callable[[], Any],
    library: str,
    engine: str,
    precision: str,
    batch: int,
    options: argparse.Namespace,
    wait: Callable[[], None],
) -> Found:
    about = {"library": library, "engine": engine, "precision": precision, "batch": batch}
    try:
        began = time.perf_counter()
        call()
        wait()
        first = time.perf_counter() - began
        seconds = timed(call, scale(options).seconds, wait)
    except Exception as error:  # One that does not run, or does not fit, must not cost the others their place.
        yield {**about, "left_out": f"{engine} {precision} batch {batch}: {str(error).splitlines()[0][:200]}"}
        return
    yield {**about, "images_per_second": batch / seconds, "seconds": seconds, "first_call_seconds": first}


def _probes(options: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Names of the providers to measure, and whether they work: those of a card, or in a dry run the processor's."""
    for provider in PROVIDERS.values():
        if provider.gpu is not options.dry_run:
            yield provider.name, probe(provider).works


def _backends(bundle: Bundle, options: argparse.Namespace) -> Iterator[tuple[str, Backend | str]]:
    """Every provider that works, opened, or why it cannot be: one must not cost the others their place."""
    for name, works in _probes(options):
        if works:
            yield name, _opened(bundle, name, ENGINE_BATCHES)


def _opened(bundle: Bundle, name: str, batches: tuple[int, ...]) -> Backend | str:
    try:
        # On the processor, too, the way that inputs and outputs take on a card.
        return open_backend(bundle, name, EngineOptions(bound=True, batch_sizes=batches))
    except CapacityError as error:
        fitting = tuple(batch for batch in batches if batch <= error.fits)
        return _opened(bundle, name, fitting) if fitting else error.problem
    except BusigenError as error:
        return error.problem


def _sampler(bundle: Bundle, backend: Backend) -> Sampler:
    return Sampler(bundle, backend, classes={LABEL: 0.5, "malignant": 0.5}, batch_size=8)


def _inputs(folder: Path, batch: int) -> dict[str, NDArray[np.float32]]:
    """What stages 2 and 3 read, of the right shapes; the values decide nothing about the time."""
    bundle, random = Bundle.recorded(folder), np.random.default_rng(0)
    shape = bundle.latent_shape(SIDE)
    tokens = (RESOLUTION // bundle.patch) ** 2
    square = np.zeros((batch, 1, SIDE, SIDE), np.float32)
    square[:, :, 40:90, 40:90] = 1.0
    latents = random.standard_normal((2, batch, *shape), np.float32)
    return {
        "noise": latents[0],
        "known": latents[1],
        "tokens": random.standard_normal((batch, tokens, 128), np.float32),
        "keep": np.ones((batch, tokens), np.float32),
        "mask": square,
        "edit": square,
        "ring": square,
    }


def _run_denoisers(backend: Backend, inputs: dict[str, NDArray[np.float32]]) -> None:
    lesion = {name: inputs[name] for name in ("noise", "known", "tokens", "keep", "mask", "edit")}
    painted = backend.run(f"lesion-{LABEL}@{SIDE}", lesion)
    backend.run(f"blend-{LABEL}@{SIDE}", {**lesion, "painted": painted, "ring": inputs["ring"]})


def _denoise(
    torch: Any, networks: Any, inputs: dict[str, NDArray[np.float32]], device: str, dtype: Any
) -> Callable[[], Any]:
    """A call of stages 2 and 3 in PyTorch, on inputs that lie on the device already."""
    from busigen.training.networks.build import region_condition
    from busigen.training.networks.inference import blend_input

    v = {name: torch.from_numpy(array).to(device, dtype) for name, array in inputs.items()}

    def call() -> Any:
        with torch.no_grad():
            condition = networks.window_condition(v["known"], v["mask"], v["edit"])
            painted = networks.sample("lesion", v["noise"], LABEL, v["tokens"], v["keep"], *condition)
            edit, ring = region_condition(v["edit"]), region_condition(v["ring"])
            condition = networks.window_condition(blend_input(v["known"], painted, edit, ring), v["mask"], v["ring"])
            return networks.sample("blend", v["noise"], LABEL, v["tokens"], v["keep"], *condition)

    return call


def _torch(options: argparse.Namespace) -> Any:
    """PyTorch, where it is installed and can use the card."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    return torch if options.dry_run or torch.cuda.is_available() else None


def _device(options: argparse.Namespace) -> str:
    return "cpu" if options.dry_run else "cuda"


def _wait(torch: Any, options: argparse.Namespace) -> Callable[[], None]:
    """Waits until the device has done what it was given."""
    return (lambda: None) if options.dry_run else torch.cuda.synchronize


class _precision:
    """PyTorch in one precision: yields the element type, and lets fp32 products be TF32 or not."""

    def __init__(self, torch: Any, precision: str) -> None:
        self._torch, self._precision = torch, precision

    def __enter__(self) -> Any:
        allow = self._precision == "tf32"
        self._torch.backends.cuda.matmul.allow_tf32 = self._torch.backends.cudnn.allow_tf32 = allow
        types = {"fp16": self._torch.float16, "bf16": self._torch.bfloat16}
        return types.get(self._precision, self._torch.float32)

    def __exit__(self, *error: object) -> None:
        self._torch.backends.cuda.matmul.allow_tf32 = self._torch.backends.cudnn.allow_tf32 = False


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    total = int(one.sum() + other.sum())
    return 2.0 * float((one & other).sum()) / total if total else 1.0


def _grey(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())
