"""The card that travels with a dataset: README.md for people, its front matter for Hugging Face `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import busigen
from busigen.registry import LESION_CLASSES, NORMAL, RESOLUTION, SAMPLE_CLASSES, STABLE_DIFFUSION, SYNTHETIC
from busigen.runtime.dataset.format import (
    SHARD_FOLDER,
    command_line,
    decided,
    extra_pictures,
    key_of,
    lesion_slots,
    member_suffixes,
)
from busigen.runtime.dataset.shards import column_types
from busigen.text import counted, unproven_line

_PRIVACY_REAL = (
    "Lesions were painted into the healthy images given to the run. Where these show real patients, every pixel "
    "outside the painted region is still those patients' own: such a dataset is not anonymous, and may be passed on "
    "only as the healthy images themselves may."
)

_PRIVACY_NORMAL = "Samples of class `normal` are such images whole."

_PRIVACY_SYNTHETIC = (
    "The backgrounds are synthetic like the lesions: the run was given no patient's image, and no sample holds a "
    "patient's pixels. How much of its training images the model reproduces is what `busigen audit` measures."
)

_PRIVACY_MASKS = (
    "The lesions' outlines are those of the masks given to the run{how}. An outline that was drawn on a patient's "
    "image is that patient's: it shows no pixel, but whoever has the image can tell it again. Such a dataset may be "
    "passed on only as the masks themselves may, and a network that is trained on it has seen those outlines: none of "
    "the masks may be of images that it is tested on."
)

_LETTERBOX = f"""
Images are letterboxed to {RESOLUTION} x {RESOLUTION}. Outside the edit region, a sample's pixels equal those of its
healthy image, resized in the same way, bit for bit. A pixel (X, Y) of a sample lies in the healthy image's own file at
x = (X - letterbox_left) / letterbox_scale, y = (Y - letterbox_top) / letterbox_scale.
"""

_FRAMES = f"""
A sample is {RESOLUTION} x {RESOLUTION}. Its background has the shape of a training image, with black bars around it:
`letterbox_left` columns and `letterbox_top` rows of bar come before the image.
"""

_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")  # between which the Hub sorts data sets
_HUB_TYPES = {"str": "string", "int": "int64", "float": "float64", "bool": "bool"}

_CITATION = """@software{busigen,
  title = {busigen: synthetic breast-ultrasound images with exact lesion masks},
  author = {{the busigen authors}},
  version = {VERSION},
  year = {YEAR}
}
@article{wen2026,
  title = {Synthesizing breast cancer ultrasound images from healthy samples using latent diffusion models},
  author = {Wen and others},
  journal = {Journal of Medical Imaging},
  volume = {13},
  number = {2},
  pages = {024002},
  year = {2026}
}"""

LICENCE = (
    "The samples inherit the terms of what they were made from: the bundle's training data and the healthy images. "
    "Check both before you publish or sell."
)
_LICENCE_OF_MODEL = (
    " The lesions were drawn by a Stable Diffusion of others, whose licence the bundle's MODEL_CARD.md names: under an "
    "OpenRAIL-M licence, samples may not be used for what it forbids."
)


def dataset_card(info: Mapping[str, Any]) -> str:
    """The dataset card in Markdown; ``info`` is the content of ``dataset.json``."""
    first = info["shards"][0]
    shards = f"{{{first['number']:06d}..{info['shards'][-1]['number']:06d}}}"
    classes = "\n".join(f"| {name} | {count} |" for name, count in info["classes"].items())
    refusals = "The quality gates refused no draw."
    if refused := sum(info["rejected"].values()):
        listed = ", ".join(f"{reason}: {count}" for reason, count in info["rejected"].items())
        refusals = f"The quality gates refused {counted(refused, 'draw')}, drawn again since ({listed})."
    gap = f"\nUnproven: {unproven_line(info['unproven'])}\n" if info.get("unproven") else ""
    lesions = [name for name in info["classes"] if name != NORMAL]
    features = sample_features(info["columns"], info["classes"])
    bars = (_FRAMES if _is_synthetic(info) else _LETTERBOX) if "letterbox_scale" in info["columns"] else ""
    return f"""{front_matter(info["samples"], {"train": f"{SHARD_FOLDER}/*.tar"}, features)}
# Synthetic breast ultrasound, {counted(info["samples"], "sample")}

Images with a synthetic {" or ".join(lesions)} lesion and that lesion's exact mask, made by busigen
{info["busigen"]} with

```sh
{command_line(info)}
```

where folders stand by their names alone. For research; not for diagnosis.
{balance(info)}
![samples](preview.png)

| class | samples |
|---|---:|
{classes}

{refusals}

