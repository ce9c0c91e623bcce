"""A user's mistake ends in one line and exit status 2; nothing is lost or half-written."""

import json
import shutil

import pytest

from bert_flax.prepare import PrepareConfig, prepare
from core_flax.checkpoint import list_steps


@pytest.fixture
def refuse(call):
    """Runs a command that must be refused; returns its one line."""

    def refuse(*argv) -> str:
        done = call(*argv)
        assert done.returncode == 2, done
        assert done.stdout == ""
        assert done.stderr.startswith("bert-flax: error: ") and done.stderr.count("\n") == 1
        return done.stderr

    return refuse


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run, and a check that nothing in it changes."""
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    yield workdir
    assert contents(workdir) == contents(finished_run)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


@pytest.fixture(scope="session")
def other_data(tmp_path_factory, corpus):
    """Part of the text, so another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    text = folder / "text.txt"
    text.write_text("\n\n".join(corpus.read_text().split("\n\n")[:8]))
    settings = {"vocab_size": 120, "valid_fraction": 0.2, "num_workers": 1}
    prepare(PrepareConfig((str(text),), str(folder / "data"), **settings))
    return folder / "data"


# Text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt does not exist"),
        (b"", "text.txt holds no text"),
        (b" \n\n", "text.txt holds no text"),
        ("One caf\xe9. Two caf\xe9s.\n".encode("latin-1"), "text.txt:1 is not UTF-8"),
        (b"A sentence. And another.\n\nOnly one here.\n\nTwo of them. Indeed.\n", "one sentence only"),
        (b"A document. It is alone.\n", "the input is 1 document"),
    ],
    ids=["missing", "empty", "blank", "latin-1", "single sentence", "single document"],
)
def test_text(refuse, call, bert_flax, corpus, tmp_path, content, message):
    text, output = tmp_path / "text.txt", tmp_path / "data"
    if content is not None:
        text.write_bytes(content)
    command = ["prepare", "--input", text, "--output", output, "--vocab-size", 100, "--num-workers", 1]
    assert message in refuse(*command)
    assert not (output / "manifest.json").exists()
    assert f"data folder {output} is " in refuse(*bert_flax.pretrain(tmp_path / "run", data=output))
    shutil.copy(corpus, text)  # the mistake is mended, and the same command runs
    assert call(*command).returncode == 0
    assert (output / "manifest.json").exists()


def test_a_vocabulary_without_mask(refuse, corpus, tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n")
    line = refuse("prepare", "--input", corpus, "--output", tmp_path / "data", "--vocab", vocab)
    assert f"{vocab} lacks [MASK]" in line
    assert not (tmp_path / "data").exists()


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs__length": 64}, "--inputs.length 64 exceeds --model.max-length 32"),
        ({"model__num_heads": 5}, "--model.num-heads 5 does not divide --model.width 32"),
        ({"model__num_heads": 0}, "--model.num-heads 0"),
        ({"model__num_segments": 1}, "--model.num-segments 1: pretraining reads pairs of texts; give 2 or more"),
        ({"checkpoint__keep_last": 0}, "--checkpoint.keep-last 0"),
        ({"seed": -1}, "--seed -1"),
        ({"train__batch_size": 6}, "--train.batch-size 6 does not divide by 1 microbatches x 4 devices"),
        ({"train__num_microbatches": 3}, "--train.batch-size 8 does not divide by 3 microbatches"),
        ({"mesh__fsdp": 3}, "4 devices"),
        ({"model__vocab_size": 50}, "--model.vocab-size 50"),
        ({"train__num_steps": -1}, "--train.num-steps -1: must be 1 or more"),
        ({"train__batch_size": 0}, "--train.batch-size 0: must be 1 or more"),
        ({"log__every_steps": -1}, "--log.every-steps -1: must be 1 or more"),
        ({"model__init_stddev": 0}, "--model.init-stddev 0.0: must be more than 0"),
        ({"optimizer__learning_rate": "nan"}, "--optimizer.learning-rate nan: must be more than 0"),
        ({"inputs__long_from_step": -1}, "--inputs.long-from-step -1: must be 0 or more, or None"),
        ({"optimizer__name": "adam"}, "adamw"),
        ({"train__num_steps": "many"}, "many"),
        ({"schedule__total_steps": 3, "schedule__final_fraction": 0}, "--schedule.total-steps 3 ends before"),
    ],
    ids=str,
)
def test_settings(refuse, bert_flax, tmp_path, changes, message):
    workdir = tmp_path / "run"
    assert message in refuse(*bert_flax.pretrain(workdir, **changes))
    assert not workdir.exists()


