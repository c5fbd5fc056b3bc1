"""Makes TensorRT engines of a bundle's graphs: takes them from the cache, or builds them and puts them there.

An entry is ``<cache>/<kind>/<digest of its key>/content``, with key and content's sha256 in ``record.json``, which is
written last. The hashes are for damage, not against malice: an engine is code that anybody with the folder can replace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from busigen.errors import CapacityError, IntegrityError, OutputError, ProviderError
from busigen.files import atomic_file, leftovers, write_json
from busigen.foreign import read_file
from busigen.records import Record, Text, read_checked
from busigen.runtime.backends.base import largest_that_fits, usable_cores
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.onnx_graph import MAX_GRAPH_BYTES
from busigen.runtime.backends.tensorrt.library import (
    BuildSpec,
    Device,
    Library,
    answered,
    build,
    check_capability,
    cuda,
    open_device,
    parsed,
    target_named,
)
from busigen.runtime.backends.tensorrt.profiles import Batches
from busigen.runtime.storage.files import cache_folder, output_errors
from busigen.runtime.storage.lock import exclusive

CONTENT, RECORD = "content", "record.json"
_NAMES = re.compile(f"{re.escape(CONTENT)}|{re.escape(RECORD)}")
_MAX_CONTENT_BYTES = 8 << 30
_POLL = 0.2  # seconds between looks at an entry that another process is making


Key = Mapping[str, Any]  # all that an entry depends on, as JSON has it: texts, numbers, booleans, and lists of those

REVISION = 1  # counted up when the same graph and options give another engine, so that all are made anew
KIND = "engines"  # the cache's kind of engines

_log = logging.getLogger(__name__)


class _Record(Record):
    key: dict[Text, Any]
    sha256: Text


def default_folder() -> Path:
    """What ``BUSIGEN_CACHE`` names, else the folder for ``busigen`` where this system keeps caches."""
    named = os.environ.get("BUSIGEN_CACHE")
    return Path(named) if named else cache_folder()


class Cache:
    """A folder of entries that processes share; it need not exist yet, and by default is the user's."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def entry(self, kind: str, key: Key) -> Path:
        """The folder of an entry, whether or not it is there. Its name proves nothing."""
        text = json.dumps(key, sort_keys=True, separators=(",", ":"))
        return self.folder / kind / hashlib.sha256(text.encode()).hexdigest()[:32]

    def read(self, kind: str, key: Key) -> bytes | None:
        """An entry's content; None if there is none or, which is logged, it is not what its record says."""
        entry = self.entry(kind, key)
        try:
            record = read_checked(_Record, entry / RECORD, fix="")
            # Read once and used as read: what is hashed is what runs.
            content = read_file(entry / CONTENT, _MAX_CONTENT_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, IntegrityError) as error:
            _log.warning("%s cannot be used and is made again: %s", entry, error)
            return None
        # Through JSON, as the recorded one: a tuple comes back as a list.
        if record["key"] != json.loads(json.dumps(key)):
            _log.warning("%s is the entry of something else and is made again", entry)
            return None
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            _log.warning("%s is not what was kept there, by its sha256, and is made again", entry / CONTENT)
            return None
        return content

    def write(self, kind: str, key: Key, content: bytes, **facts: Any) -> None:
        """Keep content under its key, and facts for people; an ``OutputError`` if the folder cannot be written to."""
        entry = self._made(kind, key)
        with output_errors(entry):
            # Gone before its content changes: a kill in between must not leave the old record beside the new content.
            (entry / RECORD).unlink(missing_ok=True)
            with atomic_file(entry / CONTENT) as file:
                file.write(content)
            sha256 = hashlib.sha256(content).hexdigest()
            write_json(entry / RECORD, {"key": key, "sha256": sha256, "bytes": len(content), **facts})

    @contextmanager
    def making(self, kind: str, key: Key) -> Iterator[None]:
        """Be the only process that makes an entry until the block ends, after any other that is making it."""
        entry, said = self._made(kind, key), False
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(exclusive(entry))
                    break
                except OutputError as error:
                    if not isinstance(error.__context__, OSError):  # No lock that is held: another program's file.
                        raise
                    if not said:
                        _log.info("%s is being made by another process; waiting for it", entry)
                    said = True
                    time.sleep(_POLL)
                except OSError as error:
                    with output_errors(entry):
                        raise error
            for path in leftovers(entry, _NAMES):  # Of a process that was killed: its lock died with it.
                path.unlink(missing_ok=True)
            yield

    def keys(self, kind: str) -> list[dict[str, Any]]:
        """The keys of all entries of a kind that have a readable record."""
        found = []
        for path in sorted((self.folder / kind).glob(f"*/{RECORD}")):
            with contextlib.suppress(OSError, IntegrityError):
                found.append(read_checked(_Record, path, fix="")["key"])
        return found

    def _made(self, kind: str, key: Key) -> Path:
        entry = self.entry(kind, key)
        with output_errors(entry):
            # For this user alone: what lies here runs.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            entry.mkdir(parents=True, exist_ok=True)
        return entry


