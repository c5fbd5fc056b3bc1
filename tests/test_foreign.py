"""Files from elsewhere: nothing is waited for, followed or read without an end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from busigen.foreign import ForeignFileError, open_file, read_file


def test_a_file_within_its_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ForeignFileError, match="has 5 bytes; at most 4 are read"):
        read_file(path, 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ForeignFileError, match="is a pipe, not a file"):
        open_file(tmp_path / "pipe")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs devices")
def test_a_link_to_a_device_without_an_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(ForeignFileError, match="is a device, not a file"):
        read_file(tmp_path / "endless", 100)


def test_a_folder_and_a_missing_file_say_so(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        open_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")


def test_links_are_followed_where_no_root_is_given_and_never_beneath_one(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (tmp_path / "way").symlink_to(root)
    assert read_file(root / "file", 10) == b"secret"
    for path in (root / "file", root / "folder" / "secret", root / ".." / "outside" / "secret", outside / "secret"):
        with pytest.raises(ForeignFileError):
            read_file(path, 10, root=root)
    # A link above the root is the user's own way to it.
    (root / "plain").write_bytes(b"plain")
    assert read_file(tmp_path / "way" / "plain", 10, root=tmp_path / "way") == b"plain"
