"""Files and folders appear whole or not at all."""

import os
import shutil
from collections import namedtuple

import pytest

from sparsekit.files import replace_dir, replace_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]
    with replace_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x.json"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    folder = tmp_path / "model"
    with replace_dir(folder, 0) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(RuntimeError), replace_dir(folder, 0) as temporary:
        (temporary / "a").write_text("2")
        raise RuntimeError
    assert (folder / "a").read_text() == "1" and os.listdir(tmp_path) == ["model"]


def test_others_may_read_what_is_written(tmp_path):
    before = os.umask(0o022)
    try:
        with replace_dir(tmp_path / "model", 0) as temporary:
            (temporary / "secret").touch(mode=0o600)
        with replace_file(tmp_path / "x") as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("model", "model/secret", "x")] == [
        0o755,
        0o644,
        0o644,
    ]


def test_other_files_are_carried_over_and_stale_ones_are_not(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in ("tokenizer.json", "model-1.safetensors", "config.json", "sub/x"):
        (folder / name).write_text("old")
    with replace_dir(folder, 0, stale=("model*.safetensors",)) as temporary:
        (temporary / "config.json").write_text("new")
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == [
        "config.json",
        "sub",
        "sub/x",
        "tokenizer.json",
    ]
    assert (folder / "config.json").read_text() == "new" and (folder / "tokenizer.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(OSError, match="needs 5.00 GB and 0.00 GB are free"), replace_dir(tmp_path / "model", 5 * 10**9):
        pytest.fail("the body must not run")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_no_failed_rename_loses_the_old_folder(tmp_path, monkeypatch, failing):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    rename, calls = os.rename, []

    def failing_rename(source, target):
        calls.append(target)
        if len(calls) >= failing if failing == 2 else len(calls) == failing:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_rename)
    if failing == 3:  # never reached: two renames do it
        with replace_dir(folder, 0, stale=("weights",)) as temporary:
            (temporary / "weights").write_text("new")
        assert (folder / "weights").read_text() == "new"
        return
    with pytest.raises(OSError, match="no") as raised, replace_dir(folder, 0) as temporary:
        (temporary / "weights").write_text("new")
    [kept] = [path for path in tmp_path.rglob("weights")]
    assert kept.read_text() == "old"
    if failing == 2:  # even putting it back failed: the error says where it is
        assert str(kept.parent) in raised.value.__notes__[0]
    else:
        assert kept.parent == folder and os.listdir(tmp_path) == ["model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with replace_dir(tmp_path / "link", 0) as temporary:
        (temporary / "x").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "1"


def test_the_working_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for path in (tmp_path, tmp_path / "inside"):
        with pytest.raises(ValueError, match="working directory"), replace_dir(path, 0):
            pytest.fail("the body must not run")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"), replace_dir(tmp_path / "model", 0):
        pytest.fail("the body must not run")
