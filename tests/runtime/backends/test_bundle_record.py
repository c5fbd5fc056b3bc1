"""A bundle of schema 6 that says what cannot be is refused before any of its graphs is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from busigen.errors import BusigenError, InputError, IntegrityError
from busigen.runtime.backends.bundle import Bundle
from tests.harness.made_bundles import plain

Info = dict[str, Any]
LESION = "lesion-benign@128"


def described() -> Info:
    """A record as that of a Stable-Diffusion bundle: one file for both stages, all classes and both windows."""
    info = json.loads((plain() / "bundle.json").read_text())
    stage = {
        "file": "lesion-benign-256.onnx",
        "files": info["graphs"]["lesion-benign@256"]["files"],
        "inputs": ["noise", "tokens", "keep", "known", "painted", "mask", "edit", "ring", "adapter", "fresh"],
        "fresh": 4,
    }
    names = [
        f"{name}-{label}@{side}" for name in ("lesion", "blend") for label in info["classes"] for side in (128, 256)
    ]
    for number, name in enumerate(names):
        info["graphs"][name] = {**stage, "constants": {"adapter": [float(number // 2 == place) for place in range(4)]}}
    info["graphs"]["background-decoder"] = dict(info["graphs"]["decoder@256"])
    for side in (128, 256):
        info["graphs"][f"decoder@{side}"] = {**info["graphs"][f"decoder@{side}"], "inputs": ["latents"]}
    return {
        **info,
        "schema": 6,
        "resolution": 256,
        "latent_factor": 8,
        "windows": {"128": 256, "256": 256},
        "latent_channels": 4,
        "background": {"decoder": "background-decoder", "latent_channels": 8},
    }


def recorded(folder: Path, info: Info) -> Bundle:
    (folder / "bundle.json").write_text(json.dumps(info))
    return Bundle.recorded(folder)


def test_a_bundle_says_its_windows_latents_and_graphs(tmp_path: Path) -> None:
    bundle = recorded(tmp_path, described())
    assert bundle.windows == {128: 256, 256: 256}
    assert bundle.latent_shape(128) == bundle.latent_shape(256) == (4, 32, 32)
    assert bundle.background_shape == (8, 32, 32)
    assert bundle.inputs("decoder@128") == ("latents",)
    assert bundle.fresh(LESION) == 4 and bundle.fresh("context") == 0
    assert bundle.constants("blend-malignant@256")["adapter"].tolist() == [[0.0, 0.0, 0.0, 1.0]]
    stages = [name for name in bundle.graph_names if name.startswith(("lesion", "blend"))]
    assert len(stages) == 8 and set(stages) & set(bundle.distinct_graphs) == {stages[0]}
    assert {bundle.call_side(name) for name in stages} == {256}


def test_shown_larger_than_the_frame_backgrounds_stay_as_they_are(tmp_path: Path) -> None:
    info = described() | {"windows": {"256": 512}}
    info["graphs"] = {name: record for name, record in info["graphs"].items() if not name.endswith("@128")}
    bundle = recorded(tmp_path, info)
    assert bundle.latent_shape(256) == (4, 64, 64) and bundle.call_side("decoder@256") == 512
    assert bundle.background_shape == (8, 32, 32)
    assert bundle.call_side("prior") == bundle.call_side("background-decoder") == 256


def test_what_older_records_leave_out_is_what_it_was(tmp_path: Path) -> None:
    info = json.loads((plain() / "bundle.json").read_text())
    left_out = ("windows", "resolution", "latent_factor", "background", "classes")
    bundle = recorded(tmp_path, {name: value for name, value in info.items() if name not in left_out} | {"schema": 5})
    assert bundle.windows == {128: 128, 256: 256} and bundle.latent_shape(128) == (8, 16, 16)
    assert (bundle.background_shape, bundle.background_decoder) == ((8, 32, 32), "decoder@256")
    assert bundle.distinct_graphs == bundle.graph_names and set(bundle.graph_names) == set(bundle.info["graphs"])


def test_a_bundle_for_other_frames_is_refused_with_both_sizes(tmp_path: Path) -> None:
    # Its frames are larger, too, which is not what is said.
    with pytest.raises(InputError, match=r"made for frames of 512 pixels; this busigen writes 256\.") as caught:
        recorded(tmp_path, described() | {"resolution": 512, "frames": [[512, 400]]})
    assert str(tmp_path / "bundle.json") in caught.value.problem


def graph(**values: Any) -> Callable[[Info], None]:
    return lambda info: info["graphs"][LESION].update(values)


def fed(*names: str) -> Callable[[Info], None]:
    return lambda info: info["graphs"][LESION]["inputs"].extend(names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: info.update(resolution="256"), "'resolution'"),
        (lambda info: info.update(resolution=-256), "'resolution'"),
        (lambda info: info.update(latent_factor=0), "'latent_factor'"),
        (lambda info: info.update(latent_factor=7), "should divide 64"),
        (lambda info: info.update(latent_factor=8.0), "'latent_factor'"),
        (lambda info: info.update(classes=[]), "'classes'"),
        (lambda info: info.update(classes=["benign", "benign"]), "should be different ones of benign, malignant"),
        (lambda info: info.update(classes=["benign", "normal"]), "should be different ones"),
        (lambda info: info.update(classes=["benign"]), "does not name the graphs"),
        (lambda info: info.update(windows={}), "should have sides among 64, 128, 192, 256"),
        (lambda info: info.update(windows={"128": 128}), "should have sides among"),
        (lambda info: info.update(windows={"0128": 128, "256": 256}), "should have sides among"),
        (lambda info: info.update(windows={"100": 200, "256": 256}), "should have sides among"),
        (lambda info: info.update(windows={"256": 256, "512": 512}), "should have sides among"),
        (lambda info: info.update(windows={"128": 192, "256": 256}), "should show 128 pixels at a multiple"),
        (lambda info: info.update(windows={"128": 64, "256": 256}), "should show 128 pixels at a multiple"),
        (lambda info: info.update(windows={"128": 1280, "256": 256}), "'windows.128'"),
        (lambda info: info.update(windows={"128": 10**12, "256": 256}), "'windows.128'"),
        (lambda info: info.update(windows={"128": "256", "256": 256}), "'windows.128'"),
        (lambda info: info.update(windows={str(64 * n): 64 * n for n in range(1, 9)}), "'windows'"),
        (lambda info: info.update(windows={"64": 256, "256": 256}), "does not name the graphs"),
        (lambda info: info.update(background={"decoder": "prior", "latent_channels": 8}), "'background.decoder'"),
        (lambda info: info["background"].update(latent_channels=0), "'background.latent_channels'"),
        (lambda info: info["background"].pop("latent_channels"), "lacks 'background.latent_channels'"),
        (lambda info: info["background"].update(latent_channels=4), "not those of 4 channels"),
        (lambda info: info["graphs"].pop("background-decoder"), "does not name the graphs"),
        (
            lambda info: (
                info["background"].update(decoder="decoder@256"),
                info["graphs"].pop("background-decoder"),
            ),
            "decoder@256 does not decode latents of the prior",
        ),
        (lambda info: info.update(memory=0), "'memory'"),
        (lambda info: info.update(memory=1e9), "'memory'"),
        (lambda info: info.update(memory=1 << 60), "'memory'"),
        (lambda info: info["graphs"]["context"].pop("inputs"), "lacks 'graphs.context.inputs'"),
        (graph(inputs=[]), f"'graphs.{LESION}.inputs'"),
        (graph(inputs=[f"noise{number}" for number in range(100)]), f"'graphs.{LESION}.inputs'"),
        (graph(inputs=["noise", "tokens", "adapter", "fresh", "secret"]), "nothing gives 'secret'"),
        (fed("pixels"), "nothing gives 'pixels'"),
        (graph(constants={}), "nothing gives 'adapter'"),
        (graph(constants={"adapter": []}), f"'graphs.{LESION}.constants.adapter'"),
        (graph(constants={"adapter": [0.0] * 65}), f"'graphs.{LESION}.constants.adapter'"),
        (graph(constants={"adapter": [[0.0]]}), f"'graphs.{LESION}.constants.adapter"),
        (graph(constants={"adapter": [float("nan")]}), f"'graphs.{LESION}.constants.adapter"),
        (graph(constants={"adapter": [1e30]}), f"'graphs.{LESION}.constants.adapter"),
        (graph(constants={"adapter": [0.0], "mask": [0.0]}), "'mask' is no input that can be constant"),
        (graph(constants={"adapter": [0.0], "fresh": [0.0]}), "'fresh' is no input that can be constant"),
        (graph(constants={"adapter": [0.0], "other": [0.0]}), "'other' is no input that can be constant"),
        (graph(constants={f"c{number}": [0.0] for number in range(9)}), f"'graphs.{LESION}.constants'"),
        (graph(fresh=0), f"'graphs.{LESION}.fresh'"),
        (graph(fresh=65), f"'graphs.{LESION}.fresh'"),
        (graph(fresh=True), f"'graphs.{LESION}.fresh'"),
        (graph(fresh=None), "'fresh' says how many arrays"),
        (lambda info: info["graphs"]["prior"].update(fresh=4), "'fresh' says how many arrays"),
        (
            lambda info: info["graphs"]["prior"].update(inputs=["noise", "frame", "fresh"], fresh=4),
            "stages 2 and 3 alone have one",
        ),
        (lambda info: info.update(latent_channels=256) or graph(fresh=64)(info), "numbers of noise for an image"),
    ],
)
def test_a_record_that_says_what_cannot_be_is_refused_and_named(
    tmp_path: Path, change: Callable[[Info], Any], said: str
) -> None:
    info = described()
    change(info)
    with pytest.raises(BusigenError) as caught:
        recorded(tmp_path, info)
    assert isinstance(caught.value, IntegrityError) and caught.value.exit_code == 5
    assert str(tmp_path / "bundle.json") in caught.value.problem and said in caught.value.problem
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert "busigen export" in caught.value.fix
