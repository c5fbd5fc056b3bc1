"""What `busigen view` answers, asked by a client that is no browser: bytes, order, refusals."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import signal
import socket
import sys
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.geometry import edit_region
from busigen.data.images import read_image
from busigen.data.letterbox import letterbox
from busigen.runtime.dataset.reader import Dataset
from tests.harness.command import error_line, run
from tests.harness.processes import GUARD_SECONDS
from tests.runtime.viewing.conftest import HOSTILE, serving


def ask(url: str, path: str = "", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by their names in small letters, and content; ``path`` follows the page's own address."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=GUARD_SECONDS)
    connection.request(method, path if path.startswith("/") else place.path + path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


def read(url: str, path: str, **query: Any) -> Any:
    status, _, content = ask(url, f"{path}?{urlencode(query, doseq=True)}")
    assert status == 200, content
    return json.loads(content)


def tars(folder: Path) -> dict[str, bytes]:
    """Content of all members of a dataset's shards by their names."""
    found = {}
    for path in sorted(folder.glob("shards/*.tar")):
        with tarfile.open(path) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar})  # type: ignore[union-attr]
    return found


def test_pictures_are_the_bytes_in_the_shards(plain: Path, plain_url: str, merged: Path, merged_url: str) -> None:
    for url, folder, prefix in ((plain_url, plain, ""), (merged_url, merged / "parts" / "001", "001/")):
        stored = {name: content for name, content in tars(folder).items() if name.endswith(".png")}
        assert len(stored) in (28, 140)
        for name, content in stored.items():
            key, kind, _ = name.split(".")
            status, headers, found = ask(url, f"pair/{prefix}{key}/{kind}.png")
            assert (status, headers["content-type"], found) == (200, "image/png", content)


def test_the_outline_encloses_the_masks_pixels(plain: Path, plain_url: str) -> None:
    for sample in Dataset.open(plain).samples(range(14)):
        _, headers, content = ask(plain_url, f"pair/{sample.index:09d}/outline.svg")
        assert headers["content-type"] == "image/svg+xml"
        path = re.search(r'd="([^"]*)"', content.decode())
        assert path
        # A pixel is inside if an odd number of upright edges lie to its left.
        edges = np.zeros((256, 257), bool)
        for ring in path[1].strip("MZ").split("ZM"):
            corners = [tuple(map(int, corner.split())) for corner in ring.split("L")]
            for (x, y), (to_x, to_y) in zip(corners, [*corners[1:], corners[0]], strict=True):
                assert x == to_x or y == to_y
                if x == to_x:
                    edges[min(y, to_y) : max(y, to_y), x] ^= True
        np.testing.assert_array_equal(np.logical_xor.accumulate(edges, axis=1)[:, :256], sample.mask)


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"where": "class=malignant"},
        {"where": ["class=benign", "score>=0.25", "score<0.75"]},
        {"where": "rarely!=none"},
        {"where": "class=Malignant"},
        {"where": "part='parts/001' and flipped=true"},
        {"where": "lesion_pixels>1000000"},
        {"sort": "score"},
        {"sort": "score", "down": 1, "where": "attempt=1"},
        {"sort": "rarely"},
        {"sort": "rarely", "down": 1},
        {"sort": "class"},
        {"sort": "never"},
        {"down": 1},
    ],
)
def test_filters_and_order_are_those_of_the_manifest(merged: Path, merged_url: str, query: dict[str, Any]) -> None:
    table = pl.read_parquet(merged / "manifest.parquet")
    for condition in [query["where"]] if isinstance(query.get("where"), str) else query.get("where", []):
        # polars' SQL writes them alike, but for what has no value.
        sql = condition.replace("rarely!=none", "rarely IS NOT NULL").replace("=benign", "='benign'").lower()
        table = table.filter(pl.sql_expr(sql.replace("=malignant", "='malignant'")))
    if "sort" in query:
        table = table.sort(query["sort"], descending="down" in query, nulls_last=True, maintain_order=True)
    elif "down" in query:
        table = table.reverse()
    wanted = [f"{part.removeprefix('parts/')}/{key}" for part, key in table.select("part", "key").iter_rows()]
    found = read(merged_url, "pairs.json", count=140, **query)
    assert found["total"] == len(wanted)
    assert [pair["name"] for pair in found["pairs"]] == wanted
    assert [pair["class"] for pair in found["pairs"]] == table["class"].to_list()
    if "sort" in query:
        assert [pair["value"] for pair in found["pairs"]] == table[query["sort"]].to_list()
    middle = read(merged_url, "pairs.json", first=3, count=4, **query)
    assert [pair["name"] for pair in middle["pairs"]] == wanted[3:7]


