"""No damage to a checkpoint goes unseen, and the one before it is taken."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_states import ABSTRACT, assert_same, make_state, opening, save

from core_flax import snapshot
from core_flax.checkpoint import Checkpoints, list_steps, load_params
from core_flax.config import CheckpointConfig
from core_flax.types import UserError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def opened(folder):
    with opening(folder) as make:
        yield make


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    path.write_bytes(random.Random(0).randbytes(max(64, path.stat().st_size)))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(folder, CheckpointConfig())
    save(checkpoints, 1, 2)
    checkpoints.close()
    return folder


@pytest.mark.parametrize("harm", [flip, truncate, garble, Path.unlink])
def test_no_damage_to_any_file_goes_unseen(opened, folder, two_steps, harm):
    """Whatever happens to one file of the newest: its right content or the one before, never anything else."""
    files = sorted(path.relative_to(two_steps) for path in (two_steps / "2").rglob("*") if path.is_file())
    outcomes = {}
    for file in files:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(two_steps, folder)
        harm(folder / file)
        checkpoints, said = opened()
        state, step = checkpoints.restore_latest(ABSTRACT)
        assert_same(state, make_state(step))
        assert (step, len(said), (folder / "2.corrupt").exists()) in [(2, 0, False), (1, 1, True)], file
        outcomes[str(file)] = step
    assert outcomes["2/manifest/manifest.json"] == 1
    assert [step for file, step in outcomes.items() if "/d/" in file].count(1) >= 1


def test_every_byte_of_the_arrays_is_guarded(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    kernel = np.asarray(make_state(2).params["encoder"]["kernel"]).tobytes()
    path, start = next(
        (path, found)
        for path in (folder / "2").rglob("*")
        if path.is_file() and (found := path.read_bytes().find(kernel[:64])) >= 0
    )
    content = path.read_bytes()
    checkpoints, _ = opened()
    for byte in random.Random(0).sample(range(len(kernel)), 8):
        changed = bytearray(content)
        changed[start + byte] ^= 0x80
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"step 2 .* is damaged .*; others: 1"):
            checkpoints.restore(2, ABSTRACT)
    path.write_bytes(content)
    assert_same(checkpoints.restore(2, ABSTRACT), make_state(2))


def test_a_wrong_fingerprint_is_damage(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    path = folder / "2" / "manifest" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["arrays"]["params/scale"]["fingerprint"] ^= 1
    path.write_text(json.dumps(snapshot.seal(manifest)))
    checkpoints, said = opened()
    assert checkpoints.restore_latest(ABSTRACT)[1] == 1
    assert len(said) == 1 and "\n" not in said[0]
    assert "step 2 is damaged (params/scale does not have the bits that were saved): going back to step 1" in said[0]


def test_what_is_damaged_is_set_aside_and_blocks_no_save(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    for number in ("", "-2"):
        flip(folder / "2" / "manifest" / "manifest.json")
        checkpoints, _ = opened()
        assert checkpoints.restore_latest(ABSTRACT)[1] == 1
        assert (folder / f"2.corrupt{number}" / "arrays").is_dir()
        save(checkpoints, 2)
        state, step = checkpoints.restore_latest(ABSTRACT)
        assert step == 2
        assert_same(state, make_state(2))
    assert sorted(os.listdir(folder)) == ["1", "2", "2.corrupt", "2.corrupt-2"]
    flip(folder / "1" / "manifest" / "manifest.json")
    save(checkpoints, 1)
    assert_same(checkpoints.restore(1, ABSTRACT), make_state(1))


def test_an_empty_folder_is_damage(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    (folder / "3").mkdir()
    checkpoints, said = opened()
    assert checkpoints.restore_latest(ABSTRACT)[1] == 2
    assert "its manifest cannot be read" in said[0]


def test_all_damaged_is_an_error_and_nothing_is_moved(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    for step in ("1", "2"):
        truncate(folder / step / "manifest" / "manifest.json")
    for _ in range(2):  # a second try must not take the folder for an empty one
        checkpoints, said = opened()
        with pytest.raises(UserError, match=f"no checkpoint in {folder} is intact .step 2: .*step 1: ") as error:
            checkpoints.restore_latest(ABSTRACT)
        assert "\n" not in str(error.value) and said == []
    with pytest.raises(UserError, match="is intact"):
        load_params(folder)
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_another_schema_is_refused(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    path = folder / "2" / "manifest" / "manifest.json"
    path.write_text(json.dumps(snapshot.seal(json.loads(path.read_text()) | {"schema": 2})))
    checkpoints, _ = opened()
    with pytest.raises(UserError, match="has schema 2 and this version reads 1"):
        checkpoints.restore_latest(ABSTRACT)


def test_leftovers_go_and_the_users_files_stay(opened, folder):
    for name in ("7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-17", "3.deleted", "5.corrupt", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    checkpoints, _ = opened()
    assert sorted(os.listdir(folder)) == ["5.corrupt", "notes"]
    save(checkpoints, 7)
    assert checkpoints.steps() == [7]


def test_a_deletion_that_is_interrupted_leaves_no_checkpoint(opened, folder, monkeypatch):
    checkpoints, _ = opened(keep_last=1)
    save(checkpoints, 1)
    monkeypatch.setattr(
        type(checkpoints.directory), "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2)
    assert list_steps(folder) == [2] and sorted(os.listdir(folder)) == ["1.deleted", "2"]
    monkeypatch.undo()
    opened()
    assert os.listdir(folder) == ["2"]
