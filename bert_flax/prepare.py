"""From text to the folder that pretraining reads: sentences, WordPiece ids, passages, shards and a manifest."""

import dataclasses
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tqdm import tqdm

from bert_flax import vocabulary_sample
from core_flax.config import check_range
from core_flax.data import corpora, folder, pipeline, records
from core_flax.data.corpora import Part
from core_flax.data.feed import ordered_map
from core_flax.signals import Stopped
from core_flax.storage import local_folder
from core_flax.text import wordpiece
from core_flax.text.sentences import SentenceMode, split_sentences
from core_flax.text.wordpiece import WordPiece
from core_flax.types import UserError

_BLOCK_CHARACTERS = 4 << 20
_ENCODE_SENTENCES = 1024
_OWN_FILES = re.compile(
    r"(train|valid)-\d{5}(-of-\d{5})?\.arrayrecord(\.partial)?|(train|valid)\.(index|unigram)\.(npy|partial)|"
    r"vocab\.txt|manifest\.json(\.partial)?|prepare\.lock|" + pipeline.PARTIAL
)


@dataclass(frozen=True)
class PrepareConfig:
    """What text to prepare, and how."""

    input: tuple[str, ...]
    """Text to read: files of plain text, or .jsonl with the text of one document a line in the field "text", either of
    them also gzipped (.gz); tfds:NAME[/CONFIG][:SPLIT] (TensorFlow Datasets); python:docs (what every Python ships)."""
    output: str
    """Folder to write; it may exist if it is empty or holds an interrupted run of this command."""
    vocab_size: int = 30522
    """Pieces of the WordPiece vocabulary that is trained on the text, unless --vocab gives one."""
    vocab: str | None = None
    """A vocab.txt to use, one piece a line (for example bert-base-uncased's); None: train one."""
    lowercase: bool = True
    """Lower-case the text and strip accents (uncased model)."""
    num_workers: int | None = None
    """Processes that encode text; None: one per core. The output does not depend on it."""
    beam: tuple[str, ...] = ()
    """Options of an Apache Beam pipeline, as in "runner=FlinkRunner flink_master=HOST:8081", whose workers then encode
    text, each an input at a time, in place of processes here. They must see the inputs and the output folder under the
    same names. The output does not depend on it."""
    documents: corpora.DocumentMode = "blank-line"
    """What separates documents in plain text. blank-line: blank lines; file: nothing, a file is one document, and blank
    lines separate paragraphs. (In .jsonl, tfds and python:docs a record is a document.)"""
    document_start: str | None = None
    """Regular expression: in plain text, a line that it matches from its beginning starts a new document, and blank
    lines separate paragraphs. Takes the place of --documents."""
    sentences: SentenceMode = "prose"
    """What is a sentence. prose: the lines of a paragraph are joined, and a sentence ends at . ! or ? before a capital
    or a digit (common abbreviations and initials aside); line: every line is a sentence."""
    single_sentence_documents: Literal["refuse", "drop", "keep"] = "refuse"
    """A document of one sentence has no next sentence. refuse: stop and say where; drop: leave it out; keep: cut the
    sentence in half."""
    valid_fraction: float = 0.01
    """Share of the tokens held out for evaluation, by whole documents, at least two; 0: none."""
    vocab_sample_mb: float = 200.0
    """The vocabulary is trained on at most this much text (10**6 bytes), drawn evenly from all of it; on less if that
    has more than about a million different words, since memory grows with these."""
    overwrite: bool = False
    """Replace a complete folder."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "num_workers", least=1)
        if self.beam and self.num_workers is not None:
            raise UserError("--num-workers is for processes of this machine: it does not go with --beam")
        check_range("", self, "valid_fraction", least=0, most=0.5)
        check_range("", self, "vocab_sample_mb", above=0)


class Terminated(Stopped):
    """SIGTERM came. Nothing was saved, and nothing is left behind."""

    status = 128 + signal.SIGTERM


def prepare(config: PrepareConfig) -> records.Manifest:
    """Prepare text for pretraining; the same input and settings give the same bytes, with any number of workers.

    The manifest is written last, so an interrupted run leaves no folder that reads as complete; run again, it starts
    anew. If the folder is complete already, from the same input and settings, nothing is done.

    Raises:
        UserError: the input or the settings cannot be used, or the output folder holds something else.
        Terminated: SIGTERM came. As after any error, what was written is removed.
    """
    directory = local_folder("--output", config.output)
    vocabulary = _check(config)
    settings = _settings(config, vocabulary)
    own_files = folder.OwnFiles(_OWN_FILES, [*config.input, config.vocab or ""])
    if (directory / folder.MANIFEST).exists():
        if not config.overwrite:
            return _already_prepared(directory, settings)
        return folder.replace(
            directory, own_files, lambda new: prepare(dataclasses.replace(config, output=str(new), overwrite=False))
        )
    with _sigterm_raises(), folder.own_folder(directory, own_files):
        if vocabulary is None:
            vocabulary = _train_vocabulary(config)
        vocabulary.save(directory / records.VOCAB)
        return _encode(config, vocabulary, settings, directory)


def _check(config: PrepareConfig) -> WordPiece | None:
    """Refuse settings that cannot work, before anything is read at length. Returns the vocabulary if one is given."""
    if not config.input:
        raise UserError("nothing to prepare; give --input FILE [FILE ...]")
    special = config.document_start is not None or config.documents != "blank-line"
    if special and not any(map(corpora.is_plain_text, config.input)):
        raise UserError("--documents and --document-start apply to plain text, and no input is plain text")
    if config.document_start is not None and config.documents != "blank-line":
        raise UserError("--document-start takes the place of --documents; give one of them")
    corpora.stored_bytes(config.input)
    if config.vocab is None:
        return None
    if config.vocab_sample_mb != PrepareConfig.vocab_sample_mb:
        raise UserError("--vocab-sample-mb is for a vocabulary that is trained: it does not go with --vocab")
    vocabulary = WordPiece.load(config.vocab, config.lowercase)
    if config.vocab_size not in (PrepareConfig.vocab_size, vocabulary.num_tokens):
        raise UserError(
            f"--vocab-size {config.vocab_size} contradicts --vocab {config.vocab}, which has {vocabulary.num_tokens} "
            "pieces; leave one out"
        )
    return vocabulary


def _settings(config: PrepareConfig, vocabulary: WordPiece | None) -> dict[str, Any]:
    """All that the output depends on, as JSON values."""
    trained = {"vocab_size": config.vocab_size, "vocab_sample_mb": config.vocab_sample_mb}
    return {
        "input": [corpora.identify(name) for name in config.input],
        "vocabulary": trained if vocabulary is None else vocabulary.fingerprint,
        "lowercase": config.lowercase,
        "documents": config.documents,
        "document_start": config.document_start,
        "sentences": config.sentences,
        "single_sentence_documents": config.single_sentence_documents,
        "valid_fraction": config.valid_fraction,
    }


def _already_prepared(directory: Path, settings: dict[str, Any]) -> records.Manifest:
    manifest = records.Manifest.load(directory)
    different = [name for name, value in settings.items() if manifest.settings.get(name) != value]
    if different:
        raise UserError(
            f"{directory} is prepared already, but with another {', '.join(different)}; "
            "give another --output, or --overwrite to replace it"
        )
    for split in manifest.splits:
        records.PassageStore(directory, split)
    return manifest


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Makes the first SIGTERM raise Terminated here; a second one ends the process at once."""

    class Sigterm(BaseException):  # like KeyboardInterrupt no Exception, which libraries catch (tqdm does)
        pass

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Sigterm

    def lost(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not Sigterm:
            hook_before(unraisable)
            return
        # It came in a finalizer, which lets no exception out: once more when that has ended.
        signal.signal(signal.SIGTERM, handle)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()

    hook_before, sys.unraisablehook = sys.unraisablehook, lost
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except Sigterm:
        raise Terminated("terminated; nothing is left of this run") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook_before


def _read(config: PrepareConfig, title: str) -> Iterator[Part]:
    """All parts of the input, under a progress bar."""
    total = corpora.stored_bytes(config.input)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        yield from corpora.read_parts(config.input, config.documents, config.document_start, bar.update)


def _train_vocabulary(config: PrepareConfig) -> WordPiece:
    parts = _read(config, "1/2 drawing text for the vocabulary")
    sample = vocabulary_sample.draw((part.text for part in parts), config.vocab_sample_mb * 1e6)
    return wordpiece.train(sample, config.vocab_size, config.lowercase)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """What a worker makes of a document, or of a piece of a very long one."""

    document: int
    passages: list[records.Record]


@dataclass(frozen=True)
class _Encoder:
    """The work of one process: text of whole documents (or pieces of very long ones) to passages."""

    vocabulary: WordPiece
    sentences: SentenceMode
    single: Literal["refuse", "drop", "keep"]

    def __call__(self, block: list[Part]) -> list[_Encoded]:
        if multiprocessing.parent_process() is not None:
            wordpiece.single_threaded()
        split = [split_sentences(part.text, self.sentences) for part in block]
        ids = iter(self._encode([sentence for sentences in split for sentence in sentences]))
        documents: dict[int, list[list[int]]] = {}
        whole: dict[int, str] = {}
        for part, sentences in zip(block, split, strict=True):
            encoded = [next(ids) for _ in sentences]
            documents.setdefault(part.document, []).extend(sentence for sentence in encoded if sentence)
            whole.setdefault(part.document, part.where)
        return [_Encoded(document, self._pack(sentences, whole[document])) for document, sentences in documents.items()]

    def _encode(self, sentences: list[str]) -> Iterator[list[int]]:
        # A few at a time: while encoded, a token takes some hundred bytes.
        for start in range(0, len(sentences), _ENCODE_SENTENCES):
            yield from self.vocabulary.encode(sentences[start : start + _ENCODE_SENTENCES])

    def _pack(self, sentences: list[list[int]], where: str) -> list[records.Record]:
        if len(sentences) == 1 and self.single == "refuse":
            raise UserError(
                f"{where}: the document has one sentence only, so no next sentence; leave such documents out with "
                "--single-sentence-documents drop, cut them in half with keep, or see --documents and --sentences for "
                "what separates documents and sentences"
            )
        if len(sentences) == 1 and self.single == "drop":
            return []
        return records.pack_passages(sentences, folder.token_type(self.vocabulary.num_tokens))


def _blocks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in blocks of about four million characters; only longer documents are divided among blocks.

    Where a document is divided depends on nothing but itself. Its last part stays with the one before it: alone it may
    be one sentence, which the document is not.
    """
    block: list[Part] = []
    size = size_of_document = 0
    for part in parts:
        if block and block[-1].last:
            size_of_document = 0
        ends = size >= _BLOCK_CHARACTERS and size_of_document == 0
        if ends or (size_of_document >= 2 * _BLOCK_CHARACTERS and not part.last):
            yield block
            block, size, size_of_document = [], 0, 0
        block.append(part)
        size += len(part.text)
        size_of_document += len(part.text)
    if block:
        yield block


class _HeldOut:
    """Decides document by document, in stream order, which are held out: the same whatever the rest of the stream."""

    def __init__(self, fraction: float, train: records.SplitWriter, valid: records.SplitWriter):
        self._fraction, self._train, self._valid = fraction, train, valid
        self._num_documents = 0

    def next_writer(self) -> records.SplitWriter:
        """Where the next document goes; it does not depend on its own length, so no length is preferred."""
        self._num_documents += 1
        if self._fraction == 0:
            return self._train
        if self._num_documents <= 4:  # next-sentence pairs need another document: two at least on either side
            return self._train if self._num_documents % 2 else self._valid
        tokens = self._train.tokens + self._valid.tokens
        return self._valid if self._valid.tokens < self._fraction * tokens else self._train


def _encode(
    config: PrepareConfig, vocabulary: WordPiece, settings: dict[str, Any], directory: Path
) -> records.Manifest:
    writers = {split: records.SplitWriter(directory, split, vocabulary.num_tokens) for split in records.SPLITS}
    try:
        dropped = _write(
            config, vocabulary, directory, _HeldOut(config.valid_fraction, writers["train"], writers["valid"])
        )
        finished = {split: writer.finish() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    num_documents = sum(info.documents for info, _ in finished.values())
    if num_documents < 2:
        raise UserError(
            f"the input is {num_documents} document; next-sentence pairs need another one to draw from: give more "
            "files, or say with --documents or --document-start where a document begins"
        )
    if num_documents < 4 and config.valid_fraction > 0:
        raise UserError(f"{num_documents} documents are too few to hold two out; give more, or --valid-fraction 0")
    files = {name: about for _, files in finished.values() for name, about in files.items()}
    files[records.VOCAB] = folder.describe_file(directory / records.VOCAB)
    manifest = records.Manifest(
        fingerprint=vocabulary.fingerprint,
        num_tokens=vocabulary.num_tokens,
        lowercase=vocabulary.lowercase,
        splits={split: info for split, (info, _) in finished.items()},
        files=files,
        dropped_documents=dropped,
        settings=settings,
    )
    manifest.save(directory)
    return manifest


@dataclass(frozen=True)
class _InputEncoder:
    """The work of one of Beam's workers: all of an input, its documents counted from 0."""

    encoder: _Encoder
    documents: corpora.DocumentMode
    document_start: str | None

    def __call__(self, name: str) -> Iterator[list[_Encoded]]:
        return map(self.encoder, _blocks(corpora.read_parts([name], self.documents, self.document_start)))


def _encoded(config: PrepareConfig, encoder: _Encoder, directory: Path) -> Iterator[list[_Encoded]]:
    """All of the input, block by block."""
    if not config.beam:
        workers = config.num_workers or _num_cores()
        blocks = _blocks(_read(config, "2/2 encoding"))
        yield from ordered_map(encoder, blocks, num_processes=workers if workers > 1 else 0, ahead=workers + 2)
        return
    work, first = _InputEncoder(encoder, config.documents, config.document_start), 0
    for results in pipeline.each_of(work, config.input, config.beam, directory):
        last = first
        for block in results:
            yield [dataclasses.replace(each, document=first + each.document) for each in block]
            last = first + block[-1].document
        first = last + 1


def _write(config: PrepareConfig, vocabulary: WordPiece, directory: Path, held_out: _HeldOut) -> int:
    """Encode everything and give it to the writers, in order. Returns the number of documents that were dropped."""
    encoder = _Encoder(vocabulary, config.sentences, config.single_sentence_documents)
    written, current, last, writer = 0, -1, -1, None
    for block in _encoded(config, encoder, directory):
        for piece in block:
            last = piece.document
            if not piece.passages:
                continue
            new = piece.document != current
            writer = held_out.next_writer() if new or writer is None else writer
            writer.write(piece.passages, new_document=new)
            written += new
            current = piece.document
    return last + 1 - written


def _num_cores() -> int:
    """Cores that this process may use; where that is not known (macOS), that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
