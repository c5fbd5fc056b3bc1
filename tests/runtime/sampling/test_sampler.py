"""The shipped bundle on ONNX Runtime: which samples exist does not depend on how they are asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from busigen.data.geometry import edit_region, window_for
from busigen.data.images import read_image
from busigen.data.letterbox import letterbox
from busigen.errors import AcceptanceError, IntegrityError, UsageError
from busigen.registry import LATENT_FACTOR, LESION_CLASSES
from busigen.runtime.backends.base import EngineOptions, TimedBackend, open_backend
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.dataset.format import Sample, SampleBatch
from busigen.runtime.diagnostics.bench import ReplayBackend
from busigen.runtime.sampling import quality_gates
from busigen.runtime.sampling.conditions import class_at, parse_conditions
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import MAX_ATTEMPTS, Sampler
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.harness.synthetic_datasets import draw_frame

ROOT = Path(__file__).parents[3]
SEED = 11
MIX = {"benign": 0.5, "malignant": 0.5}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(default_bundle())


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> OnnxBackend:
    return OnnxBackend(bundle)


@pytest.fixture(scope="module")
def healthy(synthetic_busi: Path) -> HealthyFolder:
    return HealthyFolder(synthetic_busi / "normal")


@pytest.fixture(scope="module")
def whole(bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder) -> SampleBatch:
    """Indices 0 to 5 in batches of four, painted into drawn healthy images."""
    return draw(Sampler(bundle, backend, classes=MIX, healthy=healthy, batch_size=4), range(6))


def draw(sampler: Sampler, indices: Sequence[int]) -> SampleBatch:
    counted: list[int] = []
    generated = sampler.draw(SEED, indices, counted.append)
    assert [sample.index for sample in generated.samples] == list(indices)
    assert sum(counted) == len(indices)
    return generated


def assert_same(found: Sample, expected: Sample) -> None:
    assert (found.index, found.attempt, found.label, found.row) == (
        expected.index,
        expected.attempt,
        expected.label,
        expected.row,
    )
    assert np.array_equal(found.mask, expected.mask)
    assert np.array_equal(found.image, expected.image)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batch_size_changes_no_byte(
    bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder, whole: SampleBatch, batch_size: int
) -> None:
    generated = draw(Sampler(bundle, backend, classes=MIX, healthy=healthy, batch_size=batch_size), range(4))
    for found, expected in zip(generated.samples, whole.samples, strict=False):
        assert_same(found, expected)
    assert generated.rejections == [rejection for rejection in whole.rejections if rejection.index < 4]


def test_order_and_company_change_no_byte(
    bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder, whole: SampleBatch
) -> None:
    sampler = Sampler(bundle, backend, classes=MIX, healthy=healthy, batch_size=2)
    for indices in ([5, 3], [3, 5], [3]):
        for found in draw(sampler, indices).samples:
            assert_same(found, whole.samples[found.index])


def test_synthetic_backgrounds_follow_the_same_rules(bundle: Bundle, backend: OnnxBackend) -> None:
    together = draw(Sampler(bundle, backend, classes=MIX, batch_size=8), range(3))
    for found in draw(Sampler(bundle, backend, classes=MIX, batch_size=1), [2, 0]).samples:
        assert_same(found, together.samples[found.index])
    for sample in together.samples:
        assert sample.row["background"] == "synthetic"
        top, left = sample.row["letterbox_top"], sample.row["letterbox_left"]
        height, width = max(
            f for f in bundle.frames(sample.row["scanner"]) if ((256 - f[0]) // 2, (256 - f[1]) // 2) == (top, left)
        )
        valid = np.zeros((256, 256), dtype=bool)
        valid[top : top + height, left : left + width] = True
        assert quality_gates.image_reason(sample.image, sample.mask, valid) is None
        assert not sample.mask[~valid].any()
    assert len({sample.image.tobytes() for sample in together.samples}) == 3


def test_synthetic_backgrounds_are_shown_through_a_filter_of_their_own_and_a_users_are_not(
    bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder, whole: SampleBatch
) -> None:
    plain = replace(bundle, info={**bundle.info, "transfer": None})
    before, after = (draw(Sampler(b, backend, classes=MIX, batch_size=8), range(3)).samples for b in (plain, bundle))
    for unfiltered, sample in zip(before, after, strict=True):
        assert np.array_equal(sample.mask, unfiltered.mask)
        # A filter reaches ten pixels, and what is 40 pixels wide passes as it is.
        assert not np.array_equal(sample.image, unfiltered.image)
        coarse, unchanged = (gaussian_filter(s.image.astype(float), 12.0) for s in (sample, unfiltered))
        assert np.abs(coarse - unchanged).max() < 3.0
    # Commands open the folder only once they know that they may write.
    given = Sampler(bundle, backend, classes=MIX, batch_size=4)
    given.plan.healthy = healthy
    own = draw(Sampler(plain, backend, classes=MIX, healthy=healthy, batch_size=4), range(2)).samples
    for found, unfiltered, expected in zip(draw(given, range(2)).samples, own, whole.samples, strict=False):
        assert_same(found, unfiltered)
        assert_same(found, expected)


def test_another_seed_gives_other_samples(
    bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder, whole: SampleBatch
) -> None:
    (other,) = Sampler(bundle, backend, classes=MIX, healthy=healthy, batch_size=1).draw(SEED + 1, [0], print).samples
    assert not np.array_equal(other.mask, whole.samples[0].mask)
    assert not np.array_equal(other.image, whole.samples[0].image)


def test_classes_are_dealt_in_proportion(
    bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder, whole: SampleBatch
) -> None:
    assert [sample.label for sample in whole.samples] == [class_at(index, MIX) for index in range(6)]
    assert [sample.label for sample in whole.samples].count("benign") == 3
    sampler = Sampler(bundle, backend, classes={"malignant": 2.0}, healthy=healthy, batch_size=2)
    assert {sample.label for sample in draw(sampler, [0, 1]).samples} == {"malignant"}
    assert set(LESION_CLASSES) == set(MIX)


def test_pixels_outside_the_edit_region_are_the_healthy_images_own(healthy: HealthyFolder, whole: SampleBatch) -> None:
    paths = dict(healthy.items)
    for sample in whole.samples:
        pixels, box = letterbox(read_image(paths[sample.row["healthy_sha256"]]).pixels)
        edit = edit_region(sample.mask, box.valid)
        assert np.array_equal(sample.image[~edit], pixels[~edit])
        # All of the lesion was painted, and the row says where.
        assert not (sample.mask & ~edit).any()
        assert (sample.image != pixels)[sample.mask].mean() > 0.5
        window = window_for(edit)
        assert (window.top, window.left, window.side) == tuple(
            sample.row[f"window_{name}"] for name in ("top", "left", "side")
        )
        assert sample.row["edit_pixels"] == edit.sum()


class Watched(OnnxBackend):
    """An engine that remembers what each graph was first and last fed and gave, and how often it was run."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.first: dict[str, dict[str, np.ndarray]] = {}
        self.seen: dict[str, dict[str, np.ndarray]] = {}
        self.calls: Counter[str] = Counter()

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        output = super().run(graph, inputs)
        name = graph.partition("@")[0]
        self.seen[name] = {**inputs, "output": output}
        self.first.setdefault(name, self.seen[name])
        self.calls[name] += 1
        return output


