"""``seq2seq-flax translate``: texts from a file or a pipe, translated line by line and put out in their order."""

import contextlib
import io
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from tqdm import tqdm

from core_flax.beam import BeamSearch
from core_flax.cli import options_changed
from core_flax.config import check_range
from core_flax.data import corpora
from core_flax.sampling import Sampling
from core_flax.storage import replacing
from core_flax.types import UserError
from seq2seq_flax.decode import Draws
from seq2seq_flax.translator import Candidate, Line, Translator

_STANDARD_INPUT = "standard input"


@dataclass(frozen=True, kw_only=True)
class TranslateCommand:
    """Translates a file or a pipe, line by line; an empty line becomes an empty line."""

    workdir: str
    """Folder of a run, an average of its checkpoints, a model that import-hf took in, or one of Hugging Face's."""
    input: str = "-"
    """File of sentences, one a line (also .gz); -: standard input, of which the lines that are there are answered at
    once."""
    output: str = "-"
    """File to write; -: standard output."""
    target_lang: str | None = None
    """Language to translate into, for a model that has several."""
    long: Literal["refuse", "split"] = "refuse"
    """A line longer than the model takes. refuse: stop and say where; split: translate it in pieces, at ends of
    sentences where it has any, and say so."""
    beam_size: int = BeamSearch.beam_size
    """Sequences that live on at each step of the search; 1: greedy, always the most probable token."""
    length_penalty: float = BeamSearch.length_penalty
    """What length is worth (Wu et al. 2016, section 7). 0: the most probable translation, which tends to be short."""
    n_best: int = 1
    """Translations of each line. More than 1: the output has so many lines for each (one for an empty line), the best
    first, of three columns: the line's number, the score, the translation. They differ in their tokens: a text that can
    be cut into tokens in two ways may come twice."""
    sample: bool = False
    """Draw translations by chance instead of searching for the best; the score is then the log-probability."""
    temperature: float = 1.0
    """With --sample: what scores are divided by before they become probabilities; 0: always the most probable token."""
    top_k: int | None = None
    """With --sample: draw from this many most probable tokens; None: from all."""
    top_p: float | None = None
    """With --sample: draw from the fewest tokens that have this probability together; None: from all."""
    min_p: float | None = None
    """With --sample: draw from tokens with this share of the best one's probability, or more; None: from all."""
    seed: int = 0
    """With --sample: of what is drawn for a line, with its place among what is translated: an empty line does not
    count, one in pieces counts as so many."""
    batch_size: int = 64
    """Sentences that are translated at a time."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range, and on options that do not go together."""
        check_range("", self, "batch_size", "n_best", least=1, most=2**16)
        check_range("", self, "step", least=0)
        check_range("", self, "seed", least=0, below=2**31)
        self.check_given(options_changed(self))
        if self.sample and not self.temperature and (self.top_k, self.top_p, self.min_p) != (None, None, None):
            raise UserError("--temperature 0 takes the most probable token; leave out --top-k, --top-p and --min-p")
        if self.sample and not self.temperature and self.n_best > 1:
            raise UserError("--temperature 0 has one translation of a line; leave out --n-best")
        if self.output.endswith(".gz"):
            raise UserError(f"--output {self.output}: text is written as it is; give a name without .gz")
        if self.input != "-" and Path(self.input).resolve() == Path(self.output).resolve():
            raise UserError("--input and --output must be different files")
        _ = self.search  # refuses what is out of range

    def check_given(self, given: Collection[str]) -> None:
        """Raises UserError if one of these options (cli.options_given) has nothing to say beside the others."""
        searching, drawing = ("--beam-size", "--length-penalty"), ("--temperature", "--top-k", "--top-p", "--min-p")
        for option in searching if self.sample else (*drawing, "--seed"):
            if option in given:
                raise UserError(f"{option} {'does not go with' if self.sample else 'goes with'} --sample")
        check_greedy(self.beam_size, given)

    @property
    def search(self) -> BeamSearch | Draws:
        """How translations are found."""
        if self.sample:
            return Draws(Sampling(self.temperature, self.top_k, self.top_p, self.min_p), self.seed, self.n_best)
        return BeamSearch(self.beam_size, self.length_penalty, n_best=self.n_best)


def check_greedy(beam_size: int, given: Collection[str]) -> None:
    """Raises UserError if a search without alternatives is told, by one of these options, how to compare them."""
    if beam_size == 1 and "--length-penalty" in given:
        raise UserError("--beam-size 1 has nothing to choose from by --length-penalty; leave that out")


