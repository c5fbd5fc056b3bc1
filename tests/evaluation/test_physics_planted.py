"""Every defect, planted in one half of a set and judged against the other; and silence between halves."""

import pytest

from busigen.evaluation.physics import section as physics
from busigen.evaluation.reading.sets import from_prepared
from tests.conftest import Sources
from tests.harness.planted_defects import DEFECTS, audit_of, draw_set, halved

pytestmark = pytest.mark.slow

NAMED = {
    "blur": "smoother than real, as after an autoencoder",
    "jpeg": "a grid of 8 px",
    "white noise": "no beam has shaped",
    "upside-down": "upside-down",
    "squashed": "squashed along the beam",
    "masks moved by 6 px": "Masks do not lie on the lesions",
    "masks flipped": "Masks do not lie on the lesions",
    "classes swapped": "Classes look exchanged",
    "hard seam": "a seam along the outline",
    "smooth outlines": "drawn more evenly than by hand",
}
"""What the report says about each defect."""


@pytest.fixture(scope="module")
def lesions(any_sources: Sources):
    """Real images that no generator was trained on; as many drawn ones where there are no real ones."""
    real = from_prepared(any_sources.prepared, ("val", "test"), lesions_only=True)
    return real if len(real) >= 200 else draw_set(240, seed=3)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.mark.parametrize("seed", range(6))
def test_half_against_half_is_silent(lesions, out, seed):
    result = physics.run(audit_of(*halved(lesions, seed), out))
    assert [finding.text for finding in result.findings if finding.level == "flag"] == []


@pytest.mark.parametrize("defect", list(NAMED))
def test_a_planted_defect_is_named(lesions, out, defect):
    synthetic, real = halved(lesions, 3)
    result = physics.run(audit_of(DEFECTS[defect](synthetic), real, out))
    assert any(NAMED[defect] in finding.text for finding in result.findings if finding.level == "flag")


def test_every_planted_defect_that_changes_ultrasound_has_its_sentence():
    others_find = {"anatomy shuffled in blocks", "calipers added", "one image a third of the time"}
    assert NAMED.keys() == DEFECTS.keys() - others_find
