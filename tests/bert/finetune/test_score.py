import json
import random

import pytest
import sklearn.metrics

from bert_flax.finetune import score
from bert_flax.finetune.examples import Answer, QuestionExample
from bert_flax.finetune.tasks import TASKS, custom_task
from core_flax.types import UserError

RTE = "index\tsentence1\tsentence2\tlabel\n" + "".join(
    f'{index}\tThe "river\tcrosses.\t{label}\n'
    for index, label in enumerate(["entailment", "not_entailment", "entailment", "not_entailment"])
)
ANSWERS = ["entailment", "not_entailment", "not_entailment", "entailment"]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def submission(path, predictions, indexes=None, header="index\tprediction"):
    rows = [f"{index}\t{text}" for index, text in zip(indexes or range(len(predictions)), predictions, strict=True)]
    return write(path, "\n".join([header, *rows]) + "\n")


@pytest.fixture
def rte(tmp_path):
    return write(tmp_path / "RTE" / "dev.tsv", RTE)


def refusal(task, predictions, data, null_odds=None):
    with pytest.raises(UserError) as error:
        score.score(task, predictions, data, null_odds)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_labels_are_found_by_index(tmp_path, rte):
    straight = submission(tmp_path / "p.tsv", ANSWERS)
    shuffled = submission(tmp_path / "q.tsv", [ANSWERS[i] for i in (2, 0, 3, 1)], [2, 0, 3, 1])
    assert score.score("rte", straight, rte) == score.score("rte", shuffled, rte) == {"accuracy": 50, "total": 4}


def test_each_classification_has_the_metrics_of_its_task(tmp_path):
    """Against scikit-learn, on files laid out as CoLA (no header), MRPC (byte order mark, no index) and QQP (id)."""
    draw = random.Random(0)
    labels = [draw.randint(0, 1) for _ in range(60)]
    found = [label if draw.random() < 0.7 else 1 - label for label in labels]
    rows = {
        "cola": "".join(f"s\t{label}\t\tA sentence.\n" for label in labels),
        "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        + "".join(f"{label}\t7\t8\tOne.\tTwo.\n" for label in labels),
        "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        + "".join(f"{900 + i}\t\t\tWhy?\tHow?\t{label}\n" for i, label in enumerate(labels)),
    }
    expected = {
        "accuracy": 100 * sklearn.metrics.accuracy_score(labels, found),
        "f1": 100 * sklearn.metrics.f1_score(labels, found),
        "matthews": 100 * sklearn.metrics.matthews_corrcoef(labels, found),
        "total": 60,
    }
    names = {"cola": "matthews accuracy total", "mrpc": "accuracy f1 total", "qqp": "accuracy f1 total"}
    for task, text in rows.items():
        indexes = [900 + i for i in range(60)] if task == "qqp" else None
        path = submission(tmp_path / f"{task}.tsv", found, indexes)
        scores = score.score(task, path, write(tmp_path / task / "dev.tsv", text))
        assert scores == pytest.approx({name: expected[name] for name in names[task].split()})


def test_regression_takes_any_finite_number(tmp_path):
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    rows = "".join(f"{i}\tg\tf\ty\t0\tn\tn\tOne.\tTwo.\t{value}\n" for i, value in enumerate([0, 1.5, 4, 5]))
    data = write(tmp_path / "dev.tsv", header + rows)
    # Ranks 1 3 2 4 of 1 2 3 4: 1 - 6 (1 + 1) / (4 (16 - 1)).
    scores = score.score("stsb", submission(tmp_path / "p.tsv", ["-0.2", "4e0", "3", "5.3"]), data)
    assert scores["spearman"] == pytest.approx(80)
    assert 0 < scores["pearson"] < 100
    assert "p.tsv:3: 'nan' is no score" in refusal("stsb", submission(tmp_path / "p.tsv", [1, "nan", 2, 3]), data)


def test_rows_that_the_reader_leaves_out_may_be_predicted(tmp_path):
    header = "index\tsentence1\tsentence2\tgold_label\n"
    rows = "".join(f"{i}\tOne.\tTwo.\t{label}\n" for i, label in enumerate(["neutral", "-", "entailment"]))
    data = write(tmp_path / "dev_matched.tsv", header + rows)
    for predicted in ([0, 1, 2], [0, 2]):
        path = submission(tmp_path / "p.tsv", ["neutral"] * len(predicted), predicted)
        figures, notes = score.score_file(TASKS["mnli"], path, data)
        assert figures == {"accuracy": 50, "total": 2}
        assert len(notes) == 1 and "dev_matched.tsv:3 has no label" in notes[0]
    path = submission(tmp_path / "p.tsv", ["neutral"] * 4, range(4))
    assert f"{path}:3 index '1' is not in {data} (nor are 1 more); give" in refusal("mnli", path, data)


