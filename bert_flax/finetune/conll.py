"""Files in columns, as CoNLL-2003 has them: a word a line with its tag in the last column, blank lines, documents."""

import re
from collections.abc import Sequence
from pathlib import Path

from bert_flax.finetune.examples import Dataset, TaggedExample
from bert_flax.finetune.files import read_text
from bert_flax.finetune.tasks import TaskSpec
from core_flax.types import UserError

DOCUMENT_START = "-DOCSTART-"


def to_iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """Tags in IOB1 (B- only where two entities of a type touch) or IOB2 (B- wherever one begins), as IOB2."""
    found: list[str] = []
    for tag in tags:
        goes_on = bool(found) and found[-1][1:] == tag[1:]  # the same type, and the word before is in it
        found.append(tag if tag == "O" or goes_on else f"B{tag[1:]}")
    return tuple(found)


def read_sentences(spec: TaskSpec, path: Path, labelled: bool) -> Dataset[TaggedExample]:
    """Sentences with their tags.

    Args:
        spec: a task of kind tagging.
        path: words in the first column, tags in the last; columns are separated by spaces or tabs.
        labelled: whether to read the tags, too; a file without may have the word alone.

    Returns:
        The sentences. If the file has no ``-DOCSTART-`` line, each is a document of its own.

    Raises:
        UserError: a line has not as many columns as the first, or a tag is not the task's.
    """
    sentences: list[tuple[int, list[str], list[str]]] = []
    document, has_documents, is_open, first = 0, False, False, None
    for number, line in enumerate(read_text(path).split("\n"), 1):
        fields = re.findall(r"[^ \t\r]+", line)
        if not fields or fields[0] == DOCUMENT_START:
            is_open = False
            if fields:
                has_documents = True
                document += bool(sentences)
            continue
        first = first or (number, len(fields))
        _check_columns(f"{path}:{number}", len(fields), first, labelled)
        if labelled and fields[-1] not in spec.labels:
            raise UserError(
                f"{path}:{number}: {fields[-1]!r} is no tag of task {spec.name}, which has {', '.join(spec.labels)}"
            )
        if not is_open:
            sentences.append((document, [], []))
            is_open = True
        sentences[-1][1].append(fields[0])
        sentences[-1][2].append(fields[-1])
    return Dataset(
        tuple(
            TaggedExample(
                str(index), tuple(words), to_iob2(tags) if labelled else None, number if has_documents else index
            )
            for index, (number, words, tags) in enumerate(sentences)
        )
    )


def _check_columns(where: str, count: int, first: tuple[int, int], labelled: bool) -> None:
    if count != first[1]:
        raise UserError(f"{where} has {count} columns where line {first[0]} has {first[1]}")
    if labelled and count < 2:
        raise UserError(f"{where} has a word and no tag; the tag is the last of two or more columns")