def test_the_blend_changes_the_ring_and_leaves_the_lesions_inside_alone(bundle: Bundle, healthy: HealthyFolder) -> None:
    backend = Watched(bundle)
    asked = parse_conditions(size="0.08")
    Sampler(bundle, backend, classes={"benign": 1.0}, healthy=healthy, asked=asked).attempt(0, [(0, 0), (1, 0)])
    painted, decoded = backend.seen["lesion-benign"]["output"], backend.seen["decoder"]["latents"]
    changed = (painted != decoded).any(axis=1)
    ring = backend.seen["blend-benign"]["ring"][:, 0]
    cells = ring.reshape(len(ring), changed.shape[1], LATENT_FACTOR, changed.shape[2], LATENT_FACTOR).any(axis=(2, 4))
    mask = backend.seen["lesion-benign"]["mask"][:, 0]
    lesion = mask.reshape(len(ring), changed.shape[1], LATENT_FACTOR, changed.shape[2], LATENT_FACTOR).all(axis=(2, 4))
    assert changed[cells].all()
    assert (lesion & ~cells).any()
    assert not changed[lesion & ~cells].any()


def test_the_decoder_is_told_the_lesion_and_that_a_background_has_none(bundle: Bundle) -> None:
    backend = Watched(bundle)
    asked = parse_conditions(size="0.08")
    Sampler(bundle, backend, classes={"benign": 1.0}, asked=asked, batch_size=1).attempt(0, [(0, 0)])
    assert "output" in backend.seen["prior"] and backend.calls["decoder"] == 2
    assert not backend.first["decoder"]["mask"].any()
    assert backend.seen["decoder"]["mask"].any()
    assert np.array_equal(backend.seen["decoder"]["mask"], backend.seen["lesion-benign"]["mask"])


