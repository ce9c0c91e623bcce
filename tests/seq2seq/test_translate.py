"""``translate`` on a small model of random weights: every line once and in its place, whatever the batch."""

import dataclasses
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_text import sentences
from small_models import drawn_params

from core_flax.beam import BeamSearch
from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig
from core_flax.run import CHECKPOINTS, Run
from core_flax.sampling import Sampling
from core_flax.state import TrainState
from core_flax.text import sentencepiece_model
from core_flax.text.sentences import split_sentences
from core_flax.types import UserError
from seq2seq_flax.architectures import make_model
from seq2seq_flax.cli import main
from seq2seq_flax.config import InputsConfig, TransformerConfig, TranslateConfig
from seq2seq_flax.decode import Draws, room_for
from seq2seq_flax.decode import translate as translate_tokens
from seq2seq_flax.pairs import TOKENIZER
from seq2seq_flax.translate import TranslateCommand
from seq2seq_flax.translator import Candidate, Translator, pieces_of

MODEL = TransformerConfig(vocab_size=72, num_layers=2, width=16, num_heads=2, mlp_width=16, tied_embeddings="none")
ROW_LENGTH = 24


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run as training leaves it, that translates from English into two languages; two entries are padding."""
    folder = tmp_path_factory.mktemp("run")
    texts = (text for pair in sentences(60, longest=4) for text in pair)
    tokenizer = sentencepiece_model.train(texts, 68).with_languages(["ne", "xx"])
    facts = {"directions": [["en", "ne"], ["en", "xx"]], "tagged": True}
    config = TranslateConfig(model=MODEL, inputs=InputsConfig(row_length=ROW_LENGTH))
    kind = "seq2seq_flax.transformer"
    Run(folder, kind, config, folder / "data", "none", tokenizer.fingerprint, facts).save(TOKENIZER, tokenizer.save)
    params = drawn_params(make_model(MODEL))
    params["decoder"]["layers"]["cross_attention"]["out"]["kernel"] *= 4.0  # so that the source matters
    checkpoints = Checkpoints(folder / CHECKPOINTS, CheckpointConfig())
    checkpoints.save(TrainState(jnp.int32(7), jax.tree.map(jnp.asarray, params), {}))
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def translator(workdir):
    return Translator.load(str(workdir))


LINES = [
    "river farmer",
    "",
    "the song",
    "market letter winter",
    "  ",
    "road",
    "doctor bridge road",
    "song a",
    "rg",
    "wi",
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("".join(f"{line}\n" for line in LINES), encoding="utf-8")
    return path


@pytest.fixture
def call(capsys, monkeypatch, workdir):
    """``seq2seq-flax`` in this process, on four devices, on a file or on what is piped in: (status, out, err)."""

    def call(command, *argv, piped=None, **options):
        if piped is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        options = {"workdir": workdir, "target_lang": "ne", "batch_size": 4} | options
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([command, *argv, *flags])
        return stop.value.code, *capsys.readouterr()

    return call


def by_itself(translator, text, search, language="ne", number=0):
    (line,) = translator.encode([("here", text)], translator.language_prefix(language), "refuse")
    return translator.translate([line], search, first_number=number)[0]


def test_every_line_is_translated_once_and_in_its_place(call, translator, source, tmp_path):
    """In batches of four, on four devices, sorted by length: what each line gives by itself."""
    output = tmp_path / "out.txt"
    status, out, err = call("translate", input=source, output=output)
    assert status == 0, err
    found = output.read_text(encoding="utf-8").split("\n")
    expected = [by_itself(translator, line.strip(), BeamSearch())[0].text for line in LINES]
    assert found == [*expected, ""]
    assert [line for line, text in zip(expected, LINES, strict=True) if not text.strip()] == ["", ""]
    assert len(set(expected)) > 6
    assert f"{output}: 10 lines translated with {translator.name.removeprefix('the run in ')}" in out


def test_a_pipe_gives_what_a_file_gives(call, source):
    _, expected, _ = call("translate", input=source)
    status, out, _ = call("translate", piped=source.read_bytes().rstrip(b"\n"))
    assert (status, out) == (0, expected) and expected.count("\n") == len(LINES)


def test_a_line_is_answered_before_the_next_one_comes(workdir, translator):
    """As a user at a terminal, or a program at the other end of two pipes, needs it."""
    expected = [by_itself(translator, line, BeamSearch(1), "xx")[0].text for line in ("road", "song")]
    argv = [sys.executable, "-m", "seq2seq_flax.cli", "translate", f"--workdir={workdir}", "--target-lang=xx"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*argv, "--beam-size=1"], **pipes) as process:
        answers = []
        for line in ("road", "song"):
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            answers.append(process.stdout.readline())
        process.stdin.close()
        assert process.wait(60) == 0
    assert answers == [f"{text}\n" for text in expected] and len(set(answers)) == 2


@pytest.mark.parametrize(("stream", "option"), [("input", "stdin"), ("output", "stdout")])
def test_a_stream_that_is_closed(call, source, monkeypatch, stream, option):
    """As a shell's ``<&-`` and ``>&-`` leave it, and some that start services."""
    monkeypatch.setattr(sys, option, None)
    status, _, err = call("translate", **{"input": "-" if stream == "input" else source})
    assert status == 2 and err == f"seq2seq-flax: error: standard {stream} is closed; give a file as --{stream}\n"


