"""What ``bundle.json`` may say, within bounds; which graphs follow from it, and what each of them can be fed."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict

from busigen.mtf import Transfer
from busigen.noise_styles import are_styles
from busigen.phantoms.distribution import Phantoms
from busigen.records import FileName, Many, Number, Record, Text
from busigen.registry import BUCKETS, LATENT_FACTOR, LESION_CLASSES, MAX_OUTLINES, RESOLUTION, SCANNERS, STAGES

LEAST_FRAME, MAX_FRAMES = 32, 1024  # shortest side in pixels, and number, of the frames that a bundle may record
LARGEST_SPECKLE = 4.0  # greatest deviation of the noise that a bundle may ask to decode backgrounds with
MAX_WINDOWS, WINDOW_STEP, MAX_SHOWN = 4, 64, 1024  # number of windows; their sides' divisor; largest side shown, pixels
MAX_MEMORY = 1 << 44  # bytes that opening the graphs may be said to take
MAX_NOISE = 1 << 22  # numbers of noise that a stage may ask for per image: 16 MB
WHOLE_DECODER, BACKGROUND_DECODER = f"decoder@{RESOLUTION}", "background-decoder"  # what may decode the prior's latents

_WINDOWED = {"encoder", "decoder", "lesion", "blend"}  # components, without their class, with a graph for every window
_PAINTED = frozenset(("noise", "tokens", "keep", "known", "painted", "mask", "edit", "ring", "scanner"))
_DECODED = frozenset(("latents", "noise", "mask", "scanner"))
_FED = {
    "context": frozenset(("image", "keep")),
    "prior": frozenset(("noise", "frame", "start", "scanner")),
    "background": _DECODED,
    "encoder": frozenset(("pixels",)),
    "decoder": _DECODED,
    "mask": frozenset(("noise", "tokens", "keep", "asked")),
    "lesion": _PAINTED,
    "blend": _PAINTED,
}  # what the sampler has for a graph, by the beginning of its name
_FRESH = "fresh"  # the input of stages 2 and 3 that holds noise for every step

DEFAULT_WINDOWS = {str(side): side for side in BUCKETS}


def component_of(graph: str) -> str:
    """A graph's component without class and window: ``lesion`` for ``lesion-benign@128``."""
    return graph.partition("@")[0].partition("-")[0]


def graphs_of(component: str, sides: Sequence[int] = BUCKETS) -> tuple[str, ...]:
    """The graphs of one component: one, or one per window size (``<component>@<side>``) for what works on windows."""
    if component_of(component) in _WINDOWED:
        return tuple(f"{component}@{side}" for side in sides)
    return (component,)


def names_of_graphs(classes: Sequence[str], sides: Sequence[int], background: str) -> tuple[str, ...]:
    """Every graph of a bundle with these classes, windows, and decoder of backgrounds."""
    components = ("context", "prior", *(f"{stage}-{label}" for stage in STAGES for label in classes))
    names = [name for component in ("encoder", "decoder", *components) for name in graphs_of(component, sides)]
    return tuple(dict.fromkeys([*names, background]))


def _framed(sides: list[int]) -> list[int]:
    if max(sides) != RESOLUTION:
        raise ValueError(f"should have a side of {RESOLUTION}")
    return sides


def _transfer(found: Any) -> Any:
    if found is not None:
        Transfer.from_json(found)
    return found


def _dividing(factor: int) -> int:
    if WINDOW_STEP % factor:
        raise ValueError(f"should divide {WINDOW_STEP}")
    return factor


def _lesions(classes: list[str]) -> list[str]:
    if len(set(classes)) != len(classes) or not set(classes) <= set(LESION_CLASSES):
        raise ValueError(f"should be different ones of {', '.join(LESION_CLASSES)}")
    return classes


def _windows(found: dict[str, int]) -> dict[str, int]:
    allowed = [str(side) for side in range(WINDOW_STEP, RESOLUTION + 1, WINDOW_STEP)]
    if not set(found) <= set(allowed) or str(RESOLUTION) not in found:
        raise ValueError(f"should have sides among {', '.join(allowed)}, the last one too")
    if wrong := [side for side, shown in found.items() if shown % int(side)]:
        raise ValueError(f"should show {wrong[0]} pixels at a multiple of it")
    return found