def test_rows_have_the_declared_fields_and_types(
    bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder, whole: SampleBatch
) -> None:
    types = Sampler(bundle, backend, classes=MIX, healthy=healthy).row_types()
    for sample in whole.samples:
        assert sample.row.keys() == types.keys()
        assert all(value is None or type(value) is types[name] for name, value in sample.row.items())


ASKED = {"size": "0.03:0.08", "depth": "0.3:0.45", "across": "0.5", "height_width": "0.6:0.9", "birads": "4"}


def test_what_is_asked_for_is_what_comes_out(bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder) -> None:
    asked = parse_conditions(**ASKED)
    sampler = Sampler(bundle, backend, classes=MIX, healthy=healthy, asked=asked, batch_size=4)
    samples = draw(sampler, range(4)).samples
    for sample in samples:
        wanted = asked.values(SEED, sample.index)
        for name, value in wanted.items():
            assert sample.row[f"asked_{name}"] == value
            found = sample.row["area_share" if name == "size" else name]
            scale = 1.0 if name in ("across", "depth") else value
            assert abs(found - value) <= quality_gates.ASKED_TOLERANCE[name] * scale
        assert sample.row["asked_birads"] == "4"
        paths = dict(healthy.items)
        valid = letterbox(read_image(paths[sample.row["healthy_sha256"]]).pixels)[1].valid
        assert sample.row["area_share"] == sample.mask.sum() / valid.sum()
    # Ranges are drawn from, each sample its own value, and a later draw of an index asks for the same again.
    assert len({sample.row["asked_size"] for sample in samples}) == 4
    assert {sample.row["asked_across"] for sample in samples} == {0.5}


def test_what_cannot_be_is_refused_as_not_as_asked(bundle: Bundle, backend: OnnxBackend, tmp_path: Path) -> None:
    # So large a lesion so near the lower border of a strip must be cut by its bars.
    sampler = Sampler(
        bundle,
        backend,
        classes=MIX,
        healthy=strip(tmp_path / "strip", 400),
        asked=parse_conditions(size="0.2", depth="0.75", height_width="1.7"),
        batch_size=4,
    )
    accepted, refused = sampler.attempt(SEED, [(index, 0) for index in range(4)])
    assert not accepted
    assert {rejection.reason for rejection in refused} <= {"not as asked", "mask cut by the border"}


def strip(folder: Path, height: int) -> HealthyFolder:
    """Very wide healthy images, whose letterbox bars leave outlines little room."""
    folder.mkdir()
    for number in range(3):
        frame = draw_frame(np.random.default_rng(number), (1024, max(height, 33)))
        Image.fromarray(frame.pixels[:height]).save(folder / f"{number}.png")
    return HealthyFolder(folder)


def test_a_refused_draw_is_replaced_by_the_next_one_of_its_index(
    bundle: Bundle, backend: OnnxBackend, tmp_path: Path
) -> None:
    once = replace(bundle, info={**bundle.info, "outlines": 1})
    sampler = Sampler(once, backend, classes=MIX, healthy=strip(tmp_path / "strip", 400), batch_size=4)
    generated = draw(sampler, range(6))
    assert generated.rejections, "these images were chosen for the refusals that they provoke"
    assert generated.rejections == sorted(generated.rejections, key=lambda r: (r.index, r.attempt))
    for sample in generated.samples:
        refused = [rejection for rejection in generated.rejections if rejection.index == sample.index]
        assert [rejection.attempt for rejection in refused] == list(range(sample.attempt))
        assert all(rejection.label == sample.label and rejection.reason for rejection in refused)
    # Every one of them is a draw of its own that can be made again.
    again = generated.rejections[0]
    assert sampler.attempt(SEED, [(again.index, again.attempt)]) == ([], [again])
    replaced = generated.samples[again.index]
    (found,), _ = sampler.attempt(SEED, [(replaced.index, replaced.attempt)])
    assert_same(found, replaced)
    assert replaced.attempt > 0


