"""What a user does with a task: fine-tune, stop and go on, predict, score, export."""

import csv
import dataclasses
import json
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tasks
from flax import traverse_util
from small_tasks import QUICK, arguments, here, in_a_hurry, refused, right

from bert_flax.finetune.runs import figures_by_step
from bert_flax.finetune.task import make_model
from bert_flax.huggingface import load_pretrained
from bert_flax.pretrained import load_init
from core_flax.checkpoint import list_steps, load_params


@pytest.fixture(scope="module", autouse=True)
def hurry():
    with in_a_hurry():
        yield


def params(workdir):
    """Bytes of the last parameters, by path."""
    tree, _ = load_params(workdir / "checkpoints", max(list_steps(workdir / "checkpoints")))
    return {path: np.asarray(x).tobytes() for path, x in traverse_util.flatten_dict(tree, sep="/").items()}


def results(workdir):
    """results.json without times."""
    stored = json.loads((workdir / "results.json").read_text())
    runs = [{k: v for k, v in run.items() if k not in ("seconds", "resumed")} for run in stored.pop("runs")]
    return {name: value for name, value in stored.items() if name != "seconds"} | {"runs": runs}


# Runs


def test_two_seeds_and_a_table(mrpc):
    workdir, printed = mrpc
    stored = results(workdir)
    assert stored["seeds"] == [0, 1] and stored["primary"] == "dev/f1"
    assert params(workdir / "seed-0") != params(workdir / "seed-1")
    for seed, run in enumerate(stored["runs"]):
        records = [json.loads(line) for line in (workdir / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()]
        by_step = {record["step"]: record for record in records if "dev/f1" in record}
        assert sorted(by_step) == [3, 6, 9, 12, 15, 18, 21, 24] and run["last_step"] == 24
        assert run["last"].items() <= by_step[24].items() and run["best"].items() <= by_step[run["best_step"]].items()
        assert run["best"]["dev/f1"] == max(record["dev/f1"] for record in by_step.values())
        assert run["best_step"] in list_steps(workdir / f"seed-{seed}" / "checkpoints")
    assert set(stored["figures"]) == {"dev/accuracy", "dev/f1"} and stored["runs"][0]["last"]["dev/total"] == 13
    for name, moments in stored["figures"].items():
        for moment in ("last", "best"):
            values = [run[moment][name] for run in stored["runs"]]
            assert moments[moment]["mean"] == pytest.approx(np.mean(values))
            assert moments[moment]["deviation"] == pytest.approx(np.std(values, ddof=1))
    lines = printed.splitlines()
    assert "mrpc, train: 24 examples" in lines and "mrpc, dev: 13 examples" in lines
    rows = r"^batches of 8 in \d+(?: or \d+)* rows of 32 tokens, \d+\.\d% of them padding$"
    assert len(re.findall(rows, printed, re.M)) == 2
    assert re.match(r"mrpc, 2 seeds, \d+ s each +last epoch +best epoch", lines[-5])
    mean, deviation = (stored["figures"]["dev/f1"]["last"][name] for name in ("mean", "deviation"))
    assert f"{mean:.2f} ± {deviation:.2f}" in lines[-3] and lines[-3].endswith("*")
    assert lines[-1] == f"written to {workdir / 'results.json'}"


def test_complete_runs_are_taken_as_they_are(mrpc, model, glue, tmp_path):
    """Also after the folder, the data and the model were moved."""
    workdir = shutil.copytree(mrpc[0], tmp_path / "run")
    data, init = shutil.copytree(glue, tmp_path / "glue"), shutil.copytree(model, tmp_path / "model")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "results.json"}
    printed = right(here(*arguments("mrpc", data / "MRPC", workdir, init=init, seeds=2)))
    assert "step" not in printed and printed.splitlines()[-5:-1] == mrpc[1].splitlines()[-5:-1]
    assert [line for line in printed.splitlines() if line.startswith("complete already: ")] == [
        f"complete already: {workdir / name}" for name in ("seed-0", "seed-1")
    ]
    assert {path: path.read_bytes() for path in before} == before
    assert (workdir / "results.json").read_text() == (mrpc[0] / "results.json").read_text()


