"""Inception's figures with a network the test brings, and our metrics against torchmetrics'."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from busigen.errors import InputError
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.fidelity import inception
from busigen.evaluation.fidelity import section as fidelity
from busigen.evaluation.fidelity.measures import frechet_distance, mmd2, polynomial_kernel
from tests.harness.synthetic_sets import synthetic_set


class _Small(torch.nn.Module):
    """A random network with the interface of the widely used TorchScript Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 24, 15, stride=8)
        self.last = torch.nn.Linear(24, 10)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        features = torch.relu(self.convolution(img.float() / 128 - 1)).mean(dim=(2, 3))
        if return_features:
            return features
        logits = torch.nn.functional.linear(features, self.last.weight) if no_output_bias else self.last(features)
        return logits.softmax(dim=1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "small.pt"
    torch.jit.script(_Small().eval()).save(str(path))
    return path


def _context(synthetic: ImageSet, real: ImageSet, out: Path, path: Path | None) -> AuditContext:
    return AuditContext(synthetic, real, None, out, inception=path)


def _features(context: AuditContext) -> inception.Features:
    found = inception.features_of(context, inception.load(context))
    assert found is not None
    return found


@pytest.mark.parametrize("count", [12, 200])
def test_frechet_distance_is_torchmetrics_with_fewer_and_with_more_rows_than_features(count: int) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(count, 30)), rng.normal(0.3, 1.4, size=(count + 7, 30))
    identity = torch.nn.Identity()
    identity.num_features = 30
    reference = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    reference.update(torch.from_numpy(a), real=True)
    reference.update(torch.from_numpy(b), real=False)
    # Square roots of eigenvalues that should be 0 cost the reference half of its digits.
    assert frechet_distance(a, b) == pytest.approx(float(reference.compute()), rel=1e-5)


def test_mmd_is_kid_of_torchmetrics() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(50, 16)), rng.normal(0.2, 1.1, size=(50, 16))
    found = mmd2(polynomial_kernel(np.concatenate([a, b])), np.arange(50), np.arange(50, 100))
    # The same sums in another order.
    assert found == pytest.approx(float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b))), rel=1e-9)


def test_a_torchscript_network_gives_fid_and_inception_score(network: Path, tmp_path: Path) -> None:
    synthetic, real = synthetic_set(30, seed=1), synthetic_set(40, seed=2)
    context = _context(synthetic, real, tmp_path, network)
    assert inception.load(context).source == "small.pt"
    found = _features(context)
    assert (found.synthetic.shape, found.real.shape) == ((30, 24), (40, 24))
    fid, score = inception.library_figures(found, np.arange(30), np.arange(40), context)
    # Features travel in double precision; see the comparison with torchmetrics above.
    assert fid.value.value == pytest.approx(frechet_distance(found.synthetic, found.real), rel=1e-4, abs=1e-9)
    assert (fid.synthetic, fid.real) == (30, 40)
    # Between 1 (all alike) and the number of classes.
    assert 1 <= score.value.value <= 10


def test_one_image_has_the_same_features_in_any_batch(network: Path, tmp_path: Path) -> None:
    images = synthetic_set(inception.BATCH + 3, seed=3)
    whole = _features(_context(images, images.take(np.arange(5)), tmp_path, network))
    # Single precision; batches of other sizes may sum in another order.
    np.testing.assert_allclose(whole.synthetic[:5], whole.real, rtol=1e-4, atol=1e-6)


def test_a_network_that_only_gives_features_has_no_inception_score(tmp_path: Path) -> None:
    path = tmp_path / "features.pt"
    torch.jit.trace(lambda x: x.float().mean(dim=(2, 3)), torch.zeros((2, 3, 299, 299), dtype=torch.uint8)).save(
        str(path)
    )
    context = _context(synthetic_set(12, seed=4), synthetic_set(12, seed=5), tmp_path, path)
    found = _features(context)
    figures = inception.library_figures(found, np.arange(12), np.arange(12), context)
    assert [figure.label for figure in figures] == ["FID over all images"]


