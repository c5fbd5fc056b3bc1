"""Engine targets in an export: proved where they run, said where they do not, and no bundle without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from busigen.errors import OutputError, ParityError, UsageError
from busigen.export.exporter import export
from busigen.export.report import unproved
from busigen.export.request import Options
from busigen.registry import ENGINE_TARGETS, LESION_CLASSES
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from tests.harness.checkpoints import untrained
from tests.harness.static_engine import NAME, static_engines


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("checkpoints") / "sound")


class Spoilt(OnnxBackend):
    """Yields NaN from one graph, as an engine does in which a sum overflows."""

    def run(self, graph: str, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
        output = super().run(graph, inputs)
        if graph == "decoder@128":
            raise self._useless(graph, "yields NaN or infinity, which is no image")
        return output


def test_an_unknown_engine_target_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'coreml'.*onnx, tensorrt"):
        Options(engines=("coreml",))


def test_the_report_says_which_targets_were_not_compared_and_why() -> None:
    assert unproved({"unproved": {"tensorrt": "no card"}}) == "Not compared: tensorrt (no card)."
    assert unproved({"unproved": {}}) == "", "all were"
    assert unproved({}) == "", "a bundle of an older export does not say"


@pytest.mark.slow
def test_a_target_that_runs_is_proved_and_what_comes_last_decides_whether_the_bundle_appears(
    sound: Path, tmp_path: Path
) -> None:
    """A minute: an export of a tiny checkpoint, which the engines' cache, say, then spoils."""
    written: list[dict[str, Any]] = []

    def last(bundle: Bundle) -> None:
        assert all(bundle.graph(name).is_file() for name in bundle.info["graphs"])
        written.append(bundle.info)
        raise OutputError("the cache is full.")

    options = Options(draws=8, engines=(NAME,), batch_sizes=(2, 4))
    with static_engines(OnnxBackend) as opened, pytest.raises(OutputError, match="the cache is full"):
        export(sound, tmp_path / "bundle", options, last=last)
    assert list(tmp_path.iterdir()) == []
    (info,) = written
    assert [backend.version for backend in opened] == ["0 on no card, batch 4,2"]
    assert set(info["parity"]["targets"][NAME]) == set(LESION_CLASSES)
    assert info["parity"]["unproved"] == {
        name: "it was not asked for with --target" for name in ENGINE_TARGETS if name != NAME
    }


@pytest.mark.slow
def test_a_target_that_yields_no_numbers_is_not_shipped(sound: Path, tmp_path: Path) -> None:
    """A minute: all is in fp32 already, so there is no higher precision to go on with."""
    with static_engines(Spoilt), pytest.raises(ParityError, match=rf"{NAME}.*decoder-128.*yields NaN"):
        export(sound, tmp_path / "bundle", Options(draws=8, engines=(NAME,)))
    assert list(tmp_path.iterdir()) == []
