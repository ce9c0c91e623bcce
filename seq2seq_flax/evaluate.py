"""How good translations are: BLEU and chrF as sacreBLEU computes them, exact match, the loss on held-out pairs.

BLEU depends on how text is cut into words and on case, so it is never printed without the signature that says so
(Post 2018, arXiv 1804.08771).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from tqdm import tqdm

from core_flax import storage
from core_flax.beam import BeamSearch
from core_flax.cli import options_changed
from core_flax.config import check_range
from core_flax.run import Run, kind_of, on_all_held_out
from core_flax.run import evaluate as run_evaluate
from core_flax.storage import replacing
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import UserError
from seq2seq_flax import numbers, pretrained
from seq2seq_flax.pairs import Manifest
from seq2seq_flax.parallel_text import TABLES, ParallelText
from seq2seq_flax.runs import held_out_of, load_run, open_data
from seq2seq_flax.task import make_task
from seq2seq_flax.translate import check_greedy
from seq2seq_flax.translator import Line, Translator

_MODEL = ("--input", "--output", "--target-lang", "--data", "--step")
_TRANSLATIONS = ("--output", "--target-lang", "--tokenize", "--lowercase")
_SEARCH = ("--beam-size", "--length-penalty", "--batch-size", "--long")
_ABOUT_TRANSLATIONS = "is about translations: it goes with --input and --reference"


@dataclass(frozen=True)
class EvaluateCommand:
    """Scores translations: those of a model, or those in a file. And the loss on a run's held-out pairs."""

    workdir: str | None = None
    """Folder of a run, an average of its checkpoints, a model that import-hf took in, or one of Hugging Face's."""
    input: str | None = None
    """Sentences to translate, one a line (also .gz). Without it, only the held-out loss is printed."""
    reference: str | None = None
    """Their translations, line by line (also .gz)."""
    hypotheses: str | None = None
    """In place of --workdir and --input: translations that exist, one a line."""
    output: str | None = None
    """File to write the model's translations to."""
    target_lang: str | None = None
    """Language to translate into, for a run that has several."""
    data: str | None = None
    """Prepared folder whose held-out pairs the loss is measured on; None: the one that the run was trained on."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""
    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    """How sacreBLEU cuts text into words. none: at spaces alone, for text that is tokenised already."""
    lowercase: bool = False
    """Score without regard to case."""
    beam_size: int = 4
    """Sequences that live on at each step of the search; 1: greedy."""
    length_penalty: float = 0.6
    """What length is worth (Wu et al. 2016, section 7). 0: the most probable translation, which tends to be short."""
    batch_size: int = 64
    """Sentences that are translated at a time."""
    long: Literal["refuse", "split"] = "refuse"
    """A line longer than the model takes. refuse: stop and say where; split: translate it in pieces, and say so."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range, and on options that do not go together."""
        check_range("", self, "beam_size", "batch_size", least=1, most=2**16)
        check_range("", self, "step", least=0)
        if (self.workdir is None) == (self.hypotheses is None):
            raise UserError("give --workdir, to score a model, or --hypotheses, to score a file: one of them")
        if self.hypotheses is not None:
            if self.reference is None:
                raise UserError("--reference must be given: what the hypotheses are compared with")
        elif (self.input is None) != (self.reference is None):
            missing = "--input" if self.input is None else "--reference"
            raise UserError(f"{missing} must be given: a model is scored by --input and --reference together")
        self.check_given(options_changed(self))
        _ = self.search  # refuses what is out of range
        if self.output is not None:
            read = [Path(name).resolve() for name in (self.input, self.reference) if name is not None]
            if Path(self.output).resolve() in read:
                raise UserError(f"--output {self.output} is to be read; give another file")
            if self.output.endswith(".gz"):
                raise UserError(f"--output {self.output}: text is written as it is; give a name without .gz")
            if self.output == "-" or Path(self.output).is_dir():
                raise UserError(f"--output {self.output}: give the name of a file")
        if (self.input, self.hypotheses, self.reference).count("-") > 1:
            raise UserError("the standard input can be one of the texts; give files for the others")

    def check_given(self, given: Collection[str]) -> None:
        """Raises UserError if one of these options (cli.options_given) has nothing to say beside the others."""
        if self.hypotheses is not None:
            _refuse("is about a model: it does not go with --hypotheses", given, *_MODEL, *_SEARCH)
        elif self.input is None:
            _refuse(_ABOUT_TRANSLATIONS, given, *_TRANSLATIONS)
        check_greedy(self.beam_size, given)

    @property
    def search(self) -> BeamSearch:
        """How translations are found."""
        return BeamSearch(beam_size=self.beam_size, length_penalty=self.length_penalty)


