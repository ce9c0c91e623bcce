"""The text that a vocabulary is trained on: drawn evenly from all of it, as much as memory can hold."""

import math
import re
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

_SLICE_CHARACTERS = 1 << 14
_MAX_WORDS = 1_000_000
"""Different words that a vocabulary is trained on: each takes the trainer some 700 bytes."""


def draw(texts: Iterable[str], max_bytes: float) -> list[str]:
    """Slices of the texts, evenly spaced, of about ``max_bytes`` at most together and a million different words."""
    sample = _thin(_slices(texts), max_bytes)
    while len(sample) > 1 and _count_words(sample) > _MAX_WORDS:
        sample = sample[::2]
    return sample


def _slices(texts: Iterable[str]) -> Iterator[str]:
    """Text in slices of some thousand characters, cut at white space: what is drawn for the vocabulary, or not."""
    for text in texts:
        start = 0
        while start < len(text):
            space = re.compile(r"\s").search(text, start + _SLICE_CHARACTERS)
            end = space.end() if space else len(text)
            yield text[start:end]
            start = end


def _thin(slices: Iterable[str], max_bytes: float) -> list[str]:
    """Evenly spaced slices of at most ``max_bytes`` together, not knowing how many will come.

    Keeps every slice until they are too many, then every second one of those kept and to come, and so on.
    """
    kept: list[tuple[str, int]] = []
    size, stride = 0, 1
    for number, text in enumerate(slices):
        if number % stride:
            continue
        kept.append((text, len(text.encode())))
        size += kept[-1][1]
        while size > max_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(num_bytes for _, num_bytes in kept)
    return [text for text, _ in kept]


def _count_words(texts: Iterable[str]) -> int:
    """About how many different words there are, by linear counting (Whang et al. 1990): exact to a few per cent."""
    seen = np.zeros(1 << 23, bool)
    for text in texts:
        words = set(re.findall(r"\w+", text.lower()))
        seen[[zlib.crc32(word.encode()) & (len(seen) - 1) for word in words]] = True
    return round(-len(seen) * math.log(max(1, np.count_nonzero(~seen)) / len(seen)))