def _background(decoder: str) -> str:
    if decoder not in (WHOLE_DECODER, BACKGROUND_DECODER):
        raise ValueError(f"should be {WHOLE_DECODER} or {BACKGROUND_DECODER}")
    return decoder


def _scanners(found: list[tuple[str, float]]) -> list[tuple[str, float]]:
    if len({name for name, _ in found}) != len(found) or sum(share for _, share in found) > 1.001:  # rounded
        raise ValueError("should have different names, and shares that add up to 1 at most")
    return found


def _phantoms(found: Any) -> Any:
    if found is not None:
        start_of(found)
        Phantoms.from_json(found)
    return found


def start_of(phantoms: Any) -> float:
    """The time from which the prior makes phantoms backgrounds, as a bundle holds it; a ValueError if it is none."""
    start = phantoms.get("start") if isinstance(phantoms, dict) else None
    if not isinstance(start, float) or not 0.0 < start < 1.0:
        raise ValueError("'start' is no time between 0 and 1")
    return start


Side = Annotated[int, Strict(), Field(ge=LEAST_FRAME, le=RESOLUTION)]
Frame = Annotated[list[Side], Field(min_length=2, max_length=2), AfterValidator(_framed)]
Frames = Annotated[Many[Frame], Field(min_length=1, max_length=MAX_FRAMES)]
Channels = Annotated[int, Strict(), Field(ge=1, le=256)]
Share = Annotated[Number, Field(ge=0, le=1)]
Shown = Annotated[int, Strict(), Field(ge=1, le=MAX_SHOWN)]
Constant = Annotated[Many[Annotated[Number, Field(ge=-1e6, le=1e6)]], Field(min_length=1, max_length=64)]


class ImagesRecord(Record):
    """What bundle and checkpoint record of whole images; `busigen.noise_styles.are_styles` says more of ``styles``.

    ``scanners`` are those that networks are told by name, in the order of their condition, with their shares of the
    training images; ``scanner_frames`` are the frames of each one's images, where ``frames`` are those of all.
    """

    frames: Frames = Field(default_factory=lambda: [[RESOLUTION, RESOLUTION]])
    scanner_frames: Annotated[dict[Text, Frames], Field(max_length=SCANNERS)] = Field(default_factory=dict)
    styles: Many[Many[Number]] = Field(default_factory=list)
    transfer: Annotated[Any, AfterValidator(_transfer)] = None
    phantoms: Annotated[Any, AfterValidator(_phantoms)] = None
    scanners: Annotated[Many[tuple[Text, Share]], Field(max_length=SCANNERS), AfterValidator(_scanners)] = Field(
        default_factory=list
    )


class _GraphRecord(Record):
    file: FileName
    files: dict[FileName, Text]
    inputs: Annotated[Many[Text], Field(min_length=1, max_length=32)]
    constants: Annotated[dict[Text, Constant], Field(max_length=8)] = Field(default_factory=dict)
    fresh: Annotated[int, Strict(), Field(ge=1, le=64)] | None = None
    precision: Text = ""

    def fault(self, name: str) -> str:
        """What is wrong with the inputs of the graph of that name; empty for nothing."""
        given = _FED[component_of(name)]
        if wrong := sorted(set(self.constants) & {*given, _FRESH} or set(self.constants) - set(self.inputs)):
            return f"{reprlib.repr(wrong[0])} is no input that can be constant"
        if unknown := sorted(set(self.inputs) - given - set(self.constants) - {_FRESH}):
            return f"nothing gives {reprlib.repr(unknown[0])}"
        if (self.fresh is not None) != (_FRESH in self.inputs) or (self.fresh and given is not _PAINTED):
            return f"'{_FRESH}' says how many arrays the input of that name holds, and stages 2 and 3 alone have one"
        return ""


class _BackgroundRecord(Record):
    decoder: Annotated[Text, AfterValidator(_background)]
    latent_channels: Channels