def test_fewer_steps_than_the_presets_warmup(refuse, bert_flax, tmp_path):
    argv = (
        "pretrain",
        "bert_tiny",
        f"--workdir={tmp_path / 'run'}",
        f"--data={bert_flax.data}",
        "--train.num-steps=10",
    )
    line = refuse(*argv)
    assert "--schedule.warmup-steps 10000" in line and "set --schedule.warmup-steps to at most 9" in line
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_size_that_is_given_is_taken(call, bert_flax, tmp_path):
    """And be it the preset's own, which gives way to that of the data where nothing is said."""
    changes = {"train__num_steps": 1}
    for name, more in (("given", {"model__vocab_size": 30_522}), ("not", {})):
        assert call(*bert_flax.pretrain(tmp_path / name, **changes, **more)).returncode == 0
    sizes = [
        json.loads((tmp_path / name / "config.json").read_text())["config"]["model"]["vocab_size"]
        for name in ("given", "not")
    ]
    assert sizes == [30_522, len((bert_flax.data / "vocab.txt").read_text().splitlines())]


def test_a_length_that_no_preset_takes(refuse, bert_flax, tmp_path):
    line = refuse("pretrain", "bert_base", f"--workdir={tmp_path}", f"--data={bert_flax.data}", "--inputs.length=513")
    assert "--inputs.length 513 exceeds --model.max-length 512" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (["pretrain", "--train.num-step=5"], "--train.num-steps"),
        (["pretrain", "--checkpoint.every_step", "5"], "--checkpoint.every-steps"),
        (["prepare", "--vocab-sise=5"], "--vocab-size"),
        (["evaluate", "--workdr=x"], "--workdir"),
        (["pretrian"], "pretrain"),
        (["fillmask"], "fill-mask"),
        (["pretrain", "bert_bse"], "bert_base"),
    ],
    ids=str,
)
def test_a_misspelt_word_is_corrected(refuse, argv, suggestion):
    assert f"did you mean {suggestion}?" in refuse(*argv)


def test_two_presets(refuse, tmp_path):
    assert "one preset at a time" in refuse("pretrain", "bert_tiny", "--workdir", tmp_path / "run", "bert_mini")
    assert "one preset at a time" in refuse("pretrain", "--log.no-tensorboard", "bert_tiny", "bert_mini")
    for words in (["--log.tensorboard", "False"], ["--log.tensorboard=False"], ["--log.no-tensorboard", "true"]):
        assert "takes no value; write --log.no-tensorboard" in refuse("pretrain", "bert_tiny", "--workdir", "x", *words)
    assert "takes no value; write --log.tensorboard" in refuse("pretrain", "--workdir", "x", "--log.tensorboard", "1")
    assert "takes no value; write --no-lowercase" in refuse(
        "prepare", "--input", "a", "--output", "b", "--lowercase", "False"
    )


def test_a_missing_option_is_named(refuse):
    for command, missing in (
        (["pretrain", "bert_tiny"], "--workdir"),
        (["prepare", "--vocab-size=200"], "--input, --output"),
        (["score", "--predictions=x"], "TASK, --data"),
        (["score", "mrpc"], "--predictions, --data"),
        (["finetune", "mrpc", "--seeds", "2"], "--workdir, --data"),
    ):
        prog = " ".join(["bert-flax", *command[: 1 if command[0] in ("prepare", "score") else 2]])
        assert refuse(*command) == f"bert-flax: error: {missing} must be given; see {prog} --help\n"


