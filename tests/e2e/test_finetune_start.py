"""What fine-tuning is started with, and what is refused, in one line; hardly anything is trained."""

import json
import shutil

import numpy as np
import pytest
import small_tasks
from safetensors.numpy import load_file, save_file
from small_tasks import arguments, here, in_a_hurry, refused, right

from bert_flax.finetune import command as finetune_command
from bert_flax.finetune.runs import Result
from bert_flax.pretrained import load_init


@pytest.fixture(scope="module", autouse=True)
def hurry():
    with in_a_hurry():
        yield


@pytest.fixture
def started(monkeypatch):
    """Runs are not trained but listed: folder, task, settings, model. The figure tells the recipe."""
    found = []

    def run(folder, task, settings, pretrained, data, origin):
        figures = {f"dev/{task.spec.primary}": settings.optimizer.learning_rate * 1e5 + settings.epochs / 100}
        found.append((folder, task, settings, pretrained))
        if not folder.exists():
            small_tasks.put(folder / "of", folder.name)
        return Result(task.name, settings.seed, figures, figures, 1, 1, 1.0, False)

    monkeypatch.setattr(finetune_command, "run", run)
    return found


def test_a_head_is_kept(started, mrpc, glue, tmp_path):
    right(here(*arguments("mrpc", glue, tmp_path / "a", "--keep-head", init=mrpc[0])))
    right(here(*arguments("rte", glue, tmp_path / "b", init=mrpc[0])))
    kept, new = (pretrained.params for *_, pretrained in started)
    best = load_init(str(mrpc[0]))
    np.testing.assert_array_equal(kept["head"]["kernel"], best.head.kernel)
    np.testing.assert_array_equal(kept["head"]["bias"], best.head.bias)
    assert set(new) == {"encoder"}


def test_a_pooler_that_is_missing_is_told(started, model, glue, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    arrays = load_file(other / "model.safetensors")
    save_file({name: x for name, x in arrays.items() if "pooler" not in name}, other / "model.safetensors")
    data = small_tasks.write_ner(tmp_path / "ner", train=1, dev=1)
    line = f"{other} has no pooler: a new one is trained, as the head is"
    assert line in right(here(*arguments("mrpc", glue, tmp_path / "a", init=other))).splitlines()
    for number, (task, place, init) in enumerate((("ner", data, other), ("mrpc", glue, model))):
        assert "has no pooler" not in right(here(*arguments(task, place, tmp_path / f"b{number}", init=init)))


def test_the_grid_is_tried_and_the_best_recipe_given_to_the_seeds(started, model, glue, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_command, "SWEEP_BATCH_SIZES", (4,))
    monkeypatch.setattr(finetune_command, "SWEEP_EPOCHS", (2, 1))
    monkeypatch.setattr(finetune_command, "SWEEP_LEARNING_RATES", (2e-5, 3e-5))
    swept = {"train__batch_size": None, "optimizer__learning_rate": None, "epochs": None}
    printed = right(here(*arguments("rte", glue, tmp_path, "--sweep", init=model, seeds=2, seed=5, **swept)))
    tried, seeds = started[:4], started[4:]
    recipes = [f"batch4_lr{rate}_epochs{epochs}" for rate in ("2e-05", "3e-05") for epochs in (2, 1)]
    assert [folder for folder, *_ in tried] == [tmp_path / "sweep" / recipe for recipe in recipes]
    assert {settings.seed for _, _, settings, _ in tried} == {5}
    assert [folder for folder, *_ in seeds] == [tmp_path / "seed-5", tmp_path / "seed-6"]
    for (_, _, settings, _), seed in zip(seeds, (5, 6), strict=True):
        assert (settings.seed, settings.epochs, settings.train.batch_size) == (seed, 2, 4)
        assert settings.optimizer.learning_rate == 3e-5 and settings.inputs.max_length == 32
    assert "best recipe on the dev set is batch4_lr3e-05_epochs2: accuracy 3.02" in printed
    sweep = json.loads((tmp_path / "results.json").read_text())["sweep"]
    assert list(sweep) == recipes and max(sweep, key=sweep.get) == "batch4_lr3e-05_epochs2"
    # The run that was best is not trained again: it is the first seed's.
    made = {path.parent.name: path.read_text() for path in tmp_path.rglob("of")}
    assert made == {recipe: recipe for recipe in recipes} | {"seed-5": "batch4_lr3e-05_epochs2", "seed-6": "seed-6"}


def test_the_papers_grid():
    """Appendix A.3."""
    assert set(finetune_command.SWEEP_BATCH_SIZES) == {16, 32}
    assert set(finetune_command.SWEEP_LEARNING_RATES) == {5e-5, 3e-5, 2e-5}
    assert set(finetune_command.SWEEP_EPOCHS) == {2, 3, 4}


def test_all_of_glue_that_is_there(started, model, glue, tmp_path):
    data, names = shutil.copytree(glue, tmp_path / "glue"), ("cola", "mrpc", "stsb")
    (data / "RTE" / "dev.tsv").unlink()
    command = arguments("glue", data, tmp_path / "run", init=model, seeds=2, optimizer__learning_rate=None)
    lines = right(here(*command)).splitlines()
    assert f"rte: left out, {data} lacks its dev split" in lines
    assert f"qqp: left out, {data} lacks its dev and train split" in lines
    assert [task.name for _, task, _, _ in started] == [name for name in names for _ in range(2)]
    assert {folder.parent for folder, *_ in started} == {tmp_path / "run" / name for name in names}
    *lines, last = lines
    assert last == f"written to {tmp_path / 'run' / 'results.json'}"
    shown = [line.split()[:2] for line in lines[-4:]]
    assert shown == [["task", "metric"], ["cola", "matthews"], ["mrpc", "f1"], ["stsb", "spearman"]]
    assert "5.08 ± 0.00" in lines[-1] and lines[-1].endswith(" 1")
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())) == set(names)


