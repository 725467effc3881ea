"""Whose cache is used, and whose index."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omnivl.data import cache_folder as module
from omnivl.data.cache_folder import cache_folder, index_secret
from omnivl.data.index_file import load_index

NOBODY = 65534


@pytest.fixture(autouse=True)
def _forgets(monkeypatch, tmp_path):
    """Each test has its own home and temporary folder, and starts without a secret."""
    monkeypatch.delenv("OMNIVL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir(mode=0o777)
    for cached in (module._folder_of_process, module._warn, module.index_secret):
        cached.cache_clear()
    yield
    module.index_secret.cache_clear()


def test_the_cache_is_below_the_home_folder_and_private(tmp_path):
    assert cache_folder() == tmp_path / "home" / "omnivl"
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700


def test_rights_of_others_in_the_home_cache_are_taken_away(tmp_path):
    (tmp_path / "home" / "omnivl").mkdir(parents=True)
    (tmp_path / "home" / "omnivl").chmod(0o775)
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o755


def test_a_named_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("OMNIVL_CACHE", str(shared))
    with pytest.warns(UserWarning, match=r"is not used: .* or others can write into it"):
        assert cache_folder() == tmp_path / "home" / "omnivl"
    assert stat.S_IMODE(shared.stat().st_mode) == 0o777, "it is not the engine's to change"


@pytest.fixture
def _no_home(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_it_is_a_private_temporary_folder(tmp_path):
    folder = cache_folder()
    assert folder == tmp_path / "temporary" / f"omnivl-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.usefixtures("_no_home")
@pytest.mark.parametrize("by", ["mode", "link", "owner"])
def test_a_neighbours_temporary_folder_is_left_alone(tmp_path, by):
    folder = tmp_path / "temporary" / f"omnivl-{os.getuid()}"
    if by == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777 if by == "mode" else 0o755)
    if by == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can make a folder of another user")
        os.chown(folder, NOBODY, NOBODY)
    private = cache_folder()
    assert private.name.startswith(f"omnivl-{os.getuid()}-")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert cache_folder() == private


def test_a_folder_of_one_process_is_removed_at_its_end(tmp_path):
    (tmp_path / "temporary" / f"omnivl-{os.getuid()}").symlink_to(tmp_path)
    code = "from omnivl.data.cache_folder import cache_folder; print(cache_folder())"
    env = {**os.environ, "XDG_CACHE_HOME": "/dev/null", "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path / "temporary"
    assert not folder.exists()


def test_the_secret_is_kept_and_private():
    first = index_secret()
    module.index_secret.cache_clear()
    assert index_secret() == first
    path = cache_folder() / "index.key"
    assert path.read_bytes() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_secret_that_others_can_read_is_not_used():
    index_secret()
    (cache_folder() / "index.key").chmod(0o644)
    module.index_secret.cache_clear()
    assert index_secret() != (cache_folder() / "index.key").read_bytes()


def test_an_index_beside_the_shard_that_another_made_is_not_believed(write_tar, png, tmp_path):
    """It swaps the captions of two pictures, and has the right stamp."""
    members = [("a.png", png), ("a.txt", b"a cat"), ("b.png", png), ("b.txt", b"a dog")]
    path, cache = write_tar(members), tmp_path / "index.safetensors"
    whole = load_index(path, "s", cache)
    columns = load_file(cache)
    columns["text"] = columns["text"][::-1].copy()
    save_file(columns, cache)
    assert np.array_equal(load_index(path, "s", cache).text, whole.text)
    assert np.array_equal(load_index(path, "s", cache).text, load_file(cache)["text"]), "it was written anew"


def test_an_index_of_another_users_secret_is_built_again(write_tar, pairs, tmp_path):
    path, cache = write_tar(pairs(2)), tmp_path / "index.safetensors"
    load_index(path, "s", cache)
    theirs = cache.read_bytes()
    (cache_folder() / "index.key").unlink()
    module.index_secret.cache_clear()
    load_index(path, "s", cache)
    assert cache.read_bytes() != theirs


def test_a_shard_put_in_place_with_the_old_time_gets_a_new_index(write_tar, pairs, tmp_path):
    path, cache = write_tar(pairs(2)), tmp_path / "index.safetensors"
    before = path.stat()
    load_index(path, "s", cache)
    other = write_tar([(name.replace("000", "900"), data) for name, data in pairs(2)])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert other.stat().st_size == before.st_size
    assert load_index(path, "s", cache).keys == ("9000", "9001")
