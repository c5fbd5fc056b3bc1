import numpy as np
import pytest
from scipy import ndimage

from busigen.evaluation.physics import features as shape
from busigen.evaluation.physics.features import RING, find_regions
from busigen.evaluation.physics.speckle import DYNAMIC_RANGE

VALID = np.zeros((256, 256), dtype=np.bool_)
VALID[28:228] = True
NOTHING = np.zeros((256, 256), dtype=np.bool_)
Y, X = np.mgrid[0:256, 0:256].astype(np.float64)


def _ellipse(along, across, centre=(100, 120)):
    return ((Y - centre[0]) / along) ** 2 + ((X - centre[1]) / across) ** 2 <= 1


def _scene(mask, seed=0):
    """Speckled tissue at grey 130 with a lesion at grey 60, float32."""
    tissue = np.where(mask, 60.0, 130.0) + 8 * ndimage.gaussian_filter(
        np.random.default_rng(seed).normal(size=(256, 256)), 1.0
    )
    return np.where(VALID, tissue, 0.0).astype(np.float32)


@pytest.mark.parametrize("radius", [12, 30, 60])
def test_discs_are_round_whatever_their_size(radius):
    form = shape.outline(_ellipse(radius, radius), VALID)
    # Crofton's perimeter in four directions is within 2.5 % for a disc, and circularity takes its square.
    assert form["circularity"] == pytest.approx(1.0, abs=0.06)
    assert form["height_width"] == 1.0
    assert form["solidity"] > 1 - 0.7 / radius  # The hull is drawn around the corners of pixels.
    assert form["roughness"] < 0.25 / radius  # The staircase of pixels: a quarter of one.
    assert form["area_fraction"] == pytest.approx(np.pi * radius**2 / (200 * 256), rel=0.03)


def test_an_ellipse_has_its_closed_form():
    along, across = 20, 50
    form = shape.outline(_ellipse(along, across), VALID)
    # Ramanujan's perimeter; Crofton's error as above, and edges lie half a pixel further out.
    perimeter = np.pi * (3 * (along + across) - np.sqrt((3 * along + across) * (along + 3 * across)))
    assert form["circularity"] == pytest.approx(4 * np.pi * np.pi * along * across / perimeter**2, abs=0.06)
    assert form["height_width"] == pytest.approx(41 / 101)


