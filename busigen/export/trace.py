"""Tracing a checkpoint's networks to ONNX, with the targets of reshapes as constants.

A tracer that keeps the batch open computes every reshape's target from the shapes of what flows there: a third of a
UNet's nodes. All of it depends on the batch alone, and a reshape with one open size needs no computation.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.inliner
import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from onnx import ModelProto
from onnxscript import ir, optimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from busigen.export.graph_rewrites import make_sums_deterministic
from busigen.export.weights import shared_copy, weight
from busigen.registry import ASKED_LENGTH, LATENT_FACTOR, LESION_CLASSES, RESOLUTION, SCANNERS
from busigen.training.networks.build import OutlineTransformer, place_condition, region_condition, scanner_condition
from busigen.training.networks.inference import ADAPTERS, Decoder, Networks, Velocity, blend_input, window_condition
from busigen.training.networks.outline import OutlineSpace


def simplified(model: ModelProto) -> ModelProto:
    """Fold what is constant but for the weights, make shapes constant, and drop the tracer's notes.

    More than half of a traced UNet's nodes compute shapes, and every node carries the Python stack that made it; both
    would be repeated in every solver step. Reshapes get constant targets, wherever only one size grows with the batch.
    """
    graph = ir.from_proto(model)
    weights = set(graph.graph.initializers)
    _fold(graph, weights)
    for node in graph.graph:
        node.metadata_props.clear()
        node.doc_string = None
    model = ir.to_proto(graph)
    # Sizes that differ between two batches grow with the batch.
    first, second = (_shapes_at(model, batch, weights) for batch in (2, 3))
    graph = ir.from_proto(model)
    for node in graph.graph:
        name = node.outputs[0].name or ""
        if node.op_type != "Reshape" or node.domain or name not in first or name not in second:
            continue
        grows = [one != other for one, other in zip(first[name], second[name], strict=True)]
        if sum(grows) > 1:
            continue
        sizes = [-1 if open_ else size for open_, size in zip(grows, first[name], strict=True)]
        target = ir.Value(name=f"{name}/shape", const_value=ir.tensor(np.array(sizes), name=f"{name}/shape"))
        graph.graph.register_initializer(target)
        node.replace_input_with(1, target)
    optimizer.remove_unused_nodes(graph)
    result = ir.to_proto(graph)
    del result.graph.value_info[:]
    return result


def _fold(graph: ir.Model, weights: set[str]) -> None:
    """Fold what is constant but for the weights, which keep their names: those are how others' are put in and read."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    optimizer.fold_constants(graph, onnx_shape_inference=True, should_fold=should_fold)
    optimizer.remove_unused_nodes(graph)


def _shapes_at(model: ModelProto, batch: int, weights: set[str]) -> dict[str, list[int]]:
    """What every reshape of the graph yields at one batch, as far as it can be told."""
    fixed = copy.deepcopy(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if not size.HasField("dim_value"):
                size.dim_value = batch
    graph = ir.from_proto(fixed)
    _fold(graph, weights)
    found = {}
    for node in graph.graph:
        shape = node.outputs[0].shape
        if node.op_type == "Reshape" and shape is not None and all(isinstance(size, int) for size in shape):
            found[node.outputs[0].name or ""] = [int(size) for size in shape if isinstance(size, int)]
    return found


PAINTER = "painter"  # The component that is one Stable Diffusion for both stages.
EXAMPLE_BATCH = 2  # A batch of one would be frozen into the graph by the tracer.


class _Step(nn.Module):
    """One evaluation with ``t`` and ``label`` of shape (1,), so that the loop can feed constants.

    In place of a label, Stable Diffusion gets adapters ``(B, A)``.
    """

    def __init__(self, velocity: Velocity) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, t: Tensor, label: Tensor, tokens: Tensor, keep: Tensor, *condition: Tensor) -> Tensor:
        batch = x.shape[0]
        # The tracer gives every input's batch axis a symbol of its own; attention's reshapes need to know they agree.
        adapters = (label,) if label.dim() == 2 else ()
        for other in (tokens, keep, *condition, *adapters):
            torch._check(other.shape[0] == batch)
        return self.velocity(x, t.expand(batch), label if adapters else label.expand(batch), tokens, keep, *condition)


