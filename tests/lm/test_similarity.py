"""Analogies, judgements of similarity, neighbours: files in the official layouts, vectors whose answers are known."""

import numpy as np
import pytest
import scipy.stats

from core_flax.types import UserError
from lm_flax.similarity import Vectors, analogies, judgements, neighbours, read_judgements, read_questions
from lm_flax.vectors import AnalogiesCommand, NeighboursCommand, list_neighbours, measure

# King - man + woman = queen, and a plural is a step along the third dim.
WORDS = ["<pad>", "man", "woman", "king", "queen", "kings", "King", "paris", "France"]
TABLE = np.array(
    [
        [9, 9, 9],
        [1, 0, 0],
        [1, 1, 0],
        [2, 0, 0.1],
        [2, 2, 0.1],
        [2, 0, 1],
        [0, 0, 5],
        [-1, 0, 1],
        [-1, 1, 1],
        [7, 7, 7],
    ],
    np.float32,
)
VECTORS = Vectors.of(["", *WORDS[1:]], TABLE)

QUESTIONS = """: family
man woman king queen
king queen man woman
man king woman unicorn
: towns

Paris france man woman
"""
JUDGEMENTS = """# Word 1	Word 2	Human (mean)
man	woman	7.5
king	Queen	8.00
man	paris	1
man	unicorn	0.5
"""


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions-words.txt"
    path.write_text(QUESTIONS)
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "wordsim353.tsv"
    path.write_text(JUDGEMENTS)
    return path


def test_vectors_are_those_of_words_at_length_1():
    assert VECTORS.words == WORDS[1:]
    np.testing.assert_allclose(np.linalg.norm(VECTORS.unit_VD, axis=1), 1, rtol=1e-6)
    twice = Vectors.of(["a", "b", "a"], np.array([[1.0, 0], [0, 0], [0, 1]]))
    assert twice.words == ["a", "b"]
    np.testing.assert_array_equal(twice.unit_VD, [[1, 0], [0, 0]])


def test_analogies_are_answered_by_brute_force(questions):
    sections = read_questions(questions)
    assert {name: len(each) for name, each in sections.items()} == {"family": 3, "towns": 1}
    score = analogies(VECTORS, sections["family"])
    assert (score.num_known, score.num_all) == (2, 3)
    unit = dict(zip(VECTORS.words, VECTORS.unit_VD, strict=True))

    def answer(a, b, c):
        goal = unit[b] - unit[a] + unit[c]
        return max((word for word in unit if word not in (a, b, c)), key=lambda word: float(unit[word] @ goal))

    known = [question for question in sections["family"] if "unicorn" not in question]
    expected = np.mean([answer(a, b, c) == d for a, b, c, d in known])
    assert score.value == expected == 1.0


def test_words_of_questions_are_found_in_any_case(questions):
    """But as they are written where the vocabulary has both."""
    assert analogies(VECTORS, read_questions(questions)["towns"]).num_known == 1
    find = VECTORS.finder()
    assert [VECTORS.words[find(word)] for word in ("king", "King", "KING", "france")] == [
        "king",
        "King",
        "king",
        "France",
    ]
    assert find("unicorn") == -1


def test_judgements_are_compared_by_rank(pairs):
    score = judgements(VECTORS, read_judgements(pairs))
    assert (score.num_known, score.num_all) == (3, 4)
    cosines = [
        TABLE[a] @ TABLE[b] / np.linalg.norm(TABLE[a]) / np.linalg.norm(TABLE[b]) for a, b in ((1, 2), (3, 4), (1, 7))
    ]
    np.testing.assert_allclose(score.value, scipy.stats.spearmanr(cosines, [7.5, 8.0, 1.0]).statistic)


def test_neighbours_are_sorted_and_do_not_hold_the_word():
    found = neighbours(VECTORS, "Man", 3)
    assert found[0][0] == "king" and [cosine for _, cosine in found] == sorted((c for _, c in found), reverse=True)
    assert len(neighbours(VECTORS, "man", 99)) == len(VECTORS.words) - 1
    with pytest.raises(UserError, match="'unicorn' is no token"):
        neighbours(VECTORS, "unicorn")


def test_of_words_that_are_all_unknown_nothing_is_claimed(questions, pairs):
    other = Vectors.of(["x", "y"], np.eye(2))
    assert analogies(other, read_questions(questions)["family"]).value == 0
    score = judgements(other, read_judgements(pairs))
    assert (score.value, score.num_known, score.num_all) == (0.0, 0, 4)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_questions, ": family\nman woman king\n", "line 2: 'man woman king', where four words should be"),
        (read_questions, "man woman king queen\n", "line 1: 'man woman king queen', where the head of a section"),
        (read_questions, ": family\n", "holds no questions"),
        (read_judgements, "man woman 7\n", "line 1: 'man woman 7', where two words and a number should be"),
        (read_judgements, "man\twoman\tmuch\n", "where two words and a number should be"),
        (read_judgements, "man\twoman\tnan\n", "where two words and a number should be"),
        (read_judgements, "# nothing\n", "holds no pairs"),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path, read, text, message):
    path = tmp_path / "file.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "marked.txt").write_text("\ufeff: family\nman woman king queen\n")
    assert read_questions(tmp_path / "marked.txt") == {"family": [("man", "woman", "king", "queen")]}


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt cannot be read"):
        read_questions(tmp_path / "nowhere.txt")


# What the commands print


def test_measurements_say_what_they_are_of(questions, pairs):
    command = AnalogiesCommand(workdir="run", questions=str(questions), wordsim353=str(pairs))
    lines = measure(command, VECTORS)
    assert lines[:2] == [
        "questions-words: 100.0 % of 3 questions right; 1 have words that are not in the vocabulary",
        "  family: 100.0 % of 2 questions right; 1 have words that are not in the vocabulary",
    ]
    assert lines[3].startswith("wordsim353: Spearman 1.000 (chance 0 ± 0.707) over 3 pairs; 1 have words")
    nothing = measure(command, Vectors.of(["x", "y"], np.eye(2)))
    assert nothing[0] == "questions-words: none of 4 questions has its words in the vocabulary"
    assert nothing[-1].endswith("too few for a correlation")


def test_neighbours_are_listed_word_by_word():
    lines = list_neighbours(NeighboursCommand(workdir="run", number=2), VECTORS, ["man", "paris"])
    assert [lines[0], lines[3]] == ["man", "paris"] and len(lines) == 6
    assert lines[1] == "  0.999  king"


def test_commands_that_ask_for_nothing_are_refused():
    with pytest.raises(UserError, match="give --questions, --wordsim353 or --simlex999"):
        AnalogiesCommand(workdir="run")
    with pytest.raises(UserError, match="--number 0"):
        NeighboursCommand(workdir="run", number=0)