def test_place_is_relative_to_the_image_not_to_its_bars():
    form = shape.outline(_ellipse(15, 15, (128, 64)), VALID)
    assert form["depth"] == pytest.approx(0.5, abs=0.01)  # Half a pixel of 200.
    assert form["lateral"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("wave", [0.05, 0.1])
def test_roughness_is_the_wave_on_a_circle(wave):
    angle = np.arctan2(Y - 110, X - 120)
    form = shape.outline(np.hypot(Y - 110, X - 120) <= 50 * (1 + wave * np.cos(8 * angle)), VALID)
    # r = R (1 + a cos 8t) has two harmonics of R a / 2. Equal steps along the outline are not equal steps in angle,
    # which moves some of that into other harmonics.
    assert form["roughness"] == pytest.approx(wave / np.sqrt(2), rel=0.2)


def test_ripple_is_finer_than_roughness():
    angle = np.arctan2(Y - 110, X - 120)
    lobed, rippled = (
        shape.outline(np.hypot(Y - 110, X - 120) <= 60 * (1 + 0.04 * np.cos(waves * angle)), VALID) for waves in (7, 22)
    )
    assert lobed["roughness"] > 2 * lobed["ripple"]
    assert rippled["ripple"] > 2 * lobed["ripple"]


def test_notches_lower_solidity():
    notched = _ellipse(40, 40) & ~_ellipse(20, 20, (100, 160))
    assert shape.outline(notched, VALID)["solidity"] < 0.93


def test_margin_of_a_drawn_lesion():
    mask = _ellipse(25, 35)
    found = shape.margin(_scene(mask), find_regions(mask, VALID, NOTHING))
    expected = 70 * DYNAMIC_RANGE / 255
    # The speckle's mean over a few hundred pixels errs by less than half a grey level.
    assert found["contrast"] == pytest.approx(expected, abs=0.2)
    assert found["sharpness"] == pytest.approx(expected, abs=0.3)
    assert found["offset"] == 0.0
    assert found["posterior"] == pytest.approx(0.0, abs=0.3)


@pytest.mark.parametrize("step", [(6, 0), (0, -6), (4, 5)])
def test_a_moved_mask_is_found_at_its_distance(step):
    mask = _ellipse(25, 35)
    image = _scene(mask)
    moved = shape.margin(image, find_regions(np.roll(mask, step, (0, 1)), VALID, NOTHING))
    assert moved["offset"] == pytest.approx(np.hypot(*step), abs=0.5)  # Whole pixels.
    assert moved["sharpness"] < 0.75 * shape.margin(image, find_regions(mask, VALID, NOTHING))["sharpness"]


@pytest.mark.parametrize("change", [-40.0, 25.0])
def test_shadow_and_enhancement_below_a_lesion(change):
    mask = _ellipse(20, 30, (90, 120))
    image = _scene(mask)
    image[111:200, 90:151] += change
    found = shape.margin(image, find_regions(mask, VALID, NOTHING))
    assert found["posterior"] == pytest.approx(change * DYNAMIC_RANGE / 255, abs=0.4)


def test_blur_softens_the_margin_and_a_cut_out_sharpens_the_step():
    mask = _ellipse(25, 35)
    soft = ndimage.gaussian_filter(_scene(mask), 3.0)
    regions = find_regions(mask, VALID, NOTHING)
    pasted = np.where(mask, soft - 30.0, soft).astype(np.float32)
    assert shape.margin(soft, regions)["sharpness"] < 0.6 * shape.margin(_scene(mask), regions)["sharpness"]
    assert shape.margin(pasted, regions)["step"] > 2 * shape.margin(soft, regions)["step"]


def test_depth_profile_of_a_ramp_and_of_the_ramp_upside_down():
    ramp = np.where(VALID, 28 + 200 - Y, 0).astype(np.float32)
    profile = shape.depth_profile(ramp, VALID, 4)
    # Band means of a falling line from 200 to 1.
    assert profile == pytest.approx(np.array([175.5, 125.5, 75.5, 25.5]) / 100.5)
    assert shape.depth_profile(ramp[::-1], VALID[::-1], 4) == pytest.approx(profile[::-1])


def test_regions_do_not_overlap_and_leave_bars_and_overlays_out():
    overlays = NOTHING.copy()
    overlays[100:104, 60:200] = True
    mask = _ellipse(25, 35)
    regions = find_regions(mask, VALID, overlays)
    parts = np.stack([regions.lesion, regions.ring, regions.background])
    assert parts.sum(axis=0).max() == 1
    assert not (parts.any(axis=0) & (overlays | ~VALID)).any()
    outside = ndimage.distance_transform_edt(~mask)
    assert outside[regions.ring].min() > RING[0]
    assert outside[regions.ring].max() <= RING[1] + 0.5
    ((below, beside),) = regions.strips
    assert not (below & beside).any()
    assert below.sum() > 0 < beside.sum()


def test_each_lesion_of_an_image_is_measured_and_specks_are_not():
    small, large = _ellipse(10, 20), _ellipse(20, 20)
    two = np.roll(small, (-20, -60), (0, 1)) | np.roll(large, (20, 50), (0, 1))
    specked = two.copy()
    specked[40:44, 120:124] = True
    masks = (small, large, two, specked)
    found = [shape.measure(_scene(mask).astype(np.uint8), mask, VALID, NOTHING) for mask in masks]
    for name in ("shape_area", "shape_taller", "shape_circularity"):
        assert found[2][name] == pytest.approx((found[0][name] + found[1][name]) / 2, rel=1e-6)
        assert found[3][name] == found[2][name]


def test_a_lesion_that_fills_the_image_is_measured_without_surroundings():
    regions = find_regions(VALID, VALID, NOTHING)
    found = shape.margin(np.full((256, 256), 90, np.float32), regions)
    assert np.isnan(found["contrast"])
    assert np.isnan(found["posterior"])


@pytest.mark.parametrize("grey", [0.0, 255.0])
def test_bars_and_overlays_are_no_margin(grey):
    """Whatever bars and overlays show, the margin is that of the tissue between them."""
    mask = _ellipse(25, 35, (50, 120)) & VALID  # Cut off by the upper bar.
    overlays = NOTHING.copy()
    overlays[70:80, 100:140] = True  # Across the lower outline.
    regions = find_regions(mask, VALID, overlays)
    image = _scene(mask)
    generated = np.where(overlays | ~VALID, grey, image).astype(np.float32)
    plain = np.where(VALID, image, 95.0).astype(np.float32)
    found, expected = shape.margin(generated, regions), shape.margin(plain, regions)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found["offset"] == 0.0
    # The lesion's inner band runs along the bar, too, at the lesion's own grey.
    assert found["sharpness"] == pytest.approx(70 * DYNAMIC_RANGE / 255, abs=0.5)


def test_a_lesion_that_fills_the_frame_is_no_background():
    everywhere = np.ones((256, 256), dtype=np.bool_)
    regions = find_regions(everywhere, everywhere, NOTHING)
    assert regions.lesion.all()
    assert not regions.background.any()
    assert not regions.ring.any()
