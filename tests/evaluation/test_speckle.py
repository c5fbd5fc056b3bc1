import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from busigen.evaluation.physics import speckle

EVERYWHERE = np.ones((256, 256), dtype=np.bool_)


def _compressed(amplitude):
    """Grey levels that the stated decompression maps back to the amplitude, rounded as a scanner rounds them."""
    return np.clip(np.rint(255.0 * 20.0 * np.log10(amplitude) / speckle.DYNAMIC_RANGE), 0, 255).astype(np.uint8)


def _power_law(exponent, seed=0):
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    radius[0, 0] = 1.0
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(256, 256))) * radius ** (exponent / 2)).real
    return (field / field.std() * 20 + 128).astype(np.float32)


def test_decompression_spans_the_stated_range():
    assert speckle.envelope(np.array([0, 255])) == pytest.approx([1.0, 1000.0])


def test_rayleigh_speckle_has_its_closed_form_moments():
    amplitude = np.random.default_rng(0).rayleigh(3.0, 400_000)
    contrast, kurtosis, nakagami = speckle.moments(amplitude)
    # Standard errors at this size: below 0.001, 0.02 and 0.004.
    assert contrast == pytest.approx(np.sqrt(4 / np.pi - 1), abs=0.005)
    assert kurtosis == pytest.approx((32 - 3 * np.pi**2) / (4 - np.pi) ** 2, abs=0.06)
    assert nakagami == pytest.approx(1.0, abs=0.015)


@pytest.mark.parametrize("m", [0.5, 0.8, 2.0, 5.0])
def test_nakagami_samples_have_their_parameter(m):
    amplitude = np.sqrt(np.random.default_rng(1).gamma(m, 7.0 / m, 400_000))
    # The estimator's relative standard error is below 0.5 % here.
    assert speckle.moments(amplitude)[2] == pytest.approx(m, rel=0.02)


@pytest.mark.parametrize("m", [0.8, 1.0, 2.0])
def test_nakagami_survives_compression_to_grey_levels(m):
    amplitude = 60.0 * np.sqrt(np.random.default_rng(2).gamma(m, 1.0 / m, (256, 256)))
    found = speckle.local_moments(speckle.envelope(_compressed(amplitude)), EVERYWHERE)[2]
    # In blocks of 256 pixels the median of the moment estimate lies up to 4 % above the parameter.
    assert found == pytest.approx(m, rel=0.08)


def test_tissues_of_different_brightness_do_not_count_as_speckle():
    rng = np.random.default_rng(3)
    amplitude = 20.0 * rng.rayleigh(1.0, (256, 256)) * np.where(np.arange(256) < 128, 1.0, 6.0)[:, None]
    # 4 % as above; over the whole image the step alone would halve it.
    assert speckle.local_moments(amplitude, EVERYWHERE)[2] == pytest.approx(1.0, rel=0.08)
    assert speckle.moments(amplitude.ravel())[2] < 0.6


def test_a_region_smaller_than_a_block_is_still_measured():
    region = np.zeros((256, 256), dtype=np.bool_)
    region[20:30, 19:29] = True
    amplitude = np.random.default_rng(4).rayleigh(1.0, (256, 256))
    assert 0.5 < speckle.local_moments(amplitude, region)[2] < 2.0  # Three standard errors of 100 values.


@pytest.mark.parametrize("sigma", [(0.8, 1.6), (1.5, 1.5), (1.2, 3.0)])
def test_widths_of_filtered_noise_match_the_closed_form(sigma):
    noise = np.random.default_rng(5).normal(size=(256, 256)) * 20
    field = ndimage.gaussian_filter(noise, sigma, mode="wrap").astype(np.float32)
    axial, lateral = speckle.autocovariance_widths(field, EVERYWHERE)
    # A Gaussian filter's autocovariance is Gaussian with sigma * sqrt(2). Interpolating it linearly between whole lags
    # errs by up to 4 %, sampling by about 2 %.
    assert axial == pytest.approx(np.sqrt(8 * np.log(2)) * np.sqrt(2) * sigma[0], rel=0.06)
    assert lateral == pytest.approx(np.sqrt(8 * np.log(2)) * np.sqrt(2) * sigma[1], rel=0.06)


