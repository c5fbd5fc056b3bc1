"""The graphs that share a file of weights, traced once and laid out as often as a precision is tried."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from onnx import ModelProto, TensorProto

from busigen.export import trace
from busigen.export.assembly import with_solver, with_weights
from busigen.export.graph_rewrites import TYPES, emulated, lowered, make_sums_deterministic
from busigen.export.weights import weight
from busigen.registry import (
    BUCKETS,
    CLASSES,
    LATENT_FACTOR,
    LESION_CLASSES,
    LOOPS,
    MASK_CHANNELS,
    PLACE_CHANNELS,
    RESOLUTION,
)
from busigen.runtime.backends.bundle import graphs_of
from busigen.solver import solver_steps
from busigen.training.networks.inference import Networks

Graphs = dict[str, ModelProto]


@dataclass(frozen=True)
class Part:
    """One graph: a traced evaluation in fp32, and what puts the rest around it (given a name in ``registry.LOOPS``).

    ``before`` computes conditions once, ahead of the solver's loop, ``after`` the output from its result, and
    ``update`` is a solver step.
    """

    evaluation: ModelProto
    finish: Callable[[ModelProto, str], ModelProto] = lambda model, loop: model
    before: ModelProto | None = None
    after: ModelProto | None = None
    update: ModelProto | None = None


@dataclass(frozen=True)
class Component:
    """What shares weights: ``parts`` by graph name; ``loop`` is a name in ``registry.LOOPS``."""

    name: str
    parts: Mapping[str, Part]
    loop: str = next(iter(LOOPS))

    def graphs(self, precision: str, *, rounded: bool = False) -> Graphs:
        """Lay out the graphs.

        Args:
            precision: ``fp32``, or a name in :data:`busigen.export.graph_rewrites.TYPES`.
            rounded: compute in fp32 what the precision would round (:func:`busigen.export.graph_rewrites.emulated`).
        """
        found = {}
        for name, part in self.parts.items():
            model = make_sums_deterministic(
                lowered(part.evaluation, precision) if precision in TYPES else part.evaluation
            )
            found[name] = part.finish(emulated(model) if rounded else model, self.loop)
        return found


COMPONENTS = ("context", "encoder", "decoder", "prior", "mask", "lesion", "blend")
"""Names of all components, in the order in which they are traced."""


def components(networks: Networks, *, opset: int, loop: str, only: Collection[str] = COMPONENTS) -> Iterator[Component]:
    """Trace a checkpoint's networks, one component after the other.

    A network is traced once per window size and gets each class's weights; what adapters leave alone is the same in
    both classes and stored once.

    Args:
        networks: the merged networks of a checkpoint.
        opset: ONNX's, one of ``registry.OPSETS``.
        loop: a name in ``registry.LOOPS``.
        only: names in ``COMPONENTS``.
    """
    tracing, steps = trace.Tracer(opset), Steps()
    makers: dict[str, Callable[[], Component]] = {
        "context": lambda: Component("context", {"context": Part(tracing.context(networks))}, loop),
        "encoder": lambda: _sized("encoder", lambda side: tracing.encoder(networks, side), loop),
        "decoder": lambda: _sized("decoder", lambda side: tracing.decoder(networks, side), loop),
        "prior": lambda: _prior(tracing, networks, loop),
        "mask": lambda: outlines(tracing, networks, loop),
        "lesion": lambda: _staged(tracing, networks, loop, "lesion", steps),
        "blend": lambda: _staged(tracing, networks, loop, "blend", steps),
    }
    for name in COMPONENTS:
        if name in only:
            yield makers[name]()


def _sized(name: str, traced: Callable[[int], ModelProto], loop: str) -> Component:
    return Component(name, {f"{name}@{side}": Part(traced(side)) for side in BUCKETS}, loop)


_CONDITIONS: dict[str, tuple[torch.nn.Module, list[str]]] = {
    "lesion": (trace.LesionCondition(), ["known", "mask", "edit"]),
    "blend": (trace.BlendCondition(), ["known", "painted", "mask", "edit", "ring"]),
}
"""What computes a stage's condition channels, and from which inputs."""