def test_a_killed_run_ends_where_it_would_have_ended(bert_flax, mrpc, model, glue, tmp_path):
    """With dropout, and with checkpoints at other steps."""
    command = arguments("mrpc", glue, tmp_path, init=model, seed=1, checkpoint__every_steps=2)
    with bert_flax.start(*command) as process:
        while not list_steps(tmp_path / "seed-1" / "checkpoints"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
        process.communicate()
    stopped = max(list_steps(tmp_path / "seed-1" / "checkpoints"))
    assert 2 <= stopped < 24 and not (tmp_path / "seed-1" / "result.json").exists()
    printed = right(bert_flax.run(*command))
    assert f"resumes at step {stopped}" in printed and printed.count("starts") == 0
    assert params(tmp_path / "seed-1") == params(mrpc[0] / "seed-1")
    assert results(tmp_path)["runs"] == results(mrpc[0])["runs"][1:]
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["resumed"]


# Predictions


def scores(task, predictions, data):
    """What ``bert-flax score`` prints, by name."""
    lines = right(here("score", task, "--predictions", predictions, "--data", data)).splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if "per cent" not in line)}


def best_figures(workdir):
    """Those of the best step of the best seed."""
    stored = json.loads((workdir / "results.json").read_text())
    best = max(stored["runs"], key=lambda run: run["best"][stored["primary"]])
    return {name.removeprefix("dev/"): value for name, value in best["best"].items()}


def test_predictions_have_the_scores_of_the_best_step(bert_flax, mrpc, glue, tmp_path):
    """Thirteen pairs, on one device and on four: each is there once, and the same."""
    workdir, data = mrpc[0], glue / "MRPC" / "dev.tsv"
    one, four = tmp_path / "one" / "MRPC.tsv", tmp_path / "four" / "MRPC.tsv"
    command = ["predict", "--workdir", workdir, "--data", data, "--output"]
    printed = right(bert_flax.run(*command, one))
    assert printed.splitlines()[-1].startswith(f"{one}: 13 predictions of {workdir}/seed-")
    right(here(*command, four))
    lines = one.read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", *map(str, range(13))]
    assert {line.split("\t")[1] for line in lines[1:]} == {"0", "1"}
    assert four.read_text() == one.read_text()
    assert scores("mrpc", one, data) == pytest.approx(best_figures(workdir), abs=0.005)


def test_a_test_file_and_a_text(mrpc, glue, tmp_path):
    output = tmp_path / "MRPC.tsv"
    printed = right(here("predict", "--workdir", mrpc[0], "--data", glue / "MRPC" / "test.tsv", "--output", output))
    assert "folder of task" not in printed
    assert re.fullmatch(r"index\tprediction\n(\d\t[01]\n){5}", output.read_text())
    other = shutil.copytree(glue / "MRPC", tmp_path / "QQP") / "test.tsv"
    printed = right(here("predict", "--workdir", mrpc[0], "--data", other, "--output", tmp_path / "x"))
    assert f"{other} is in the folder of task qqp, the model is of mrpc" in printed.splitlines()
    assert (tmp_path / "x").read_text() == output.read_text()
    first, second = next(small_tasks.rows(2, 1))[1:3]
    printed = right(here("predict", "--workdir", mrpc[0], "--text", first, "--text-pair", second))
    shares = re.findall(r"^ *([\d.]+)%  (.*)$", printed, re.M)
    assert {label for _, label in shares} == {"0", "1"}
    assert sum(float(share) for share, _ in shares) == pytest.approx(100, abs=0.11)
    assert shares[0][1] == output.read_text().splitlines()[1].split("\t")[1]
    printed = right(here("predict", "--workdir", mrpc[0], "--text", "the " * 99, "--text-pair", second))
    assert printed.splitlines()[0] == "--text: 1 texts over --inputs.max-length 32 were cut"