def _refuse(why: str, given: Collection[str], *options: str) -> None:
    for option in options:
        if option in given:
            raise UserError(f"{option} {why}")


@dataclass(frozen=True)
class Score:
    """What sacreBLEU says of a set of translations.

    Attributes:
      bleu: 0 to 100.
      bleu_line: with the n-gram precisions, the brevity penalty and both lengths.
      bleu_signature: how it was computed.
      chrf: 0 to 100.
      chrf_line, chrf_signature: likewise.
      hypothesis_length, reference_length: words as BLEU counts them.
    """

    bleu: float
    bleu_line: str
    bleu_signature: str
    chrf: float
    chrf_line: str
    chrf_signature: str
    hypothesis_length: int
    reference_length: int


def score(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a", lowercase: bool = False
) -> Score:
    """BLEU and chrF of translations, line by line beside their references."""
    # force: text that is tokenised is what "none" is for, so there is nothing to warn of.
    bleu = BLEU(tokenize=tokenize, lowercase=lowercase, force=tokenize == "none")
    chrf = CHRF(lowercase=lowercase)
    words = bleu.corpus_score(list(hypotheses), [list(references)])
    letters = chrf.corpus_score(list(hypotheses), [list(references)])
    return Score(
        bleu=words.score,
        bleu_line=words.format(width=2),
        bleu_signature=bleu.get_signature().format(),
        chrf=letters.score,
        chrf_line=letters.format(width=2),
        chrf_signature=chrf.get_signature().format(),
        hypothesis_length=words.sys_len,
        reference_length=words.ref_len,
    )


def evaluate(command: EvaluateCommand, given: Collection[str] | None = None) -> None:
    """Print what the command asks for.

    Args:
      command: what is asked for.
      given: the options that stand on the command line (cli.options_given); None: those that are not their defaults.

    Raises:
      UserError: files that cannot be read, that do not belong together, or that have an empty line; no such run.
    """
    if command.hypotheses is not None:
        assert command.reference is not None
        pairs = _read(command.hypotheses, command.reference, may_be_empty=True)
        _print_score(score(*pairs, command.tokenize, command.lowercase))
        return
    assert command.workdir is not None
    sources, references = [], []
    if command.input is not None and command.reference is not None:
        sources, references = _read(command.input, command.reference, may_be_empty=False)
    if command.output is not None:
        storage.check_writable(Path(command.output))  # before there is anything to lose
    folder = storage.folder("--workdir", command.workdir)
    imported = kind_of(folder) == pretrained.KIND or pretrained.is_hugging_face(folder)
    if imported and command.data is not None:
        raise UserError(f"--data {command.data}: {command.workdir} is an imported model, whose tokens are others")
    where = [(f"{command.input}:{number}", text) for number, text in enumerate(sources, start=1)]
    translator = Translator.load(command.workdir, command.step) if sources else None
    lines = _encoded(translator, where, command) if translator else []  # before anything is measured
    if not imported:
        run, tokenizer = load_run(command.workdir)
        if not sources and numbers.held_out_files(run.data) is None:
            _refuse(_ABOUT_TRANSLATIONS, options_changed(command) if given is None else given, *_SEARCH)
        print_held_out(run, tokenizer, command.data, command.step)
        if not sources:
            print_numbers(run, command)
    elif not sources:
        raise UserError(
            f"{command.workdir} is an imported model, without pairs of its own: give --input and --reference"
        )
    if translator:
        texts = _translated(translator, lines, command)
        _print_score(score(texts, references, command.tokenize, command.lowercase))
        if command.output is not None:
            with replacing(Path(command.output)) as partial:
                partial.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def _read(first: str, second: str, may_be_empty: bool) -> tuple[list[str], list[str]]:
    """The lines of two files that belong together."""
    for name in (first, second):
        if name.lower().endswith(TABLES):
            raise UserError(f"{name} is a table; give two files of plain text, one for each of its columns")
    pairs = list(ParallelText((first, second)).read(lambda count: None))
    for number, pair in enumerate(pairs, start=1):
        empty = first if not pair.source and not may_be_empty else None if pair.target else second
        if empty is not None:
            raise UserError(f"{empty}:{number}: the line is empty; mend the files, or leave such pairs out of both")
    return [pair.source for pair in pairs], [pair.target for pair in pairs]