def _any_or(scanner: Tensor | None, latents: Tensor) -> Tensor:
    """The scanner that is told, or any, sized after latents: a constant would have a fixed batch."""
    return (latents[:, :1, 0, 0] * 0.0).expand(-1, SCANNERS) if scanner is None else scanner


class _LesionCondition(nn.Module):
    """What the lesion graph is fed, as condition channels."""

    def forward(self, known: Tensor, mask: Tensor, edit: Tensor, scanner: Tensor | None = None) -> tuple[Tensor, ...]:
        # An input handed through untouched would have one name for both, so it is touched.
        return window_condition(known * 1.0, mask, edit, _any_or(scanner, known))


class _BlendCondition(nn.Module):
    """What the blend graph is fed, as condition channels."""

    def forward(
        self,
        known: Tensor,
        painted: Tensor,
        mask: Tensor,
        edit: Tensor,
        ring: Tensor,
        scanner: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        seen = blend_input(known, painted, region_condition(edit), region_condition(ring))
        return window_condition(seen, mask, ring, _any_or(scanner, known))


class _PainterCondition(nn.Module):
    """What the graph of both stages is fed, as condition channels; what stage 2 has no use for makes no difference."""

    def forward(
        self, known: Tensor, painted: Tensor, mask: Tensor, edit: Tensor, ring: Tensor, adapter: Tensor
    ) -> tuple[Tensor, ...]:
        blending = adapter[:, len(LESION_CLASSES) :].sum(dim=1)[:, None, None, None]
        ring = ring * blending
        seen = blend_input(known, painted, region_condition(edit) * blending, region_condition(ring))
        return window_condition(seen, mask, ring + edit * (1.0 - blending))


_CONDITIONS = {
    PAINTER: (_PainterCondition(), ["known", "painted", "mask", "edit", "ring", "adapter"]),
    "lesion": (_LesionCondition(), ["known", "mask", "edit"]),
    "blend": (_BlendCondition(), ["known", "painted", "mask", "edit", "ring"]),
}
"""What computes a stage's condition channels, and from which inputs."""


class _PriorCondition(nn.Module):
    """The prior's empty context and its cells' places, sized after its noise."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.dim = networks.preset.context_dim

    def forward(self, noise: Tensor, frame: Tensor, scanner: Tensor | None = None) -> tuple[Tensor, ...]:
        # Built from the input, because a constant would have a fixed batch.
        zero = (noise[:, :1, 0, 0] * 0.0)[:, :, None]
        condition = scanner_condition(noise, _any_or(scanner, noise)), place_condition(noise, frame)
        return zero.expand(-1, 1, self.dim), zero[:, :, 0] + 1.0, *condition


class _EmptyAttention(nn.Module):
    """Cross-attention to a single token of zeros, whose value is zero: the output's bias is all that it adds."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.bias.expand_as(hidden)


def without_context(unet: ModelMixin) -> ModelMixin:
    """A copy of the prior in which the cross-attention, which sees no context, is folded into its bias."""
    copied: ModelMixin = shared_copy(unet)
    for module in copied.modules():
        if isinstance(module, BasicTransformerBlock):
            module.attn2 = _EmptyAttention(module.attn2.to_out[0].bias)
    return copied


class _AskedCondition(nn.Module):
    """What a user asks of an outline, as stage 1's condition."""

    def __init__(self, space: OutlineSpace) -> None:
        super().__init__()
        self.space = space

    def forward(self, asked: Tensor) -> Tensor:
        return self.space.condition(asked)


class _DistanceOutput(nn.Module):
    """An outline's code on the pixels' grid."""

    def __init__(self, space: OutlineSpace) -> None:
        super().__init__()
        self.space = space

    def forward(self, sample: Tensor, asked: Tensor) -> Tensor:
        torch._check(asked.shape[0] == sample.shape[0])
        return self.space.distance(sample, asked)


def traced(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], opset: int, static: Sequence[str] = ()
) -> ModelProto:
    """Trace a module without looking at its weights' numbers.

    ``inputs`` are examples in the order of its arguments, with batch ``EXAMPLE_BATCH`` first unless ``static``.
    """
    dynamic = [None if name in static else {0: torch.export.Dim.DYNAMIC} for name in inputs]
    # The positional parameters of ``forward``; what is left arrives as one ``*args`` tuple.
    fixed = module.forward.__code__.co_argcount - 1
    shapes = tuple(dynamic[:fixed]) + ((tuple(dynamic[fixed:]),) if len(dynamic) > fixed else ())
    # A module that is nothing but tables is traced with them: what is computed from them is folded.
    trained = next(module.parameters(), None) is not None
    weights = dict([*module.named_parameters(), *module.named_buffers()]) if trained else {}
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            (_skeleton(module, weights.values()) if trained else module).eval(),
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            opset_version=opset,
            # Folding would rename and transpose weights, and their names are how another class's are put in.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    for name in weights.keys() & program.model.graph.initializers.keys():
        value = program.model.graph.initializers[name]
        assert value.dtype is not None and value.shape is not None
        # A file that is not there: nothing may look at a weight's numbers before the graph is written.
        value.const_value = ir.ExternalTensor(f"#{name}", None, None, value.dtype, shape=value.shape, name=name)
    model = simplified(onnx.inliner.inline_local_functions(ir.to_proto(program.model)))
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weight(tensor.name, weights[tensor.name]))
    return model


