"""SQuAD's JSON, versions 1.1 and 2.0."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_flax.finetune.examples import Answer, Dataset, QuestionExample
from bert_flax.finetune.files import read_json
from bert_flax.finetune.tasks import TaskSpec
from core_flax.types import UserError


@dataclass(frozen=True, slots=True)
class RawQuestion:
    """A question as it is stored; None stands for what is not there."""

    where: str
    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None
    is_impossible: bool | None


def read_questions(spec: TaskSpec, path: Path, labelled: bool, training: bool) -> Dataset[QuestionExample]:
    """The questions of a file. See ``sift``.

    Raises:
        UserError: it is not JSON, or not in SQuAD's layout.
    """
    return sift(spec, _raw_questions(path, read_json(path), labelled), labelled, training)


def sift(spec: TaskSpec, questions: Iterable[RawQuestion], labelled: bool, training: bool) -> Dataset[QuestionExample]:
    """The questions that can be used, with the answers that can.

    Args:
        spec: a task of kind span.
        questions: as stored.
        labelled: whether to keep the answers.
        training: an answer that is not found where its offset says is left out; else it is kept, with a warning,
            because the official scorer compares with its text alone.

    Raises:
        UserError: a question is answered and unanswerable, or unanswerable in a task that knows no such questions; or
            two have the same id and are not for training, where predictions go by id.
    """
    examples, dropped, warnings, ids = [], [], [], set()
    for raw in questions:
        if raw.id in ids and not training:
            raise UserError(f"{raw.where} comes twice; predictions are told apart by id")
        ids.add(raw.id)
        if not labelled:
            examples.append(QuestionExample(raw.id, raw.question, raw.context, (), False))
            continue
        answers = tuple(answer for answer in raw.answers or () if answer.text.strip())
        impossible = _is_impossible(spec, raw, answers)
        misplaced = [answer for answer in answers if not _is_in_place(raw.context, answer)]
        lines = [
            f"{raw.where}: answer_start {answer.start} of {answer.text!r} points at "
            f"{raw.context[max(answer.start, 0) :][: len(answer.text)]!r}"
            for answer in misplaced
        ]
        if training:
            answers = tuple(answer for answer in answers if answer not in misplaced)
            dropped += lines
        else:
            warnings += lines
        if answers or impossible:
            examples.append(QuestionExample(raw.id, raw.question, raw.context, answers, impossible))
        elif not misplaced:
            dropped.append(f"{raw.where} has no answer")
    return Dataset(tuple(examples), tuple(dropped), tuple(warnings))


def _is_in_place(context: str, answer: Answer) -> bool:
    return answer.start >= 0 and context.startswith(answer.text, answer.start)


def _is_impossible(spec: TaskSpec, raw: RawQuestion, answers: tuple[Answer, ...]) -> bool:
    """Where the file does not say, a question without answers is unanswerable, as it is for the official scorer."""
    if raw.is_impossible is None:
        return spec.unanswerable and not answers
    if raw.is_impossible and not spec.unanswerable:
        raise UserError(f"{raw.where} is unanswerable, which task {spec.name} does not know; take squad2")
    if raw.is_impossible and answers:
        raise UserError(f"{raw.where} is_impossible and has the answer {answers[0].text!r}")
    return raw.is_impossible


def _raw_questions(path: Path, stored: Any, labelled: bool) -> Iterator[RawQuestion]:
    for a, article in enumerate(_get(stored, "data", list, str(path))):
        for p, paragraph in enumerate(_get(article, "paragraphs", list, f"{path} data[{a}]")):
            where = f"{path} data[{a}].paragraphs[{p}]"
            context = _get(paragraph, "context", str, where)
            for q, node in enumerate(_get(paragraph, "qas", list, where)):
                own_id = _get(node, "id", str, f"{where}.qas[{q}]")
                of = f"{path} question {own_id}"
                answers = _answers(node, of) if labelled else None
                impossible = _get(node, "is_impossible", bool, of) if labelled and "is_impossible" in node else None
                yield RawQuestion(of, own_id, _get(node, "question", str, of), context, answers, impossible)


def _answers(node: Any, where: str) -> tuple[Answer, ...]:
    return tuple(
        Answer(_get(answer, "text", str, where), _get(answer, "answer_start", int, where))
        for answer in _get(node, "answers", list, where)
    )


_NOUNS = {list: "list", str: "string", int: "whole number", bool: "true or false"}


def _get(node: Any, key: str, kind: type, where: str) -> Any:
    """A field of an object. Raises UserError if it is not there, is of another type, or is text that is not Unicode."""
    value = node.get(key) if isinstance(node, dict) else None
    if type(value) is not kind:
        raise UserError(
            f"{where} has no {key!r} ({_NOUNS[kind]}); SQuAD's layout is data[].paragraphs[].qas[] with question, id "
            "and answers[] of text and answer_start"
        )
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds half of a surrogate pair at character {error.start} of {key!r}") from error
    return value
