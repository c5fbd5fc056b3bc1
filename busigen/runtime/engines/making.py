"""All engines of a bundle: those that the cache has, and those that are built now."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from busigen.errors import IntegrityError
from busigen.runtime.bundle import Bundle, graph_names
from busigen.runtime.backend import usable_cores
from busigen.runtime.engines.building import REVISION, Blueprint, build, check_capability
from busigen.runtime.engines.cache import Cache, Key
from busigen.runtime.engines.library import Library
from busigen.runtime.engines.profiles import Batches

KIND = "engines"
"""Of the cache's entries."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """An engine that is in the cache now.

    Attributes:
        graph: its name.
        capability: that it was built for; empty for the library's own choice.
        content: the serialised engine.
        key: that it is kept under.
        seconds: that its building took; 0 where the cache had it.
        cached: whether the cache had it.
    """

    graph: str
    capability: str
    content: bytes
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

    Raises:
        UsageError: the library does not build for this capability.
    """

    def __init__(
        self, library: Library, bundle: Bundle, batches: Batches, cache: Cache, *, capability: str = ""
    ) -> None:
        if library.target.ahead:
            check_capability(library, capability)
        self._library, self._bundle, self._batches, self._cache = library, bundle, batches, cache
        self._capability = capability
        self._told = False

    def make(self, graph: str) -> Made:
        """A graph's engine, from the cache or built and put there.

        Raises:
            BusigenError: it cannot be built (:func:`busigen.runtime.engines.building.build`) or kept.
        """
        key = key_of(self._library, self._bundle, graph, self._batches, self._capability)
        if (content := self._cache.read(KIND, key)) is not None:
            return Made(graph, self._capability, content, key, 0.0, cached=True)
        with self._cache.making(KIND, key):
            # Another process may have made it while this one waited.
            if (content := self._cache.read(KIND, key)) is not None:
                return Made(graph, self._capability, content, key, 0.0, cached=True)
            self._tell_of_others(key)
            path = self._bundle.graph(graph)
            blueprint = Blueprint(graph, path, self._read(graph), self._batches.profiles(graph), self._aimed_at())
            started = time.perf_counter()
            content = build(self._library, blueprint)
            seconds = time.perf_counter() - started
            self._cache.write(KIND, key, content, graph=graph, seconds=round(seconds, 3))
        return Made(graph, self._capability, content, key, seconds, cached=False)

    def make_all(self, done: Callable[[Made], None] = lambda made: None) -> list[Made]:
        """The engines of all graphs, in the bundle's order.

        Args:
            done: told of each as it is finished.

        Raises:
            BusigenError: one of them cannot be made; those that were finished stay in the cache.
        """
        # Kernels are timed on the card, where two builds would disturb each other; ahead of time there is nothing to time.
        workers = usable_cores() if self._library.target.ahead else 1
        pool = ThreadPoolExecutor(workers, thread_name_prefix="engine")
        try:
            waiting = [pool.submit(self.make, graph) for graph in graph_names()]
            for future in as_completed(waiting):
                done(future.result())
            return [future.result() for future in waiting]
        finally:
            pool.shutdown(cancel_futures=True)

    def _aimed_at(self) -> str:
        # A library that builds on the card knows it; the capability is then part of the key alone.
        return self._capability if self._library.target.ahead else ""

    def _read(self, graph: str) -> bytes:
        record = self._bundle.info["graphs"][graph]
        path = self._bundle.graph(graph)
        model = path.read_bytes()
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


def _differences(key: Key, cache: Cache) -> Iterator[str]:
    """What other entries of the same graph, target and batches were made for."""
    said = {"version": "version {}", "capability": "compute capability {}", "system": "{}"}
    same = set(key) - set(said)
    for other in cache.keys(KIND):
        if all(other.get(part) == key[part] for part in same):
            parts = [text.format(other.get(part) or "any") for part, text in said.items() if other.get(part) != key[part]]
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
                "bytes": len(one.content),
                "sha256": hashlib.sha256(one.content).hexdigest(),
                "cached": one.cached,
                **{name: one.key[name] for name in ("target", "version", "precision", "profiles", "onnx")},
            }
            for one in made
        ],
        "seconds": round(sum(one.seconds for one in made), 2),
        "bytes": sum(len(one.content) for one in made),
    }
