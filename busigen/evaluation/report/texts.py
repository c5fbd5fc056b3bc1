"""What the report says in every run: what an audit cannot say, how its figures are made, what is private."""

from __future__ import annotations

SMALL = 100
"""Images of a set below which the report warns that only large differences can show."""

UNANSWERED = "Not every section ran. Unanswered: {sections}"

SMALL_SET = "A headline figure rests on {fewest} images of one side: with so few, only large differences can show."

TINY_SET = (
    "A headline figure rests on {fewest} images of one side. Below {least}, comparisons are never flagged, and silence "
    "says nothing."
)

NO_TRAIN = "No training images were named, so nothing here compares the set with what its generator was trained on."

QUICK = "This was a quick run: smaller networks, fewer seeds. A full run can find what this one does not."

CANNOT_SAY = (
    "Silent means: no difference passed both the test and the floor, or there were too few images to judge one. It "
    "does not mean that there is none.",
    "Floors come from halves of the real set. Where the synthetic set is smaller than such a half, chance alone lifts "
    "its distances above the floor; the p-value knows the sizes, the floor does not.",
    "Every figure is relative to this real set. Other scanners, hospitals and patients may differ from it by more than "
    "the synthetic set does.",
    "No reader looked at the images: whether a lesion is plausible to a radiologist is not measured.",
)

PRIVACY = {
    "real": "The synthetic images were painted into real ones. Every pixel outside the painted region is still the "
    "patient's own, by construction: such a set is not private towards these patients, and not anonymous, whatever the "
    "privacy section's figures say, and may be passed on only as those real images may. The figures on lesion crops "
    "say whether it also shows lesions of the training set.",
    "synthetic": "The synthetic images have synthetic backgrounds, so no pixel was copied from a patient's image on "
    "purpose. What a network remembers of its training images may still show, and the privacy section's figures look "
    "for that. They can find copies; they cannot prove that there are none, and are no guarantee in the sense of "
    "differential privacy.",
    "unknown": "It is not known what the synthetic images were painted into. If it was real images, every pixel "
    "outside the painted region is still the patient's own, and the set is neither private nor anonymous, whatever the "
    "privacy section's figures say.",
}
"""What is private and what is not, per ``AuditContext.backgrounds``: for the privacy section and for every report."""