def _skeleton(module: nn.Module, weights: Iterable[Tensor]) -> nn.Module:
    """A copy of a module whose weights have shapes and no numbers."""
    # The meta device would do as well, but PyTorch then takes attention apart otherwise, and names change.
    with FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True):
        empty = {id(value): torch.empty(value.shape, dtype=value.dtype) for value in weights}
        empty |= {id(value): nn.Parameter(empty[id(value)]) for value in module.parameters()}
        return copy.deepcopy(module, empty)


def _noise(*shape: int) -> Tensor:
    return torch.randn(EXAMPLE_BATCH, *shape)


def _ones(*shape: int) -> Tensor:
    return torch.ones(EXAMPLE_BATCH, *shape)


@dataclass(frozen=True)
class Tracer:
    """Traces a checkpoint's networks for one ``opset`` of ONNX."""

    opset: int

    def context(self, networks: Networks) -> ModelProto:
        """``(image, keep)`` to ``tokens``."""
        assert networks.context is not None
        inputs = {"image": _noise(1, RESOLUTION, RESOLUTION), "keep": _ones(networks.preset.tokens)}
        return traced(networks.context, inputs, ["tokens"], self.opset)

    def encoder(self, networks: Networks, side: int) -> ModelProto:
        """``pixels`` to ``latents`` for one window size."""
        return traced(networks.encoder, {"pixels": _noise(1, side, side)}, ["latents"], self.opset)

    def decoder(self, decoder: Decoder, side: int, *, scanner: bool = False) -> ModelProto:
        """``(latents, noise, mask)``, and the ``scanner`` if told, to ``pixels`` for one window size."""
        cells = (decoder.shown_at or side) // LATENT_FACTOR
        inputs = {
            "latents": _noise(decoder.latents_mean.shape[1], cells, cells),
            "noise": _noise(1, side, side),
            "mask": _ones(1, side, side),
            **({"scanner": _ones(SCANNERS)} if scanner else {}),
        }
        return traced(decoder, inputs, ["pixels"], self.opset)

    def step(self, unet: ModelMixin, cells: int, tokens: int, conditions: Sequence[int]) -> ModelProto:
        """One evaluation of a denoiser on ``cells`` x ``cells``; ``conditions`` are its condition inputs' channels."""
        channels = (_noise(number, cells, cells) for number in conditions)
        return self._evaluation(unet, _noise(unet.config.out_channels, cells, cells), tokens, *channels)

    def painter_step(self, networks: Networks, conditions: Sequence[int]) -> ModelProto:
        """One evaluation of Stable Diffusion, which is told its adapter."""
        cells = (networks.shown_at or RESOLUTION) // LATENT_FACTOR
        inputs = {
            "x": _noise(networks.channels, cells, cells),
            "t": torch.full((1,), 0.5),
            "adapter": _ones(len(ADAPTERS)),
            "tokens": _noise(networks.preset.tokens, networks.preset.context_dim),
            "keep": _ones(networks.preset.tokens),
            **{f"condition{k}": _noise(number, cells, cells) for k, number in enumerate(conditions)},
        }
        step = _Step(Velocity(networks.denoisers[ADAPTERS[0]]))
        return traced(step, inputs, ["velocity"], self.opset, static=("t",))

    def outline_step(self, model: OutlineTransformer, tokens: int) -> ModelProto:
        """One evaluation of stage 1."""
        return self._evaluation(model, _noise(model.length), tokens, _ones(ASKED_LENGTH))

    def _evaluation(self, unet: ModelMixin, x: Tensor, tokens: int, *conditions: Tensor) -> ModelProto:
        inputs = {
            "x": x,
            "t": torch.full((1,), 0.5),
            "label": torch.ones(1, dtype=torch.long),
            "tokens": _noise(tokens, unet.config.cross_attention_dim),
            "keep": _ones(tokens),
            **{f"condition{number}": condition for number, condition in enumerate(conditions)},
        }
        return traced(_Step(Velocity(unet)), inputs, ["velocity"], self.opset, static=("t", "label"))

    def condition(self, stage: str, channels: int, side: int, *, scanner: bool = False) -> ModelProto:
        """Condition channels of stage 2 or 3 from latents and pixels, and the ``scanner`` if told."""
        module, names = _CONDITIONS[stage]
        names = [*names, "scanner"] if scanner else names
        cells = side // LATENT_FACTOR
        special = {name: _noise(channels, cells, cells) for name in ("known", "painted")}
        special |= {"adapter": _ones(len(ADAPTERS)), "scanner": _ones(SCANNERS)}
        inputs = {name: special[name] if name in special else _ones(1, side, side) for name in names}
        count = 3 if stage == PAINTER else 4
        return self._steady(module, inputs, [f"condition{number}" for number in range(count)])

    def prior_condition(self, networks: Networks, cells: int) -> ModelProto:
        """``noise``, ``frame`` and, if told, the ``scanner`` to the prior's ``tokens``, ``keep`` and condition."""
        inputs = {"noise": _noise(networks.preset.latent_channels, cells, cells), "frame": _ones(4)}
        inputs |= {"scanner": _ones(SCANNERS)} if networks.scanners else {}
        return self._steady(_PriorCondition(networks), inputs, ["tokens", "keep", "condition0", "condition1"])

    def update(
        self, spectrum: nn.Module, *shape: int, conditions: Sequence[int] = (), fresh: bool = False
    ) -> ModelProto:
        """A solver step: ``x`` of a ``shape``, its ``velocity`` and the times ``t`` and ``s`` to ``following``.

        Where it has ``conditions``, the channels of each, it reads the last two of them as well; and ``fresh`` noise.
        """
        inputs = {
            "x": _noise(*shape),
            "velocity": _noise(*shape),
            "t": torch.full((1,), 0.9),
            "s": torch.full((1,), 0.8),
        }
        read = list(enumerate(conditions))[-2:]
        inputs |= {f"condition{number}": _ones(channels, *shape[1:]) for number, channels in read}
        inputs |= {"fresh": _noise(*shape)} if fresh else {}
        return self._steady(spectrum, inputs, ["following"], static=("t", "s"))

    def asked(self, space: OutlineSpace) -> ModelProto:
        """``asked`` to stage 1's condition."""
        return self._steady(_AskedCondition(space), {"asked": _ones(ASKED_LENGTH)}, ["condition0"])

    def distance(self, space: OutlineSpace, length: int) -> ModelProto:
        """A code and what was asked for to a signed distance per pixel."""
        return self._steady(
            _DistanceOutput(space), {"sample": _noise(length), "asked": _ones(ASKED_LENGTH)}, ["distance"]
        )

    def _steady(
        self, module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], static: Sequence[str] = ()
    ) -> ModelProto:
        """What lies around an evaluation is fp32 in every precision, so its sums can be rewritten at once."""
        return make_sums_deterministic(traced(module, inputs, outputs, self.opset, static))
