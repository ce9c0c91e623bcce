"""From parallel text to the folder that training reads: a joint tokenizer, filtered pairs, shards and a manifest."""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from core_flax.cli import options_changed
from core_flax.config import check_range
from core_flax.data import folder
from core_flax.storage import local_folder
from core_flax.text import sentencepiece_model
from core_flax.text.sentencepiece_model import Algorithm, SentencePiece
from core_flax.types import UserError
from seq2seq_flax.pairs import SPLITS, TOKENIZER, Manifest, PairStore, PairWriter
from seq2seq_flax.parallel_text import Pair, ParallelText, parse_direction

_BLOCK_PAIRS = 4096
_VOCAB_SIZE = 8000
_OWN_FILES = re.compile(
    r"(train|valid)-\d{5}(-of-\d{5})?\.arrayrecord(\.partial)?|(train|valid)\.index\.(npy|partial)|"
    r"tokenizer\.model|manifest\.json(\.partial)?|prepare\.lock"
)

Pairs = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class PrepareConfig:
    """What sentence pairs to prepare, and how."""

    output: str
    """Folder to write; it may exist if it is empty or holds an interrupted run of this command."""
    train: tuple[str, ...] = ()
    """Pairs to train on, of one direction: SRC TGT (two files, the same line of each a pair), or one table of two
    columns (.tsv), any of them also gzipped (.gz); or tfds:NAME[/CONFIG][:SPLIT] (TensorFlow Datasets)."""
    valid: tuple[str, ...] = ()
    """Held-out pairs, likewise. No pair of them is filtered but those that are empty or too long."""
    pair: Pairs = ()
    """In place of --train, for one language pair or several: the languages, then the files: --pair en-de SRC TGT. May
    be given repeatedly. Where there are several target languages, sources begin with a piece that asks for one."""
    valid_pair: Pairs = ()
    """In place of --valid, likewise."""
    both_directions: bool = False
    """Use every --pair and --valid-pair from its target language to its source language as well."""
    copies: bool = False
    """Train on both sides of every --pair as translations of themselves as well (Currey et al. 2017, W17-4715). A model
    that has read a language only to write one other writes that other whatever is asked of it; after copies it can
    also be asked for directions that it was not trained on."""
    vocab_size: int | None = None
    """Pieces of the joint vocabulary that is trained on both sides of the training pairs. None: 8000, or as many as
    --tokenizer has."""
    model: Algorithm = "bpe"
    """What is trained: byte-pair encoding or the unigram model."""
    tokenizer: str | None = None
    """A SentencePiece .model file to use; None: train one. Pieces that ask for languages are added to it."""
    character_coverage: float = 0.9995
    """Share of the characters of the sampled text that get a piece; the rarest become <unk>."""
    vocab_sample_mb: float = 100.0
    """The vocabulary is trained on at most this much text (10**6 bytes), drawn evenly from all pairs."""
    max_length: int = 256
    """Tokens of a sentence, </s> and language piece included; pairs with a longer one are left out and counted."""
    max_ratio: float | None = None
    """Training pairs of which one side has more than this many times the tokens of the other are left out and counted;
    None: none is."""
    deduplicate: bool = False
    """Leave out, and count, training pairs that occurred before, both sides, in these languages; of --copies, texts
    that were copied before. Takes some 100 bytes of memory a pair."""
    empty: Literal["refuse", "drop"] = "refuse"
    """A pair with an empty side. refuse: stop and say where; drop: leave it out and count it."""
    overwrite: bool = False
    """Replace a complete folder."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "vocab_size", least=8)
        check_range("", self, "max_length", least=4)
        check_range("", self, "max_ratio", least=1)
        check_range("", self, "vocab_sample_mb", above=0)
        check_range("", self, "character_coverage", least=0.9, most=1)
        self.check_given(options_changed(self))

    def check_given(self, given: Collection[str]) -> None:
        """Raises UserError if one of these options (cli.options_given) has nothing to say beside --tokenizer."""
        for option in ("--model", "--character-coverage", "--vocab-sample-mb") if self.tokenizer is not None else ():
            if option in given:
                raise UserError(f"{option} is for a vocabulary that is trained: it does not go with --tokenizer")

    @property
    def num_pieces(self) -> int:
        """Pieces of a vocabulary that is trained."""
        return _VOCAB_SIZE if self.vocab_size is None else self.vocab_size


@dataclass(frozen=True)
class _Inputs:
    """Where the pairs of each split come from, and the directions there are."""

    texts: dict[str, list[ParallelText]]
    both_directions: bool
    copies: bool

    @property
    def directions(self) -> list[tuple[str | None, str | None]]:
        """(source, target) languages, each direction once, in the order of appearance."""
        found = [(text.source, text.target) for split in SPLITS for text in self.texts[split]]
        if self.both_directions:
            found += [(target, source) for source, target in found]
        if self.copies:
            found += [(each, each) for text in self.texts["train"] for each in (text.source, text.target)]
        return list(dict.fromkeys(found))

    @property
    def target_languages(self) -> list[str]:
        """Languages that sources must ask for: none where there is one only."""
        targets = list(dict.fromkeys(target for _, target in self.directions if target is not None))
        return targets if len(targets) > 1 else []


def prepare(config: PrepareConfig) -> Manifest:
    """Prepare pairs for training; the same input and settings give the same bytes.

    The manifest is written last, so an interrupted run leaves no folder that reads as complete; run again, it starts
    anew. If the folder is complete already, from the same input and settings, nothing is done.

    Raises:
      UserError: the input or the settings cannot be used, or the output folder holds something else.
    """
    directory, inputs, tokenizer = local_folder("--output", config.output), _inputs(config), _given_tokenizer(config)
    settings = _settings(config, inputs, tokenizer)
    names = [name for texts in inputs.texts.values() for text in texts for name in text.names]
    own_files = folder.OwnFiles(_OWN_FILES, [*names, config.tokenizer or ""])
    if (directory / folder.MANIFEST).exists():
        if not config.overwrite:
            return _already_prepared(directory, settings)
        return folder.replace(
            directory, own_files, lambda new: prepare(dataclasses.replace(config, output=str(new), overwrite=False))
        )
    with folder.own_folder(directory, own_files):
        if tokenizer is None:
            tokenizer = _train_tokenizer(config, inputs)
        tokenizer = tokenizer.with_languages(inputs.target_languages)
        tokenizer.save(directory / TOKENIZER)
        return _encode(config, inputs, tokenizer, settings, directory)


def _given_tokenizer(config: PrepareConfig) -> SentencePiece | None:
    """That of --tokenizer, if there is one. Raises UserError if it has not the size that was asked for."""
    if config.tokenizer is None:
        return None
    tokenizer = SentencePiece.load(config.tokenizer)
    if config.vocab_size not in (None, tokenizer.num_tokens):
        raise UserError(
            f"--vocab-size {config.vocab_size} contradicts --tokenizer {config.tokenizer}, which has "
            f"{tokenizer.num_tokens} pieces; leave one out"
        )
    return tokenizer


def _inputs(config: PrepareConfig) -> _Inputs:
    """Refuses inputs that cannot be, before anything is read at length."""
    texts: dict[str, list[ParallelText]] = {}
    for split, plain, named in (("train", config.train, config.pair), ("valid", config.valid, config.valid_pair)):
        option = "pair" if split == "train" else "valid-pair"
        if plain and named:
            raise UserError(f"give --{split} or --{option}, not both")
        texts[split] = [ParallelText(plain)] if plain else []
        for words in named:
            direction, *names = words or ("",)
            texts[split].append(ParallelText(tuple(names), *parse_direction(direction, f"--{option}")))
    if not texts["train"]:
        raise UserError("nothing to prepare; give --train SRC TGT, or --pair SOURCE-TARGET SRC TGT")
    inputs = _Inputs(texts, config.both_directions, config.copies)
    several = config.both_directions or config.copies or len(inputs.directions) > 1
    if (None, None) in inputs.directions and several:
        raise UserError("which languages these are must be known here: give --pair (not --train) and --valid-pair")
    trained = dataclasses.replace(inputs, texts={**texts, "valid": []}).directions
    for source, target in inputs.directions:
        if target is not None and target not in {language for _, language in trained}:
            raise UserError(f"--valid-pair {source}-{target}: no training pair has the target language {target}")
    for language in inputs.target_languages:
        sentencepiece_model.check_language(language)
    for text in (*texts["train"], *texts["valid"]):
        text.stored_bytes()
    return inputs


def _settings(config: PrepareConfig, inputs: _Inputs, tokenizer: SentencePiece | None) -> dict[str, Any]:
    """All that the output depends on, as JSON values."""
    names = ("model", "character_coverage", "vocab_sample_mb")
    trained = {"vocab_size": config.num_pieces, **{name: getattr(config, name) for name in names}}
    filters = ("max_length", "max_ratio", "deduplicate", "empty", "both_directions", "copies")
    return {
        "input": {
            split: [{"languages": [text.source, text.target], "files": text.identify()} for text in texts]
            for split, texts in inputs.texts.items()
        },
        "tokenizer": trained if tokenizer is None else tokenizer.fingerprint,
        **{name: getattr(config, name) for name in filters},
    }


def _already_prepared(directory: Path, settings: dict[str, Any]) -> Manifest:
    manifest = Manifest.load(directory)
    # Folders from before there were copies have none.
    different = [name for name, value in settings.items() if manifest.settings.get(name, False) != value]
    if different:
        raise UserError(
            f"{directory} is prepared already, but with another {', '.join(different)}; "
            "give another --output, or --overwrite to replace it"
        )
    for split in manifest.splits:
        PairStore(directory, split)
    return manifest


def _read(texts: list[ParallelText], title: str) -> Iterator[tuple[ParallelText, Pair]]:
    """All pairs with the text that they are of, under a progress bar."""
    sizes = [text.stored_bytes() for text in texts]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for text in texts:
            for pair in text.read(bar.update):
                yield text, pair


def _train_tokenizer(config: PrepareConfig, inputs: _Inputs) -> SentencePiece:
    def pairs() -> Iterator[Pair]:
        for _, pair in _read(inputs.texts["train"], "1/2 drawing text for the vocabulary"):
            if config.empty == "refuse" and not (pair.source and pair.target):  # before a vocabulary is trained
                raise _is_empty(pair, has_source=bool(pair.source))
            yield pair

    sample = _draw(pairs(), int(config.vocab_sample_mb * 1e6))
    texts = [text for pair in sample for text in (pair.source, pair.target) if text]
    return sentencepiece_model.train(texts, config.num_pieces, config.model, config.character_coverage)


def _draw(pairs: Iterable[Pair], max_bytes: int) -> list[Pair]:
    """Evenly spaced pairs of at most ``max_bytes`` together, not knowing how many will come.

    Keeps every pair until they are too many, then every second one of those kept and to come, and so on.
    """
    kept: list[tuple[Pair, int]] = []
    size, stride = 0, 1
    for number, pair in enumerate(pairs):
        if number % stride:
            continue
        kept.append((pair, len(pair.source.encode()) + len(pair.target.encode())))
        size += kept[-1][1]
        while size > max_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(num_bytes for _, num_bytes in kept)
    return [pair for pair, _ in kept]


def _encode(
    config: PrepareConfig, inputs: _Inputs, tokenizer: SentencePiece, settings: dict[str, Any], directory: Path
) -> Manifest:
    writers = {split: PairWriter(directory, split, tokenizer.num_tokens, tokenizer.unk_id) for split in SPLITS}
    try:
        for split, writer in writers.items():
            _write(config, inputs, split, tokenizer, writer)
        finished = {split: writer.finish() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    for split, (info, _) in finished.items():
        if info.pairs == 0 and inputs.texts[split]:
            left_out = ", ".join(f"{count:,} {reason}" for reason, count in info.dropped.items())
            raise UserError(f"no pair of the {split} input is left ({left_out}); see --max-length and --max-ratio")
    files = {name: about for _, files in finished.values() for name, about in files.items()}
    files[TOKENIZER] = folder.describe_file(directory / TOKENIZER)
    manifest = Manifest(
        fingerprint=tokenizer.fingerprint,
        num_tokens=tokenizer.num_tokens,
        directions=[list(direction) for direction in inputs.directions],
        tagged=bool(inputs.target_languages),
        splits={split: info for split, (info, _) in finished.items()},
        files=files,
        settings=settings,
    )
    manifest.save(directory)
    return manifest


def _write(config: PrepareConfig, inputs: _Inputs, split: str, tokenizer: SentencePiece, writer: PairWriter) -> None:
    """Encode the pairs of a split and write those that no filter leaves out, in order."""
    numbers = {direction: number for number, direction in enumerate(inputs.directions)}
    tagged = bool(inputs.target_languages)
    keeps = _Filter(config, strict=split == "train")
    pairs = _read(inputs.texts[split], f"2/2 encoding {split}")
    while block := list(islice(pairs, _BLOCK_PAIRS)):
        sources, targets = (
            tokenizer.encode([getattr(pair, side) for _, pair in block]) for side in ("source", "target")
        )
        for (text, pair), source, target in zip(block, sources, targets, strict=True):
            reason = keeps.reason_against(pair, source, target, text, int(tagged))
            ways = [(source, target, (text.source, text.target), reason)]
            if inputs.both_directions:
                ways.append((target, source, (text.target, text.source), reason))
            if config.copies and split == "train":
                sides = (source, pair.source, text.source), (target, pair.target, text.target)
                for side, content, language in sides:
                    of_copy = reason or keeps.reason_against_copy(content, language)
                    ways.append((side, side, (language, language), of_copy))
            for before, after, direction, reason in ways:
                if reason is not None:
                    writer.drop(reason)
                    continue
                tag = [tokenizer.languages[direction[1]]] if tagged and direction[1] else []
                writer.write([*tag, *before, tokenizer.eos_id], [*after, tokenizer.eos_id], numbers[direction])


def _is_empty(pair: Pair, has_source: bool) -> UserError:
    """What is said of a pair that lacks a side."""
    side = "the target" if has_source else "the source"
    return UserError(f"{pair.where}: {side} of the pair is empty; mend it, or leave such pairs out with --empty drop")


class _Filter:
    """Decides pair by pair, in stream order, what is left out and why."""

    def __init__(self, config: PrepareConfig, strict: bool) -> None:
        """``strict``: by all filters, as for training; held-out pairs are what they are."""
        self._config, self._strict = config, strict
        self._seen: set[bytes] = set()

    def reason_against(
        self, pair: Pair, source: list[int], target: list[int], text: ParallelText, num_tags: int
    ) -> str | None:
        """Why the pair is left out; None: it is not. Raises UserError if it is empty and that is refused."""
        config = self._config
        if not source or not target:
            if config.empty == "refuse":
                raise _is_empty(pair, has_source=bool(source))
            return "empty"
        shorter, longer = sorted((len(source), len(target)))
        # A source asks for its language; with both directions, and with copies, either side is one.
        target_tags = num_tags * (config.both_directions or config.copies)
        if 1 + max(len(source) + num_tags, len(target) + target_tags) > config.max_length:
            return f"longer than {config.max_length} tokens"
        if self._strict and config.max_ratio is not None and longer > config.max_ratio * shorter:
            return f"lengths more than {config.max_ratio:g} : 1"
        if self._strict and config.deduplicate:
            # Names and numbers are the same in many languages, and are to be learned in each.
            sides = [f"{text.source}\t{pair.source}", f"{text.target}\t{pair.target}"]
            return self._seen_before("\t".join(sorted(sides) if config.both_directions else sides))
        return None

    def reason_against_copy(self, content: str, language: str | None) -> str | None:
        """Why a text is left out as its own translation, if nothing is against its pair."""
        return self._seen_before(f"{language}\n{content}") if self._config.deduplicate else None

    def _seen_before(self, content: str) -> str | None:
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        if digest in self._seen:
            return "seen before"
        self._seen.add(digest)
        return None