def test_a_torn_file_of_a_later_task_is_told_first(started, model, glue, tmp_path):
    data = shutil.copytree(glue, tmp_path / "glue")
    (data / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tentailment\n")
    command = arguments("glue", data, tmp_path / "run", init=model, optimizer__learning_rate=None)
    assert "RTE/dev.tsv:2 has 3 fields, not 4" in refused(*command)
    assert started == []


def test_workdirs_of_something_else(started, mrpc, model, glue, tmp_path):
    """One task's and all tasks' are not mixed, nor one recipe's seeds and a sweep."""
    home = tmp_path / "all"
    shutil.copytree(mrpc[0], home / "mrpc")
    line = refused(*arguments("mrpc", glue, home, init=model))
    assert f"--workdir {home} holds the runs of several tasks (mrpc); give one for this task alone" in line
    swept = {"train__batch_size": None, "optimizer__learning_rate": None, "epochs": None}
    line = refused(*arguments("mrpc", glue, home / "mrpc", "--sweep", init=model, **swept))
    assert f"--workdir {home / 'mrpc'} holds runs of one recipe; give another for a --sweep" in line
    line = refused(*arguments("glue", glue, home / "mrpc", init=model, optimizer__learning_rate=None))
    assert f"--workdir {home / 'mrpc'} holds the runs of one task; give another for all of GLUE" in line
    assert started == []


def test_every_seed_must_be_one(started, model, glue, tmp_path):
    line = refused(*arguments("mrpc", glue, tmp_path / "run", init=model, seed=2**31 - 1, seeds=2))
    assert f"seed {2**31}: must be" in line
    assert started == []


def test_the_folder_of_another_task_without_its_name(started, model, glue, tmp_path, monkeypatch):
    data = shutil.copytree(glue, tmp_path / "glue")
    monkeypatch.chdir(data / "MRPC")
    assert "--data . is the folder of task mrpc, not of rte" in refused(
        *arguments("rte", ".", tmp_path / "a", init=model)
    )


def test_windows_closer_than_the_stride_are_told(started, model, tmp_path):
    data = small_tasks.write_squad(tmp_path / "squad", 1)
    given = {"init": model, "inputs__max_length": 16}
    told = "windows begin where the one before ends, and not --inputs.stride 30 tokens after its start: 16 tokens have"
    assert told in right(here(*arguments("squad", data, tmp_path / "a", inputs__stride=30, **given)))
    assert "windows begin" not in right(here(*arguments("squad", data, tmp_path / "b", inputs__stride=2, **given)))


def test_documents_of_one_sentence_are_told(started, model, tmp_path):
    data = small_tasks.write_ner(tmp_path / "ner")
    words = arguments("ner", data, tmp_path / "a", "--inputs.document-context", init=model)
    assert "no document holds two sentences" not in right(here(*words))
    for name in ("eng.train", "eng.testa"):
        text = (data / name).read_text()
        (data / name).write_text("\n".join(line for line in text.split("\n") if "-DOCSTART-" not in line))
    assert "ner, train: no document holds two sentences" in right(here(*words))


def test_a_table_with_tabs_and_labels_of_its_own(started, model, tmp_path):
    small_tasks.tsv(tmp_path / "train.tsv", ("kind", "n", "said"), ("no", 1, "a"), ("yes", 2, '"a'), ("maybe", 3, "b"))
    small_tasks.tsv(tmp_path / "validation.tsv", ("n", "kind", "said"), (4, "yes", "a"))
    given = {"init": model, "columns": "text=said,label=kind,id=n"}
    printed = right(here(*arguments("custom", tmp_path, tmp_path / "run", **given)))
    assert "custom, train: 3 examples" in printed and "custom, dev: 1 examples" in printed
    assert "custom, labels: maybe, no, yes" in printed.splitlines()
    assert started[0][1].spec.labels == ("maybe", "no", "yes")
    small_tasks.tsv(tmp_path / "validation.tsv", ("n", "kind", "said"), (4, "never", "a"))
    assert "validation.tsv:2: 'never' is no label of task custom" in refused(
        *arguments("custom", tmp_path, tmp_path / "run", **given)
    )


def test_what_is_left_out_is_told_and_not_trained_on(started, model, tmp_path):
    """A SQuAD answer whose offset is wrong; a mismatched dev set that is not there."""
    data = small_tasks.write_squad(tmp_path / "squad", 1)
    stored = json.loads((data / "train-v1.1.json").read_text())
    stored["data"][0]["paragraphs"][3]["qas"][0]["answers"][0]["answer_start"] += 1
    (data / "train-v1.1.json").write_text(json.dumps(stored))
    printed = right(here(*arguments("squad", data, tmp_path / "a", init=model)))
    assert "squad, train: 23 examples" in printed.splitlines()
    assert f"squad, train: left out 1: {data / 'train-v1.1.json'} question q0-3: answer_start" in printed
    header, row = ("gold_label", "sentence1", "sentence2"), ("neutral", "the river " * 8, "the old village")
    for name in ("train", "dev_matched"):
        small_tasks.tsv(tmp_path / "MNLI" / f"{name}.tsv", header, row, row)
    printed = right(here(*arguments("mnli", tmp_path, tmp_path / "b", init=model, inputs__max_length=16)))
    assert "mnli: not measured on dev_mismatched (" in printed
    assert "mnli, train: 2 texts over --inputs.max-length 16 were cut" in printed
    small_tasks.tsv(tmp_path / "MNLI" / "dev_mismatched.tsv", header, row[:2])
    line = refused(*arguments("mnli", tmp_path, tmp_path / "c", init=model))
    assert f"{tmp_path / 'MNLI' / 'dev_mismatched.tsv'}:2 has 2 fields, not 3" in line


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "--seeds 0: must be 1 or more"),
        ({"epochs": 0}, "--epochs 0.0: must be more than 0, or None"),
        ({"epochs": 1e308}, "--epochs 1e+308: must be less than 2147483648, or None"),
        ({"epochs": 1e9}, "--train.num-steps 3000000000: must be less than 2147483648"),
        ({"train__num_steps": 1000}, "--train.num-steps follows from --epochs 8"),
        ({"schedule__warmup_steps": 0}, "--schedule.warmup-steps follows from --warmup-share 0.1"),
        ({"train__eval_every_steps": 5}, "--train.eval-every-steps follows from --evaluations-per-epoch 1"),
        ({"train__eval_batches": 5}, "a task is measured on its whole dev set"),
        ({"inputs__max_length": 65}, "--inputs.max-length 65 exceeds the 64 positions"),
        ({"inputs__max_length": 15}, "--inputs.max-length 15: must be 16 or more"),
        ({"train__batch_size": 6}, "--train.batch-size 6 does not divide by 1 microbatches x 4 devices"),
        ({"init": None}, "give either --init FOLDER"),
        ({"init_from_task": "x"}, "give either --init FOLDER"),
        ({"columns": "text=a,label=b"}, "go with the task custom"),
        ({"inputs__stride": 64}, "--inputs.stride is for tasks of kind span; mrpc is of kind classification"),
        ({"optimizer__learning_rat": 1}, "did you mean --optimizer.learning-rate?"),
        ({"init": "nowhere"}, "nowhere is no folder"),
        ({"data": "nowhere"}, "--data nowhere does not exist"),
        ({"workdir": ""}, "--workdir is empty"),
        ({"workdir": "s3://a/b"}, "--workdir s3://a/b: give a local folder"),
    ],
    ids=str,
)
def test_settings(model, glue, tmp_path, options, message):
    given = {"init": model} | options
    places = given.pop("data", glue), given.pop("workdir", tmp_path / "run")
    assert message in refused(*arguments("mrpc", *places, **given))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else(model, glue, mrpc):
    for folder in (model, mrpc[0] / "seed-0"):
        line = refused(*arguments("mrpc", glue, folder, init=model))
        assert f"--workdir {folder} is the folder of one run or model" in line


