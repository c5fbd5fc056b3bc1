"""The texts that travel with a dataset: README.md for people, croissant.json for catalogues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from busigen.registry import RESOLUTION, STABLE_DIFFUSION, SYNTHETIC
from busigen.runtime.dataset.format import MANIFEST_FILE, SHARD_FOLDER, command_line, decided, key_of
from busigen.runtime.dataset.shards import FIXED_COLUMNS
from busigen.text import counted, unproven_line

_PRIVACY_REAL = (
    "Lesions were painted into the healthy images given to the run. Where these show real patients, every pixel "
    "outside the painted region is still those patients' own: such a dataset is not anonymous, and may be passed on "
    "only as the healthy images themselves may."
)

_PRIVACY_SYNTHETIC = (
    "The backgrounds are synthetic like the lesions: the run was given no patient's image, and no sample holds a "
    "patient's pixels. How much of its training images the model reproduces is what `busigen audit` measures."
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

LICENCE = (
    "The samples inherit the terms of what they were made from: the bundle's training data and the healthy images. "
    "Check both before you publish or sell."
)
_LICENCE_OF_MODEL = (
    " The lesions were drawn by a Stable Diffusion of others, whose licence the bundle's MODEL_CARD.md names: under an "
    "OpenRAIL-M licence, samples may not be used for what it forbids."
)

_CROISSANT_TYPES = {"str": "sc:Text", "int": "sc:Integer", "float": "sc:Float", "bool": "sc:Boolean"}

_CROISSANT_WORDS = (
    "citeAs column conformsTo equivalentProperty extract field fileObject fileProperty fileSet format includes "
    "isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate "
    "separator source subField transform"
)
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{word: f"cr:{word}" for word in _CROISSANT_WORDS.split()},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}  # what the words of Croissant 1.0 stand for in JSON-LD


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
    bars = (_FRAMES if _is_synthetic(info) else _LETTERBOX) if "letterbox_scale" in info["columns"] else ""
    return f"""{front_matter(f"{SHARD_FOLDER}/*.tar")}
# Synthetic breast ultrasound, {counted(info["samples"], "sample")}

Images with a synthetic {" or ".join(info["classes"])} lesion and that lesion's exact mask, made by busigen
{info["busigen"]} with

```sh
{command_line(info)}
```

where folders stand by their names alone. For research; not for diagnosis.

![samples](preview.png)

| class | samples |
|---|---:|
{classes}

{refusals}

## Content

- `shards/*.tar`: [WebDataset](https://github.com/webdataset/webdataset) shards. A sample is three files:
  `<key>.image.png` ({RESOLUTION} x {RESOLUTION}, 8-bit grey), `<key>.mask.png` (1 bit, white on the lesion),
  `<key>.json` (its row).
- `manifest.parquet`: one row per sample: {", ".join(f"`{name}`" for name in (*FIXED_COLUMNS, *info["columns"]))}.
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

or with the standard library alone:

```python
import tarfile

with tarfile.open("{first["tar"]["file"]}") as shard:
    png = shard.extractfile("{key_of(first["first"])}.image.png").read()
```

`busigen verify` checks every file, hash, pair and row.

## Licence

{licence(info)}

## Privacy

{privacy(info)}
"""


def front_matter(shards: str) -> str:
    """The card's header for the Hugging Face Hub, with a pattern of the sample files: else it reads all JSON."""
    return f"""---
license: other
task_categories:
- image-segmentation
- image-classification
tags:
- medical
- ultrasound
- synthetic
- webdataset
configs:
- config_name: default
  data_files:
  - split: train
    path: "{shards}"
---
"""


def licence(info: Mapping[str, Any]) -> str:
    """The text on terms; those of a Stable Diffusion are named where one drew the samples."""
    return f"{LICENCE}{_LICENCE_OF_MODEL if info['fingerprint'].get('preset') == STABLE_DIFFUSION else ''}"


def privacy(info: Mapping[str, Any]) -> str:
    """The text on privacy; a record that does not say what its backgrounds are is taken to have used real images."""
    return _PRIVACY_SYNTHETIC if _is_synthetic(info) else _PRIVACY_REAL


def croissant(info: Mapping[str, Any]) -> dict[str, Any]:
    """The dataset as MLCommons Croissant 1.0 JSON-LD; ``info`` is the content of ``dataset.json``."""
    manifest = info["files"][MANIFEST_FILE]
    shards = [
        _file_object(f"shard-{shard['number']:06d}", "WebDataset shard.", shard["tar"], "application/x-tar")
        for shard in info["shards"]
    ]
    table = {"fileObject": {"@id": "manifest"}}
    columns = {name: kind.__name__ for name, kind in FIXED_COLUMNS.items()} | dict(info["columns"])
    return {
        "@context": dict(sorted(_CONTEXT.items())),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "busigen-dataset",
        "description": f"{info['samples']} synthetic breast ultrasound images with lesion masks. {privacy(info)}",
        "version": f"{info['schema_version']}.0.0",
        "keywords": ["breast", "ultrasound", "synthetic", "segmentation"],
        "usageInfo": licence(info),
        "distribution": [
            _file_object("manifest", "One row per sample, in index order.", manifest, "application/x-parquet"),
            *shards,
            *(
                {
                    "@type": "cr:FileSet",
                    "@id": f"{kind}s",
                    "name": f"{kind}s",
                    "description": about,
                    "containedIn": [{"@id": shard["@id"]} for shard in shards],
                    "encodingFormat": "image/png",
                    "includes": f"*.{kind}.png",
                }
                for kind, about in (("image", "Images, 8-bit grey."), ("mask", "Lesion masks, 1 bit."))
            ),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "description": "The manifest's rows.",
                "key": {"@id": "samples/key"},
                "field": [
                    _field("samples", name, _CROISSANT_TYPES[kind], source={**table, "extract": {"column": name}})
                    for name, kind in columns.items()
                ],
            },
            _pictures("images"),
            _pictures("masks"),
        ],
    }


def _is_synthetic(info: Mapping[str, Any]) -> bool:
    return bool(decided(info, "--healthy") == SYNTHETIC)


def _file_object(name: str, about: str, record: Mapping[str, Any], encoding: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "description": about,
        "contentUrl": record["file"],
        "contentSize": f"{record['size']} B",
        "encodingFormat": encoding,
        "sha256": record["sha256"],
    }


def _pictures(name: str) -> dict[str, Any]:
    content, files = f"{name}_content", {"fileSet": {"@id": name}}
    key = {**files, "extract": {"fileProperty": "filename"}, "transform": {"regex": r"^(\d{9})"}}
    pixels = {**files, "extract": {"fileProperty": "content"}}
    return {
        "@type": "cr:RecordSet",
        "@id": content,
        "name": content,
        "description": f"The {name}, joined to the rows by key.",
        "field": [
            _field(content, "key", "sc:Text", references={"field": {"@id": "samples/key"}}, source=key),
            _field(content, "pixels", "sc:ImageObject", source=pixels),
        ],
    }


def _field(records: str, name: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": f"{records}/{name}", "name": name, "dataType": kind, **more}