def test_choices_in_a_csv_file(tmp_path):
    header = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label\n"
    rows = "".join(f'{i},,,She,"A, b.",She,gold,a,b,c,"d, e",{label}\n' for i, label in ((5, 0), (6, 3), (7, 2)))
    data = write(tmp_path / "val.csv", header + rows)
    path = write(tmp_path / "p.csv", "index,prediction\n7,2\n5,1\n6,3\n")
    assert score.score("swag", path, data) == {"accuracy": pytest.approx(200 / 3), "total": 3}
    assert "p.csv:2: '4' is no label of task swag" in refusal("swag", write(path, "index,prediction\n7,4\n"), data)


def test_a_task_of_the_users_own(tmp_path):
    data = write(tmp_path / "dev.csv", 'text,class\n"a, b",good\nc,bad\n')
    path = submission(tmp_path / "p.tsv", ["good", "good"])
    figures, _ = score.score_file(custom_task("text=text,label=class", ("bad", "good")), path, data)
    assert figures == {"accuracy": 50, "total": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tprediction\n0\tentailment\n1\tyes\n", "p.tsv:3: 'yes' is no label of task rte, which has entailment,"),
        ("index\tprediction\n0\tentailment\n", "p.tsv has no prediction for 3 of 4 rows: index '1', '2', '3'"),
        ("index\tprediction\n0\tentailment\n0\tentailment\n", "p.tsv:3: index '0' comes twice"),
        ("index\tprediction\n7\tentailment\n", "p.tsv:2 index '7' is not in "),
        ("index\tprediction\n0 entailment\n", "p.tsv:2 has 1 field, not 2"),
        ("id\tprediction\n0\tentailment\n", "p.tsv has no column 'index'; its columns are 'id', 'prediction'"),
        ("0\tentailment\n", "p.tsv has no column 'index'; its columns are '0', 'entailment'"),
        ("index\tprediction\n", "p.tsv has no prediction for 4 of 4 rows"),
        ("", "p.tsv is empty"),
    ],
)
def test_a_submission_with_a_mistake_is_refused(tmp_path, rte, content, message):
    path = write(tmp_path / "p.tsv", content)
    assert message in refusal("rte", path, rte)


def test_files_that_are_not_there_and_tasks_that_do_not_exist(tmp_path, rte):
    assert "cannot read" in refusal("rte", tmp_path / "none.tsv", rte)
    path = submission(tmp_path / "p.tsv", ANSWERS)
    assert "cannot read" in refusal("rte", path, tmp_path)
    assert "unknown task 'rtf'; did you mean rte?" in refusal("rtf", path, rte)
    assert "task custom has no columns and labels by which to score" in refusal("custom", path, rte)
    assert "has no column 'label'" in refusal("rte", path, write(tmp_path / "t.tsv", "sentence1\tsentence2\na\tb\n"))
    twice = write(tmp_path / "dev.tsv", RTE + RTE.split("\n")[1] + "\n")
    assert "'0' comes twice" in refusal("rte", path, twice)
    assert "task rte has no unanswerable questions" in refusal("rte", path, rte, null_odds=path)


def squad_file(path, version2=False):
    """Three questions about one paragraph; in version 2 a fourth one that it does not answer."""
    context = "The old bridge crosses the river. A farmer paints it."
    answers = {"q1": ["old bridge", "The old bridge"], "q2": ["the river"], "q3": ["A farmer", "farmer"]}
    nodes = [
        {
            "id": key,
            "question": "What?",
            "answers": [{"text": text, "answer_start": context.index(text)} for text in texts],
        }
        | ({"is_impossible": False} if version2 else {})
        for key, texts in answers.items()
    ]
    if version2:
        nodes.append({"id": "q4", "question": "When?", "answers": [], "is_impossible": True})
    paragraph = {"context": context, "qas": nodes}
    return write(path, json.dumps({"version": "x", "data": [{"title": "t", "paragraphs": [paragraph]}]}))


def test_answers_of_version_1(tmp_path):
    """By hand: q2 shares one of two words once articles are gone (1 of 2 predicted, 1 of 1 gold)."""
    data = squad_file(tmp_path / "dev-v1.1.json")
    path = write(tmp_path / "p.json", json.dumps({"q1": "Old Bridge!", "q2": "wide river", "q3": "teacher"}))
    assert score.score("squad", path, data) == pytest.approx(
        {"exact": 100 / 3, "f1": 100 * (1 + 2 / 3 + 0) / 3, "total": 3, "missing": 0}
    )