def test_what_is_put_out_is_utf8_whatever_the_terminal_has(call, source, monkeypatch):
    _, expected, _ = call("translate", input=source)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(Translator, "translate", lambda *_, **__: [[Candidate("zwölf ⁇", 0.0, True)]] * len(LINES))
    assert call("translate", input=source)[0] == 0
    assert raw.getvalue().decode("utf-8") == "zwölf ⁇\n" * len(LINES) and expected.isascii()


SHORT = ["road", "", "song", "wi"]


@pytest.fixture
def short(source):
    """Lines of one compiled shape."""
    source.write_text("".join(f"{line}\n" for line in SHORT), encoding="utf-8")
    return source


def test_several_translations_of_a_line(call, translator, short):
    status, out, err = call("translate", input=short, n_best=3, beam_size=3, length_penalty=1.0)
    assert status == 0, err
    rows = [line.split("\t") for line in out.splitlines()]
    for number, line in enumerate(SHORT, start=1):
        found = [(float(score), text) for at, score, text in rows if int(at) == number]
        expected = by_itself(translator, line.strip(), BeamSearch(3, 1.0, n_best=3))
        assert [text for _, text in found] == [each.text for each in expected]
        np.testing.assert_allclose([score for score, _ in found], [each.score for each in expected], atol=1e-3)
        assert len(found) == (3 if line.strip() else 1)


def test_what_is_drawn_for_a_line_depends_on_its_number_alone(call, translator, short):
    status, out, err = call("translate", "--sample", input=short, n_best=2, seed=3, top_k=20)
    assert status == 0, err
    found = [line.split("\t")[2] for line in out.splitlines() if line.startswith("3\t")]
    draws = Draws(Sampling(top_k=20), 3, 2)
    # Of the lines before the third, one is not empty.
    assert found == [each.text for each in by_itself(translator, SHORT[2], draws, number=1)]
    assert found != [each.text for each in by_itself(translator, SHORT[2], draws, number=2)]


def test_the_language_changes_the_translation(translator):
    assert by_itself(translator, "road", BeamSearch()) != by_itself(translator, "road", BeamSearch(), "xx")