def test_a_pair_has_its_row_its_refusals_and_its_neighbours(plain: Path, plain_url: str) -> None:
    rows = pl.read_parquet(plain / "manifest.parquet").to_dicts()
    for index, row in enumerate(rows):
        pair = read(plain_url, f"pair/{index:09d}/pair.json", sort="index", down=1)
        assert (pair["row"], pair["problems"]) == (row, [])
        # What the noise source refuses.
        refused = [{"attempt": 0, "class": row["class"], "reason": "too dark"}] if index in (3, 10) else []
        assert pair["refused"] == refused
        before, after = (f"{n:09d}" if 0 <= n < 14 else None for n in (index + 1, index - 1))
        assert (pair["rank"], pair["total"], pair["before"], pair["after"]) == (13 - index, 14, before, after)
    beside = read(plain_url, "pair/000000003/pair.json", where="attempt=0")
    assert (beside["rank"], beside["total"], beside["before"]) == (None, 12, None)


def test_the_healthy_image_is_shown_in_the_frame(plain: Path, plain_url: str, healthy: Path) -> None:
    for row in pl.read_parquet(plain / "manifest.parquet").iter_rows(named=True):
        status, _, content = ask(plain_url, f"pair/{row['key']}/healthy.png")
        beside = read(plain_url, f"pair/{row['key']}/pair.json")["beside"]
        if row["healthy_file"] is None:
            assert (status, beside) == (404, None)
        else:
            assert beside == f"Healthy image: {row['healthy_file']}"
            wanted, _ = letterbox(read_image(healthy / row["healthy_file"]).pixels)
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), wanted)


def test_without_the_healthy_images_none_is_shown(merged_url: str) -> None:
    assert ask(merged_url, "pair/000/000000001/healthy.png")[0] == 404
    assert read(merged_url, "pair/000/000000001/pair.json")["beside"] is None


def test_what_is_said_of_the_dataset(merged: Path, merged_url: str) -> None:
    table = pl.read_parquet(merged / "manifest.parquet")
    about = read(merged_url, "about.json")
    assert (about["name"], about["pairs"]) == ("all", 140)
    assert about["classes"] == dict(table["class"].value_counts().iter_rows())
    columns = {column.pop("name"): column for column in about["columns"]}
    assert list(columns) == table.columns
    assert columns["class"] == {"type": "str", "fixed": True, "values": ["benign", "malignant"]}
    assert columns["score"]["least"] == table["score"].min()
    assert "values" not in columns["image_sha256"]


def test_damage_is_named_and_all_else_is_shown(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "set"))
    tar = folder / "shards" / "000001.tar"
    stored = tars(folder)
    content = tar.read_bytes()
    broken = stored["000000006.image.png"]
    content = content.replace(broken, b"GIF89a" + broken[6:])
    told = stored["000000008.json"]
    content = content.replace(told, told.replace(b'"attempt": 0', b'"attempt": 7'))
    tar.write_bytes(content)
    (folder / "shards" / "000002.json").write_text("{")
    with serving(folder) as (url, _):
        status, _, said = ask(url, "pair/000000006/image.png")
        assert status == 500
        assert said.decode().startswith("Sample 000000006 is damaged: ")
        assert read(url, "pair/000000006/pair.json")["problems"] == [
            "the image has another sha256 than the manifest records."
        ]
        assert read(url, "pair/000000008/pair.json")["problems"] == ["the shard says attempt is 7, the manifest 0."]
        assert ask(url, "pair/000000007/image.png")[2] == stored["000000007.image.png"]
        assert read(url, "pair/000000012/pair.json")["refused"] is None
        tar.unlink()
        status, _, said = ask(url, "pair/000000009/image.png")
        assert status == 500 and b"000001.tar cannot be read" in said


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1", "LOCALHOST:1", "[::1]:80"])
def test_names_of_this_machine_are_answered_whatever_port_is_forwarded(plain_url: str, host: str) -> None:
    assert ask(plain_url, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example",
     "0.0.0.0", "10.0.0.1", "localhost:80:80", ""],
)  # fmt: skip
def test_other_hosts_are_refused(plain_url: str, host: str) -> None:
    for path in ("", "about.json", "pair/000000001/image.png"):
        status, headers, content = ask(plain_url, path, Host=host)
        assert status == 403
        assert headers["connection"] == "close"
        assert b"PNG" not in content and b"pairs" not in content