def test_a_healthy_image_that_changes_while_it_is_painted_ends_the_draw(
    bundle: Bundle, backend: OnnxBackend, tmp_path: Path
) -> None:
    healthy = strip(tmp_path / "strip", 1024)
    sampler = Sampler(bundle, backend, classes=MIX, healthy=healthy, batch_size=1)
    before = draw(sampler, [0])
    _, path = next(item for item in healthy.items if item[0] == before.samples[0].row["healthy_sha256"])
    whole = path.read_bytes()
    # The image is remembered from the first draw, and its pixels are painted into again: only the file tells.
    with pytest.raises(IntegrityError, match="has changed since the run began") as caught:
        sampler.draw(SEED, [0], lambda _: path.write_bytes(whole[:-40]))
    assert str(path) in caught.value.problem
    path.write_bytes(whole)
    assert_same(draw(sampler, [0]).samples[0], before.samples[0])


def test_a_hopeless_run_ends(bundle: Bundle, backend: OnnxBackend, tmp_path: Path) -> None:
    # Eight rows of image: whatever is drawn is cut by them.
    sampler = Sampler(bundle, backend, classes=MIX, healthy=strip(tmp_path / "strip", 33), batch_size=1)
    with pytest.raises(AcceptanceError, match=f"sample 4 was refused {MAX_ATTEMPTS} times, last for: ") as caught:
        draw(sampler, [4])
    assert caught.value.exit_code == 8
    assert "other healthy images" in caught.value.fix


@pytest.mark.parametrize("size", [0, -1, 4097])
def test_an_impossible_batch_size_is_refused(bundle: Bundle, backend: OnnxBackend, size: int) -> None:
    with pytest.raises(UsageError, match=f"--batch-size is {size}"):
        Sampler(bundle, backend, classes=MIX, batch_size=size)


def test_an_unknown_provider_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="'abacus'") as caught:
        open_backend(bundle, "abacus")
    assert "cpu" in caught.value.fix
    with pytest.raises(UsageError, match="--threads is 0"):
        open_backend(bundle, options=EngineOptions(threads=0))


def test_the_fingerprint_says_what_decides_the_samples(
    bundle: Bundle, backend: OnnxBackend, healthy: HealthyFolder
) -> None:
    def fingerprint(batch_size: int = 4, healthy: HealthyFolder | None = None, **classes: float) -> dict[str, object]:
        return Sampler(bundle, backend, classes=classes or MIX, healthy=healthy, batch_size=batch_size).fingerprint()

    assert fingerprint(batch_size=1) == fingerprint(batch_size=16)
    assert fingerprint()["bundle"] == bundle.sha256
    assert fingerprint() != fingerprint(benign=1.0)
    assert fingerprint() != fingerprint(healthy=healthy)
    asking = Sampler(bundle, backend, classes=MIX, asked=parse_conditions(depth="0.3"), batch_size=4).fingerprint()
    assert {key for key, value in asking.items() if value != fingerprint()[key]} == {"depth"}


def test_sampling_needs_no_torch() -> None:
    code = (
        "import sys; from busigen.runtime.sampling.sampler import Sampler; "
        "from busigen.runtime.backends.base import open_backend; "
        "from busigen.runtime.backends.bundle import Bundle, default_bundle; b = Bundle.open(default_bundle()); "
        "Sampler(b, open_backend(b), classes={'benign': 1.0}, batch_size=1).attempt(0, [(0, 0)]); "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'onnx', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TwoAtOnce(QuickEngine):
    """Takes two calls at once, and keeps the first one until a second has come; gives up after a long while."""

    max_concurrent_calls = 2

    def __init__(self) -> None:
        super().__init__()
        self._count, self._guard = 0, threading.Lock()
        self.together = threading.Event()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        with self._guard:
            self._count += 1
            if self._count == 2:
                self.together.set()
        self.together.wait(60)
        with self._guard:
            self._count -= 1
            return super().run(graph, inputs)


@pytest.mark.parametrize("wrapper", [TimedBackend, ReplayBackend])
def test_a_backend_that_takes_two_calls_at_once_gets_them_in_generate_and_in_bench(wrapper: type[TimedBackend]) -> None:
    engine = TwoAtOnce()
    sampler = Sampler(
        Bundle.recorded(default_bundle()), wrapper(engine), classes={"benign": 0.5, "malignant": 0.5}, batch_size=2
    )
    generated = sampler.draw(0, range(8), lambda count: None)
    assert [sample.index for sample in generated.samples] == list(range(8))
    assert engine.together.is_set(), "the second call was held back until the first had ended"


def test_a_constant_that_joins_the_gates_makes_no_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = quick_sampler(QuickEngine()).fingerprint()
    monkeypatch.setattr(quality_gates, "ANOTHER_LIMIT", 1.0, raising=False)
    assert quick_sampler(QuickEngine()).fingerprint() == before
