"""Texts become the sequences they should, compared with BERT's own loops written out by hand."""

import random
import re

import numpy as np
import pytest

from bert_flax.finetune.examples import Answer, ChoiceExample, QuestionExample, TaggedExample, TextExample
from bert_flax.finetune.inputs import NO_TAG, encode_choices, encode_questions, encode_tagged, encode_texts
from core_flax.text.wordpiece import SPECIALS, WordPiece

WORDS = ["the", "old", "river", "king", "of", "two", "towns", "went", "there", "in", "winter"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [*SPECIALS, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "##ing", ".", ",", "?"]
VOCABULARY = WordPiece(PIECES)
NUMBER = {piece: number for number, piece in enumerate(PIECES)}
UNK, CLS, SEP = (NUMBER[piece] for piece in ("[UNK]", "[CLS]", "[SEP]"))


def pieces_of(word):
    """The longest piece that the rest of the word begins with, again and again."""
    found = []
    while word:
        marked = "##" * bool(found)
        size = next((size for size in range(len(word), 0, -1) if marked + word[:size] in NUMBER), 0)
        if not size:
            return [UNK]
        found.append(NUMBER[marked + word[:size]])
        word = word[size:]
    return found


def ids_of(text):
    return [number for word in re.findall(r"\w+|[^\w\s]", text.lower()) for number in pieces_of(word)]


def texts(seed, count, longest):
    """Lines of words, some of them in the vocabulary, and of no words."""
    draw = random.Random(seed)

    def word():
        return draw.choice(WORDS) if draw.random() < 0.7 else "".join(draw.choices(LETTERS, k=draw.randint(1, 6)))

    return [" ".join(word() for _ in range(draw.randint(0, longest))) for _ in range(count)]


def cut_as_bert_does(a, b, room):
    """``_truncate_seq_pair`` of BERT's run_classifier.py."""
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()
    return a, b


# Texts and choices


def test_texts():
    found = texts(0, 60, longest=20)
    units = encode_texts([TextExample(str(n), text, None, n % 3) for n, text in enumerate(found)], VOCABULARY, 20)
    for tokens, num_first, text in zip(units.tokens, units.num_first, found, strict=True):
        assert tokens == [CLS, *ids_of(text)[:18], SEP] and num_first == len(tokens)
    assert units.num_cut == sum(len(ids_of(text)) > 18 for text in found) > 5
    assert units.labels == [n % 3 for n in range(60)] and units.example == list(range(60)) and units.per_unit == 1


@pytest.mark.parametrize("max_length", [16, 19, 33])
def test_of_a_pair_the_longer_text_is_cut(max_length):
    first, second = texts(1, 80, longest=14), texts(2, 80, longest=14)
    examples = [TextExample("0", a, b, None) for a, b in zip(first, second, strict=True)]
    units = encode_texts(examples, VOCABULARY, max_length)
    num_cut = 0
    for tokens, num_first, text, pair in zip(units.tokens, units.num_first, first, second, strict=True):
        a, b = cut_as_bert_does(ids_of(text), ids_of(pair), max_length - 3)
        assert tokens == [CLS, *a, SEP, *b, SEP] and num_first == len(a) + 2
        num_cut += len(ids_of(text)) + len(ids_of(pair)) > max_length - 3
    assert units.num_cut == num_cut > 0
    assert max(units.lengths) == max_length and units.labels == []


def test_an_empty_second_text_is_a_second_text():
    units = encode_texts([TextExample("0", "the king", "", 0), TextExample("1", "", None, 1)], VOCABULARY, 16)
    assert units.tokens == [[CLS, NUMBER["the"], NUMBER["king"], SEP, SEP], [CLS, SEP]]
    assert units.num_first == [4, 2]


def test_what_looks_like_a_special_piece_is_text():
    units = encode_texts([TextExample("0", "the [SEP] king", None, 0)], VOCABULARY, 16)
    assert units.tokens[0].count(SEP) == 1 and units.tokens[0][-1] == SEP


def test_each_ending_follows_how_its_sentence_starts():
    draw = random.Random(3)
    contexts, starts = texts(4, 12, longest=12), texts(5, 12, longest=3)
    endings = [tuple(texts(100 + n, 4, longest=9)) for n in range(12)]
    labels = [draw.randrange(4) for _ in range(12)]
    rows = zip(contexts, starts, endings, labels, strict=True)
    units = encode_choices([ChoiceExample("0", *row) for row in rows], VOCABULARY, 20)
    assert units.per_unit == 4 and units.num_units == 12 and len(units.tokens) == 48 and units.labels == labels
    for number, tokens in enumerate(units.tokens):
        n, choice = divmod(number, 4)
        a, b = cut_as_bert_does(ids_of(contexts[n]), ids_of(starts[n]) + ids_of(endings[n][choice]), 17)
        assert tokens == [CLS, *a, SEP, *b, SEP] and units.num_first[number] == len(a) + 2
    assert (
        0
        < units.num_cut
        == sum(
            len(ids_of(f"{context} {start} {ending}")) > 17
            for context, start, four in zip(contexts, starts, endings, strict=True)
            for ending in four
        )
    )


# Questions


def questions(seed, count):
    """Questions whose answers lie anywhere in contexts of many windows; each third has none."""
    draw, found = random.Random(seed), []
    for n, (question, context) in enumerate(zip(texts(seed, count, 5), texts(seed + 1, count, 60), strict=True)):
        context = f"The {context}."
        words = [match.span() for match in re.finditer(r"\w+", context)]
        first = draw.randrange(len(words))
        start, stop = words[first][0], words[min(first + draw.randrange(4), len(words) - 1)][1]
        answers = () if n % 3 == 2 else (Answer(context[start:stop], start), Answer("the", 0))
        found.append(QuestionExample(str(n), f"{question}?", context, answers, n % 3 == 2))
    return found


@pytest.mark.parametrize(("max_length", "stride"), [(32, 8), (32, 100), (20, 5)])
def test_a_labelled_window_shows_the_answer(max_length, stride):
    examples = questions(7, 40)
    units = encode_questions(examples, VOCABULARY, max_length, stride, labelled=True)
    assert max(units.lengths) == max_length and units.num_units > 2 * len(examples)
    shown = {n: set() for n in range(len(examples))}
    num_labelled = np.zeros(len(examples), int)
    for unit, n in enumerate(units.example):
        example, window, num_first = examples[n], units.windows[unit], units.num_first[unit]
        question, context = ids_of(example.question)[: max_length // 2], ids_of(example.context)
        part = context[window.start : window.stop]
        assert units.tokens[unit] == [CLS, *question, SEP, *part, SEP] and num_first == len(question) + 2
        shown[n] |= set(range(window.start, window.stop))
        first, last = units.labels[unit]
        if (first, last) == (0, 0):
            continue
        assert num_first <= first <= last < len(units.tokens[unit]) - 1
        found = units.contexts[n]
        begin, end = (place - num_first + window.start for place in (first, last))
        assert example.context[found.starts[begin] : found.ends[end]] == example.answers[0].text
        assert found.starts[begin] == example.answers[0].start
        num_labelled[n] += 1
    assert all(len(shown[n]) == len(ids_of(example.context)) for n, example in enumerate(examples))
    impossible = np.array([example.is_impossible for example in examples])
    assert (num_labelled[impossible] == 0).all()
    if (max_length, stride) == (32, 8):  # two windows have more in common than any of these answers is long
        assert (num_labelled[~impossible] >= 1).all()
    assert 0 < (np.array(units.labels) == 0).all(axis=1).sum() < units.num_units


def test_a_window_that_shows_part_of_an_answer_is_labelled_as_none():
    context = "the old river king of two towns went there in winter"
    example = QuestionExample("0", "the", context, (Answer("two towns", context.index("two")),), False)
    units = encode_questions([example], VOCABULARY, 16, stride=6, labelled=True)
    # Twelve tokens fit: the windows are all eleven words.
    assert units.windows == [(0, 11)] and units.labels == [(3 + 5, 3 + 6)]
    long = QuestionExample("0", "the old river king", context, (Answer("two towns", context.index("two")),), False)
    units = encode_questions([long], VOCABULARY, 16, stride=3, labelled=True)
    assert units.windows == [(0, 9), (3, 11)] and units.labels == [(6 + 5, 6 + 6), (6 + 2, 6 + 3)]
    units = encode_questions([long], VOCABULARY, 13, stride=3, labelled=True)
    assert units.windows == [(0, 6), (3, 9), (6, 11)] and units.labels == [(0, 0), (6 + 2, 6 + 3), (0, 0)]


def test_questions_that_are_too_long_are_cut_and_counted():
    examples = [QuestionExample(str(n), "the " * n, "king", (Answer("king", 0),), False) for n in (8, 9, 63, 64, 65)]
    for max_length, longest, num_cut in ((16, 8, 4), (256, 64, 1)):
        units = encode_questions(examples, VOCABULARY, max_length, 128, labelled=False)
        assert [first - 2 for first in units.num_first] == [min(n, longest) for n in (8, 9, 63, 64, 65)]
        assert units.num_cut == num_cut and units.labels == []


# Tags


def sentences(seed, count, longest):
    draw, found, document = random.Random(seed), [], 0
    for n, text in enumerate(texts(seed, count, longest)):
        words = tuple(text.split()) or ("king",)
        document += draw.random() < 0.4
        found.append(TaggedExample(str(n), words, tuple(draw.choice(("O", "B-X", "I-X")) for _ in words), document))
    return found


@pytest.mark.parametrize("document_context", [False, True])
def test_every_word_is_labelled_once(document_context):
    examples, labels = sentences(8, 40, longest=25), ("O", "B-X", "I-X")
    units = encode_tagged(examples, VOCABULARY, 18, labels, document_context)
    assert max(units.lengths) <= 18 and units.num_units > len(examples) and units.num_cut == 0
    tagged = [[None] * len(example.words) for example in examples]
    for unit, n in enumerate(units.example):
        tokens, tags = units.tokens[unit], units.labels[unit]
        assert (tokens[0], tokens[-1], units.num_first[unit]) == (CLS, SEP, len(tokens)) and len(tags) == len(tokens)
        assert np.flatnonzero(tags != NO_TAG).tolist() == [token for _, token in units.words[unit]]
        for word, token in units.words[unit]:
            pieces = pieces_of(examples[n].words[word])
            assert tokens[token : token + len(pieces)] == pieces
            assert tagged[n][word] is None
            tagged[n][word] = labels[tags[token]]
    assert tagged == [list(example.tags) for example in examples]
    if not document_context:  # nothing else is shown
        shown = [[] for _ in examples]
        for tokens, n in zip(units.tokens, units.example, strict=True):
            shown[n] += tokens[1:-1]
        assert shown == [ids_of(" ".join(example.words)) for example in examples]


def test_the_context_is_what_stands_around_in_the_document():
    """Whole words, none left out between, of the same document alone, and as many as fit."""
    examples, room = sentences(9, 40, longest=8), 24
    units = encode_tagged(examples, VOCABULARY, room + 2, ("O", "B-X", "I-X"), document_context=True)
    documents = {}
    for n, example in enumerate(examples):
        documents.setdefault(example.document, []).extend((n, word) for word in range(len(example.words)))
    pieces = {
        (n, word): pieces_of(text) for n, example in enumerate(examples) for word, text in enumerate(example.words)
    }
    both_sides = 0
    for unit, n in enumerate(units.example):
        words = documents[examples[n].document]
        own = [words.index((n, word)) for word, _ in units.words[unit]]
        left, right = own[0], own[-1] + 1
        size = sum(len(pieces[word]) for word in words[left:right])
        room_left = room - size
        before = after = 0  # pieces; each side may have half, and what the other leaves

        def take(place, step, used, limit, words=words):
            while 0 <= place < len(words) and used + len(pieces[words[place]]) <= limit:
                used += len(pieces[words[place]])
                place += step
            return place, used

        end, after = take(right, 1, 0, room_left - room_left // 2)
        start, before = take(left - 1, -1, 0, room_left - after)
        end, after = take(end, 1, after, room_left - before)
        shown = words[start + 1 : end]
        assert units.tokens[unit] == [CLS, *(piece for word in shown for piece in pieces[word]), SEP]
        assert units.words[unit][0][1] == 1 + before
        both_sides += bool(before and after)
    assert both_sides > 10


def test_words_of_which_nothing_or_too_much_is_left():
    example = TaggedExample("0", ("\x00", "king", "x" * 30, "q" * 101), ("B-X", "O", "I-X", "O"), 0)
    units = encode_tagged([example], VOCABULARY, 18, ("O", "B-X", "I-X"), False)
    long = [NUMBER["x"], *[NUMBER["##x"]] * 15]
    assert units.tokens == [[CLS, UNK, NUMBER["king"], SEP], [CLS, *long, SEP], [CLS, UNK, SEP]]
    assert units.words == [[(0, 1), (1, 2)], [(2, 1)], [(3, 1)]] and units.num_cut == 1
    assert [tags.tolist() for tags in units.labels] == [[-1, 1, 0, -1], [-1, 2, *[-1] * 16], [-1, 0, -1]]
    untagged = TaggedExample("0", ("king",), None, 0)
    assert encode_tagged([untagged], VOCABULARY, 18, ("O",), False).labels == []


# All of them


def test_other_content_is_told_from_the_same():
    examples = [TextExample("0", "the king", "of towns", 1), TextExample("1", "river", "old", 0)]
    content = encode_texts(examples, VOCABULARY, 16).content
    assert encode_texts(examples, VOCABULARY, 32).content == content
    for other in (
        [examples[1], examples[0]],
        [examples[0], TextExample("1", "river", "old", 1)],
        [examples[0], TextExample("1", "river", "king", 0)],
        [TextExample("0", "the king of", "towns", 1), examples[1]],
        examples[:1],
    ):
        assert encode_texts(other, VOCABULARY, 16).content != content
