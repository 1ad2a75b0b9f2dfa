"""Files that appear when they are complete."""

import os

import pytest

from ladder_jax import files


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "out.json"
    with files.replacing(path) as part:
        part.write_text("new")
        assert not path.exists() and part.suffix == ".json"
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(OSError), files.replacing(path):
        raise OSError("before it is there")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["out.json"]


def test_permissions_links_and_pipes_stay(tmp_path):
    path, link = tmp_path / "out.txt", tmp_path / "link.txt"
    files.write_text(path, "old")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write_text(link, "naïve")
    assert link.is_symlink() and path.read_text(encoding="utf-8") == "naïve"
    assert path.stat().st_mode & 0o777 == 0o640
    reader, writer = os.pipe()
    files.write_text(f"/dev/fd/{writer}", "to a pipe")
    os.close(writer)
    assert os.read(reader, 100) == b"to a pipe"
    os.close(reader)
