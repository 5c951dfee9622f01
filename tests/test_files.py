"""The ground floor's files: an atomic write is whole or not there, and leaves nothing behind."""

import pytest

from refmoe.files import cache_folder, write_atomically


def fail(target, error, folder=False):
    with write_atomically(target) as part:
        if folder:
            part.mkdir()
            part = part / "x"
        part.write_text("half")
        raise error


def test_a_target_has_its_name_only_once_it_is_whole(tmp_path):
    target = tmp_path / "t.json"
    target.write_text("before")
    with write_atomically(target) as part:
        part.write_text("after")
        assert target.read_text() == "before"
        assert part.parent == tmp_path
    assert target.read_text() == "after"
    with pytest.raises(KeyboardInterrupt):
        fail(target, KeyboardInterrupt())
    assert target.read_text() == "after"
    assert [f.name for f in tmp_path.iterdir()] == ["t.json"]


def test_a_folder_and_a_given_part_work_too(tmp_path):
    with write_atomically(tmp_path / "folder") as part:
        part.mkdir()
        (part / "x").write_text("x")
    assert (tmp_path / "folder" / "x").read_text() == "x"
    with pytest.raises(OSError, match="full"):
        fail(tmp_path / "other", OSError("full"), folder=True)
    with write_atomically(tmp_path / "y", part=tmp_path / "z", to_disk=True) as part:
        assert part == tmp_path / "z"
        part.write_text("y")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["folder", "y"]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "x"):
        pass


def test_caches_lie_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("dense") == tmp_path / "refmoe" / "dense"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("usage") == tmp_path / ".cache" / "refmoe" / "usage"