def test_a_prediction_in_bfloat16(mrpc, glue, tmp_path, monkeypatch):
    """The option reaches the model, and labels of a model that is sure of them stay."""
    from bert_flax.finetune import predict

    made = []
    monkeypatch.setattr(predict, "make_model", lambda *args: made.append(make_model(*args)) or made[-1])
    outputs = [tmp_path / dtype for dtype in ("float32", "bfloat16")]
    for output in outputs:
        data = ["--data", glue / "MRPC" / "test.tsv", "--compute-dtype", output.name]
        right(here("predict", "--workdir", mrpc[0], "--output", output, *data))
    assert [jnp.dtype(model.dtype).name for model in made] == ["float32", "bfloat16"]
    assert outputs[0].read_text() == outputs[1].read_text()


def test_the_threshold_of_null_odds_is_that_of_the_dev_set(squad2, tmp_path):
    data, workdir = squad2
    dev, best = data / "dev-v2.0.json", best_figures(workdir)
    files = {"--output": "a/x.json", "--null-odds": "b/odds.json", "--n-best": "c/best.json"}
    paths = {option: tmp_path / name for option, name in files.items()}
    right(here("predict", "--workdir", workdir, "--data", dev, *(word for pair in paths.items() for word in pair)))
    found, odds, ranked = (json.loads(path.read_text()) for path in paths.values())
    threshold = best.pop("null_threshold")
    assert scores("squad2", paths["--output"], dev) == pytest.approx(best, abs=0.005)
    for key, text in found.items():
        answers = [row["text"] for row in ranked[key] if row["text"]]
        assert text == ("" if odds[key] > threshold else answers[0])
        assert sum(row["probability"] for row in ranked[key]) == pytest.approx(1)
    assert len(found) == len(odds) == len(ranked) == 9
    # Another step has a threshold of its own.
    by_step = figures_by_step(workdir / "seed-0")
    assert sorted(by_step) == list_steps(workdir / "seed-0" / "checkpoints") == [3, 6, 9]
    other = next(step for step, figures in by_step.items() if figures["dev/null_threshold"] != threshold)
    right(here("predict", "--workdir", workdir, "--data", dev, "--output", tmp_path / "y", "--step", other))
    assert scores("squad2", tmp_path / "y", dev)["f1"] == pytest.approx(by_step[other]["dev/f1"], abs=0.005)
    example = ["--text", "Who?", "--text-pair", "In the river, a good dog."]
    *rows, chosen = right(here("predict", "--workdir", workdir, *example)).splitlines()
    assert len(rows) in (5, 6) and all(re.match(r" *\d+\.\d%  ", row) for row in rows)
    told = re.fullmatch(r"prediction: (.+) \(null odds (\S+), (above|not above) (\S+), the best .*\)", chosen)
    answer, null_odds, side, shown = told.groups()
    assert shown == f"{threshold:.2f}" and side == ("above" if float(null_odds) > float(shown) else "not above")
    texts = [row.split("%  ")[1] for row in rows]
    assert answer == ("(no answer)" if side == "above" else next(text for text in texts if text != "(no answer)"))


def test_tags_of_sentences_with_their_documents(model, tmp_path):
    """Some sentences are longer than a sequence, and all are shown words of their document."""
    data, run, output = small_tasks.write_ner(tmp_path / "data"), tmp_path / "run", tmp_path / "tags.txt"
    options = QUICK | {"inputs__max_length": 24, "epochs": 4, "optimizer__learning_rate": 3e-2}
    printed = right(here(*arguments("ner", data, run, "--inputs.document-context", init=model, **options)))
    assert "ner, train: 28 sequences of 20 examples" in printed
    right(here("predict", "--workdir", run, "--data", data / "eng.testa", "--output", output))
    best = best_figures(run)
    assert best["f1"] > 20
    assert scores("ner", output, data / "eng.testa") == pytest.approx(best, abs=0.005)
    # A file that names no documents gets no lines that would begin them.
    bare = small_tasks.put(tmp_path / "bare", "the NN\ngood NN\n\na NN\nriver NN\n")
    right(here("predict", "--workdir", run, "--data", bare, "--output", tmp_path / "bare.txt"))
    assert re.fullmatch(r"the \S+\ngood \S+\n\na \S+\nriver \S+\n\n?", (tmp_path / "bare.txt").read_text())
    assert output.read_text().startswith("-DOCSTART- O\n\nthe ")
    printed = right(here("predict", "--workdir", run, "--text", "the good river sees the winter"))
    words = [line.split("\t")[0] for line in printed.splitlines()]
    assert " ".join(words) == "the good river sees the winter"