def test_answers_of_version_2_and_null_odds(tmp_path):
    data = squad_file(tmp_path / "dev-v2.0.json", version2=True)
    path = write(tmp_path / "p.json", json.dumps({"q1": "old bridge", "q2": "", "q3": "farmer", "q4": "river"}))
    odds = write(tmp_path / "odds.json", json.dumps({"q1": -3, "q2": 0.5, "q3": -1.5, "q4": 0}))
    scores = score.score("squad2", path, data, odds)
    assert {name: scores[name] for name in ("exact", "f1", "total", "HasAns_exact", "NoAns_f1")} == pytest.approx(
        {"exact": 50, "f1": 50, "total": 4, "HasAns_exact": 200 / 3, "NoAns_f1": 0}
    )
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (75, -1.5)
    assert "best_f1" not in score.score("squad2", path, data)


def test_missing_answers_are_said_and_wrong(tmp_path):
    data = squad_file(tmp_path / "dev-v1.1.json")
    path = write(tmp_path / "p.json", json.dumps({"q1": "old bridge"}))
    figures, notes = score.score_file(TASKS["squad"], path, data)
    assert figures == pytest.approx({"exact": 100 / 3, "f1": 100 / 3, "total": 3, "missing": 2})
    assert notes == [f"{path} has no prediction for 2 questions, which count as wrong: q2, q3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"q1": "a", "q9": "b"}', "p.json question q9 is not in "),
        ('{"q1": ["a"]}', 'p.json question q1: ["a"] is not a text'),
        ('{"q1": null}', "p.json question q1: null is not a text"),
        ('{"q1": "a",\n "q1": "b"}', "p.json question q1 comes twice"),
        ('["a"]', "p.json is not a JSON object of a text by question"),
        ('{"q1": "a"\n "q2"', "p.json:2 is not valid JSON"),
        ("{}", "p.json predicts none of the 4 questions"),
        ("", "p.json is empty"),
        ("[" * 100_000, "p.json is not JSON that can be read"),
    ],
)
def test_answers_with_a_mistake_are_refused(tmp_path, content, message):
    data = squad_file(tmp_path / "dev-v2.0.json", version2=True)
    assert message in refusal("squad2", write(tmp_path / "p.json", content), data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"q1": 1, "q2": 2.5, "q3": 0}', "odds.json has no number for 1 of 4 questions: q4"),
        ('{"q1": 1, "q2": 2.5, "q3": 0, "q4": "1"}', 'odds.json question q4: "1" is not a number'),
        ('{"q1": 1, "q2": 2.5, "q3": 0, "q4": NaN}', "odds.json question q4: NaN is not a number"),
        ('{"q1": 1, "q2": 2.5, "q3": 0, "q4": 1%s}' % ("0" * 400), "odds.json question q4: 1000"),
        ('{"q1": 1, "q2": 2.5, "q3": 0, "q4": -Infinity}', "odds.json question q4: -Infinity is not a number"),
        ('{"q1": 1, "q2": 2.5, "q3": 0, "q4": true}', "odds.json question q4: true is not a number"),
        ('{"q1": 1, "q2": 2.5, "q3": 0, "q4": 1, "q5": 1}', "odds.json question q5 is not in "),
    ],
)
def test_null_odds_with_a_mistake_are_refused(tmp_path, content, message):
    data = squad_file(tmp_path / "dev-v2.0.json", version2=True)
    path = write(tmp_path / "p.json", '{"q1": "a", "q2": "", "q3": "", "q4": ""}')
    assert message in refusal("squad2", path, data, write(tmp_path / "odds.json", content))


GOLD = """-DOCSTART- -X- O O

Anna NNP I-NP I-PER
Berg NNP I-NP I-PER
visits VBZ I-VP O
Oslo NNP I-NP I-LOC

-DOCSTART- -X- O O

Bergen NNP I-NP I-LOC
Oslo NNP I-NP B-LOC
"""


