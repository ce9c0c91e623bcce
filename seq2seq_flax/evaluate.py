"""How good translations are: BLEU and chrF as sacreBLEU computes them, exact match, the loss on held-out pairs.

BLEU depends on how text is cut into words and on case, so it is never printed without the signature that says so
(Post 2018, arXiv 1804.08771).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from tqdm import tqdm

from core_flax.beam import BeamSearch
from core_flax.config import MeshConfig, check_range, replacing
from core_flax.hardware import compute_dtype
from core_flax.run import Run
from core_flax.run import evaluate as run_evaluate
from core_flax.sharding import make_mesh, replicated
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import UserError
from seq2seq_flax import numbers
from seq2seq_flax.architectures import make_model
from seq2seq_flax.pairs import Manifest
from seq2seq_flax.parallel_text import ParallelText
from seq2seq_flax.runs import held_out_of, load_run, open_data
from seq2seq_flax.task import make_task
from seq2seq_flax.translator import translate


@dataclass(frozen=True)
class EvaluateCommand:
    """Scores translations: those of a model, or those in a file. And the loss on a run's held-out pairs."""

    workdir: str | None = None
    """Folder of a run, or an average of its checkpoints."""
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

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range, and on options that do not go together."""
        check_range("", self, "beam_size", "batch_size", least=1)
        check_range("", self, "step", least=0)
        if (self.workdir is None) == (self.hypotheses is None):
            raise UserError("give --workdir, to score a model, or --hypotheses, to score a file: one of them")
        if self.hypotheses is not None:
            wrong = [name for name in ("input", "output", "target_lang", "data", "step") if getattr(self, name)]
            if wrong:
                raise UserError(f"--{wrong[0].replace('_', '-')} is about a model: it does not go with --hypotheses")
            if self.reference is None:
                raise UserError("--reference must be given: what the hypotheses are compared with")
        elif (self.input is None) != (self.reference is None):
            missing = "--input" if self.input is None else "--reference"
            raise UserError(f"{missing} must be given: a model is scored by --input and --reference together")


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


def evaluate(command: EvaluateCommand) -> None:
    """Print what the command asks for.

    Raises:
      UserError: files that cannot be read, that do not belong together, or that have an empty line; no such run.
    """
    if command.hypotheses is not None:
        assert command.reference is not None
        pairs = _read(command.hypotheses, command.reference, may_be_empty=True)
        _print_score(score(*pairs, command.tokenize, command.lowercase))
        return
    assert command.workdir is not None
    run, tokenizer = load_run(command.workdir)
    print_held_out(run, tokenizer, command.data, command.step)
    search = BeamSearch(beam_size=command.beam_size, length_penalty=command.length_penalty)
    if command.input is not None and command.reference is not None:
        sources, references = _read(command.input, command.reference, may_be_empty=False)
        texts = translate_texts(run, tokenizer, sources, search, command.target_lang, command.step, command.batch_size)
        if command.output is not None:
            with replacing(Path(command.output)) as partial:
                partial.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        _print_score(score(texts, references, command.tokenize, command.lowercase))
    else:
        print_numbers(run, tokenizer, search, command.step)


def _read(first: str, second: str, may_be_empty: bool) -> tuple[list[str], list[str]]:
    """The lines of two files that belong together."""
    pairs = list(ParallelText((first, second)).read(lambda count: None))
    for pair in pairs:
        if not pair.target or not (pair.source or may_be_empty):
            side = "its translation" if pair.source else "the line"
            raise UserError(f"{pair.where}: {side} is empty; mend the files, or leave such pairs out of both")
    return [pair.source for pair in pairs], [pair.target for pair in pairs]


def _print_score(found: Score) -> None:
    print(found.bleu_line)
    print(f"  reference length {found.reference_length}, signature {found.bleu_signature}")
    print(found.chrf_line)
    print(f"  signature {found.chrf_signature}")


def translate_texts(
    run: Run[Any],
    tokenizer: SentencePiece,
    texts: Sequence[str],
    search: BeamSearch,
    target_lang: str | None = None,
    step: int | None = None,
    batch_size: int = 64,
) -> list[str]:
    """The best translation of each text, under a progress bar.

    Raises:
      UserError: the run does not translate into this language, or must be told into which.
    """
    prefix = language_prefix(run, tokenizer, target_lang)
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    model = make_model(run.config.model, compute_dtype(run.config.train.compute_dtype))
    params, _ = run.params(step, replicated(mesh))
    sources = [[*prefix, *ids, tokenizer.eos_id] for ids in tokenizer.encode(texts)]
    with tqdm(total=len(sources), desc="translating", unit=" sentences", disable=None) as bar:
        found = translate(
            model,
            params,
            sources,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            search=search,
            mesh=mesh,
            batch_size=batch_size,
            done=bar.update,
        )
    return [tokenizer.decode(best.tokens) for best, *_ in found]


def language_prefix(run: Run[Any], tokenizer: SentencePiece, target_lang: str | None) -> list[int]:
    """What sources begin with, to ask for a language; nothing where there is only one.

    Raises:
      UserError: the run does not translate into this language, or must be told into which.
    """
    targets = list(dict.fromkeys(target for _, target in run.facts["directions"] if target is not None))
    if target_lang is not None and target_lang not in targets:
        known = f"translates into {', '.join(targets)}" if targets else "was not told which languages its pairs are in"
        raise UserError(f"--target-lang {target_lang}: the run in {run.workdir} {known}")
    if not run.facts["tagged"]:
        return []
    if target_lang is None:
        raise UserError(f"--target-lang must be given: the run in {run.workdir} translates into {', '.join(targets)}")
    return [tokenizer.languages[target_lang]]


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
    task = make_task(run.config, open_data(folder)[0], held_out, tokenizer)
    metrics, at = run_evaluate(run, task.evaluators["held_out"], step)
    print(
        f"held out, step {at}: loss {metrics['nll']:.4f} (perplexity {math.exp(metrics['nll']):.2f}), "
        f"next token right {metrics['accuracy']:.1%}"
    )


def print_numbers(run: Run[Any], tokenizer: SentencePiece, search: BeamSearch, step: int | None = None) -> None:
    """Of the demonstration's held-out numbers, if it is one: how many are translated exactly, and five of them."""
    files = numbers.held_out_files(run.data)
    if files is None:
        return
    sources, references = _read(*map(str, files), may_be_empty=False)
    texts = translate_texts(run, tokenizer, sources, search, step=step)
    right = sum(text == reference for text, reference in zip(texts, references, strict=True))
    how = "greedy" if search.beam_size == 1 else f"beam {search.beam_size}"
    print(f"exact match, {how}: {right / len(texts):.1%} of {len(texts)} numbers that were not trained on")
    for source, text, reference in list(zip(sources, texts, references, strict=True))[:5]:
        print(f"  {source}\n    -> {text}{'' if text == reference else f'   (right: {reference})'}")