def test_tasks_that_cannot_be(model, glue, tmp_path):
    assert "did you mean mrpc?" in refused("finetune", "mrcp", "--data", glue)
    assert "name the task: bert-flax finetune TASK" in refused("finetune", "--data", glue)
    assert "one task at a time" in refused("finetune", "mrpc", "--data", glue, "rte")
    assert "--epochs is what --sweep tries values of" in refused(
        *arguments("mrpc", glue, tmp_path, "--sweep", init=model)
    )
    assert "go with the task custom" in refused(*arguments("mrpc", glue, tmp_path, "--regression", init=model))
    assert "go with the task custom" in refused(*arguments("custom", glue, tmp_path, init=model))
    assert "--data tfds:imdb: task custom reads tables; give the folder" in refused(
        *arguments("custom", "tfds:imdb", tmp_path, init=model, columns="text=text,label=label")
    )
    assert "names no label" in refused(*arguments("custom", glue, tmp_path, init=model, columns="text=a"))
    assert "--keep-head goes with one task" in refused(*arguments("glue", glue, tmp_path, "--keep-head", init=model))
    assert "holds no task of GLUE" in refused(*arguments("glue", tmp_path / "x", tmp_path, init=model))
    assert "RTE is the folder of task rte" in refused(*arguments("mrpc", glue / "RTE", tmp_path, init=model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("rte", "RTE/train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", ":2: 'maybe' is no label of"),
        ("rte", "RTE/train.tsv", "index\tsentence1\tlabel\n0\ta\tentailment\n", "has no column 'sentence2'"),
        ("rte", "RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tentailment\n", ":2 has 3 fields, not 4"),
        ("rte", "RTE/dev.tsv", "\n", "is empty"),
        ("rte", "RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n", "holds no example"),
        ("rte", "RTE/dev.tsv", None, "lacks the dev split of rte"),
        ("stsb", "STS-B/train.tsv", "sentence1\tsentence2\tscore\na\tb\t5.1\n", ":2: '5.1' is no score"),
        ("squad", "train-v1.1.json", "[", "train-v1.1.json:1 is not valid JSON"),
        ("squad", "train-v1.1.json", '{"data": [{}]}', "data[0] has no 'paragraphs'"),
        ("ner", "eng.train", "a NN O\nb O\n", ":2 has 2 columns where line 1 has 3"),
        ("ner", "eng.train", "a NN B-PERSON\n", ":1: 'B-PERSON' is no tag of task ner"),
        ("swag", "train.csv", "sent1,sent2\na,b\n", "has no column 'ending0'"),
    ],
)
def test_files(model, glue, tmp_path, task, name, content, message):
    data = shutil.copytree(glue, tmp_path / "data")
    (data / name).unlink(missing_ok=True)
    if content is not None:
        small_tasks.put(data / name, content)
    line = refused(*arguments(task, data, tmp_path / "run", init=model))
    assert message in line and str(data if content is None else data / name) in line
    assert not (tmp_path / "run").exists()


