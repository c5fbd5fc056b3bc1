"""An order for engines, as the command line gives it: for which libraries, cards and batches, into which folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from busigen.errors import ProviderError
from busigen.registry import ENGINE_TARGETS
from busigen.runtime.bundle import Bundle, graph_names
from busigen.runtime.engines.building import check_capability
from busigen.runtime.engines.cache import Cache
from busigen.runtime.engines.device import Device, open_device
from busigen.runtime.engines.library import Library, target_named
from busigen.runtime.engines.making import Made, Workshop
from busigen.runtime.engines.profiles import Batches


@dataclass(frozen=True)
class Order:
    """Engines to be made.

    Attributes:
        targets: names in ``registry.ENGINE_TARGETS``.
        batches: to build for.
        capabilities: compute capabilities to build for, each engine for one; none for the library's own choice.
        folder: the cache's; ``None`` for this user's.

    Raises:
        UsageError: a target is unknown.
    """

    targets: Sequence[str]
    batches: Batches = Batches()  # noqa: RUF009  # It is frozen.
    capabilities: Sequence[str] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name in self.targets:
            target_named(name)

    @property
    def count(self) -> int:
        """Engines that it asks for."""
        ahead = sum(ENGINE_TARGETS[name].ahead for name in self.targets)
        return len(graph_names()) * (ahead * max(1, len(self.capabilities)) + len(self.targets) - ahead)

    def check(self) -> list[tuple[Library, str, Device | None]]:
        """What builds, for which compute capability and on which card: all that can be wrong before a bundle is read.

        Raises:
            MissingDependencyError: a library is not installed.
            UsageError: a library does not build for a capability.
            ProviderError: a library builds on the card that runs the engines, and there is none.
        """
        jobs: list[tuple[Library, str, Device | None]] = []
        for name in dict.fromkeys(self.targets):
            library = Library.load(name)
            for capability in self.capabilities:
                check_capability(library, capability)
            if library.target.ahead:
                jobs += [(library, capability, None) for capability in dict.fromkeys(self.capabilities or ("",))]
            else:
                device = _card(name)
                jobs.append((library, device.capability, device))
        return jobs

    def fill(self, bundle: Bundle, done: Callable[[Made], None] = lambda made: None) -> list[Made]:
        """Make every engine that the cache lacks.

        Args:
            bundle: an opened, checked bundle.
            done: told of each as it is finished.

        Raises:
            BusigenError: what ``check`` says, or an engine cannot be made; those that were finished stay in the cache.
        """
        cache, made = Cache(self.folder), []
        for library, capability, device in self.check():
            workshop = Workshop(library, bundle, self.batches, cache, capability=capability, device=device)
            made += workshop.make_all(done)
        return made


def _card(target: str) -> Device:
    try:
        return open_device(target)
    except ProviderError as error:
        # It speaks of a provider, which is what this target's engines are run by.
        raise ProviderError(
            error.problem.replace("--provider", "--target", 1),
            fix="Build on the kind of machine that is to run the engines, or choose --target tensorrt-rtx.",
        ) from error
