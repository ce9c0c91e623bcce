import time

import pytest

from core_flax.text.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It runs\nover lines. Next\nline.", ["It runs over lines.", "Next line."]),
        ("A heading\n\nThe text. More", ["A heading", "The text.", "More"]),
        ("Blank line\n  \t\nwith spaces", ["Blank line", "with spaces"]),
        ("Dr. Who met Mr. Smith in St. Ives. He left.", ["Dr. Who met Mr. Smith in St. Ives.", "He left."]),
        ("J. R. Smith came. It rained.", ["J. R. Smith came.", "It rained."]),
        ("So did I. He did not.", ["So did I.", "He did not."]),
        ("See fig. 3 and vol. 5. It helps, e.g. Here.", ["See fig. 3 and vol. 5.", "It helps, e.g. Here."]),
        ('He said "Stop." Then he left. "Why?" she asked.', ['He said "Stop."', "Then he left.", '"Why?" she asked.']),
        ("It cost 3.50 dollars. 20 more came.", ["It cost 3.50 dollars.", "20 more came."]),
        ("version 3.8. it goes on in lower case.", ["version 3.8. it goes on in lower case."]),
        ("Wait... what? Yes... Now.", ["Wait... what?", "Yes...", "Now."]),
        ("Very!! Good?! End", ["Very!!", "Good?!", "End"]),
        ("(Inside. Too.) Outside.", ["(Inside.", "Too.)", "Outside."]),
        ("Été fini. Élan vital.", ["Été fini.", "Élan vital."]),
        ("एक वाक्य. दूसरा वाक्य.", ["एक वाक्य.", "दूसरा वाक्य."]),
        ("今日は。明日も！はい", ["今日は。", "明日も！", "はい"]),  # noqa: RUF001
        ("यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
        ("No lo sé. ¿Qué dices? ¡Hola! Adiós.", ["No lo sé.", "¿Qué dices?", "¡Hola!", "Adiós."]),
        ("Er sagte: „Ja.“ Dann ging er. „Gut!“ Ende", ["Er sagte: „Ja.“", "Dann ging er.", "„Gut!“", "Ende"]),
        (
            "Il dit : « Oui. » Puis rien. « Non ! » Ah.",
            ["Il dit : « Oui. »", "Puis rien.", "« Non ! »", "Ah."],
        ),
        ("He left. – She came. — And so on. – or not.", ["He left.", "– She came.", "— And so on. – or not."]),  # noqa: RUF001
        ("tokenised text . The next one .", ["tokenised text .", "The next one ."]),
        ("windows\r\nends\r\n\r\nhere", ["windows ends", "here"]),
        (" \n\n \n", []),
        ("", []),
    ],
)
def test_prose(text, expected):
    assert split_sentences(text) == expected


def test_line_mode_takes_lines_as_they_are():
    text = "One. Still one.\n\n  two \r\nthree\n"
    assert split_sentences(text, "line") == ["One. Still one.", "two", "three"]


def test_nothing_but_white_space_is_lost():
    text = 'Mr. A. said: "No. 5 is it." (Really?) Yes... U.S. law. 7 e.g. 8! “Ok.” End. ' * 20
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@pytest.mark.parametrize("text", ["." * 200_000, '."' * 100_000, ". " * 100_000, "\n \n" * 100_000, "a" * 500_000])
def test_awkward_text_takes_no_more_than_linear_time(text):
    start = time.perf_counter()
    split_sentences(text)
    assert time.perf_counter() - start < 5