def test_tokens_that_stand_for_no_text_never_come(translator):
    """Not even where the model wants nothing else: ``<s>``, languages and the two entries beyond the vocabulary."""
    tokenizer, output = translator.tokenizer, translator.params["embeddings_output"]["embedding"]
    never = [tokenizer.bos_id, *tokenizer.languages.values(), 70, 71]
    assert never[-2:] == [tokenizer.num_tokens, MODEL.vocab_size - 1]
    much = jnp.array([20.0, -20.0, 20.0, -20.0, 20.0])[:, None]  # one of them is then the best by far, always
    eager = translator.params | {"embeddings_output": {"embedding": output.at[jnp.array(never)].multiply(much)}}
    options = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "search": BeamSearch(), "mesh": translator.mesh}

    def tokens(**banned):
        ((best,),) = translate_tokens(translator.model, eager, [[5, 9, 7, 2]], **options, **banned)
        return set(best.tokens)

    assert tokens() & set(never)
    assert not tokens(banned=never) & set(never)


def test_a_translation_is_one_line(translator, monkeypatch):
    """Of a vocabulary with all bytes it could hold ends of lines, and the tabs that stand between columns."""
    monkeypatch.setattr(type(translator.tokenizer), "decode", lambda self, ids: "\t one\n\r two\u2028three\u00a0\n")
    (best, *_) = by_itself(translator, "road", BeamSearch(1))
    assert best.text == "one  two three"


def test_what_ends_a_translation_may_also_begin_it(translator):
    ends = {"bos_id": translator.tokenizer.eos_id, "eos_id": translator.tokenizer.eos_id}
    output = translator.params["embeddings_output"]["embedding"]
    found = []
    for sign in (1.0, -1.0):  # whichever it is that makes the end the best token, always
        params = translator.params | {"embeddings_output": {"embedding": output.at[ends["eos_id"]].multiply(99 * sign)}}
        ((best,),) = translate_tokens(
            translator.model, params, [[5, 9, 7, 2]], **ends, search=BeamSearch(1), mesh=translator.mesh
        )
        found.append(best)
    assert any(each.is_complete and not each.tokens for each in found)


LONG = "river farmer. The song is long. A market letter of the winter! Engine village; doctor bridge"