# Folders


def test_data_of_another_tokenizer(refuse, bert_flax, run, other_data):
    assert "another tokenizer" in refuse(*bert_flax.pretrain(run, data=other_data))
    assert "another tokenizer" in refuse("evaluate", "--workdir", run, "--data", other_data)


def test_data_of_other_text(refuse, bert_flax, run, corpus, tmp_path):
    """Cut by the same vocabulary, so nothing but the text would show it."""
    text, data = tmp_path / "text.txt", tmp_path / "data"
    text.write_text(corpus.read_text().replace("river", "road"))
    vocab = str(bert_flax.data / "vocab.txt")
    prepare(PrepareConfig((str(text),), str(data), vocab=vocab, valid_fraction=0.1, num_workers=1))
    assert "holds other text" in refuse(*bert_flax.pretrain(run, data=data))


def test_a_folder_that_another_run_writes_to(refuse, bert_flax, tmp_path):
    with bert_flax.start(*bert_flax.pretrain(tmp_path, train__num_steps=100_000)) as process:
        assert "starts" in process.stdout.readline()
        assert "another run is writing" in refuse(*bert_flax.pretrain(tmp_path))
        assert process.poll() is None


def test_data_that_has_been_moved(refuse, call, bert_flax, finished_run, tmp_path):
    workdir, data = shutil.copytree(finished_run, tmp_path / "run"), tmp_path / "gone"
    stored = json.loads((workdir / "config.json").read_text()) | {"data": str(data)}
    (workdir / "config.json").write_text(json.dumps(stored))
    resume = [argument for argument in bert_flax.pretrain(workdir) if not argument.startswith("--data=")]
    for command in (["evaluate", f"--workdir={workdir}"], resume):  # which notes the new place
        line = refuse(*command)
        assert f"data folder {data}, which {workdir / 'config.json'} names, is not there" in line
        assert "--data" in line and "prepare" not in line
        shutil.copytree(bert_flax.data, tmp_path / "new", dirs_exist_ok=True)
        assert call(*command, f"--data={tmp_path / 'new'}").returncode == 0


@pytest.mark.parametrize(("folder", "message"), [("s3://bucket/run", "local folder"), ("", "is empty")])
def test_a_folder_that_is_none(refuse, bert_flax, tmp_path, monkeypatch, folder, message):
    monkeypatch.chdir(tmp_path)
    for option, command in (
        ("--workdir", bert_flax.pretrain(folder)),
        ("--data", bert_flax.pretrain("run", data=folder)),
        ("--workdir", ["evaluate", f"--workdir={folder}"]),
        ("--workdir", ["fill-mask", "The [MASK].", f"--workdir={folder}"]),
        ("--output", ["prepare", "--input=python:docs", f"--output={folder}"]),
        ("--output", ["import-hf", "model", f"--output={folder}"]),
        ("--output", ["export-hf", "--workdir=run", f"--output={folder}"]),
        ("--workdir", ["export-hf", f"--workdir={folder}", "--output=new"]),
    ):
        line = refuse(*command)
        assert option in line and message in line
        assert not any((tmp_path / name).exists() for name in ("gs:", "config.json", "run/config.json"))


def test_the_run_of_another_preset(refuse, run):
    line = refuse("pretrain", "--workdir", run)
    assert "holds a run with other settings" in line and "these are preset bert_demo's" in line


