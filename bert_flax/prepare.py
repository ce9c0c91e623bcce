"""From text to the folder that pretraining reads: sentences, WordPiece ids, passages, shards and a manifest."""

import dataclasses
import math
import multiprocessing
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from core_flax.data import corpora, records
from core_flax.data.corpora import Part
from core_flax.data.feed import ordered_map
from core_flax.lock import only_writer
from core_flax.text import wordpiece
from core_flax.text.sentences import SentenceMode, split_sentences
from core_flax.text.wordpiece import WordPiece
from core_flax.types import UserError

_BLOCK_CHARACTERS = 4 << 20
_SAMPLE_CHARACTERS = 1 << 14
_SAMPLE_WORDS = 1_000_000
"""Different words that a vocabulary is trained on: each takes the trainer some 700 bytes."""
_ENCODE_SENTENCES = 1024
_LOCK = "prepare.lock"
_OWN_FILES = re.compile(
    r"(train|valid)-\d{5}(-of-\d{5})?\.arrayrecord(\.partial)?|(train|valid)\.(index|unigram)\.(npy|partial)|"
    r"vocab\.txt|manifest\.json(\.partial)?|prepare\.lock"
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


def prepare(config: PrepareConfig) -> records.Manifest:
    """Prepare text for pretraining; the same input and settings give the same bytes, with any number of workers.

    The manifest is written last, so an interrupted run leaves no folder that reads as complete; run again, it starts
    anew. If the folder is complete already, from the same input and settings, nothing is done.

    Raises:
        UserError: the input or the settings cannot be used, or the output folder holds something else.
    """
    vocabulary = _check(config)
    settings = _settings(config, vocabulary)
    directory = Path(config.output)
    if (directory / records.MANIFEST).exists():
        return _replace(config) if config.overwrite else _already_prepared(directory, settings)
    with _own_folder(directory):
        try:
            if vocabulary is None:
                vocabulary = _train_vocabulary(config)
            vocabulary.save(directory / records.VOCAB)
            return _encode(config, vocabulary, settings, directory)
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror or error}; free space and run again") from error


def _replace(config: PrepareConfig) -> records.Manifest:
    """Prepare beside the complete folder and put the new one in its place: bad input loses nothing."""
    directory = Path(config.output)
    new, old = (directory.with_name(f"{directory.name}.{which}") for which in ("new", "old"))
    (new / records.MANIFEST).unlink(missing_ok=True)  # of a run that was interrupted before it could move it
    manifest = prepare(dataclasses.replace(config, output=str(new), overwrite=False))
    if old.exists():
        shutil.rmtree(old)
    directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old)
    return manifest


def _check(config: PrepareConfig) -> WordPiece | None:
    """Refuse settings that cannot work, before anything is read at length. Returns the vocabulary if one is given."""
    if not config.input:
        raise UserError("nothing to prepare; give --input FILE [FILE ...]")
    if not 0 <= config.valid_fraction <= 0.5:
        raise UserError(f"--valid-fraction {config.valid_fraction} must lie between 0 and 0.5")
    if config.num_workers is not None and config.num_workers < 1:
        raise UserError(f"--num-workers {config.num_workers} must be at least 1")
    if config.vocab_sample_mb <= 0:
        raise UserError(f"--vocab-sample-mb {config.vocab_sample_mb} must be positive")
    special = config.document_start is not None or config.documents != "blank-line"
    if special and not any(map(corpora.is_plain_text, config.input)):
        raise UserError("--documents and --document-start apply to plain text, and no input is plain text")
    if config.document_start is not None and config.documents != "blank-line":
        raise UserError("--document-start takes the place of --documents; give one of them")
    corpora.stored_bytes(config.input)
    if config.vocab is None:
        return None
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
def _own_folder(directory: Path) -> Iterator[None]:
    """Make the folder, for this process alone, empty of what an earlier run left. Refuses files of others."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in directory.iterdir() if not _OWN_FILES.fullmatch(path.name))
        if foreign:
            raise UserError(f"{directory} holds other files ({foreign[0]}); give an empty or a new folder as --output")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    refusal = f"another prepare is writing to {directory}; wait for it or take another folder"
    with only_writer(directory / _LOCK, refusal):
        (directory / records.MANIFEST).unlink(missing_ok=True)  # first of all: from here on nothing is complete
        for path in directory.iterdir():
            if path.name != _LOCK:
                path.unlink()
        yield


def _read(config: PrepareConfig, title: str) -> Iterator[Part]:
    """All parts of the input, under a progress bar."""
    total = corpora.stored_bytes(config.input)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        yield from corpora.read_parts(config.input, config.documents, config.document_start, bar.update)


def _train_vocabulary(config: PrepareConfig) -> WordPiece:
    parts = _read(config, "1/2 drawing text for the vocabulary")
    sample = _draw(_slices(parts), int(config.vocab_sample_mb * 1e6))
    while len(sample) > 1 and _count_words(sample) > _SAMPLE_WORDS:
        sample = sample[::2]
    return wordpiece.train(sample, config.vocab_size, config.lowercase)


def _slices(parts: Iterable[Part]) -> Iterator[str]:
    """Text in slices of some thousand characters, cut at white space: what is drawn for the vocabulary, or not."""
    for part in parts:
        start = 0
        while start < len(part.text):
            space = re.compile(r"\s").search(part.text, start + _SAMPLE_CHARACTERS)
            end = space.end() if space else len(part.text)
            yield part.text[start:end]
            start = end


def _draw(slices: Iterable[str], max_bytes: int) -> list[str]:
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
        return records.pack_passages(sentences, records.token_type(self.vocabulary.num_tokens))


def _blocks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in blocks of about four million characters; only longer documents are divided among blocks."""
    block: list[Part] = []
    size = 0
    for part in parts:
        block.append(part)
        size += len(part.text)
        if size >= _BLOCK_CHARACTERS and (part.last or size >= 2 * _BLOCK_CHARACTERS):
            yield block
            block, size = [], 0
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
        dropped = _write(config, vocabulary, _HeldOut(config.valid_fraction, writers["train"], writers["valid"]))
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
    files[records.VOCAB] = records.describe_file(directory / records.VOCAB)
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


def _write(config: PrepareConfig, vocabulary: WordPiece, held_out: _HeldOut) -> int:
    """Encode everything and give it to the writers, in order. Returns the number of documents that were dropped."""
    encoder = _Encoder(vocabulary, config.sentences, config.single_sentence_documents)
    blocks = _blocks(_read(config, "2/2 encoding"))
    num_workers = config.num_workers or _num_cores()
    encoded = ordered_map(encoder, blocks, num_processes=num_workers if num_workers > 1 else 0, ahead=num_workers + 2)
    dropped, current, writer = 0, -1, None
    for block in encoded:
        for piece in block:
            new = piece.document != current
            if new and not piece.passages:
                dropped += 1
                continue
            writer = held_out.next_writer() if new or writer is None else writer
            writer.write(piece.passages, new_document=new)
            current = piece.document
    return dropped


def _num_cores() -> int:
    """Cores that this process may use; where that is not known (macOS), that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
