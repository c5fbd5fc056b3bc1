"""A dataset as MLCommons Croissant 1.0, which catalogues and loaders of data sets read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import busigen
from busigen.runtime.dataset.card import citation, licence, privacy
from busigen.runtime.dataset.format import MANIFEST_FILE, lesion_slots
from busigen.runtime.dataset.shards import column_types

_PARQUET = "application/x-parquet"
_TYPES = {"str": "sc:Text", "int": "sc:Integer", "float": "sc:Float", "bool": "sc:Boolean"}

_WORDS = (
    "citeAs column conformsTo equivalentProperty extract field fileObject fileProperty fileSet format includes "
    "isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate "
    "separator source subField transform"
)
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{word: f"cr:{word}" for word in _WORDS.split()},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}  # what the words of Croissant 1.0 stand for in JSON-LD

Nodes = list[dict[str, Any]]


def croissant(info: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset's JSON-LD; ``info`` is the content of its ``dataset.json``."""
    return _described(info, *_content(info, "One row per sample, in index order."))


def collection_croissant(info: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A merged dataset's JSON-LD: the rows of all parts, and each part's own tables and pictures.

    ``info`` is the content of its ``dataset.json``; ``parts`` are those of its parts, by their folders.
    """
    manifest = info["files"][MANIFEST_FILE]
    files = [_file_object("manifest", "The rows of all parts, in order.", manifest, _PARQUET)]
    sets = [_rows("", {"part": "str", **column_types(info["columns"])}, ("part", "key"))]
    for folder, part in parts.items():
        more_files, more_sets = _content(part, f"The rows of {folder}.", f"{folder}/")
        files += more_files
        sets += more_sets
    return _described(info, files, sets)


def _described(info: Mapping[str, Any], files: Nodes, sets: Nodes) -> dict[str, Any]:
    return {
        "@context": dict(sorted(_CONTEXT.items())),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "busigen-dataset",
        "description": f"{info['samples']} synthetic breast ultrasound images with lesion masks. {privacy(info)}",
        "version": f"{info['schema_version']}.0.0",
        # Of the version that made them: what runs with equal options write is equal, whatever day it is.
        "datePublished": busigen.RELEASED,
        "license": licence(info),
        "citeAs": citation(info),
        "keywords": ["breast", "ultrasound", "synthetic", "segmentation"],
        "distribution": files,
        "recordSet": sets,
    }


def _content(info: Mapping[str, Any], about: str, folder: str = "") -> tuple[Nodes, Nodes]:
    """Files and record sets of a dataset in ``folder``, which ends with a slash; all names begin with its name."""
    start = folder.replace("/", "-")
    pictures = {
        "images": ("image", "Images, 8-bit grey."),
        "masks": ("mask", "Lesion masks, 1 bit."),
        **{
            f"masks_{number}": (f"mask_{number}", f"Masks of each image's lesion {number}, 1 bit; empty without one.")
            for number in range(1, lesion_slots(info["columns"]) + 1)
        },
    }
    shards = [
        _file_object(
            f"{start}shard-{shard['number']:06d}", "WebDataset shard.", shard["tar"], "application/x-tar", folder
        )
        for shard in info["shards"]
    ]
    return [
        _file_object(f"{start}manifest", about, info["files"][MANIFEST_FILE], _PARQUET, folder),
        *shards,
        *(
            {
                "@type": "cr:FileSet",
                "@id": f"{start}{name}",
                "name": f"{start}{name}",
                "description": what,
                "containedIn": [{"@id": shard["@id"]} for shard in shards],
                "encodingFormat": "image/png",
                "includes": f"*.{kind}.png",
            }
            for name, (kind, what) in pictures.items()
        ),
    ], [_rows(start, column_types(info["columns"]), ("key",)), *(_pictures(start, name) for name in pictures)]


def _file_object(name: str, about: str, record: Mapping[str, Any], encoding: str, folder: str = "") -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "description": about,
        "contentUrl": f"{folder}{record['file']}",
        "contentSize": f"{record['size']} B",
        "encodingFormat": encoding,
        "sha256": record["sha256"],
    }


def _rows(start: str, columns: Mapping[str, str], key: Sequence[str]) -> dict[str, Any]:
    records, table = f"{start}samples", {"fileObject": {"@id": f"{start}manifest"}}
    keys = [{"@id": f"{records}/{name}"} for name in key]
    return {
        "@type": "cr:RecordSet",
        "@id": records,
        "name": records,
        "description": "The manifest's rows.",
        "key": keys if len(keys) > 1 else keys[0],
        "field": [
            _field(records, name, _TYPES[kind], source={**table, "extract": {"column": name}})
            for name, kind in columns.items()
        ],
    }


def _pictures(start: str, kind: str) -> dict[str, Any]:
    content, files = f"{start}{kind}_content", {"fileSet": {"@id": f"{start}{kind}"}}
    key = {**files, "extract": {"fileProperty": "filename"}, "transform": {"regex": r"^(\d{9})"}}
    pixels = {**files, "extract": {"fileProperty": "content"}}
    return {
        "@type": "cr:RecordSet",
        "@id": content,
        "name": content,
        "description": f"The {kind}, joined to the rows by key.",
        "field": [
            _field(content, "key", "sc:Text", references={"field": {"@id": f"{start}samples/key"}}, source=key),
            _field(content, "pixels", "sc:ImageObject", source=pixels),
        ],
    }


def _field(records: str, name: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": f"{records}/{name}", "name": name, "dataType": kind, **more}