def test_data_that_is_not_there(refuse, bert_flax, tmp_path):
    line = refuse(*bert_flax.pretrain(tmp_path / "run", data=tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere'} is missing" in line
    assert not (tmp_path / "run").exists()


def test_a_workdir_without_a_run(refuse, tmp_path):
    for command in (["evaluate"], ["fill-mask", "The [MASK]."]):
        assert f"{tmp_path} holds no run" in refuse(*command, "--workdir", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ({"kind": "lm"}, "describes a run of kind 'lm'"),
        ({"format": 99}, "has format 99"),
        ({"lowercase": None}, "lacks lowercase"),
        ({"config": None}, "lacks config"),
        ({"data": None}, "lacks data"),
        ({"data": 3}, "data is 3, where str is wanted"),
        ({"tokenizer": ["x"]}, "tokenizer is ['x'], where str is wanted"),
        ({"config": {"seed": "0"}}, "seed is '0', where int is wanted"),
        ({"config": {"model": []}}, "model is [], no object with settings"),
        ({"config": {"train": {"steps": 3}}}, "unknown setting train.steps"),
        ({"config": {"model": {"width": -3}}}, "--model.width -3: must be 1 or more"),
    ],
    ids=str,
)
def test_a_damaged_config(refuse, bert_flax, finished_run, tmp_path, content, message):
    """Text, or what takes the place of a field; None: the field is gone."""
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    if isinstance(content, dict):
        stored = json.loads((workdir / "config.json").read_text()) | content
        content = json.dumps({name: value for name, value in stored.items() if value is not None})
    (workdir / "config.json").write_text(content)
    for command in (bert_flax.pretrain(workdir), ["evaluate", "--workdir", workdir]):
        line = refuse(*command)
        assert f"{workdir / 'config.json'}" in line and message in line


def test_a_workdir_that_cannot_be(refuse, bert_flax, corpus):
    assert str(corpus) in refuse(*bert_flax.pretrain(corpus / "run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("The river sees.", "there is no [MASK]"), ("the river " * 20 + "[MASK]", "tokens is longer than the 30")],
    ids=["no mask", "too long"],
)
def test_text_to_fill(refuse, run, text, message):
    assert message in refuse("fill-mask", "--workdir", run, text)


def test_a_checkpoint_that_is_not_there(refuse, run):
    for command in (["evaluate"], ["fill-mask", "The [MASK]."]):
        assert "no checkpoint of step 5; it has 4, 6" in refuse(*command, "--workdir", run, "--step", 5)


# Disks


def test_a_full_disk_during_a_checkpoint(bert_flax, finished_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    command = bert_flax.pretrain(workdir, train__num_steps=10)

    done = bert_flax.run(*command, max_file_kb=100)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "the checkpoint of step 8 could not be written" in done.stderr
    assert "goes on from step 6" in done.stderr
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    done = bert_flax.run(*command)
    assert done.returncode == 0 and "resumes at step 6" in done.stdout and done.stderr == ""


def test_a_full_disk_during_a_log_line(bert_flax, tmp_path, monkeypatch):
    """metrics.jsonl outgrows what the disk has left before any checkpoint is due."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # JAX would warn that it cannot write there either
    command = bert_flax.pretrain(tmp_path, train__num_steps=200, checkpoint__every_steps=0)
    done = bert_flax.run(*command, max_file_kb=20)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert f"{tmp_path / 'metrics.jsonl'} could not be written" in done.stderr
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_before_the_first_step(bert_flax, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    done = bert_flax.run(*bert_flax.pretrain(tmp_path), max_file_kb=0)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{tmp_path / 'vocab.txt'} could not be written: File too large" in done.stderr
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "config.json").exists()


def test_a_damaged_newest_checkpoint(bert_flax, finished_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    largest = max((workdir / "checkpoints" / "6").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    done = bert_flax.run(*bert_flax.pretrain(workdir))
    assert done.returncode == 0 and "resumes at step 4" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "checkpoint of step 6 is damaged" in done.stderr and "going back to step 4" in done.stderr
    assert list_steps(workdir / "checkpoints") == [4, 6]
    before, after = (losses(folder) for folder in (finished_run, workdir))
    assert after == before and len(after) == 6