@dataclass(frozen=True)
class EngineInfo:
    """An engine that is in the cache now."""

    graph: str
    capability: str  # empty for the library's own choice
    size: int  # bytes
    sha256: str
    key: Key
    seconds: float  # that building it took; 0 if the cache had it
    cached: bool


def key_of(library: Library, bundle: Bundle, graph: str, batches: Batches, capability: str) -> Key:
    """All that an engine depends on. The hashes are those that the bundle was checked against."""
    record = bundle.info["graphs"][graph]
    return {
        **library.key,
        "capability": capability,
        "onnx": record["files"][record["file"]],
        "files": sorted(record["files"].values()),
        "precision": str(record.get("precision", bundle.info.get("precision", "fp32"))),
        "profiles": [list(profile) for profile in batches.profiles(bundle.call_side(graph))],
        "revision": REVISION,
    }


class EngineBuilder:
    """Makes engines of a checked bundle for a library, some batches and one kind of card."""

    def __init__(
        self,
        library: Library,
        bundle: Bundle,
        batches: Batches,
        cache: Cache,
        *,
        capability: str = "",  # the card's, such as ``8.9``; empty for the library's own choice
        device: Device | None = None,  # this machine's card, where there is one
    ) -> None:
        self._library, self._bundle, self._batches, self._cache = library, bundle, batches, cache
        self._capability, self._device = capability, device
        # A library that builds ahead of time measures nothing.
        measured_on = None if library.target.ahead else device
        self._timings = (cache, {**library.key, **measured_on.key}) if measured_on else None
        self._announced = False

    def lacking(self) -> list[str]:
        """Graphs that the cache has no engine of, as far as names tell; ``make`` looks at the hashes."""
        names = self._bundle.distinct_graphs
        return [name for name in names if not (self._cache.entry(KIND, self._key(name)) / RECORD).is_file()]

    def make(self, graph: str) -> tuple[EngineInfo, bytes]:
        """A graph's engine, serialised, from the cache or built (:func:`build`) and put there."""
        key, seconds = self._key(graph), 0.0
        if (content := self._cache.read(KIND, key)) is None:
            with self._cache.making(KIND, key):
                # Another process may have made it while this one waited.
                if (content := self._cache.read(KIND, key)) is None:
                    self._tell_of_others(key)
                    started = time.perf_counter()
                    content = self._build(self._spec(graph))
                    seconds = time.perf_counter() - started
                    self._cache.write(KIND, key, content, graph=graph, seconds=round(seconds, 3))
        sha256 = hashlib.sha256(content).hexdigest()
        return EngineInfo(graph, self._capability, len(content), sha256, key, seconds, cached=not seconds), content

    def make_all(self, done: Callable[[EngineInfo], None] = lambda made: None) -> list[EngineInfo]:
        """Make the engines of all graphs, in the bundle's order, and call ``done`` with each; finished ones stay.

        Graphs that share a file share an engine, which is made under the name of the first.
        """
        # All are parsed first: what cannot be built is refused before minutes have gone into the others.
        for graph in self.lacking():
            parsed(self._library, self._spec(graph))
        # Kernels are timed on the card, where two builds would disturb each other. Ahead of time nothing is timed.
        workers = usable_cores() if self._library.target.ahead else 1
        pool = ThreadPoolExecutor(workers, "engine", self._enter_thread)
        try:
            # Without their contents, which come to half a gigabyte.
            waiting = [pool.submit(lambda name: self.make(name)[0], graph) for graph in self._bundle.distinct_graphs]
            for future in as_completed(waiting):
                done(future.result())
            return [future.result() for future in waiting]
        finally:
            pool.shutdown(cancel_futures=True)

    def _enter_thread(self) -> None:
        # The current card is each thread's own, and threads begin with the first one.
        if self._device is not None:
            answered(cuda().cudaSetDevice(self._device.number))

    def _key(self, graph: str) -> Key:
        return key_of(self._library, self._bundle, graph, self._batches, self._capability)

    def _spec(self, graph: str) -> BuildSpec:
        record, path = self._bundle.info["graphs"][graph], self._bundle.graph(graph)
        model = read_file(path, MAX_GRAPH_BYTES)
        if hashlib.sha256(model).hexdigest() != record["files"][record["file"]]:
            raise IntegrityError(f"{path} has changed since the bundle was opened.", fix="Run the same command again.")
        # A library that builds on the card knows it; the capability is then part of the key alone.
        capability = self._capability if self._library.target.ahead else ""
        return BuildSpec(graph, path, model, self._batches.profiles(self._bundle.call_side(graph)), capability)

    def _build(self, spec: BuildSpec) -> bytes:
        """Build an engine; if the memory does not suffice, find a batch size for which it does, and name it."""

        def builds(size: int) -> bool:
            profiles = replace(self._batches, sizes=(size,)).profiles(self._bundle.call_side(spec.name))
            try:
                build(self._library, replace(spec, profiles=profiles), self._timings)
            except CapacityError:
                return False
            return True

        try:
            return build(self._library, spec, self._timings)
        except CapacityError as error:
            full = self._batches.sizes[0]
            fitting = largest_that_fits(full, builds)
            end = "end what else uses the memory (nvidia-smi shows what holds a card's)"
            given = f"Give --batch-size {fitting}, for which it was built, or {end}."
            fix = given if fitting else f"No batch fits: {end}."
            raise CapacityError(error.problem, fix=fix, rows=full, fits=fitting) from error

    def _tell_of_others(self, key: Key) -> None:
        """Say once why engines are built again although the cache has some of the same graph, target and batches."""
        if self._announced:
            return
        said = {"version": "version {}", "capability": "compute capability {}", "system": "{}"}
        differences = set()
        for other in self._cache.keys(KIND):
            if all(other.get(part) == key[part] for part in set(key) - set(said)):
                parts = [part for part in said if other.get(part) != key[part]]
                differences.add(", ".join(said[part].format(other.get(part) or "any") for part in parts))
        if others := sorted(differences - {""}):
            self._announced = True
            _log.info("engines are built again: those kept are for %s", "; ".join(others))


