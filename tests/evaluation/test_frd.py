"""FRD is its authors' number, and is said to be missing where their package is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.fidelity import frd
from busigen.evaluation.fidelity import section as fidelity
from tests.harness.synthetic_sets import BAR, synthetic_set

COUNT = 16


def _saved(images: ImageSet, folder: Path) -> list[str]:
    folder.mkdir()
    for row, image in enumerate(images.images):
        Image.fromarray(image[BAR:-BAR]).save(folder / f"{row:02d}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.mark.slow
@pytest.mark.skipif(not frd.is_there(), reason="needs frd-score and pyradiomics")
def test_the_number_is_that_of_the_authors_package(tmp_path: Path) -> None:
    from frd_score import compute_frd

    real, synthetic = synthetic_set(COUNT, 1), synthetic_set(COUNT, 2)
    result = fidelity.run(AuditContext(synthetic, real, None, tmp_path))
    files = [_saved(images, tmp_path / name) for name, images in (("real", real), ("synthetic", synthetic))]
    figure = result.figure("fidelity.frd.all.frd.all_images")
    # Theirs takes the root of a product of singular matrices.
    assert figure.value.value == pytest.approx(compute_frd(files, num_workers=1), abs=1e-3)
    assert result.figure("fidelity.frd.all.frd.value").floor is not None


def test_features_are_standardised_by_the_real_set_and_those_that_cannot_be_are_left_out() -> None:
    rng = np.random.default_rng(0)
    real, synthetic = rng.normal(3.0, 2.0, (50, 3)), rng.normal(3.0, 2.0, (20, 3))
    real[:, 1] = 7.0
    first, second = frd.standardised(real, synthetic)
    assert first.shape == (50, 2) and second.shape == (20, 2)
    assert first.mean(axis=0) == pytest.approx(0.0, abs=1e-6) and first.std(axis=0) == pytest.approx(1.0, abs=1e-6)
    varied = [0, 2]
    expected = (synthetic[:, varied] - real[:, varied].mean(axis=0)) / real[:, varied].std(axis=0)
    assert second == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(frd.is_there(), reason="frd-score is installed")
def test_without_the_package_the_section_says_how_to_get_it(tmp_path: Path) -> None:
    result = fidelity.run(AuditContext(synthetic_set(16, 2), synthetic_set(16, 1), None, tmp_path))
    assert any("the extra frd" in finding.text for finding in result.findings)
