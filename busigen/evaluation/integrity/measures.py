"""The figures of the integrity section: what each is called, and when it is a defect."""

from __future__ import annotations

from dataclasses import dataclass

from busigen.evaluation.comparing.grouped import Side


@dataclass(frozen=True)
class Measure:
    """One figure of the section.

    Attributes:
        fact: Name in ``image_facts``, or ``exact``, ``near``, ``mask`` of ``Duplicates``.
        key: The figure's key after ``integrity.``.
        label: For people.
        defect: Sentence of the finding, with ``{value}`` and ``{floor}``.
        side: Where the synthetic mean must lie to be a defect; None compares distributions.
        unit: ``%`` for shares.
        absolute: Flagged without a test wherever it exceeds the floor.
        repeats: Tested by image, not by group: repeats make up a group, and it is their number that counts.
        headline: Shown in the summary.
    """

    fact: str
    key: str
    label: str
    defect: str
    side: Side | None = "greater"
    unit: str = "%"
    absolute: bool = False
    repeats: bool = False
    headline: bool = False


MEASURES = (
    Measure(
        "colour", "file.colour", "Images with coloured marks", "{value} of the images hold colour (real: {floor})."
    ),
    Measure(
        "aspect",
        "file.aspect",
        "Width / height of the image: distance from real",
        "Width / height of the images is distributed unlike that of real ones (distance {value}, floor {floor}): they "
        "are cropped otherwise, or squashed. Physics and shape tell which.",
        side=None,
        unit="",
    ),
    Measure(
        "levels",
        "grey.levels",
        "Distinct grey levels: distance from real",
        "The number of distinct grey levels differs from real images (distance {value}, floor {floor}): posterised, "
        "rescaled, or of another dynamic range.",
        side=None,
        unit="",
    ),
    Measure(
        "range",
        "grey.range",
        "Grey range (1st to 99th percentile): distance from real",
        "The range of grey levels differs from real images (distance {value}, floor {floor}).",
        side=None,
        unit="",
    ),
    Measure(
        "clipped",
        "grey.clipped",
        "Share of pixels at 255: distance from real",
        "The share of saturated pixels differs from real images (distance {value}, floor {floor}).",
        side=None,
        unit="",
    ),
    Measure(
        "empty",
        "mask.empty",
        "Images that should show a lesion, with an empty mask",
        "{value} of the images not labelled normal have an empty mask (real: {floor}).",
        absolute=True,
    ),
    Measure(
        "contradiction",
        "mask.contradiction",
        "Images labelled normal, with a lesion in the mask",
        "{value} of the images labelled normal have a lesion in their mask (real: {floor}).",
        absolute=True,
    ),
    Measure("tiny", "mask.tiny", "Tiny masks", "{value} of the masks are tiny (real: {floor})."),
    Measure("huge", "mask.huge", "Huge masks", "{value} of the masks cover most of the image (real: {floor})."),
    Measure(
        "parts", "mask.parts", "Masks of several parts", "{value} of the masks have several parts (real: {floor})."
    ),
    Measure("holes", "mask.holes", "Masks with holes", "{value} of the masks have holes (real: {floor})."),
    Measure(
        "border", "mask.border", "Masks that touch the border", "{value} of the masks touch the border (real: {floor})."
    ),
    Measure(
        "displacement",
        "mask.displacement",
        "Mean distance from a mask to where it fits the image's edges best",
        "Masks lie {value} from where they would fit the image's edges best (real: {floor}): they are shifted, turned "
        "over, or the lesion has no edge where its mask ends.",
        unit="px",
        headline=True,
    ),
    Measure(
        "contrast",
        "mask.contrast",
        "Edge under the outline, against the places around it",
        "The image's edges under the masks' outlines stand out less than in real images ({value}, real: {floor}).",
        side="less",
        unit="SD",
        headline=True,
    ),
    Measure(
        "text", "overlay.text", "Images with text", "{value} of the images show text, more than real ones ({floor})."
    ),
    Measure(
        "calipers",
        "overlay.calipers",
        "Images with calipers",
        "{value} of the images show caliper marks, more than real ones ({floor}).",
        headline=True,
    ),
    Measure(
        "exact",
        "duplicate.exact",
        "Images that repeat another, pixel by pixel",
        "{value} of the images repeat another one exactly (real: {floor}).",
        repeats=True,
    ),
    Measure(
        "near",
        "duplicate.near",
        "Images nearly equal to another",
        "{value} of the images nearly equal another one (real: {floor}): the set is less varied than its size says.",
        repeats=True,
        headline=True,
    ),
    Measure(
        "mask",
        "duplicate.mask",
        "Masks that repeat another, pixel by pixel",
        "{value} of the masks repeat another one exactly (real: {floor}).",
        repeats=True,
    ),
)