@pytest.mark.parametrize("hosts", [[], ["localhost", "evil.example"], ["localhost", "localhost"]])
def test_a_request_names_one_host(plain_url: str, hosts: list[str]) -> None:
    place = urlsplit(plain_url)
    with socket.create_connection((place.hostname, place.port), timeout=GUARD_SECONDS) as connection:
        lines = [f"GET {place.path} HTTP/1.1", *(f"Host: {host}" for host in hosts), "", ""]
        connection.sendall("\r\n".join(lines).encode())
        assert connection.makefile("rb").readline().split()[1] == b"403"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "HAX"])
def test_other_methods_are_refused(plain_url: str, method: str) -> None:
    status, headers, _ = ask(plain_url, "about.json", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_head_is_get_without_content(plain_url: str) -> None:
    status, headers, content = ask(plain_url, "pair/000000001/image.png", "HEAD")
    assert (status, content) == (200, b"")
    assert int(headers["content-length"]) == len(ask(plain_url, "pair/000000001/image.png")[2])


@pytest.mark.parametrize(
    "path",
    ["/", "/about.json", "/wrong/about.json", "../../../../etc/passwd", "..%2f..%2fetc/passwd", "view.html/../pairs.py",
     "pairs.py", "assets/view.js", "pair/../about.json", "pair/..%2f000000001/image.png", "pair/000000014/image.png",
     "pair/000000001/../../dataset.json", "pair/1/image.png", "pair/000/000000001/image.png", "pair/000000001/json",
     "pair/000000001/image.png/", "pair/%D9%A0%D9%A0%D9%A0%D9%A0%D9%A0%D9%A0%D9%A0%D9%A0%D9%A1/image.png",
     "shards/000000.tar", "//etc/passwd", "http://evil.example/"],
)  # fmt: skip
def test_nothing_else_is_served(plain_url: str, path: str) -> None:
    status, _, content = ask(plain_url, path)
    assert (status, len(content) < 100) == (404, True)


def test_parts_of_a_merged_dataset_have_to_be_named(merged_url: str) -> None:
    assert ask(merged_url, "pair/001/000000069/mask.png")[0] == 200
    for name in ("000000001", "002/000000001", "001/000000070"):
        assert ask(merged_url, f"pair/{name}/mask.png")[0] == 404


@pytest.mark.parametrize(
    "query, said",
    [
        ("where=bogus%3D1", "The filter names 'bogus', which is no column"),
        ("where=score", "unclear"),
        ("where=class%3C3", "compares class"),
        ("where=score%3E%3Dtwo", "score holds numbers, and two is no number"),
        ("sort=bogus", "no column 'bogus' to sort by"),
        ("first=-1", "first is '-1'"),
        ("count=9999999999", "count is"),
        ("&".join(["where=score>0"] * 101), "exceeded"),
    ],
)
def test_a_question_that_makes_no_sense(plain_url: str, query: str, said: str) -> None:
    status, headers, content = ask(plain_url, f"pairs.json?{query}")
    assert (status, headers["content-type"]) == (400, "text/plain; charset=utf-8")
    assert said in content.decode()


def test_every_answer_forbids_what_a_page_of_pictures_needs_not(plain_url: str) -> None:
    for path in ("", "view.js", "about.json", "pair/000000001/outline.svg", "nothing", "/"):
        headers = ask(plain_url, path)[1]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"


def test_texts_of_the_dataset_come_as_json_alone(plain_url: str) -> None:
    _, headers, content = ask(plain_url, "pair/000000002/pair.json")
    assert headers["content-type"] == "application/json"
    assert json.loads(content)["row"]["<b class=evil>"] == f"{HOSTILE} 2"
    assert HOSTILE.encode() not in ask(plain_url)[2]


def test_some_pairs_alone(plain: Path) -> None:
    with serving(plain, "--where", "attempt=0", "--limit", 5) as (url, _):
        found = read(url, "pairs.json")
        assert [pair["name"] for pair in found["pairs"]] == [f"{n:09d}" for n in (0, 1, 2, 4, 5)]
        assert read(url, "about.json")["pairs"] == 5
        assert sum(read(url, "about.json")["classes"].values()) == 5
        for name in ("000000003", "000000006"):
            assert ask(url, f"pair/{name}/image.png")[0] == 404
            assert ask(url, f"pair/{name}/pair.json")[0] == 404


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, 127.0.0.2 is no address of this machine")
def test_other_addresses_of_this_machine_do_not_answer(plain_url: str) -> None:
    port = urlsplit(plain_url).port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=GUARD_SECONDS).close()


