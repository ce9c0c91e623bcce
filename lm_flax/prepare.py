"""From text to the folder that training reads: a tokenizer, streams of tokens and a manifest. Imports no jax."""

import dataclasses
import itertools
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core_flax.config import check_range
from core_flax.data import corpora, folder, pipeline
from core_flax.data.feed import ordered_map
from core_flax.storage import local_folder
from core_flax.text.wordpiece import single_threaded
from core_flax.types import UserError
from lm_flax import tokenizers
from lm_flax.data import SPLITS, Manifest, SplitInfo, TokenStore, TokenWriter
from lm_flax.text import Input, Piece, Text
from lm_flax.tokenizers import KINDS, Characters, Tokenizer, Words

DEFAULT_VOCAB_SIZE = 32_000
_BLOCK_CHARACTERS = 2 << 20
_PIECE_CHARACTERS = 1 << 14
"""SentencePiece leaves out sentences of more than 65536 bytes, which four times as many characters may be."""
_OWN_FILES = re.compile(
    r"(train|valid)\.(tokens(\.partial)?|(ends|counts)\.npy)|tokenizer\.(json|model)|manifest\.json(\.partial)?|"
    r"prepare\.lock|" + pipeline.PARTIAL
)


@dataclass(frozen=True)
class PrepareConfig:
    """What text to prepare, and how."""

    input: tuple[str, ...]
    """Text to read: files of plain text, or .jsonl with the text of one document a line in the field "text", either of
    them also gzipped (.gz); tfds:NAME[/CONFIG][:SPLIT] (TensorFlow Datasets); python:docs (what every Python ships).
    Plain text is taken as it is; of records, white space at the end is left out."""
    output: str
    """Folder to write; it may exist if it is empty or holds an interrupted run of this command."""
    tokenizer: str = "bpe"
    """char: every character of the text is a token; word: words between white space, and <eos> at line ends; bpe:
    byte-level BPE as GPT-2 has it, trained on the text; sentencepiece: SentencePiece's BPE, likewise. Or what to use as
    it is: a tokenizer.json, GPT-2's vocab.json (merges.txt beside it; or encoder.json and vocab.bpe), a SentencePiece
    .model, or a folder with one."""
    vocab_size: int | None = None
    """Tokens of the vocabulary that is trained (None: 32000), or of the most frequent words (None: all)."""
    documents: corpora.DocumentMode = "file"
    """What separates documents in plain text. file: nothing, a file is one document; blank-line: blank lines. (In
    .jsonl, tfds and python:docs a record is a document.)"""
    document_start: str | None = None
    """Regular expression: in plain text, a line that it matches from its beginning starts a new document. Takes the
    place of --documents."""
    valid: tuple[str, ...] = ()
    """Held-out text, given as --input is; then nothing of that is held out."""
    valid_fraction: float = 0.1
    """Share of the text held out for evaluation; 0: none."""
    held_out: Literal["end", "documents"] = "end"
    """What is held out. end: the last share of the characters; documents: whole documents, evenly from all of the text,
    until their tokens have the share."""
    vocab_sample_mb: float = 200.0
    """BPE and SentencePiece are trained on at most this much text (10**6 bytes), drawn evenly from all of it."""
    num_workers: int | None = None
    """Processes that encode text; None: one per core. The output does not depend on it."""
    beam: tuple[str, ...] = ()
    """Options of an Apache Beam pipeline, as in "runner=FlinkRunner flink_master=HOST:8081", whose workers then encode
    text, each an input at a time, in place of processes here. They must see the inputs and the output folder under the
    same names. The output does not depend on it."""
    overwrite: bool = False
    """Replace a complete folder."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "vocab_size", least=8)
        check_range("", self, "valid_fraction", least=0, most=0.5)
        check_range("", self, "vocab_sample_mb", above=0)
        check_range("", self, "num_workers", least=1)
        if self.beam and self.num_workers is not None:
            raise UserError("--num-workers is for processes of this machine: it does not go with --beam")


def prepare(config: PrepareConfig) -> Manifest:
    """Prepare text for training; the same input and settings give the same bytes, with any number of workers.

    The manifest is written last, so an interrupted run leaves no folder that reads as complete; run again, it starts
    anew. If the folder is complete already, from the same input and settings, nothing is done.

    Raises:
      UserError: the input or the settings cannot be used, or the output folder holds something else.
    """
    directory, tokenizer = local_folder("--output", config.output), _check(config)
    settings = _settings(config, tokenizer)
    given = [] if tokenizer is None else [config.tokenizer]
    own_files = folder.OwnFiles(_OWN_FILES, [*config.input, *config.valid, *given])
    if (directory / folder.MANIFEST).exists():
        if not config.overwrite:
            return _already_prepared(directory, settings)
        return folder.replace(
            directory, own_files, lambda new: prepare(dataclasses.replace(config, output=str(new), overwrite=False))
        )
    with folder.own_folder(directory, own_files):
        at_end = config.held_out == "end"
        text = Text(config.input, config.valid, config.documents, config.document_start, config.valid_fraction, at_end)
        tokenizer = tokenizer or _learn(config, text)
        tokenizer.save(directory / tokenizer.file)
        return _encode(config, text, tokenizer, settings, directory)


def _check(config: PrepareConfig) -> Tokenizer | None:
    """Refuse settings that cannot work, before anything is read at length. Returns the tokenizer if one is given."""
    if not config.input:
        raise UserError("nothing to prepare; give --input FILE [FILE ...]")
    special = config.document_start is not None or config.documents != "file"
    if special and not any(map(corpora.is_plain_text, (*config.input, *config.valid))):
        raise UserError("--documents and --document-start apply to plain text, and no input is plain text")
    if config.document_start is not None and config.documents != "file":
        raise UserError("--document-start takes the place of --documents; give one of them")
    if config.valid and (config.valid_fraction not in (PrepareConfig.valid_fraction, 0) or config.held_out != "end"):
        raise UserError("--valid-fraction and --held-out say what of --input is held out: not with --valid")
    corpora.stored_bytes((*config.input, *config.valid))
    if config.tokenizer not in ("bpe", "sentencepiece") and config.vocab_sample_mb != PrepareConfig.vocab_sample_mb:
        raise UserError("--vocab-sample-mb is for --tokenizer bpe and sentencepiece, which learn from a sample")
    if config.tokenizer == "char" and config.vocab_size is not None:
        raise UserError(
            "--vocab-size does not apply to --tokenizer char, which has the text's characters; leave it out"
        )
    if config.tokenizer in KINDS:
        return None
    if not Path(config.tokenizer).exists():
        raise UserError(f"--tokenizer {config.tokenizer} is no file; give one, or {', '.join(KINDS)}")
    found = tokenizers.load(config.tokenizer, tokenizers.end_of(Path(config.tokenizer)))
    if found.end_id is not None and found.end_id >= found.num_tokens:
        found = tokenizers.load(config.tokenizer)
    if config.vocab_size not in (None, found.num_tokens):
        raise UserError(
            f"--vocab-size {config.vocab_size} contradicts --tokenizer {config.tokenizer}, which has "
            f"{found.num_tokens} tokens; leave one out"
        )
    return found


def _settings(config: PrepareConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that the output depends on, as JSON values."""
    names = ("documents", "document_start", "valid_fraction", "held_out")
    trained = {name: getattr(config, name) for name in ("tokenizer", "vocab_size", "vocab_sample_mb")}
    return {
        "input": [corpora.identify(name) for name in config.input],
        "valid": [corpora.identify(name) for name in config.valid],
        "tokenizer": trained if tokenizer is None else tokenizer.fingerprint,
        **{name: getattr(config, name) for name in names},
        **({} if (end := _known_end(config)) is None else {"end_id": end}),
    }


