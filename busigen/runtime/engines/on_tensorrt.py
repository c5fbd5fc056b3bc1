"""TensorRT and TensorRT for RTX as providers: their engines in place of ONNX Runtime."""

from __future__ import annotations

from busigen.registry import Provider
from busigen.runtime.backend import EngineOptions
from busigen.runtime.bundle import Bundle
from busigen.runtime.engines.backend import EngineBackend, library_of
from busigen.runtime.engines.device import open_device
from busigen.runtime.engines.trial import run_trial


class _Tensorrt:
    """See :class:`busigen.runtime.backend.Engine`."""

    def open(self, bundle: Bundle, provider: Provider, options: EngineOptions) -> EngineBackend:
        """See :class:`busigen.runtime.backend.Engine`."""
        return EngineBackend(bundle, provider, options)

    def probe(self, provider: Provider) -> str:
        """See :class:`busigen.runtime.backend.Engine`."""
        library = library_of(provider)
        device = open_device(provider.name)
        run_trial(library)
        return f"{provider.name} {library.version} on {device.name}"


ENGINE = _Tensorrt()