Steps = dict[str, list[ModelProto]]
"""Traced evaluations, one per window size, by the configuration of what was traced: stages 2 and 3 may share one."""


def _prior(tracing: trace.Tracer, networks: Networks, loop: str) -> Component:
    cells = RESOLUTION // LATENT_FACTOR
    step = tracing.step(trace.without_context(networks.denoisers["prior"]), cells, 1, (PLACE_CHANNELS,))
    before = make_sums_deterministic(tracing.prior_condition(networks, cells))
    update = make_sums_deterministic(
        tracing.update(networks.denoisers["prior"].spectrum, networks.preset.latent_channels, cells, cells)
    )
    part = _part(step, "prior", "normal", networks, "latents", before, update)
    return Component("prior", {"prior": part}, loop)


def outlines(tracing: trace.Tracer, networks: Networks, loop: str) -> Component:
    """Stage 1 of each class; the classes' adapters share the base's outline space, but not its spread."""
    first = networks.denoiser("mask", LESION_CLASSES[0])
    step = tracing.outline_step(first, networks.preset.tokens)
    before, after = (
        make_sums_deterministic(tracing.asked(first.space)),
        make_sums_deterministic(tracing.distance(first.space, first.length)),
    )
    parts = {}
    for label in LESION_CLASSES:
        unet = networks.denoisers[f"mask-{label}"]
        update = make_sums_deterministic(tracing.update(unet.spectrum, unet.length))
        weighted = with_weights(step, _weights(unet))
        parts[f"mask-{label}"] = _part(weighted, "mask", label, networks, "distance", before, update, after)
    return Component("mask", parts, loop)


def _staged(
    tracing: trace.Tracer,
    networks: Networks,
    loop: str,
    stage: str,
    steps: Steps,
) -> Component:
    channels = networks.preset.latent_channels
    first = networks.denoisers[f"{stage}-{LESION_CLASSES[0]}"]
    conditions = (channels, MASK_CHANNELS, 1)
    sizes = [side // LATENT_FACTOR for side in BUCKETS]
    # Names with an underscore say where the network was loaded from.
    key = str(sorted((name, value) for name, value in first.config.items() if not name.startswith("_")))
    if key not in steps:
        steps[key] = [tracing.step(first, size, networks.preset.tokens, conditions) for size in sizes]
    before = [make_sums_deterministic(tracing.condition(*_CONDITIONS[stage], channels, side)) for side in BUCKETS]
    traced = list(zip(steps[key], before, strict=True))
    parts = {}
    for label in LESION_CLASSES:
        unet = networks.denoisers[f"{stage}-{label}"]
        weights = _weights(unet)
        for name, size, (step, known) in zip(graphs_of(f"{stage}-{label}"), sizes, traced, strict=True):
            update = make_sums_deterministic(tracing.update(unet.spectrum, channels, size, size, conditions=conditions))
            weighted = with_weights(step, weights)
            parts[name] = _part(weighted, stage, label, networks, "latents", known, update)
    return Component(stage, parts, loop)


def _part(
    step: ModelProto,
    stage: str,
    label: str,
    networks: Networks,
    output: str,
    before: ModelProto,
    update: ModelProto,
    after: ModelProto | None = None,
) -> Part:
    def finish(evaluation: ModelProto, loop: str) -> ModelProto:
        return with_solver(
            evaluation,
            solver_steps(stage, networks.steps[stage]),
            CLASSES.index(label),
            loop=loop,
            name=stage if label == "normal" else f"{stage}-{label}",
            output=output,
            update=update,
            before=before,
            after=after,
        )

    return Part(step, finish, before, after, update)


def _weights(unet: ModelMixin) -> dict[str, TensorProto]:
    """What training changes; buffers (stage 1's outline space) are no part of a traced evaluation."""
    names = ((f"velocity.unet.{name}", value) for name, value in unet.named_parameters())
    return {name: weight(name, value) for name, value in names}