def test_widths_see_only_the_region():
    rng = np.random.default_rng(6)
    field = rng.normal(size=(256, 256)).astype(np.float32)
    field[:, 128:] = ndimage.gaussian_filter(field, 3.0)[:, 128:]
    left = np.zeros((256, 256), dtype=np.bool_)
    left[:, :120] = True
    # White noise falls to zero at lag 1, so its half width is half a pixel on both sides.
    assert speckle.autocovariance_widths(field, left) == pytest.approx((1.0, 1.0), abs=0.05)


def test_flat_images_have_no_widths():
    assert np.isnan(speckle.autocovariance_widths(np.zeros((256, 256), np.float32), EVERYWHERE)).all()


@pytest.mark.parametrize("exponent", [0.0, -1.0, -2.0, -3.0])
def test_spectral_slope_of_a_power_law(exponent):
    spectrum = speckle.radial_spectrum(_power_law(exponent), EVERYWHERE)
    # Hann's window leaks some of the steep spectra's low frequencies into the band.
    assert speckle.spectral_slope(spectrum) == pytest.approx(exponent, abs=0.15)


def test_white_noise_has_its_share_of_high_frequencies():
    spectrum = speckle.radial_spectrum(_power_law(0.0), EVERYWHERE)
    low = 2 / speckle.TILE
    # Rings of a plane hold power in proportion to their radius; 49 tiles leave about 1 % of noise.
    assert speckle.high_frequency_share(spectrum) == pytest.approx((0.25 - 0.0625) / (0.25 - low**2), abs=0.03)


def test_white_noise_has_its_fine_share():
    field = _power_law(0.0)
    # The filter keeps (0.375 ** 2) of white noise at its centre tap's overlap: 1 - 2 * 0.25 + 0.375 ** 2 is removed;
    # the moving average takes 1 / 289 of the variance away.
    found = speckle.fine_share(field, speckle.detrended(field, EVERYWHERE), EVERYWHERE)
    assert found == pytest.approx(1 - 2 * 0.25 + 0.375**2, abs=0.02)


def test_a_bar_beside_the_region_adds_no_fine_share():
    field = 100.0 + 10.0 * _power_law(-2.0)
    tissue = EVERYWHERE.copy()
    tissue[:40] = False
    barred = np.where(tissue, field, 0.0).astype(np.float32)
    residual = speckle.detrended(barred, tissue)
    without = speckle.fine_share(field.astype(np.float32), residual, tissue)
    assert speckle.fine_share(barred, residual, tissue) == pytest.approx(without, rel=1e-4)


def test_bars_and_overlays_do_not_reach_the_spectrum():
    field = _power_law(-2.0)
    tissue = EVERYWHERE.copy()
    tissue[:40], tissue[:, 230:] = False, False
    spoilt = np.where(tissue, field, 255.0).astype(np.float32)
    clean = speckle.radial_spectrum(field, tissue)
    assert speckle.radial_spectrum(spoilt, tissue) == pytest.approx(clean, rel=1e-4)


@pytest.mark.parametrize("phase", [(0, 0), (3, 6)])
def test_jpeg_shows_at_any_phase_and_blur_does_not(phase):
    field = np.clip(_power_law(-2.5), 0, 255)
    stream = io.BytesIO()
    Image.fromarray(field.astype(np.uint8)).save(stream, "JPEG", quality=20)
    packed = np.roll(np.asarray(Image.open(stream)), phase, (0, 1))[8:, 8:].astype(np.float32)
    plain = speckle.blockiness(field, EVERYWHERE)
    inside = np.ones(packed.shape, dtype=np.bool_)
    assert speckle.blockiness(packed, inside) > plain + 0.1
    assert speckle.blockiness(ndimage.gaussian_filter(field, 1.0), EVERYWHERE) < plain + 0.02