def _known_end(config: PrepareConfig) -> int | None:
    return None if config.tokenizer in KINDS else tokenizers.end_of(Path(config.tokenizer))


def _already_prepared(directory: Path, settings: dict[str, Any]) -> Manifest:
    manifest = Manifest.load(directory)
    different = [name for name, value in settings.items() if manifest.settings.get(name) != value]
    if different:
        raise UserError(
            f"{directory} is prepared already, but with another {', '.join(different)}; "
            "give another --output, or --overwrite to replace it"
        )
    for split in SPLITS:
        TokenStore(directory, split)
    return manifest


def _learn(config: PrepareConfig, text: Text) -> Tokenizer:
    """The vocabulary, from the text to train on; characters from all of it, as in nanoGPT."""
    pieces = text.pieces("reading for the vocabulary")
    if config.tokenizer == "char":
        characters: set[str] = set()
        documents: Counter[str | None] = Counter()
        for piece in pieces:
            characters.update(piece.text)
            documents[piece.split] += piece.last
        return Characters("".join(sorted(characters)), has_end=max(documents.values()) > 1)
    texts = (piece.text for piece in pieces if piece.split != "valid")
    if config.tokenizer == "word":
        counts: Counter[str] = Counter()
        for each in texts:
            counts.update(each.split())
            counts[tokenizers.END_OF_LINE] += each.count("\n")
        return Words.of(counts, config.vocab_size)
    sample = _draw(texts, int(config.vocab_sample_mb * 1e6))
    size = config.vocab_size or DEFAULT_VOCAB_SIZE
    return (tokenizers.train_byte_pairs if config.tokenizer == "bpe" else tokenizers.train_pieces)(sample, size)


