"""Where one sentence ends and the next begins."""

import re
from typing import Literal

SentenceMode = Literal["prose", "line"]

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
# A run of end marks, closing quotes or brackets (a French quote stands off by a space), a space, then what can open a
# sentence. The look-ahead captures the first letter or digit behind opening quotes, brackets, dashes and Spanish
# marks, which must not be lower case. Looking behind and giving nothing back (++) keep the time linear in long runs of
# dots. Behind the full-width marks, the danda and the marks of Arabic and Urdu nothing need follow.
_BOUNDARY = re.compile(
    r"""(?<![.!?])([.!?]++(?:[ ]»)?+["'”’“‘›»)\]]*+)[ ](?=(?:«[ ]|[–—][ ]|["'“‘„«‹(\[¿¡–—])*+(\w)?)"""  # noqa: RUF001
    r"""|[。！？।॥؟۔]++[」』”’]*+[ ]?"""  # noqa: RUF001
)
_LAST_WORD = re.compile(r"[\w.]*\w$")
# Words whose full stop seldom ends a sentence even before a capital or a digit (titles, "No. 5", "p. 3").
_ABBREVIATION = re.compile(
    "mr|mrs|ms|dr|prof|rev|hon|gen|col|lt|sgt|capt|cmdr|adm|maj|gov|sen|rep|pres|st|mt|ft|vs|etc|al|cf|viz|ca|approx|"
    r"e\.g|i\.e|eg|ie|no|nos|vol|vols|fig|figs|eq|sec|ch|pp|p|ed|eds|inc|ltd|co|corp|dept|univ|assn|bros|jr|sr|"
    r"jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|u\.s|u\.k|u\.n|d\.c|a\.m|p\.m|ph\.d",
    re.IGNORECASE,
)


def split_sentences(text: str, mode: SentenceMode = "prose") -> list[str]:
    """Split text into sentences, none of them empty, without white space at their ends.

    Args:
        text: any number of lines; a blank line separates paragraphs.
        mode: "line": every line is a sentence. "prose": the lines of a paragraph are joined, and a sentence ends at the
            end of a paragraph and at ``.``, ``!`` or ``?`` (with closing quotes or brackets) before white space and
            something that can open a sentence: a capital, a digit, or a letter of a script without capitals, possibly
            behind opening quotes or brackets. Initials ("J. Smith") and common abbreviations ("Dr. Who") end no
            sentence. The full-width marks of Chinese and Japanese need no white space.
    """
    if mode == "line":
        return [line for line in map(str.strip, text.split("\n")) if line]
    sentences = []
    for paragraph in _PARAGRAPH.split(text):
        joined = " ".join(paragraph.split())
        if joined:
            sentences += _split_paragraph(joined)
    return sentences


def _split_paragraph(paragraph: str) -> list[str]:
    sentences = []
    start = 0
    for match in _BOUNDARY.finditer(paragraph):
        if match[1] and not _ends_sentence(paragraph, start, match):
            continue
        sentences.append(paragraph[start : match.end()].rstrip())
        start = match.end()
    if start < len(paragraph):
        sentences.append(paragraph[start:])
    return sentences


def _ends_sentence(paragraph: str, start: int, match: re.Match[str]) -> bool:
    if match[2] is None or match[2].islower():
        return False
    if match[1][0] != ".":
        return True
    word = _LAST_WORD.search(paragraph, max(start, match.start() - 16), match.start())
    if word is None:
        return True
    initial = len(word[0]) == 1 and word[0].isupper() and word[0] != "I"
    return not initial and _ABBREVIATION.fullmatch(word[0]) is None
