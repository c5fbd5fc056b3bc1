"""A bundle whose backgrounds begin with phantoms: what it draws, what it keeps, and who is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from PIL import Image

from busigen.api.functions import generate as drawn_pairs
from busigen.api.pairs import Dataset
from busigen.errors import InputError, IntegrityError, UsageError
from busigen.phantoms.distribution import Phantoms
from busigen.phantoms.tissue import OUTSIDE, TISSUES
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.dataset.format import Sample
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.inputs.backgrounds import AskedTissue, phantom_at
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.made_bundles import plain

MIX = {"benign": 0.5, "malignant": 0.5}


@pytest.fixture(scope="module")
def folder() -> Path:
    """The shipped bundle, whose prior starts from phantoms."""
    return default_bundle()


def coarse(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """An image's brightness in 8 x 8 fields, as one row of numbers."""
    return np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX), np.float64).ravel()


def drawn(folder: Path, indices: range, batch: int = 2, tissue: AskedTissue | None = None) -> list[Sample]:
    bundle = Bundle.open(folder)
    sampler = Sampler(bundle, OnnxBackend(bundle), classes=MIX, tissue=tissue, batch_size=batch)
    return sampler.draw(3, indices, lambda done: None).samples


def test_backgrounds_follow_their_phantoms(folder: Path) -> None:
    """A finished background is more like the phantom that it began with than like the others, in coarse brightness."""
    samples = drawn(folder, range(6), batch=4, tissue=AskedTissue(maps=True))
    assert all(s.tissue is not None and s.tissue.shape == s.image.shape for s in samples)
    bundle = Bundle.open(folder)
    assert bundle.phantoms is not None
    phantoms, images = [], []
    for sample in samples:
        valid = sample.tissue != OUTSIDE
        rows, columns = np.flatnonzero(valid.any(axis=1)), np.flatnonzero(valid.any(axis=0))
        frame = (len(rows), len(columns))
        one = phantom_at(bundle.phantoms, 3, sample.index, sample.attempt, frame)
        inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        phantoms.append(coarse(one.image))
        images.append(coarse(sample.image[inside]))
    # All are bright above and dark below, which is no sign of any of them.
    apart = [np.array(part) - np.mean(part, axis=0) for part in (images, phantoms)]
    alike = np.corrcoef(*apart)[: len(images), len(images) :]
    own, others = np.diag(alike), alike[~np.eye(len(alike), dtype=bool)]
    assert own.mean() > others.mean() + 0.2


def test_batches_decide_nothing(folder: Path) -> None:
    asked = AskedTissue(density="C", maps=True)
    together, alone = drawn(folder, range(4), 8, asked), drawn(folder, range(2, 3), 2, asked)
    assert np.array_equal(together[2].image, alone[0].image)
    assert together[2].tissue is not None and np.array_equal(together[2].tissue, alone[0].tissue)
    assert together[2].row == alone[0].row and 0.5 <= alone[0].row["density"] <= 0.75


@pytest.fixture(scope="module")
def dataset(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tissue") / "set"
    options = GenerateOptions(
        out=out, bundle=folder, count=3, shard_size=2, batch_size=2, tissue_maps=True, chest_wall="0.5:0.7"
    )
    options.run(Progress())
    return out


def test_maps_lie_beside_images_and_are_verified(dataset: Path, folder: Path) -> None:
    assert verify(dataset).ok
    manifest = pl.read_parquet(dataset / "manifest.parquet")
    assert manifest["chest_wall"].is_between(0.5, 0.7).all()
    with tarfile.open(dataset / "shards" / "000000.tar") as tar:
        assert [name.partition(".")[2] for name in tar.getnames()[:4]] == [
            "image.png",
            "mask.png",
            "tissue.png",
            "json",
        ]
        image, tissue = (
            np.asarray(Image.open(io.BytesIO(tar.extractfile(f"000000000.{kind}.png").read())))  # type: ignore[union-attr]
            for kind in ("image", "tissue")
        )
    assert tissue.dtype == np.uint8 and tissue.max() < len(TISSUES)
    # Nothing but bars is outside.
    assert (image[tissue == OUTSIDE] == 0).all() and (tissue != OUTSIDE).mean() > 0.5
    pair = Dataset(dataset)[0]
    assert pair.tissue is not None and np.array_equal(pair.tissue, tissue)
    again = next(iter(drawn_pairs(1, bundle=folder, tissue_maps=True, chest_wall=(0.5, 0.7), batch_size=2)))
    assert again.tissue is not None and np.array_equal(again.tissue, tissue) and np.array_equal(again.image, image)


def test_a_sample_and_its_map_are_drawn_again(dataset: Path, folder: Path, tmp_path: Path) -> None:
    found = explain(dataset, "000000001", inputs=Inputs(bundle=folder), out=tmp_path / "again")
    assert found.error is None and found.replay is not None and not found.replay.differs
    assert (tmp_path / "again" / "000000001.tissue.png").is_file()


def rewritten(dataset: Path, copy: Path, change: dict[str, bytes | None]) -> Path:
    """A dataset whose first tar holds other content under some names, or lacks them."""
    for path in dataset.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(dataset)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(dataset)).write_bytes(path.read_bytes())
    name = copy / "shards" / "000000.tar"
    with tarfile.open(dataset / "shards" / "000000.tar") as source, tarfile.open(name, "w") as target:
        for member in source:
            content = change.get(member.name, source.extractfile(member).read())  # type: ignore[union-attr]
            if content is not None:
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
    return copy


@pytest.mark.parametrize("content", [None, b"", b"no PNG"])
def test_a_map_that_is_gone_or_changed_is_found(dataset: Path, tmp_path: Path, content: bytes | None) -> None:
    report = verify(rewritten(dataset, tmp_path / "copy", {"000000000.tissue.png": content}))
    assert not report.ok
    assert any("shards/000000.tar" in str(problem) for problem in report.problems)


def test_images_without_a_lesion_have_maps_as_well(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    GenerateOptions(out=out, bundle=folder, count=2, batch_size=2, tissue_maps=True, normals=0.5).run(Progress())
    assert verify(out).ok
    pairs = {pair.label: pair for pair in Dataset(out)}
    assert not pairs["normal"].mask.any()
    assert pairs["normal"].tissue is not None and (pairs["normal"].tissue != OUTSIDE).any()


def test_what_has_no_phantoms_gives_no_map(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--density is given"):
        GenerateOptions(out=tmp_path / "set", bundle=plain(), count=1, density="b").run(Progress())
    with pytest.raises(UsageError, match="--tissue-maps is for synthetic backgrounds"):
        GenerateOptions(out=tmp_path / "set", count=1, tissue_maps=True, healthy=str(tmp_path)).run(Progress())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"density": "E"}, "--density is 'E'"), ({"chest_wall": "0.1"}, "--chest-wall is '0.1'")],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        GenerateOptions(out=tmp_path / "set", count=1, **options).run(Progress())  # type: ignore[arg-type]


@pytest.mark.parametrize("phantoms", [{}, {"start": 0.5}, {**Phantoms.unfitted().to_json(), "start": 1.5}, None])
def test_a_record_of_other_phantoms_is_refused(folder: Path, tmp_path: Path, phantoms: object) -> None:
    info = json.loads((folder / "bundle.json").read_text())
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "bundle.json").write_text(json.dumps(info | {"phantoms": phantoms}))
    with pytest.raises((IntegrityError, InputError), match="phantoms"):
        Bundle.open(copy)