## Content

- `shards/*.tar`: [WebDataset](https://github.com/webdataset/webdataset) shards. A sample is {_files(info)} files:
  `<key>.image.png` ({RESOLUTION} x {RESOLUTION}, 8-bit grey), `<key>.mask.png` (1 bit, white on the lesion),
  `<key>.json` (its row).{_several(info["columns"])}
- `manifest.parquet`: one row per sample: {", ".join(f"`{name}`" for name in column_types(info["columns"]))}.
  Boxes are in pixels, right and bottom exclusive. `shards/*.parquet` hold the same rows per shard.
- `dataset.json`: options, fingerprints, counts, and the sha256 of every shard. `run.json`: the same before the run.
- `croissant.json`: [Croissant](https://mlcommons.org/croissant) metadata.
{gap}{bars}
## Reading it

```python
import webdataset as wds  # pip install webdataset

dataset = wds.WebDataset("shards/{shards}.tar", shardshuffle=False).decode("l8")
for image, mask, row in dataset.to_tuple("image.png", "mask.png", "json"):
    mask = mask > 0  # ({RESOLUTION}, {RESOLUTION}) bool; image is ({RESOLUTION}, {RESOLUTION}) uint8, row a dict
```

{_hugging_face(info["classes"])}
With the standard library alone:

```python
import tarfile

with tarfile.open("{first["tar"]["file"]}") as shard:
    png = shard.extractfile("{key_of(first["first"])}.image.png").read()
```

`busigen verify` checks every file, hash, pair and row.

{closing(info)}"""


def collection_card(info: Mapping[str, Any], pattern: str) -> str:
    """The card of a merged dataset; ``pattern`` matches all parts' shards."""
    rows = "\n".join(
        f"| `{part['folder']}` | {part['samples']} | {part['config']['seed']} | "
        f"{', '.join(source['folder'] for source in part['sources'])} |"
        for part in info["parts"]
    )
    features = sample_features(info["columns"], info["classes"])
    title = f"{counted(info['samples'], 'sample')} in {counted(len(info['parts']), 'part')}"
    return f"""{front_matter(info["samples"], {"train": pattern}, features)}
# Synthetic breast ultrasound, {title}

Merged by busigen. Each part is a dataset of its own, with the bytes it was made with; its README.md says how to read it
and how it was made. For research; not for diagnosis.
{balance(info)}
| part | samples | seed | merged from |
|---|---:|---:|---|
{rows}

- `manifest.parquet`: the rows of all parts. `part` names the folder that `shard` is in. A key is unique within a part.
- `dataset.json`: where each part came from, and the sha256 of its own `dataset.json`.
- `croissant.json`: [Croissant](https://mlcommons.org/croissant) metadata of all parts.

`busigen verify` checks all parts; `busigen explain` takes a part and a key, such as `000/{key_of(0)}`.

{_hugging_face(info["classes"])}
{closing(info)}"""


def _files(info: Mapping[str, Any]) -> str:
    return str(3 + most) if (most := lesion_slots(info["columns"])) else "three"


def _several(columns: Mapping[str, str]) -> str:
    """What the masks of single lesions are, where a dataset has them."""
    if not (most := lesion_slots(columns)):
        return ""
    return f"""
  `<key>.mask.png` marks all lesions of an image, and `<key>.mask_1.png` to `<key>.mask_{most}.png` one each: `lesions`
  in the row says how many there are, and masks beyond that are empty. Columns that begin with `lesion_1_` are the first
  lesion's, and so on. Those without a number are the first one's, too, but for `lesion_pixels`, `edit_pixels` and the
  box, which are of all lesions together."""


def balance(info: Mapping[str, Any]) -> str:
    """A paragraph on samples without a lesion and on the mix of categories; empty without either."""
    said = []
    if count := info["classes"].get(NORMAL):
        kind = "synthetic backgrounds" if _is_synthetic(info) else "the run's healthy images, letterboxed and no more"
        said.append(f"{counted(count, 'sample')} of class `normal` have no lesion and an empty mask: they are {kind}.")
    if ":" in (mix := decided(info, "--birads") or ""):
        shares = ", ".join(f"{part.replace(':', ' with weight ')}" for part in mix.split(","))
        said.append(f"BI-RADS categories were asked for in shares, {shares}: `asked_birads` has each sample's.")
    if ":" in (mix := decided(info, "--lesions") or ""):
        shares = ", ".join(f"{part.replace(':', ' with weight ')}" for part in mix.split(","))
        said.append(f"Numbers of lesions an image were asked for in shares, {shares}.")
    return f"\n{' '.join(said)}\n" if said else ""


def labels(classes: Iterable[str]) -> tuple[str, ...]:
    """The names of a dataset's labels, by number; its ``classes`` decide whether normal is one."""
    return SAMPLE_CLASSES if NORMAL in classes else LESION_CLASSES


def label_type(classes: Iterable[str]) -> dict[str, Any]:
    """What `datasets` takes for the type of a label, of a dataset with these classes."""
    return {"class_label": {"names": {str(number): name for number, name in enumerate(labels(classes))}}}


def _hugging_face(classes: Iterable[str]) -> str:
    names = ", ".join(f"{number} {name}" for number, name in enumerate(labels(classes)))
    return f"""With Hugging Face's `datasets`, which knows every column's type from this file's header:

```python
import os

from datasets import load_dataset  # pip install datasets pillow

rows = load_dataset(os.getcwd(), split="train")  # this folder by its path; on the Hub, by its name there
image, mask, row = rows[0]["image.png"], rows[0]["mask.png"], rows[0]["json"]  # row["class"]: {names}
```
"""


def closing(info: Mapping[str, Any]) -> str:
    """The sections on licence, citation and privacy, with which every card ends."""
    return f"""## Licence

{licence(info)}

## Citation

```bibtex
{citation(info)}
```

## Privacy

{privacy(info)}
"""


def front_matter(samples: int, files: Mapping[str, str], features: Sequence[Mapping[str, Any]]) -> str:
    """The card's header for Hugging Face `datasets` and its Hub.

    ``files`` has a pattern of the sample files for each split: without one, all JSON would be read. ``features`` are
    the columns, in the form that `datasets` gives a header: without them it guesses from the first rows, and fails
    where these lack a value.
    """
    # A line of JSON is YAML as well, and quotes whatever a column is called.
    columns = "\n".join(f"  - {json.dumps(feature)}" for feature in features)
    splits = "\n".join(f'  - split: {name}\n    path: "{pattern}"' for name, pattern in files.items())
    place = max(len(str(samples)) - 3, 0)
    size = f"{_SIZES[place - 1]}<n<{_SIZES[place]}" if place else f"n<{_SIZES[0]}"
    return f"""---
pretty_name: Synthetic breast ultrasound
license: other
license_name: terms-of-the-sources
task_categories:
- image-segmentation
- image-classification
size_categories:
- {size}
annotations_creators:
- machine-generated
tags:
- medical
- ultrasound
- synthetic
configs:
- config_name: default
  data_files:
{splits}
dataset_info:
  features:
{columns}
---
"""


def sample_features(columns: Mapping[str, str], classes: Iterable[str]) -> list[dict[str, Any]]:
    """What `datasets` makes of a shard: pictures, row, and where it read them; ``columns`` are those of a record."""
    return [
        *({"name": name, "dtype": "image"} for name in member_suffixes(extra_pictures(columns))[:-1]),
        {"name": "json", "struct": row_features(column_types(columns), classes)},
        *({"name": name, "dtype": "string"} for name in ("__key__", "__url__")),
    ]


def row_features(types: Mapping[str, str], classes: Iterable[str]) -> list[dict[str, Any]]:
    """Columns of a manifest for `datasets`, the class as a label; ``types`` are the names of their types."""
    label = label_type(classes)
    return [{"name": name, "dtype": label if name == "class" else _HUB_TYPES[kind]} for name, kind in types.items()]


def citation(info: Mapping[str, Any]) -> str:
    """What to cite, in BibTeX: the program, and the paper whose method it follows."""
    return _CITATION.replace("VERSION", str(info["busigen"])).replace("YEAR", busigen.RELEASED[:4])


def licence(info: Mapping[str, Any]) -> str:
    """The text on terms; those of a Stable Diffusion are named where one drew the samples."""
    return f"{LICENCE}{_LICENCE_OF_MODEL if info.get('fingerprint', {}).get('preset') == STABLE_DIFFUSION else ''}"


def privacy(info: Mapping[str, Any]) -> str:
    """The text on privacy; a record that does not say what its backgrounds are is taken to have used real images."""
    texts = [_PRIVACY_SYNTHETIC if _is_synthetic(info) else _PRIVACY_REAL]
    if decided(info, "--normals") and not _is_synthetic(info):
        texts.append(_PRIVACY_NORMAL)
    if decided(info, "--masks") is not None:
        jitter = decided(info, "--jitter")
        how = f", moved and scaled by up to {jitter:.0%} and some of them mirrored" if jitter else ""
        texts.append(_PRIVACY_MASKS.format(how=how))
    return " ".join(texts)


def _is_synthetic(info: Mapping[str, Any]) -> bool:
    return bool(decided(info, "--healthy") == SYNTHETIC)