def test_tags_in_columns(tmp_path):
    """Gold in IOB1, predictions in IOB2 with other columns and no document lines: two names of four are right."""
    data = write(tmp_path / "eng.testa", GOLD)
    path = write(tmp_path / "p.txt", "Anna B-PER\nBerg I-PER\nvisits O\nOslo B-ORG\n\nBergen B-LOC\nOslo I-LOC\n")
    scores = score.score("ner", path, data)
    assert scores == pytest.approx(
        {"f1": 200 / 7, "precision": 100 / 3, "recall": 25, "f1_LOC": 0, "f1_ORG": 0, "f1_PER": 100, "total": 4}
    )
    right = write(tmp_path / "q.txt", "Anna B-PER\nBerg I-PER\nvisits O\nOslo B-LOC\n\nBergen B-LOC\nOslo B-LOC\n")
    assert score.score("ner", right, data)["f1"] == 100
    assert score.score("ner", data, data)["f1"] == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Anna B-PER\nBerg B-DOG\n", "p.txt:2: 'B-DOG' is no tag"),
        ("Anna B-PER\nBerk I-PER\n", "p.txt:2: the word is 'Berk', at eng.testa:4 it is 'Berg'"),
        ("Anna B-PER\n\nBerg I-PER\n", "p.txt:3: a sentence begins here, but not at eng.testa:4"),
        (
            "Anna O\nBerg O\nvisits O\nOslo O\nBergen O\nOslo O\n",
            "eng.testa:10: a sentence begins here, but not at p.txt:5",
        ),
        ("Anna B-PER\nBerg I-PER\n", "p.txt has 2 words, eng.testa 6"),
        (GOLD + "more X Y O\n", "p.txt has 7 words, eng.testa 6"),
        ("Anna B-PER\nBerg\n", "p.txt:2 has 1 columns"),
    ],
)
def test_tags_with_a_mistake_are_refused(tmp_path, content, message):
    data, path = write(tmp_path / "eng.testa", GOLD), write(tmp_path / "p.txt", content)
    assert message in refusal("ner", path, data).replace(f"{tmp_path}/", "")


def test_the_table(tmp_path, capsys):
    data = squad_file(tmp_path / "dev-v2.0.json", version2=True)
    path = write(tmp_path / "p.json", json.dumps({"q1": "old bridge", "q2": "", "q3": "farmer"}))
    odds = write(tmp_path / "odds.json", json.dumps({"q1": -3, "q2": 0.5, "q3": -1.5, "q4": 0}))
    score.print_scores("squad2", path, data, odds)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-2:] == ["wrong:", "q4"]
    assert lines[1] == ["squad2", "per", "cent"]
    assert {tuple(line) for line in lines} >= {("exact", "50.00"), ("total", "4"), ("best_f1_thresh", "-1.5000")}
    assert score.table("ner", {"f1": 12.344, "total": 51362}).split("\n") == [
        "ner      per cent",
        "f1          12.34",
        "total      51,362",
    ]


def test_null_odds_count_above_the_threshold_that_is_given(tmp_path, capsys):
    """Predictions count as they are, for they may have been chosen by a threshold already; else by the one given."""
    data = squad_file(tmp_path / "dev-v2.0.json", version2=True)
    path = write(tmp_path / "p.json", json.dumps({"q1": "old bridge", "q2": "", "q3": "farmer", "q4": ""}))
    odds = write(tmp_path / "odds.json", json.dumps({"q1": 3.5, "q2": 0.5, "q3": -1.5, "q4": 5}))

    def exact(threshold=None):
        score.print_scores("squad2", path, data, odds, threshold)
        return dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])["exact"]

    assert exact() == exact(3.5) == "75.00"
    assert exact(1) == "50.00"
    with pytest.raises(UserError, match=r"--null-threshold 1 goes with --null-odds FILE"):
        score.print_scores("squad2", path, data, None, 1.0)


def test_scores_in_memory():
    """What the evaluation after an epoch calls, without files."""
    assert score.label_scores(TASKS["mrpc"], [1, 1, 0], [1, 0, 0]) == pytest.approx(
        {"accuracy": 200 / 3, "f1": 200 / 3, "total": 3}
    )
    questions = [
        QuestionExample("a", "?", "One two.", (Answer("One", 0),), False),
        QuestionExample("b", "?", "One two.", (), True),
    ]
    scores = score.answer_scores(TASKS["squad2"], questions, {"a": "one", "b": "two"}, {"a": 5, "b": 6}, threshold=5)
    assert (scores["exact"], scores["best_exact"]) == (100, 100)
    scores = score.answer_scores(TASKS["squad2"], questions, {"a": "one", "b": "two"}, {"a": 5, "b": 6})
    assert (scores["exact"], scores["best_exact"]) == (50, 100), "odds alone change no prediction"
    assert score.answer_scores(TASKS["squad"], questions[:1], {"a": "one"})["exact"] == 100
