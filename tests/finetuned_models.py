"""Fine-tuned models that several tests read; a plugin of tests/conftest.py."""

import pytest
import small_tasks
from small_tasks import QUICK, arguments, here, in_a_hurry, right


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return small_tasks.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    return small_tasks.write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="session")
def mrpc(bert_flax, model, glue, tmp_path_factory):
    """A folder with two seeds, on one device, and what was printed; for reading."""
    workdir = tmp_path_factory.mktemp("mrpc") / "run"
    with in_a_hurry():
        return workdir, right(bert_flax.run(*arguments("mrpc", glue, workdir, init=model, seeds=2)))


@pytest.fixture(scope="session")
def squad2(model, tmp_path_factory):
    """Data, and a folder with a run of which every evaluated step was saved; for reading."""
    home = tmp_path_factory.mktemp("squad2")
    small_tasks.write_squad(home / "data", 2)
    keep = QUICK | {"epochs": 3, "checkpoint__every_steps": 3, "checkpoint__keep_last": 9}
    with in_a_hurry():
        right(here(*arguments("squad2", home / "data", home / "run", init=model, **keep)))
    return home / "data", home / "run"