def test_ctrl_c_ends_it_as_meant(plain: Path) -> None:
    with serving(plain) as (url, process):
        assert ask(url)[0] == 200
        # A browser keeps connections open, which nothing has to wait for.
        place = urlsplit(url)
        with socket.create_connection((place.hostname, place.port)):
            process.send_signal(signal.SIGINT)
            assert process.wait(GUARD_SECONDS) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_a_port_that_is_taken_or_is_none(plain: Path) -> None:
    with serving(plain) as (url, _):
        line = error_line(run("view", plain, "--port", urlsplit(url).port), 2)
        assert f"--port {urlsplit(url).port} cannot be had: another program uses it." in line
    assert "--port 70000 cannot be had" in error_line(run("view", plain, "--port", 70000), 2)


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["{}/nothing"], 3, "is no busigen dataset"),
        (["s3://bucket/data"], 2, "reads folders, and s3://bucket/data is a URL"),
        (["{}", "--healthy", "{}/nothing"], 3, "--healthy"),
        (["{}", "--limit", "0"], 2, "--limit is 0"),
        (["{}", "--where", "bogus=1"], 2, "'bogus', which is no column"),
        (["{}", "--where", "score>2"], 3, "no pair of"),
        (["{}", "--html", "page.html", "--port", "8000"], 2, "--port and --html"),
        (["{}", "--replay"], 2, "backgrounds are not synthetic"),
        (["{}", "--bundle", "{}"], 2, "--bundle is for --replay"),
    ],
)
def test_what_cannot_be_shown(plain: Path, arguments: list[str], code: int, said: str) -> None:
    assert said in error_line(run("view", *(argument.format(plain) for argument in arguments)), code)


def test_a_manifest_that_is_not_its_records(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "set"))
    table = pl.read_parquet(folder / "manifest.parquet")
    for changed in (table.reverse(), table.with_columns(pl.col("score").cast(pl.String)), table.head(5)):
        changed.write_parquet(folder / "manifest.parquet")
        assert "manifest.parquet" in error_line(run("view", folder), 5)


def test_synthetic_backgrounds_are_drawn_again(tmp_path: Path) -> None:
    small = ("--count", 3, "--shard-size", 3, "--threads", 1, "--seed", 5)
    assert run("generate", *small, "--out", tmp_path / "set").returncode == 0
    with serving(tmp_path / "set", "--replay") as (url, _):
        for sample in Dataset.open(tmp_path / "set").samples(range(3)):
            assert read(url, f"pair/{sample.index:09d}/pair.json")["beside"] == "Synthetic background, drawn again"
            status, _, content = ask(url, f"pair/{sample.index:09d}/healthy.png")
            assert status == 200
            changed = np.asarray(Image.open(io.BytesIO(content))) != sample.image
            assert not (changed & ~edit_region(sample.mask, np.ones_like(sample.mask))).any()
            assert 0 < changed.sum() <= sample.row["edit_pixels"]