def test_choices(model, tmp_path):
    data, run, output = small_tasks.write_swag(tmp_path / "data"), tmp_path / "run", tmp_path / "choices.csv"
    right(here(*arguments("swag", data, run, init=model, inputs__max_length=16, **QUICK | {"epochs": 1})))
    right(here("predict", "--workdir", run, "--data", data / "val.csv", "--output", output))
    assert re.fullmatch(r"index,prediction\n(\d,[0-3]\n){9}", output.read_text())
    assert scores("swag", output, data / "val.csv") == pytest.approx(best_figures(run), abs=0.005)


def test_a_table_of_ones_own_from_another_task(mrpc, tmp_path):
    """A CSV with quotes and a number to predict, from the encoder that MRPC has left."""
    data, run = tmp_path / "data", tmp_path / "run"
    for seed, name in enumerate(("train.csv", "valid.csv")):
        rows = small_tasks.rows(seed, 16 - 5 * seed)
        found = [f'"{a} ""said, {n}""",{same + n / 100},{b},k{n}' for n, a, b, same in rows]
        small_tasks.put(data / name, "\n".join(["first,how near,second,key", *found]) + "\n")
    options = QUICK | {"columns": "text=first,text_pair=second,label=how near,id=key", "epochs": 1}
    options["optimizer__learning_rate"] = 1e-12
    printed = right(here(*arguments("custom", data, run, "--regression", init_from_task=mrpc[0], **options)))
    assert "custom, train: 16 examples" in printed and "and a new head" in printed
    before, after = load_init(str(mrpc[0])), load_init(str(run))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), dict(after.params), dict(before.params))
    assert before.head.kernel.shape == (16, 2) and after.head.kernel.shape == (16, 1)
    right(here("predict", "--workdir", run, "--data", data / "valid.csv", "--output", tmp_path / "x"))
    header, *lines = (tmp_path / "x").read_text().splitlines()
    assert header == "index\tprediction" and [line.split("\t")[0] for line in lines] == [f"k{n}" for n in range(11)]
    other = small_tasks.put(data / "other.csv", (data / "valid.csv").read_text().replace(",k3\n", ',"k\n3"\n'))
    command = ["predict", "--workdir", run, "--data", other, "--output"]
    assert "'k\\n3' holds a tab or a line break, which a TSV cannot" in refused(*command, tmp_path / "y.tsv")
    assert not (tmp_path / "y.tsv").exists()
    right(here(*command, tmp_path / "y.csv"))
    with (tmp_path / "y.csv").open(newline="") as file:
        assert [row["index"] for row in csv.DictReader(file)] == [f"k{n}" if n != 3 else "k\n3" for n in range(11)]
    _, first, second, _ = next(small_tasks.rows(1, 1))
    printed = right(here("predict", "--workdir", run, "--text", f'{first} "said, 0"', "--text-pair", second))
    assert float(printed) == pytest.approx(float(lines[0].split("\t")[1]), abs=6e-4)


# In Hugging Face's format


def test_out_and_in_again(mrpc, squad2, tmp_path):
    for workdir, changes, architecture, labels in (
        (mrpc[0], {}, "BertForSequenceClassification", ("0", "1")),
        (squad2[1], QUICK, "BertForQuestionAnswering", None),
    ):
        home = tmp_path / architecture
        right(here("export-hf", "--workdir", workdir, "--output", home / "hf"))
        right(here("import-hf", home / "hf", "--output", home / "ours"))
        first, *others = load_init(str(workdir)), load_pretrained(home / "hf"), load_init(str(home / "ours"))
        assert first.head.architecture == architecture and first.head.labels == labels
        assert first.config == dataclasses.replace(small_tasks.CONFIG, **changes)
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, dict(other.params), dict(first.params))
            np.testing.assert_array_equal(other.head.kernel, first.head.kernel)
            np.testing.assert_array_equal(other.head.bias, first.head.bias)
            assert other.head.architecture == architecture
            assert other.vocabulary.fingerprint == first.vocabulary.fingerprint