def test_a_line_longer_than_the_model_takes(call, translator, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(f"road\n{LONG}\n", encoding="utf-8")
    status, out, err = call("translate", input=path)
    assert status == 2 and not out
    assert f"{path}:2 has " in err and f"more than the {ROW_LENGTH} that the run in" in err and "--long split" in err
    assert err.count("\n") == 1
    status, out, err = call("translate", input=path, long="split")
    assert status == 0 and f"{path}:2 is translated in " in err
    assert "lines longer than the model takes, translated in pieces: 1\n" in err
    (whole,) = translator.encode([("here", LONG)], translator.language_prefix("ne"), "split")
    assert max(map(len, whole.pieces)) <= ROW_LENGTH
    narrow = dataclasses.replace(translator, max_length=6)
    with pytest.raises(UserError, match="here has a character that is more tokens than the 6 that the run in"):
        narrow.encode([("here", "the \ufdfa")], translator.language_prefix("ne"), "split")  # a phrase in one character
    read = " ".join(translator.tokenizer.decode(piece) for piece in whole.pieces)
    assert read.replace(" ", "") == translator.tokenizer.decode(translator.tokenizer.encode([LONG])[0]).replace(" ", "")


def test_pieces_end_where_sentences_do():
    def fits(text):
        return len(text) <= 34

    found = pieces_of(LONG, fits)
    assert found[:2] == ["river farmer. The song is long.", "A market letter of the winter!"]
    assert [each for each in split_sentences(LONG) if len(each) <= 34 and each not in " ".join(found)] == []
    assert pieces_of("aa bb cc", lambda text: len(text) <= 5) == ["aa bb", "cc"]
    assert pieces_of("abcdefg", lambda text: len(text) <= 3) == ["abc", "def", "g"]


@pytest.mark.parametrize("piped", [True, False])
def test_text_that_is_not_utf8(call, tmp_path, piped):
    raw, path = b"road\n\xe4hnlich\n", tmp_path / "latin.txt"
    path.write_bytes(raw)
    status, out, err = call("translate", **({"piped": raw} if piped else {"input": path}))
    where = "standard input:2" if piped else f"{path}:2"
    assert status == 2 and f"{where} is not UTF-8: byte 0xe4" in err
    assert out.count("\n") == (1 if piped else 0)  # what came before it in the pipe is answered
    if piped:
        status, out, err = call("translate", piped=f"road\n{LONG}\nsong\n".encode())
        assert (status, out.count("\n")) == (2, 1) and "standard input:2 has " in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_lang": "de"}, "--target-lang de: the run in "),
        ({"target_lang": None}, "--target-lang must be given: the run in "),
        ({"temperature": 0.5}, "--temperature goes with --sample"),
        ({"n_best": 5}, "--n-best 5 is more than --beam-size 4"),
        ({"output": "out.gz"}, "--output out.gz: text is written as it is"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"beam_size": 3_000_000_000}, "--beam-size 3000000000: must be 1 or more and at most 65536"),
        ({"beam_size": 1, "length_penalty": 3}, "--beam-size 1 has nothing to choose from by --length-penalty"),
        ({"beam_size": 1, "length_penalty": 0.6}, "--beam-size 1 has nothing to choose from by --length-penalty"),
        ({"seed": 0}, "--seed goes with --sample"),
        ({"length_penalty": "nan"}, "--length-penalty nan: must be -10 or more and at most 10"),
        ({"step": 3}, "step 3"),
        ({"workdir": "nowhere"}, "nowhere"),
        ({"input": "missing.txt"}, "missing.txt"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(call, source, options, message):
    status, out, err = call("translate", **{"input": source} | options)
    assert status == 2 and not out and message in err and err.count("\n") == 1


def test_searching_options_do_not_go_with_drawing(call, source):
    status, out, err = call("translate", "--sample", input=source, beam_size=4)  # what holds anyway
    assert (status, out) == (2, "") and "--beam-size does not go with --sample" in err
    with pytest.raises(UserError, match="--beam-size does not go with --sample"):
        TranslateCommand(workdir="run", sample=True, beam_size=2)
    with pytest.raises(UserError, match="--temperature 0 takes the most probable token; leave out --top-k"):
        TranslateCommand(workdir="run", sample=True, temperature=0.0, top_k=2)
    with pytest.raises(UserError, match="--temperature 0 has one translation of a line; leave out --n-best"):
        TranslateCommand(workdir="run", sample=True, temperature=0.0, n_best=2)


def test_sources_have_few_lengths():
    rooms = [room_for(length) for length in range(1, 129)]
    assert all(length <= room < 2 * max(length, 8) for length, room in enumerate(rooms, start=1))
    assert sorted(set(rooms)) == [8, 16, 24, 32, 48, 64, 96, 128]


def test_align_needs_no_more_than_a_model_and_a_text(call, workdir):
    status, out, err = call("align", "river road", batch_size=None)
    assert status == 0, err
    page = workdir / "alignment.html"
    assert out.startswith(f"{page}: ") and "</table>" in page.read_text(encoding="utf-8")
    page.unlink()


def test_align_of_a_text_that_is_too_long(call, workdir):
    status, _, err = call("align", LONG, batch_size=None)
    assert status == 2 and err.endswith("takes; shorten it\n") and not (workdir / "alignment.html").exists()
    status, _, err = call("align", "river", target=LONG, batch_size=None)
    assert status == 2 and err.startswith("seq2seq-flax: error: --target has ") and err.endswith("shorten it\n")


def test_align_tells_of_what_is_not_in_the_vocabulary(call, tmp_path):
    status, out, _ = call("align", "river Ω", target="road", output=tmp_path / "a.html", batch_size=None)
    assert status == 0 and out.endswith("\nnot in the vocabulary, and shown as ⁇: 1\n"), out


def test_align_is_a_command(call, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = call("align", "river road", output=page, batch_size=None, target="weiv")
    assert status == 0, err
    assert out == f"{page}: weiv\n" and page.read_text(encoding="utf-8").count("<td ") == 8
