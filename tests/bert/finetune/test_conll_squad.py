"""CoNLL's columns and SQuAD's JSON: both schemes of tags, places counted in characters, answers out of place."""

import random

import pytest
from task_files import CONTEXT, FLOW, question, squad, tuples, write

from bert_flax.finetune.conll import to_iob2
from bert_flax.finetune.examples import Answer, QuestionExample
from bert_flax.finetune.readers import read, read_file
from bert_flax.finetune.tasks import TASKS
from core_flax.types import UserError

NER, SQUAD, SQUAD2 = TASKS["ner"], TASKS["squad"], TASKS["squad2"]


# CoNLL


CONLL = """-DOCSTART- -X- O O

Anna NNP I-NP I-PER
Berg NNP I-NP I-PER
Berlin NNP I-NP B-PER
sah VBD I-VP O

Acme NNP I-NP I-ORG
Oslo NNP I-NP I-LOC
\t
-DOCSTART- -X- O O

Rio NNP I-NP I-LOC
"""


def test_conll_columns(tmp_path):
    write(tmp_path / "eng.testa", CONLL)
    expected = [
        ("0", ("Anna", "Berg", "Berlin", "sah"), ("B-PER", "I-PER", "B-PER", "O"), 0),
        ("1", ("Acme", "Oslo"), ("B-ORG", "B-LOC"), 0),
        ("2", ("Rio",), ("B-LOC",), 1),
    ]
    assert tuples(read(NER, tmp_path, "dev")) == expected
    without = CONLL.replace("-DOCSTART- -X- O O\n", "")
    write(tmp_path / "valid.txt", without.replace(" ", "\t").replace("\n", "\r\n"))
    (tmp_path / "eng.testa").unlink()
    assert tuples(read(NER, tmp_path, "dev")) == [(*row[:3], number) for number, row in enumerate(expected)]
    words = write(tmp_path / "words", "".join(line.split(" ")[0] + "\n" for line in CONLL.split("\n")))
    assert tuples(read_file(NER, words, labelled=False)) == [(*row[:2], None, row[3]) for row in expected]


def entities(tags, scheme):
    """(type, start, stop) by the definition of each scheme: the start of an entity, then all that is inside it."""
    found = []
    for place, tag in enumerate(tags):
        before = tags[place - 1] if place else "O"
        if scheme == "IOB1":
            begins = tag != "O" and (tag[0] == "B" or before == "O" or before[2:] != tag[2:])
        else:
            begins = tag[0] == "B"
        if begins:
            found.append([tag[2:], place, place + 1])
        elif tag != "O":
            assert found[-1][0] == tag[2:] and found[-1][2] == place, "I- that goes on nothing"
            found[-1][2] += 1
    return found


def test_iob1_and_iob2_hold_the_same_entities():
    draw = random.Random(0)
    for _ in range(2000):
        wanted, iob1, iob2 = [], [], []
        while len(iob1) < 12:
            kind, length = draw.choice(("PER", "LOC", None)), draw.randint(1, 3)
            if kind is None:
                iob1, iob2 = [*iob1, "O"], [*iob2, "O"]
                continue
            touches = bool(wanted) and wanted[-1][0] == kind and wanted[-1][2] == len(iob1)
            wanted.append([kind, len(iob1), len(iob1) + length])
            iob2 += [f"B-{kind}"] + [f"I-{kind}"] * (length - 1)
            iob1 += [f"{'B' if touches else 'I'}-{kind}"] + [f"I-{kind}"] * (length - 1)
        assert entities(iob1, "IOB1") == wanted  # the test's own reading of both schemes is right
        assert entities(to_iob2(iob1), "IOB2") == wanted
        assert to_iob2(iob1) == to_iob2(iob2) == tuple(iob2)


# SQuAD


def test_squad_counts_characters(tmp_path):
    smile = CONTEXT.index("🙂")
    path = write(
        tmp_path / "dev-v1.1.json", squad(question("a", ("🙂", smile), ("fließt", FLOW)), question("b", ("D", 0)))
    )
    dataset = read(SQUAD, tmp_path, "dev")
    first = QuestionExample("a", "a?", CONTEXT, (Answer("🙂", smile), Answer("fließt", FLOW)), False)
    assert dataset.examples == (first, QuestionExample("b", "b?", CONTEXT, (Answer("D", 0),), False))
    assert dataset.dropped == dataset.warnings == ()
    assert read_file(SQUAD, path, labelled=True) == dataset
    assert [example.answers for example in read_file(SQUAD, path, labelled=False).examples] == [(), ()]


def test_misplaced_answers_are_not_trained_on(tmp_path):
    questions = [
        question("whole", ("Der", 0)),
        question("half", ("fließt", FLOW), ("fließt", FLOW + 1)),
        question("off", ("Der", 1)),
        question("negative", (".", -1)),
        question("beyond", ("Der", 999)),
    ]
    for split in ("train", "dev"):
        write(tmp_path / f"{split}-v1.1.json", squad(*questions))
    train, dev = (read(SQUAD, tmp_path, split) for split in ("train", "dev"))
    assert [(e.id, e.answers) for e in train.examples] == [
        ("whole", (Answer("Der", 0),)),
        ("half", (Answer("fließt", FLOW),)),
    ]
    for example in train.examples:
        for answer in example.answers:
            assert example.context[answer.start : answer.start + len(answer.text)] == answer.text
    assert len(train.dropped) == 4 and train.warnings == ()
    assert "train-v1.1.json question off: answer_start 1 of 'Der' points at 'er '" in train.dropped[1]
    # The scorer compares texts, so nothing is left out of an evaluation.
    assert [example.id for example in dev.examples] == ["whole", "half", "off", "negative", "beyond"]
    assert len(dev.warnings) == 4 and dev.dropped == ()
    write(tmp_path / "train-v1.1.json", squad(questions[2]))
    with pytest.raises(UserError, match=r"train-v1.1.json holds no example: .*answer_start 1 of 'Der'"):
        read(SQUAD, tmp_path, "train")


def test_squad2_knows_impossible_questions(tmp_path):
    plausible = {"plausible_answers": [{"text": "Der", "answer_start": 0}]}
    questions = [
        question("yes", ("Der", 0), is_impossible=False),
        question("no", is_impossible=True) | plausible,
        question("unsaid"),  # as the official scorer sees it
        question("none", is_impossible=False),
        question("blank", ("", 0), is_impossible=False),
    ]
    path = write(tmp_path / "dev-v2.0.json", squad(*questions))
    dataset = read(SQUAD2, tmp_path, "dev")
    assert [(e.id, e.is_impossible, len(e.answers)) for e in dataset.examples] == [
        ("yes", False, 1),
        ("no", True, 0),
        ("unsaid", True, 0),
    ]
    assert dataset.dropped == (f"{path} question none has no answer", f"{path} question blank has no answer")
    with pytest.raises(UserError, match=r"question no is unanswerable, which task squad does not know; take squad2"):
        read_file(SQUAD, path, labelled=True)
    assert len(read_file(SQUAD, path, labelled=False).examples) == 5
    write(path, squad(question("both", ("Der", 0), is_impossible=True)))
    with pytest.raises(UserError, match="question both is_impossible and has the answer 'Der'"):
        read(SQUAD2, tmp_path, "dev")


def test_two_questions_of_one_id(tmp_path):
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", squad(question("a", ("Der", 0)), question("a", ("Der", 0))))
    assert len(read(SQUAD, tmp_path, "train").examples) == 2
    with pytest.raises(UserError, match=r"dev.json question a comes twice"):
        read(SQUAD, tmp_path, "dev")