class _TrainingRecord(Record):
    recipe: dict[Text, Any] = Field(default_factory=dict)
    data: dict[Text, Any] = Field(default_factory=dict)
    tasks: dict[Text, Any] = Field(default_factory=dict)
    device: Text = ""


class FrameRecord(Record):
    """The part of ``bundle.json`` that says for which frame it was made; the rest depends on it."""

    resolution: Annotated[int, Strict(), Field(ge=1, le=1 << 16)] = RESOLUTION


class BundleRecord(ImagesRecord):
    """Content of ``bundle.json`` as far as it is used, bounded: a damaged record is not to ask for all memory."""

    graphs: dict[Text, _GraphRecord]
    latent_channels: Channels
    latent_factor: Annotated[int, Strict(), Field(ge=4, le=32), AfterValidator(_dividing)] = LATENT_FACTOR
    classes: Annotated[Many[Text], Field(min_length=1, max_length=len(LESION_CLASSES)), AfterValidator(_lesions)] = (
        Field(default_factory=lambda: list(LESION_CLASSES))
    )
    windows: Annotated[dict[Text, Shown], Field(max_length=MAX_WINDOWS), AfterValidator(_windows)] = Field(
        default_factory=lambda: dict(DEFAULT_WINDOWS)
    )
    background: _BackgroundRecord | None = None
    code_length: Annotated[int, Strict(), Field(ge=1, le=4096)]
    patch: Annotated[int, Strict(), Field(ge=1, le=RESOLUTION)]
    outlines: Annotated[int, Strict(), Field(ge=1, le=MAX_OUTLINES)] = 1
    background_speckle: Annotated[Number, Field(ge=0, le=LARGEST_SPECKLE)] = 1.0
    grain_fade: Annotated[Number, Field(ge=0, le=RESOLUTION)] = 0.0
    preset: Text | None = None
    precision: Text = ""
    split_hash: Text | None = None
    checkpoint: Text | None = None
    memory: Annotated[int, Strict(), Field(ge=1, le=MAX_MEMORY)] | None = None
    training: _TrainingRecord | None = None

    def faults(self) -> list[str]:
        """What is wrong with fields that are valid by themselves, the first first."""
        background = self.background or _BackgroundRecord(decoder=WHOLE_DECODER, latent_channels=self.latent_channels)
        names = names_of_graphs(self.classes, [int(side) for side in self.windows], background.decoder)
        if set(self.graphs) != set(names):
            return ["does not name the graphs of a bundle"]
        fed = {name: fault for name, graph in self.graphs.items() if (fault := graph.fault(name))}
        found = [f"has no valid 'graphs.{name}': {fault}" for name, fault in fed.items()]
        whole = (self.latent_channels, self.windows[str(RESOLUTION)])
        if background.decoder == WHOLE_DECODER and whole != (background.latent_channels, RESOLUTION):
            found.append(f"has no valid 'background': {WHOLE_DECODER} does not decode latents of the prior")
        starts = "start" in self.graphs["prior"].inputs
        if starts != (self.phantoms is not None):
            found.append("has no valid 'phantoms': a prior that starts from phantoms has them, and no other one")
        if self.phantoms is not None and background.decoder != WHOLE_DECODER:
            found.append("has no valid 'phantoms': its encoder does not give the prior's latents")
        if any("scanner" in graph.inputs for graph in self.graphs.values()) and not self.scanners:
            found.append("has no valid 'scanners': graphs read one, and none is named")
        fresh = max(one.fresh or 0 for one in self.graphs.values())
        numbers = (1 + fresh) * self.latent_channels * (max(self.windows.values()) // self.latent_factor) ** 2
        if numbers > MAX_NOISE:
            found.append(f"asks for {numbers:,} numbers of noise for an image; at most {MAX_NOISE:,} are drawn")
        if self.styles and not are_styles(self.styles, background.latent_channels):
            wrong = f"{reprlib.repr(self.styles)} are not those of {background.latent_channels} channels"
            found.append(f"has no valid 'styles': {wrong}")
        return found