def _draw(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Evenly spaced stretches of lines, of at most ``max_bytes`` together, not knowing how many will come.

    Keeps every one until they are too many, then every second one of those kept and to come, and so on.
    """
    kept: list[tuple[str, int]] = []
    size, stride = 0, 1
    for number, stretch in enumerate(stretch for text in texts for stretch in _stretches(text)):
        if number % stride:
            continue
        kept.append((stretch, len(stretch.encode())))
        size += kept[-1][1]
        while size > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(num_bytes for _, num_bytes in kept)
    return [stretch for stretch, _ in kept]


def _stretches(text: str) -> Iterator[str]:
    """A text in stretches of whole lines, if lines are not longer than a stretch may be."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """What a worker makes of a piece."""

    split: str | None
    ids: np.ndarray
    counted: SplitInfo
    last: bool


@dataclass(frozen=True)
class _Encoder:
    """The work of one process."""

    tokenizer: Tokenizer

    def __call__(self, block: list[Piece]) -> list[_Encoded]:
        if multiprocessing.parent_process() is not None:
            single_threaded()
        return [self._encoded(piece) for piece in block]

    def _encoded(self, piece: Piece) -> _Encoded:
        try:
            ids = self.tokenizer.encode(piece.text, ends=piece.last)
        except UserError as error:
            raise UserError(f"{piece.where}: {error}") from error
        text = piece.text
        ends = text.count("\n") + (piece.last and not text.endswith("\n"))
        counted = SplitInfo(characters=len(text), bytes=len(text.encode()), words=len(text.split()) + ends)
        return _Encoded(piece.split, ids, counted, piece.last)


@dataclass(frozen=True)
class _InputEncoder:
    """The work of one of Beam's workers: all of an input."""

    text: Text
    encoder: _Encoder

    def __call__(self, source: Input) -> Iterator[list[_Encoded]]:
        return map(self.encoder, _blocks(self.text.pieces_of(source, lambda num_bytes: None)))


def _encoded(config: PrepareConfig, text: Text, encoder: _Encoder, directory: Path) -> Iterator[list[_Encoded]]:
    """All of the text, block by block."""
    if config.beam:
        work = _InputEncoder(text, encoder)
        yield from itertools.chain.from_iterable(pipeline.each_of(work, text.inputs, config.beam, directory))
        return
    size = corpora.stored_bytes((*config.input, *config.valid))
    # To start processes takes longer than to encode a few megabytes.
    workers = config.num_workers or (1 if size is not None and size < 4 * _BLOCK_CHARACTERS else _num_cores())
    blocks = _blocks(text.pieces("encoding"))
    yield from ordered_map(encoder, blocks, num_processes=workers if workers > 1 else 0, ahead=workers + 2)


def _encode(
    config: PrepareConfig, text: Text, tokenizer: Tokenizer, settings: dict[str, Any], directory: Path
) -> Manifest:
    writers = {split: TokenWriter(directory, split, tokenizer.num_tokens) for split in SPLITS}
    try:
        _write(config, _encoded(config, text, _Encoder(tokenizer), directory), writers)
        finished = {split: writer.finish() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    splits = {split: info for split, (info, _) in finished.items()}
    _check_splits(config, splits)
    files = {name: about for _, files in finished.values() for name, about in files.items()}
    files[tokenizer.file] = folder.describe_file(directory / tokenizer.file)
    end_id = None if _known_end(config) is None else tokenizer.end_id
    manifest = Manifest(tokenizer.fingerprint, tokenizer.num_tokens, splits, files, settings, end_id)
    manifest.save(directory)
    return manifest


def _check_splits(config: PrepareConfig, splits: dict[str, SplitInfo]) -> None:
    held_out = config.valid or config.valid_fraction > 0
    if config.held_out == "documents" and held_out and not config.valid and splits["valid"].documents == 0:
        raise UserError(
            "--held-out documents: the text is one document, so none can be held out; say with --documents or "
            "--document-start where a document begins, or take --held-out end"
        )
    empty = [split for split, info in splits.items() if info.tokens == 0 and (split == "train" or held_out)]
    if empty:
        raise UserError(f"nothing is left to {'train on' if 'train' in empty else 'hold out'}; give more text")


def _write(config: PrepareConfig, blocks: Iterable[list[_Encoded]], writers: dict[str, TokenWriter]) -> None:
    """Give everything to the writers, in order."""
    chosen, new = "train", True
    for block in blocks:
        for each in block:
            if each.split is None and new:
                total = sum(writer.tokens for writer in writers.values())
                chosen = "valid" if writers["valid"].tokens < config.valid_fraction * total else "train"
            writers[each.split or chosen].write(each.ids, each.counted, each.last)
            new = each.last


def _blocks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in blocks of about two million characters."""
    block: list[Piece] = []
    size = 0
    for piece in pieces:
        block.append(piece)
        size += len(piece.text)
        if size >= _BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _num_cores() -> int:
    """Cores that this process may use; where that is not known (macOS), that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