def test_without_weights_the_report_names_both_ways_to_provide_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    context = _context(synthetic_set(4, seed=6), synthetic_set(4, seed=7), tmp_path, None)
    found = inception.load(context)
    assert inception.features_of(context, found) is None
    assert "--inception PATH" in found.text
    assert inception.CACHED_WEIGHTS in found.text


def test_what_is_no_inception_is_refused_with_a_fix(tmp_path: Path, network: Path) -> None:
    sets = synthetic_set(4, seed=8), synthetic_set(4, seed=9)
    text = tmp_path / "weights.pt"
    text.write_text("no network")
    maps = tmp_path / "maps.pt"
    torch.jit.trace(lambda x: x.float() / 255, torch.zeros((2, 3, 299, 299), dtype=torch.uint8)).save(str(maps))
    for path in (tmp_path / "absent.pt", text, maps):
        with pytest.raises(InputError, match=path.name) as error:
            _features(_context(*sets, tmp_path, path))
        assert "TorchScript" in error.value.fix


@torch.jit.script
def _leak(x: torch.Tensor) -> torch.Tensor:
    return x + torch.from_file("secret", False, 1).sum()


class _Reading(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 1):
            x = _leak(x)
        return x.float().mean(dim=(2, 3))


class _Outer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Reading()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class _Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = x.float().mean(dim=(2, 3))
        return features


def test_a_network_that_reads_files_is_refused_before_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "reading.pt"
    torch.jit.script(_Outer()).save(str(path))
    context = _context(synthetic_set(2, seed=1), synthetic_set(2, seed=2), tmp_path, path)
    with pytest.raises(InputError, match=r"reading\.pt is refused.*from_file"):
        inception.load(context)


@pytest.mark.parametrize("call", ['torch.save(x, "T")', 'x.save("T")', 'ops.aten.save(x, "T")'])
def test_a_network_that_writes_files_is_refused_before_it_runs(call: str, tmp_path: Path) -> None:
    """Python's compiler knows no ``aten::save``; the archive's code does."""
    plain, path, written = tmp_path / "plain.pt", tmp_path / "writing.pt", tmp_path / "written"
    torch.jit.script(_Plain()).save(str(plain))
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith(".py"):
                line = f"    {call.replace('T', os.fspath(written))}\n    return "
                assert b"    return " in data
                data = data.replace(b"    return ", line.encode())
            if not item.filename.endswith(".debug_pkl"):
                new.writestr(item.filename, data)
    with pytest.raises(InputError, match=r"writing\.pt is refused.*save"):
        inception.load(_context(synthetic_set(2, seed=1), synthetic_set(2, seed=2), tmp_path, path))
    assert not written.exists()


def test_the_inception_score_does_not_depend_on_the_processs_generator(network: Path, tmp_path: Path) -> None:
    context = _context(synthetic_set(30, seed=1), synthetic_set(40, seed=2), tmp_path, network)
    found = _features(context)
    scores = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        scores.append(inception.library_figures(found, np.arange(30), np.arange(40), context)[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert scores[0] == scores[1]


def test_bad_weights_are_said_early_and_cost_no_other_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("no network")
    monkeypatch.setattr(fidelity, "PERMUTATIONS", {"quick": 19})
    result = fidelity.run(_context(synthetic_set(16, seed=1), synthetic_set(16, seed=2), tmp_path, path))
    assert result.figure("fidelity.radiomic.all.frechet.value")
    assert result.details["inception"] is None
    assert any("not computed" in finding.text and "weights.pt" in finding.text for finding in result.findings)
    assert "weights.pt" in caplog.text


def test_damaged_weights_in_the_librarys_cache_are_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "find_spec", lambda name: name)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / inception.CACHED_WEIGHTS).write_bytes(b"damaged")
    network = inception.try_load(_context(synthetic_set(2, seed=1), synthetic_set(2, seed=2), tmp_path, None))
    assert network.extract is None
    assert "not computed" in network.text
