"""Text encoded by the workers of a Beam pipeline, on its direct runner, becomes the same bytes as by this process."""

import gzip
from importlib.util import find_spec

import pytest
from conftest import write_corpus

from bert_flax import prepare as bert
from core_flax.data import pipeline
from core_flax.types import UserError
from lm_flax import prepare as lm

needs_beam = pytest.mark.skipif(find_spec("apache_beam") is None, reason="apache-beam is not installed: extra [beam]")
# What Beam's own modules say of Python and protobuf.
pytestmark = pytest.mark.filterwarnings("default")
RUNNER = ("runner=FnApiRunner",)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three files, one of them gzipped, of 4, 30 and 9 documents."""
    folder = tmp_path_factory.mktemp("inputs")
    files = [write_corpus(folder / f"{number}.txt", size, number) for number, size in enumerate((4, 30, 9))]
    packed = folder / "1.txt.gz"
    packed.write_bytes(gzip.compress(files[1].read_bytes()))
    return str(files[0]), str(packed), str(files[2])


def both(module, folder, **settings):
    """What prepare writes here, and by Beam: content by name."""
    written = []
    for name, way in (("here", {"num_workers": 1}), ("beam", {"beam": RUNNER})):
        output = folder / name
        module.prepare(module.PrepareConfig(output=str(output), **settings, **way))
        written.append({path.name: path.read_bytes() for path in output.iterdir()})
    return written


@needs_beam
def test_bert(inputs, tmp_path, monkeypatch):
    # Documents are cut into blocks, as long ones are.
    monkeypatch.setattr(bert, "_BLOCK_CHARACTERS", 200)
    here, beam = both(bert, tmp_path, input=inputs, vocab_size=160, valid_fraction=0.2)
    assert here == beam and "valid-00000-of-00001.arrayrecord" in here


@needs_beam
@pytest.mark.parametrize("held_out", [{"held_out": "end", "valid_fraction": 0.4}, {"held_out": "documents"}])
def test_language_models(inputs, tmp_path, held_out):
    """With the end held out, that begins within the second of the inputs."""
    here, beam = both(lm, tmp_path, input=inputs, tokenizer="char", documents="blank-line", **held_out)
    assert here == beam and len(here["valid.tokens"]) > 1000


@needs_beam
def test_held_out_inputs(inputs, tmp_path):
    here, beam = both(lm, tmp_path, input=inputs[:2], valid=inputs[2:], tokenizer="word")
    assert here == beam


@needs_beam
def test_a_workers_user_error_is_the_users(inputs, tmp_path):
    lonely = tmp_path / "lonely.txt"
    lonely.write_text("Two are here. They stay.\n\nOne sentence only.\n")
    config = bert.PrepareConfig((inputs[0], str(lonely)), str(tmp_path / "out"), vocab_size=160, beam=RUNNER)
    with pytest.raises(UserError, match=r"lonely.txt:3: the document has one sentence only"):
        bert.prepare(config)
    assert not (tmp_path / "out").exists()


@needs_beam
def test_an_unknown_runner(tmp_path):
    with pytest.raises(UserError, match="--beam runner=NoRunner: Unexpected pipeline runner: NoRunner"):
        list(pipeline.each_of(str.split, ["a b"], ["runner=NoRunner"], tmp_path))


def test_without_beam(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--beam needs the package apache-beam; install the extra \[beam\]"):
        list(pipeline.each_of(str.split, ["a b"], RUNNER, tmp_path))


@pytest.mark.parametrize("module", [bert, lm])
def test_workers_here_and_there(module):
    with pytest.raises(UserError, match="--num-workers is for processes of this machine"):
        module.PrepareConfig(("a",), "b", num_workers=2, beam=RUNNER)