def kept_batches(library: Library, bundle: Bundle, cache: Cache, size: int) -> list[Batches]:
    """Batches with this full one that the cache has engines for, those with the most sizes first."""
    # Whoever built for 16 and 4 ahead of a run wants these used, although the run asks for 16 alone.
    # The context encoder's rows are the batch sizes themselves.
    own = key_of(library, bundle, "context", Batches((size,)), "")
    same = set(own) - {"profiles", "capability"}
    found = set()
    for key in cache.keys(KIND):
        if all(key.get(part) == own[part] for part in same) and isinstance(key.get("profiles"), list):
            profiles = [tuple(profile) for profile in key["profiles"]]
            dynamic = len(profiles) == 1 and profiles[0][0] != profiles[0][2]
            found.add(Batches(tuple(most for _, _, most in profiles), dynamic))
    fitting = [batches for batches in found if batches.sizes[0] == size]
    return sorted(fitting, key=lambda batches: (-len(batches.sizes), batches.dynamic, batches.sizes))


@dataclass(frozen=True)
class BuildRequest:
    """Engines to be made, for one or more targets and batches."""

    targets: Sequence[str]
    batches: Batches = Batches()  # noqa: RUF009  # It is frozen.
    capabilities: Sequence[str] = ()  # each with engines of its own; none for the library's own choice
    folder: Path | None = None  # the cache's; None for this user's

    def count(self, bundle: Bundle) -> int:
        """Number of engines that it asks for."""
        return len(self.check()) * len(bundle.distinct_graphs)

    def check(self) -> list[tuple[Library, str, Device | None]]:
        """What builds, for which compute capability and on which card; all that can be wrong before a bundle is read.

        A BusigenError says that a target is unknown, its library not installed, or not able to build that here.
        """
        jobs: list[tuple[Library, str, Device | None]] = []
        for name, target in {name: target_named(name) for name in self.targets}.items():
            library = Library.load(name)
            for capability in filter(None, self.capabilities):
                check_capability(library, capability)
            if target.ahead:
                jobs += [(library, capability, None) for capability in dict.fromkeys(self.capabilities or ("",))]
                continue
            try:
                device = open_device(name)
            except ProviderError as error:
                # It speaks of a provider, which is what this target's engines are run by.
                fix = "Build on the kind of machine that is to run the engines, or choose --target tensorrt-rtx."
                raise ProviderError(error.problem.replace("--provider", "--target", 1), fix=fix) from error
            jobs.append((library, device.capability, device))
        return jobs

    def fill(self, bundle: Bundle, done: Callable[[EngineInfo], None] = lambda made: None) -> list[EngineInfo]:
        """Make every engine that the cache lacks, as :meth:`EngineBuilder.make_all` does, after :meth:`check`."""
        cache, made = Cache(self.folder), []
        for library, capability, device in self.check():
            builder = EngineBuilder(library, bundle, self.batches, cache, capability=capability, device=device)
            made += builder.make_all(done)
        return made


def summary(made: list[EngineInfo]) -> dict[str, Any]:
    """Figures of engines, as JSON has them."""
    engines = [
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
    ]
    seconds, size = sum(one.seconds for one in made), sum(one.size for one in made)
    return {"engines": engines, "seconds": round(seconds, 2), "bytes": size}