def _print_score(found: Score) -> None:
    print(found.bleu_line)
    print(f"  reference length {found.reference_length}, signature {found.bleu_signature}")
    print(found.chrf_line)
    print(f"  signature {found.chrf_signature}")


def _encoded(translator: Translator, texts: Sequence[tuple[str, str]], command: EvaluateCommand) -> list[Line]:
    """Texts, each with where it is from, as tokens.

    Raises:
      UserError: the model does not translate into this language, or must be told into which; a text is too long.
    """
    return translator.encode(texts, translator.language_prefix(command.target_lang), command.long)


def _translated(translator: Translator, lines: Sequence[Line], command: EvaluateCommand) -> list[str]:
    """The best translation of each line, under a progress bar."""
    in_pieces = sum(len(line.pieces) > 1 for line in lines)
    if in_pieces:
        print(f"lines longer than the model takes, translated in pieces: {in_pieces:,}")
    with tqdm(
        total=sum(len(line.pieces) for line in lines), desc="translating", unit=" sentences", disable=None
    ) as bar:
        found = translator.translate(lines, command.search, command.batch_size, done=bar.update)
    return [best.text for best, *_ in found]


def print_held_out(run: Run[Any], tokenizer: SentencePiece, data: str | None, step: int | None) -> None:
    """The loss on held-out pairs; a line that says so if their folder is not there and none was given.

    Raises:
      UserError: the folder given is not there, or was made with another tokenizer.
    """
    if data is None and not run.data.is_dir():
        print(f"held-out loss not measured: data folder {run.data} is not there; give its new place with --data")
        return
    folder = run.data_folder(data).absolute()
    if Manifest.load(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(f"data folder {folder} was made with another tokenizer than the run in {run.workdir}")
    held_out = held_out_of(folder)
    if held_out is None:
        print(f"held-out loss not measured: {folder} holds out nothing (prepare --valid)")
        return
    task = make_task(on_all_held_out(run.config), open_data(folder)[0], held_out, tokenizer)
    metrics, at = run_evaluate(run, task.evaluators["held_out"], step)
    print(
        f"held out, step {at}: loss {metrics['nll']:.4f} (perplexity {math.exp(metrics['nll']):.2f}), "
        f"next token right {metrics['accuracy']:.1%}"
    )


def print_numbers(run: Run[Any], options: EvaluateCommand) -> None:
    """Of the demonstration's held-out numbers, if it is one: how many are translated exactly, and five of them."""
    files = numbers.held_out_files(run.data)
    if files is None:
        return
    sources, references = _read(*map(str, files), may_be_empty=False)
    translator = Translator.load(str(run.workdir), options.step)
    where = [(f"{files[0]}:{number}", text) for number, text in enumerate(sources, start=1)]
    texts = _translated(translator, _encoded(translator, where, options), options)
    right = sum(text == reference for text, reference in zip(texts, references, strict=True))
    how = "greedy" if options.beam_size == 1 else f"beam {options.beam_size}"
    print(f"exact match, {how}: {right / len(texts):.1%} of {len(texts)} numbers that were not trained on")
    for source, text, reference in list(zip(sources, texts, references, strict=True))[:5]:
        print(f"  {source}\n    -> {text}{'' if text == reference else f'   (right: {reference})'}")