def test_models(model, glue, mrpc, tmp_path):
    def line(*more, **options):
        return refused(*arguments("mrpc", glue, tmp_path / "run", *more, **options))

    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    assert f"{other / 'config.json'} describes a model of type 'roberta'" in line(init=other)
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "they belong to different models" in line(init=other)
    (other / "config.json").write_text(json.dumps(config))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in line(init=other)
    (other / "config.json").unlink()
    assert str(other / "config.json") in line(init=other)
    assert f"--keep-head: {model} has no head of a task" in line("--keep-head", init=model)
    assert "--keep-head goes with --init" in line("--keep-head", init_from_task=mrpc[0])
    kind = "describes no run of kind 'bert_flax.finetune'; give the folder of such a run"
    assert f"{model / 'config.json'} {kind}" in line(init_from_task=model)
    assert f"{tmp_path} holds no complete run" in line(init_from_task=tmp_path)
    shutil.copytree(mrpc[0], tmp_path / "glue" / "mrpc")
    assert "give one of its folders mrpc" in line(init=tmp_path / "glue")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"optimizer__learning_rate": 1e-3}, "optimizer.learning_rate: 0.01 -> 0.001"),
        ({"epochs": 4}, "epochs: 8.0 -> 4.0"),
        ({"dropout": 0.0}, "dropout: None -> 0.0"),
        ({"inputs__max_length": 40}, "inputs.max_length: 32 -> 40"),
        ({"task": "rte"}, "task: mrpc -> rte"),
        ({"data": "other"}, "data: "),
        ({"init": "other"}, "init: "),
        ({"seeds": 1, "seed": 7, "epochs": 4}, "epochs: 8.0 -> 4.0"),
        ({"seeds": 1, "seed": 7, "task": "rte"}, "task: mrpc -> rte"),
    ],
    ids=str,
)
def test_another_run_is_refused_with_the_difference(mrpc, model, glue, tmp_path, changes, difference):
    workdir = shutil.copytree(mrpc[0], tmp_path / "run")
    given = {"init": model, "seeds": 2} | changes
    task, data = given.pop("task", "mrpc"), glue
    if "data" in changes:
        data = small_tasks.write_glue(tmp_path / given.pop("data"), train=23)
        difference += f"{glue} -> {data}"
    if "init" in changes:
        given["init"] = mrpc[0]
        difference += f"{model} -> {mrpc[0]}"
    line = refused(*arguments(task, data, workdir, **given))
    assert f"{workdir / 'seed-0'} holds a run with other settings, which these cannot continue: " in line
    assert difference in line
    for path in mrpc[0].rglob("*"):
        assert path.is_dir() or path.read_bytes() == (workdir / path.relative_to(mrpc[0])).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --data FILE with --output FILE, or --text TEXT"),
        ({"data": "x", "text": "x"}, "give either --data FILE with --output FILE, or --text TEXT"),
        ({"data": "x"}, "--data FILE and --output FILE go together"),
        ({"text": "x", "output": "x"}, "--data FILE and --output FILE go together"),
        ({"data": "x", "output": "y", "text_pair": "x"}, "--text-pair goes with --text"),
        ({"data": "x", "output": "x"}, "must be different files"),
        ({"text": " ", "text_pair": "x"}, "--text is empty"),
        ({"text": "x", "text_pair": "\udc80"}, "--text-pair is not UTF-8"),
        ({"text": "x"}, "task mrpc takes a --text-pair"),
        ({"text": "x", "text_pair": "y", "n_best": "z"}, "go with --data FILE"),
        ({"data": "x", "output": "y", "n_best": "z"}, "--n-best for squad and squad2; this run is of task mrpc"),
        ({"data": "x", "output": "y", "null_odds": "z"}, "--null-odds is for squad2"),
        ({"data": "x", "output": "y"}, "cannot read x"),
        ({"text": "x", "text_pair": "y", "step": 5}, "no checkpoint of step 5"),
        ({"text": "x", "text_pair": "y", "workdir": "nowhere"}, "nowhere holds no complete run"),
        ({"text": "x", "text_pair": "y", "workdir": ""}, "--workdir is empty"),
        ({"data": "x", "output": ""}, "--output is empty: only local files"),
        ({"data": "x", "output": "y", "n_best": "gs://a/b"}, "--n-best gs://a/b: only local files"),
    ],
    ids=str,
)
def test_predictions_that_cannot_be(mrpc, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    given = {"workdir": mrpc[0]} | options
    assert message in refused("predict", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()))
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_predicted(mrpc, squad2, glue, tmp_path):
    command = ["predict", "--workdir", mrpc[0], "--output", tmp_path / "x", "--data"]
    assert "has no column '#1 String'" in refused(*command, glue / "RTE" / "test.tsv")
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    assert f"{tmp_path / 'x'} could not be written: Is a directory" in refused(*command, glue / "MRPC" / "test.tsv")
    assert "takes a --text-pair" in refused("predict", "--workdir", squad2[1], "--text", "Who?")
    workdir = shutil.copytree(squad2[1], tmp_path / "run")
    (workdir / "seed-0" / "metrics.jsonl").unlink()
    line = refused("predict", "--workdir", workdir, "--text", "Who?", "--text-pair", "The river.")
    assert "was not measured on the dev set, so there is no threshold of null odds; these were: none" in line
