"""Tar files whose headers claim, or cost, gigabytes: refused with one line, in little memory, by every reader."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from busigen.runtime.dataset.reader import open_headers

ROOT = Path(__file__).parents[3]

ROOM = 512 << 20
"""Bytes that a reader may map beyond what it has after its imports. The largest claim below is eight times as much."""

LIMITED = f"""
import resource, sys
from pathlib import Path
from busigen.errors import IntegrityError
from busigen.evaluation.reading.listing import list_archives
from busigen.runtime.dataset.reader import read_members
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + {ROOM},) * 2)
path = Path(sys.argv[1])
refused = []
print(len(list_archives([path], refused)), *(refusal.problem for refusal in refused))
try:
    list(read_members(path, range(1)))
except IntegrityError as error:
    print(error)
"""


def header(kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("a.png")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def overlapping(size: int) -> bytes:
    """PAX records of two bytes that lie inside one another: some tarfiles keep a key as long as the rest for each."""
    return header(tarfile.XHDTYPE, size) + (b"2 " * (size // 2 - 1) + b"=\n").ljust(size, b"\0")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set by what /proc says")
@pytest.mark.parametrize(
    ("start", "claimed"),
    [
        (header(tarfile.GNUTYPE_LONGNAME, 4 << 30), 4 << 30),
        (header(tarfile.GNUTYPE_LONGLINK, 4 << 30), 4 << 30),
        (header(tarfile.XHDTYPE, 4 << 30), 4 << 30),
        (header(tarfile.XGLTYPE, 4 << 30), 4 << 30),
        (header(tarfile.SOLARIS_XHDTYPE, 4 << 30), 4 << 30),
        (overlapping(1 << 17), 0),
        ((header(tarfile.XHDTYPE, 512) + b"19 comment=nothing\n".ljust(512, b"\0")) * 200, 0),
    ],
    ids=["long name", "long link", "PAX", "global PAX", "Solaris PAX", "records within records", "chained"],
)
def test_headers_that_claim_gigabytes_are_not_read(tmp_path: Path, start: bytes, claimed: int) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(start)
        # A hole: nothing on disk, but a reader who believes the header gets zeros, and as many as it claims.
        file.truncate(len(start) + claimed)
        file.seek(0, io.SEEK_END)
        file.write(header(tarfile.REGTYPE, 0) + bytes(1024))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    audit, verify = done.stdout.splitlines()
    assert audit.startswith("0 It cannot be read as a tar file: the headers of one member claim more than 16,384 bytes")
    assert "the headers of one member claim more than 16,384 bytes" in verify


def test_long_names_and_records_of_the_usual_size_are_read(tmp_path: Path) -> None:
    name = f"{'folder/' * 60}scan.png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form, pax_headers={"comment": "of all"}) as tar:
            for number in range(3):
                member = tarfile.TarInfo(f"{number}/{name}")
                member.size, member.mtime = 5, 0.5
                member.pax_headers = {"SCHILY.xattr.user.note": "x" * 8000}
                tar.addfile(member, io.BytesIO(b"bytes"))
        with open_headers(path) as tar:
            found = [tar.next() for _ in range(3)]
            assert [(member.name, tar.read(member)) for member in found] == [
                (f"{number}/{name}", b"bytes") for number in range(3)
            ]
            assert tar.next() is None