def run(command: TranslateCommand) -> None:
    """Translates what the command says.

    Raises:
      UserError: the folder, the file or a line of it cannot be used.
    """
    if command.input != "-":
        corpora.existing(command.input)  # before a model is loaded
    elif sys.stdin is None:
        raise UserError("standard input is closed; give a file as --input")
    translator = Translator.load(command.workdir, command.step)
    prefix = translator.language_prefix(command.target_lang)
    begun = time.monotonic()
    if command.output == "-":
        counts = _translate(command, translator, prefix, _standard_output())
        _tell(counts, sys.stderr)
    else:
        with replacing(Path(command.output)) as partial, partial.open("w", encoding="utf-8") as file:
            counts = _translate(command, translator, prefix, file)
        seconds = time.monotonic() - begun
        print(f"{command.output}: {counts.lines:,} lines translated with {command.workdir} in {seconds:.1f} s")
        _tell(counts, sys.stdout)


def _standard_output() -> IO[str]:
    """Standard output, in UTF-8 as the input is, whatever the terminal has."""
    if sys.stdout is None:
        raise UserError("standard output is closed; give a file as --output")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    return sys.stdout


@dataclass
class _Counts:
    """Lines that were translated, and those of which something is to be said."""

    lines: int = 0
    in_pieces: int = 0
    not_ended: int = 0


def _tell(counts: _Counts, stream: IO[str]) -> None:
    if counts.in_pieces:
        print(f"lines longer than the model takes, translated in pieces: {counts.in_pieces:,}", file=stream)
    if counts.not_ended:
        print(
            f"translations that did not end by themselves, broken off at the limit: {counts.not_ended:,}", file=stream
        )


def _translate(command: TranslateCommand, translator: Translator, prefix: tuple[int, ...], output: IO[str]) -> _Counts:
    """Writes translations: of a file all at once, of standard input of the lines that are there."""
    counts, number = _Counts(), 0
    portions = _waiting_lines() if command.input == "-" else [_file_lines(command.input)]
    for texts in portions:
        refusal = None
        try:
            lines = translator.encode(texts, prefix, command.long)
        except UserError as error:
            if command.input != "-":
                raise
            lines, refusal = _as_far_as_it_goes(translator, texts, prefix, command.long), error
        for line in lines:
            if len(line.pieces) > 1:
                counts.in_pieces += 1
                print(f"{line.where} is translated in {len(line.pieces)} pieces", file=sys.stderr)
        total = sum(len(line.pieces) for line in lines)
        silent = command.input == "-" or (output is sys.stdout and output.isatty())
        with tqdm(total=total, desc="translating", unit=" sentences", disable=silent or None) as bar:
            found = translator.translate(lines, command.search, command.batch_size, number, bar.update)
        for candidates in found:
            counts.lines += 1
            counts.not_ended += not candidates[0].is_complete
            output.write(_shown(candidates, counts.lines, command.n_best))
        output.flush()
        number += total
        if refusal is not None:
            raise refusal
    return counts


def _as_far_as_it_goes(
    translator: Translator, texts: Sequence[tuple[str, str]], prefix: tuple[int, ...], long: str
) -> list[Line]:
    """The lines before the first that is refused: of a pipe they are answered, however many came with it."""
    lines: list[Line] = []
    with contextlib.suppress(UserError):
        for text in texts:
            lines += translator.encode([text], prefix, long)
    return lines


def _shown(candidates: list[Candidate], number: int, n_best: int) -> str:
    if n_best == 1:
        return f"{candidates[0].text}\n"
    return "".join(f"{number}\t{each.score:.4f}\t{each.text}\n" for each in candidates)


def _file_lines(name: str) -> list[tuple[str, str]]:
    """(FILE:LINE, text) of every line of a file."""
    return [(f"{name}:{number}", line.strip()) for number, line in corpora.read_lines(name)]


def _waiting_lines() -> Iterator[list[tuple[str, str]]]:
    """The lines of standard input, as many at a time as are there: a single one of what somebody types."""
    number, rest, stream = 0, b"", cast(io.BufferedReader, sys.stdin.buffer)
    while chunk := stream.read1(1 << 16):
        *whole, rest = (rest + chunk).split(b"\n")
        lines: list[tuple[str, str]] = []
        for raw in whole:
            number += 1
            try:
                lines.append((f"{_STANDARD_INPUT}:{number}", _decoded(raw, number)))
            except UserError:
                yield lines
                raise
        if lines:
            yield lines
    if rest:
        yield [(f"{_STANDARD_INPUT}:{number + 1}", _decoded(rest, number + 1))]


def _decoded(raw: bytes, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_STANDARD_INPUT}:{number} is not UTF-8: byte {raw[error.start]:#04x} at position {error.start + 1} of "
            "the line; convert it, for example with iconv -f LATIN1 -t UTF-8"
        ) from error
