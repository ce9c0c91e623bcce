"""The folder that prepare writes: nothing of anybody else's is removed, nothing is left after an error."""

import errno
import fcntl
import re

import pytest

from core_flax.data import folder
from core_flax.lock import only_writer
from core_flax.types import UserError

NAMES = re.compile(r"train\.index\.(npy|partial)|words\.txt|manifest\.json|prepare\.lock")


def own(*read):
    return folder.OwnFiles(NAMES, [str(path) for path in read])


def filled(home, *names):
    home.mkdir()
    for name in names:
        (home / name).write_text("work")
    return home


def contents(home):
    return {path.name: path.read_text() for path in home.iterdir()}


def test_leftovers_are_cleared_and_an_error_leaves_nothing(tmp_path):
    home = filled(tmp_path / "data", "words.txt", "train.index.partial", "prepare.lock")
    with folder.own_folder(home, own(tmp_path / "input.txt")):
        assert [path.name for path in home.iterdir()] == ["prepare.lock"]
        (home / "words.txt").write_text("new")
    assert contents(home) == {"words.txt": "new"}
    (home / "train.index.npy").write_text("new")
    with pytest.raises(RuntimeError), folder.own_folder(home, own()):
        (home / "words.txt").write_text("half")
        raise RuntimeError
    assert not home.exists()
    with pytest.raises(UserError, match=f"cannot write {home}: no space; free"), folder.own_folder(home, own()):
        raise OSError(28, "no space")


@pytest.mark.parametrize("names", [("words.txt",), ("train.index.npy", "thesis.tex")], ids=str)
def test_files_of_others_stay(tmp_path, names):
    """Ours are known by their neighbours: a name that anybody could give is not enough."""
    home = filled(tmp_path / "data", *names)
    with pytest.raises(UserError, match="holds other files"), folder.own_folder(home, own()):
        pytest.fail("was given away")
    assert contents(home) == dict.fromkeys(names, "work")


@pytest.mark.parametrize("way", ["path", "link", "folder"])
def test_what_is_to_be_read_stays(tmp_path, way):
    home = filled(tmp_path / "data", "words.txt", "train.index.npy")
    (tmp_path / "link").symlink_to(home / "words.txt")
    read = {"path": home / "words.txt", "link": tmp_path / "link", "folder": home}[way]
    with pytest.raises(UserError, match="is to be read, but lies in"), folder.own_folder(home, own(read)):
        pytest.fail("was given away")
    assert contents(home) == {"words.txt": "work", "train.index.npy": "work"}


def made(new):
    new.mkdir()
    (new / "words.txt").write_text("new")
    return "made"


def test_a_folder_is_replaced(tmp_path):
    home = filled(tmp_path / "data", "manifest.json", "train.index.npy")
    filled(tmp_path / "data.old", "words.txt", "train.index.npy")
    assert folder.replace(home, own(), made) == "made"
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and contents(home) == {"words.txt": "new"}


@pytest.mark.parametrize("beside", ["data", "data.new", "data.old"])
def test_replacing_takes_nothing_of_others_along(tmp_path, beside):
    filled(tmp_path / "data", "manifest.json", "train.index.npy")
    (tmp_path / beside).mkdir(exist_ok=True)
    (tmp_path / beside / "manifest.json").write_text("work")
    (tmp_path / beside / "thesis.tex").write_text("work")
    with pytest.raises(UserError, match="holds other files"):
        folder.replace(tmp_path / "data", own(), made)
    assert {"manifest.json", "thesis.tex"} <= contents(tmp_path / beside).keys()


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot lock .*run\.lock: No locks available; give a folder elsewhere"):
        only_writer(tmp_path / "run.lock", "another run").__enter__()


def test_a_lock_that_its_holder_has_just_removed_is_another_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: (tmp_path / "run.lock").unlink())
    with pytest.raises(UserError, match="another run"):
        only_writer(tmp_path / "run.lock", "another run").__enter__()
