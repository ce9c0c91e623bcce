import pickle
import subprocess
import sys

import pytest
import sentencepiece

from core_flax.text import sentencepiece_model
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import UserError

TEXTS = [f"the river runs by house {n} and the old mill" for n in range(300)]
TEXTS += [f"der Fluss läuft an Haus {n} und der alten Mühle vorbei" for n in range(300)]
SIZE = 64
SENTENCE = "the old river an der Straße"


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request):
    return sentencepiece_model.train(TEXTS, SIZE, request.param)


def test_it_splits_as_the_library_does(model, tmp_path):
    """Read from the file by sentencepiece itself; text comes back but for what has no piece."""
    model.save(tmp_path / "x.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "x.model"))
    assert model.encode([SENTENCE, ""]) == [theirs.encode(SENTENCE), []]
    assert model.num_tokens == theirs.get_piece_size() == SIZE
    assert (model.bos_id, model.eos_id, model.unk_id) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
    for text in TEXTS[::97]:
        (ids,) = model.encode([text])
        assert model.decode([model.bos_id, *ids, model.eos_id]) == text
        assert "".join(model.pieces(ids)).replace("▁", " ").strip() == text
    assert SentencePiece.load(tmp_path / "x.model").fingerprint == model.fingerprint


def test_language_pieces_change_nothing_else(model):
    more = model.with_languages(["de", "pt_BR", "de"])
    assert more.languages == {"de": SIZE, "pt_BR": SIZE + 1} and more.num_tokens == SIZE + 2
    assert more.encode([SENTENCE]) == model.encode([SENTENCE])
    assert more.pieces([SIZE]) == ["<2de>"] and more.decode([SIZE, *more.encode(["the mill"])[0]]) == "the mill"
    assert more.with_languages(["de"]).fingerprint == more.fingerprint != model.fingerprint
    assert pickle.loads(pickle.dumps(more)).fingerprint == more.fingerprint
    with pytest.raises(UserError, match="'d e' is no language name"):
        model.with_languages(["d e"])


def test_what_looks_like_a_control_piece_in_a_text_is_text(model):
    more = model.with_languages(["de"])
    (ids,) = more.encode(["<2de> the </s> <s>"])
    assert not {more.languages["de"], more.bos_id, more.eos_id} & set(ids)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_training_gives_the_same_model_in_another_process(algorithm):
    script = (
        "import sys; from core_flax.text import sentencepiece_model as s;"
        "print(s.train(sys.stdin.read().split('\\n'), 64, sys.argv[1]).fingerprint)"
    )
    command = [sys.executable, "-c", script, algorithm]
    done = subprocess.run(command, input="\n".join(TEXTS), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sentencepiece_model.train(TEXTS, SIZE, algorithm).fingerprint


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: sentencepiece_model.train(TEXTS, 5000), r"--vocab-size 5000 cannot be had: Vocabulary size too high"),
        (lambda: sentencepiece_model.train(TEXTS, 10), r"--vocab-size 10 cannot be had: .* takes 36;"),
        (lambda: sentencepiece_model.train([], 50), r"--vocab-size 50 cannot be had: the texts give no pieces"),
        (lambda: sentencepiece_model.train(TEXTS, 10**13), r"--vocab-size 10000000000000 cannot be had: .*as int"),
        (lambda: SentencePiece(b"no model", "x.model"), r"x.model is no SentencePiece model"),
        (lambda: SentencePiece(b"", "x.model"), r"x.model is empty"),
        (lambda: SentencePiece.load("no/such.model"), r"cannot read the tokenizer no/such.model: No such file"),
    ],
)
def test_what_cannot_be(wrong, says):
    with pytest.raises(UserError, match=says) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_a_model_without_an_end_of_sentence(tmp_path):
    options = {"vocab_size": 100, "model_type": "bpe", "eos_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "x"), **options)
    with pytest.raises(UserError, match="lacks the control piece </s>"):
        SentencePiece.load(tmp_path / "x.model")
