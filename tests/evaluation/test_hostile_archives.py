"""Archives that are damaged or hostile: what is refused of them, and that it costs neither memory nor a file."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from busigen.data.sources.records import Refusal
from busigen.errors import InputError
from busigen.evaluation.reading import listing
from busigen.evaluation.reading.sets import read_set
from tests.evaluation.test_sets import pair, write_tar


def test_hostile_members_are_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = pair()
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "a.tar", "w") as tar:

        def add(name: str, content: bytes = b"", **fields: object) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        add("good.image.png", image)
        add("good.mask.png", mask)
        add("good.image.png", image)
        add("../../escape.image.png", image)
        add("link.image.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.image.png", type=tarfile.LNKTYPE, linkname="good.image.png")
        add("device.image.png", type=tarfile.CHRTYPE)
        add(f"{'x' * 600}.image.png", image)
        add("large.image.png", b"\0" * 40_000)
        add("row.json", b"[" * 2000)
        add("row.image.png", b"no image")
    monkeypatch.setitem(listing._LIMITS, "image", 39_999 if len(image) < 39_999 else len(image))
    before = {path for path in tmp_path.rglob("*")}
    found = read_set(shards)
    # A name that points outside is a name and nothing else.
    assert found.table["id"].to_list() == ["good", "../../escape"]
    refused = {refusal.file.removeprefix("a.tar/")[:20]: refusal.problem for refusal in found.refused}
    assert {name for name, problem in refused.items() if problem == "It is no plain file."} == {
        "link.image.png",
        "hard.image.png",
        "device.image.png",
    }
    assert "600" not in refused["x" * 20] and "characters" in refused["x" * 20]
    assert "second one" in refused["good.image.png"]
    assert "bytes; 1 to" in refused["large.image.png"]
    assert "no JSON object" in refused["row.json"]
    assert "not a PNG" in refused["row.image.png"]
    assert {path for path in tmp_path.rglob("*")} == before


def test_an_oversized_member_costs_no_memory(tmp_path: Path) -> None:
    """Four sparse gigabytes that claim to be an image are refused by their header."""
    image, mask = pair()
    path = write_tar(tmp_path / "bomb.tar", {"a.image.png": image, "a.mask.png": mask})
    with path.open("r+b") as file:
        member = tarfile.TarInfo("b.image.png")
        member.size = 4 << 30
        file.seek(0, io.SEEK_SET)
        with tarfile.open(path) as tar:
            end = tar.getmembers()[-1]
            file.seek(end.offset_data + -(-end.size // 512) * 512)
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + member.size + 1024)
    tracemalloc.start()
    try:
        found = read_set(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 1
    assert [str(member.size) in refusal.problem for refusal in found.refused] == [True]
    assert peak < 200 << 20  # One image's frames and its decoding take some megabytes; the member claims 4096.


def test_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    image, mask = pair()
    buffer = io.BytesIO()
    Image.new("1", (19_000, 19_000)).save(buffer, "PNG")
    members = {"a.png": image, "a.mask.png": mask, "bomb.png": buffer.getvalue()}
    found = read_set(write_tar(tmp_path / "set.tar", members))
    assert len(found) == 1
    assert found.refused[0].problem == "bomb.png unpacks to more than 64,000,000 pixels."


def test_compressed_archives_are_not_unpacked(tmp_path: Path) -> None:
    image, mask = pair()
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        for name, content in (("a.png", image), ("a.mask.png", mask)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match=r"holds no image that can be read.*cannot be read as a tar file"):
        read_set(tmp_path)


def test_a_shard_that_is_cut_short(tmp_path: Path) -> None:
    members = {}
    for number in range(4):
        members[f"{number}.image.png"], members[f"{number}.mask.png"] = pair(number)
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = read_set(path)
    assert 1 <= len(found) < 4
    assert found.refused


@pytest.mark.parametrize("size", [-512, -1, -(1 << 40)])
def test_a_member_of_negative_size_ends_its_archive(tmp_path: Path, size: int) -> None:
    """One of -512 bytes leads back to its own header, over and over."""
    image, mask = pair()
    shards = tmp_path / "shards"
    shards.mkdir()
    path = write_tar(shards / "a.tar", {"a.png": image, "a.mask.png": mask})
    write_tar(shards / "b.tar", {"b.png": image, "b.mask.png": mask})
    member = tarfile.TarInfo("evil.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size + (1 << 96)).to_bytes(12, "big")  # Base 256, as GNU tar writes what octal cannot hold.
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end] + bytes(header) + bytes(1024))
    found = read_set(shards)
    assert found.table["id"].to_list() == ["a", "b"]
    assert len(found.refused) == 1
    assert "nothing behind it is read" in found.refused[0].problem


def extended(records: bytes) -> bytes:
    """A PAX header and its records."""
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, len(records)
    return member.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    "headers",
    [
        extended(b"10 path=a\n") * 3000,
        extended(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
        extended(b"23 GNU.sparse.map=0,x\n\n"),
        extended(b"22 GNU.sparse.size=10\n28 GNU.sparse.numblocks=two\n"),
    ],
    ids=["chained", "no sparse map", "sparse map of words", "blocks in words"],
)
def test_malformed_records_cost_one_archive_and_no_more(tmp_path: Path, headers: bytes) -> None:
    image, mask = pair()
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.tar").write_bytes(headers + tarfile.TarInfo("x.png").tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    write_tar(shards / "b.tar", {"b.png": image, "b.mask.png": mask})
    found = read_set(shards)
    assert found.table["id"].to_list() == ["b"]
    assert [refusal.file.partition("/")[0] for refusal in found.refused] == ["a.tar"]


@pytest.mark.parametrize("error", [KeyError("GNU.sparse.map"), IndexError("list index out of range"), RecursionError()])
def test_what_tarfile_lets_out_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": b"x"})

    def fail(_: tarfile.TarFile) -> None:
        raise error

    monkeypatch.setattr(tarfile.TarFile, "next", fail)
    refused: list[Refusal] = []
    assert listing.list_archives([path], refused) == []
    assert [refusal.file for refusal in refused] == ["a.tar"]


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    image, mask = pair()
    path = write_tar(tmp_path / "a.tar", {"a.png": image, "a.mask.png": mask, "b.png": image})
    with tarfile.open(path) as tar:
        at = tar.getmembers()[-1].offset
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    found = read_set(path)
    assert len(found) == 1
    assert f"header at byte {at}" in found.refused[0].problem


def test_names_send_a_terminal_nothing(tmp_path: Path) -> None:
    image, mask = pair()
    members = {"\x1b[2Ja.png": image, "\x1b[2Ja.mask.png": mask, "\x1b]0;owned\x07\x9b.png": b"no image"}
    found = read_set(write_tar(tmp_path / "a.tar", members))
    assert found.table["id"].to_list() == ["\\x1b[2Ja"]
    said = [text for refusal in found.refused for text in refusal.to_dict().values()]
    assert len(found.refused) == 1
    assert all(text.isprintable() for text in said)
