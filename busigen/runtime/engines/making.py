"""All engines of a bundle: those that the cache has, and those that are built now."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from busigen.errors import CapacityError, IntegrityError
from busigen.foreign import read_file
from busigen.runtime.backend import usable_cores
from busigen.runtime.bundle import Bundle, graph_names
from busigen.runtime.engines.building import REVISION, Blueprint, build, check_operators
from busigen.runtime.engines.cache import RECORD, Cache, Key
from busigen.runtime.engines.device import Device, answered, cuda
from busigen.runtime.engines.library import Library
from busigen.runtime.engines.profiles import Batches
from busigen.runtime.memory import largest_that_fits
from busigen.runtime.onnx_files import MAX_GRAPH_BYTES

KIND, TIMINGS = "engines", "timings"
"""Kinds of the cache's entries: engines, and what kernels were measured to take on a card."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """An engine that is in the cache now.

    Attributes:
        graph: its name.
        capability: that it was built for; empty for the library's own choice.
        size: of the serialised engine, in bytes.
        sha256: of it.
        key: that it is kept under.
        seconds: that its building took; 0 where the cache had it.
        cached: whether the cache had it.
    """

    graph: str
    capability: str
    size: int
    sha256: str
    key: Key
    seconds: float
    cached: bool


def key_of(library: Library, bundle: Bundle, graph: str, batches: Batches, capability: str) -> Key:
    """All that an engine depends on. The hashes are those that the bundle was checked against."""
    record = bundle.info["graphs"][graph]
    return {
        "target": library.name,
        "version": library.version,
        "system": library.system,
        "capability": capability,
        "onnx": record["files"][record["file"]],
        "files": sorted(record["files"].values()),
        "precision": str(record.get("precision", bundle.info.get("precision", "fp32"))),
        "profiles": [list(profile) for profile in batches.profiles(graph)],
        "revision": REVISION,
    }


class Workshop:
    """Makes engines of one bundle for one library and one kind of card.

    Args:
        library: what builds.
        bundle: an opened, checked bundle.
        batches: what to build for.
        cache: where engines are kept.
        capability: of the card, such as ``8.9``; empty for the library's own choice.
        device: the card of this machine, where there is one and the library measures kernels on it.
    """

    def __init__(
        self,
        library: Library,
        bundle: Bundle,
        batches: Batches,
        cache: Cache,
        *,
        capability: str = "",
        device: Device | None = None,
    ) -> None:
        self._library, self._bundle, self._batches, self._cache = library, bundle, batches, cache
        self._capability, self._device = capability, device
        self._timings = None if device is None or library.target.ahead else KeptTimings(library, device, cache)
        self._told = False

    def has_all(self) -> bool:
        """Whether the cache has an engine of every graph, as far as names tell; ``make`` looks at the hashes."""
        return not self._lacking()

    def _lacking(self) -> list[str]:
        keys = {
            name: key_of(self._library, self._bundle, name, self._batches, self._capability) for name in graph_names()
        }
        return [name for name, key in keys.items() if not (self._cache.entry(KIND, key) / RECORD).is_file()]

    def make(self, graph: str) -> tuple[Made, bytes]:
        """A graph's engine, serialised, from the cache or built and put there.

        Raises:
            BusigenError: it cannot be built (:func:`busigen.runtime.engines.building.build`) or kept.
        """
        key = key_of(self._library, self._bundle, graph, self._batches, self._capability)
        seconds = 0.0
        if (content := self._cache.read(KIND, key)) is None:
            with self._cache.making(KIND, key):
                # Another process may have made it while this one waited.
                if (content := self._cache.read(KIND, key)) is None:
                    content, seconds = self._build(graph, key)
        sha256 = hashlib.sha256(content).hexdigest()
        return Made(graph, self._capability, len(content), sha256, key, seconds, cached=not seconds), content

    def _build(self, graph: str, key: Key) -> tuple[bytes, float]:
        self._tell_of_others(key)
        started = time.perf_counter()
        blueprint = self._blueprint(graph)
        try:
            content = build(self._library, blueprint, self._timings)
        except CapacityError as error:
            raise self._too_large(blueprint, error) from error
        seconds = time.perf_counter() - started
        self._cache.write(KIND, key, content, graph=graph, seconds=round(seconds, 3))
        return content, seconds

    def _blueprint(self, graph: str) -> Blueprint:
        profiles = self._batches.profiles(graph)
        return Blueprint(graph, self._bundle.graph(graph), self._read(graph), profiles, self._aimed_at())

    def _too_large(self, blueprint: Blueprint, error: CapacityError) -> CapacityError:
        """The error for a batch that cannot be built for, with one that can: half of it is tried, and half of that."""

        def builds(size: int) -> bool:
            profiles = replace(self._batches, sizes=(size,)).profiles(blueprint.name)
            try:
                build(self._library, replace(blueprint, profiles=profiles), self._timings)
            except CapacityError:
                return False
            return True

        full = self._batches.sizes[0]
        fitting = largest_that_fits(full, builds)
        end = "end what else uses the memory (nvidia-smi shows what holds a card's)"
        fix = f"Give --batch-size {fitting}, for which it was built, or {end}." if fitting else f"No batch fits: {end}."
        return CapacityError(error.problem, fix=fix, rows=full, fits=fitting)

    def make_all(self, done: Callable[[Made], None] = lambda made: None) -> list[Made]:
        """The engines of all graphs, in the bundle's order.

        Args:
            done: told of each as it is finished.

        Raises:
            BusigenError: one of them cannot be made; those that were finished stay in the cache.
        """
        # All are parsed first: what cannot be built is refused before minutes have gone into the others.
        for graph in self._lacking():
            check_operators(self._library, self._blueprint(graph))
        # Kernels are timed on the card, where two builds would disturb each other. Ahead of time nothing is timed.
        workers = usable_cores() if self._library.target.ahead else 1
        pool = ThreadPoolExecutor(workers, "engine", self._enter_thread)
        try:
            # Without their contents, which come to half a gigabyte.
            waiting = [pool.submit(lambda name: self.make(name)[0], graph) for graph in graph_names()]
            for future in as_completed(waiting):
                done(future.result())
            return [future.result() for future in waiting]
        finally:
            pool.shutdown(cancel_futures=True)

    def _enter_thread(self) -> None:
        # The current card is each thread's own, and threads begin with the first one.
        if self._device is not None:
            answered(cuda().cudaSetDevice(self._device.number))

    def _aimed_at(self) -> str:
        # A library that builds on the card knows it; the capability is then part of the key alone.
        return self._capability if self._library.target.ahead else ""

    def _read(self, graph: str) -> bytes:
        record = self._bundle.info["graphs"][graph]
        path = self._bundle.graph(graph)
        model = read_file(path, MAX_GRAPH_BYTES)
        if hashlib.sha256(model).hexdigest() != record["files"][record["file"]]:
            raise IntegrityError(f"{path} has changed since the bundle was opened.", fix="Run the same command again.")
        return model

    def _tell_of_others(self, key: Key) -> None:
        """Say once why engines that seem to be there are built again."""
        if self._told:
            return
        differences = set(_differences(key, self._cache))
        if differences:
            self._told = True
            _log.info("engines are built again: those kept are for %s", "; ".join(sorted(differences)))


def kept_batches(library: Library, bundle: Bundle, cache: Cache, size: int) -> list[Batches]:
    """Other batches with this full one that the cache has engines for, those with the most profiles first.

    Whoever built for 16 and 4 ahead of a run wants these used, although the run asks for 16 alone.
    """
    # Its rows are the batch sizes themselves.
    graph = "context"
    own = key_of(library, bundle, graph, Batches((size,)), "")
    same = set(own) - {"profiles", "capability"}
    found = set()
    for key in cache.keys(KIND):
        if all(key.get(part) == own[part] for part in same) and isinstance(key.get("profiles"), list):
            profiles = [tuple(profile) for profile in key["profiles"]]
            dynamic = len(profiles) == 1 and profiles[0][0] != profiles[0][2]
            batches = Batches(tuple(most for _, _, most in profiles), dynamic)
            if batches.sizes[0] == size:
                found.add(batches)
    return sorted(found, key=lambda batches: (-len(batches.sizes), batches.dynamic, batches.sizes))


class KeptTimings:
    """See :class:`busigen.runtime.engines.building.Timings`: kept under the library's version, the card, its driver.

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
        """See :class:`busigen.runtime.engines.building.Timings`."""
        return self._cache.read(TIMINGS, self._key) or b""

    def write(self, content: bytes) -> None:
        """See :class:`busigen.runtime.engines.building.Timings`."""
        with self._cache.making(TIMINGS, self._key):
            self._cache.write(TIMINGS, self._key, content)


def _differences(key: Key, cache: Cache) -> Iterator[str]:
    """What other entries of the same graph, target and batches were made for."""
    said = {"version": "version {}", "capability": "compute capability {}", "system": "{}"}
    same = set(key) - set(said)
    for other in cache.keys(KIND):
        if all(other.get(part) == key[part] for part in same):
            parts = [
                text.format(other.get(part) or "any") for part, text in said.items() if other.get(part) != key[part]
            ]
            if parts:
                yield ", ".join(parts)


def summary(made: list[Made]) -> dict[str, Any]:
    """Figures of engines, as JSON has them."""
    return {
        "engines": [
            {
                "graph": one.graph,
                "compute_capability": one.capability or None,
                "seconds": round(one.seconds, 2),
                "bytes": one.size,
                "sha256": one.sha256,
                "cached": one.cached,
                **{name: one.key[name] for name in ("target", "version", "precision", "profiles", "onnx")},
            }
            for one in made
        ],
        "seconds": round(sum(one.seconds for one in made), 2),
        "bytes": sum(one.size for one in made),
    }
