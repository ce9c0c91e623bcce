"""What the embedding table of a run knows of words: ``lm-flax analogies`` and ``lm-flax neighbours``."""

from dataclasses import dataclass
from pathlib import Path

from core_flax.config import check_range
from core_flax.run import Run
from core_flax.types import UserError
from lm_flax import similarity
from lm_flax.similarity import Score, Vectors
from lm_flax.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class AnalogiesCommand:
    """Options of ``lm-flax analogies``: which run, and the files to measure it by, one of them at least."""

    workdir: str
    """Folder of a training run, of any model."""
    questions: str | None = None
    """Analogies in the layout of questions-words.txt: sections of lines with four words."""
    wordsim353: str | None = None
    """Pairs of words and how similar people find them, in the layout of wordsim353.tsv."""
    simlex999: str | None = None
    """Likewise, simlex999.txt."""
    step: int | None = None
    """Which checkpoint; None: the newest."""

    def __post_init__(self) -> None:
        """Raises UserError if there is nothing to measure by."""
        if self.questions is None and self.wordsim353 is None and self.simlex999 is None:
            raise UserError("nothing to measure by; give --questions, --wordsim353 or --simlex999 a file")


@dataclass(frozen=True, kw_only=True)
class NeighboursCommand:
    """Options of ``lm-flax neighbours WORD ...``."""

    workdir: str
    """Folder of a training run, of any model."""
    number: int = 10
    """How many of the nearest words."""
    step: int | None = None
    """Which checkpoint; None: the newest."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "number", least=1)


def vectors_of(run: Run, tokenizer: Tokenizer, step: int | None) -> tuple[Vectors, int]:
    """(the embeddings of the tokens that are words by themselves, the checkpoint's step).

    Raises:
      UserError: the tokenizer has no such tokens; there is no such checkpoint.
    """
    words = tokenizer.words()
    if not any(words):
        raise UserError(f"no token of the model in {run.workdir} is a word by itself; give a run with other tokens")
    params, step = run.params(step)
    return Vectors.of(words, params["token"]["embedding"]), step


def measure(command: AnalogiesCommand, vectors: Vectors) -> list[str]:
    """What to print. Raises UserError on a file that cannot be read or has another layout."""
    lines = []
    if command.questions is not None:
        sections = similarity.read_questions(command.questions)
        everything = similarity.analogies(vectors, [question for each in sections.values() for question in each])
        lines.append(f"{_name(command.questions)}: {_share(everything)}")
        lines += [f"  {name}: {_share(similarity.analogies(vectors, each))}" for name, each in sections.items()]
    for path in (command.wordsim353, command.simlex999):
        if path is not None:
            lines.append(
                f"{_name(path)}: {_correlation(similarity.judgements(vectors, similarity.read_judgements(path)))}"
            )
    return lines


def list_neighbours(command: NeighboursCommand, vectors: Vectors, words: list[str]) -> list[str]:
    """What to print. Raises UserError at a word that is not in the vocabulary."""
    lines = []
    for word in words:
        near = similarity.neighbours(vectors, word, command.number)
        lines += [word, *(f"  {cosine:.3f}  {other}" for other, cosine in near)]
    return lines


def _name(path: str) -> str:
    return Path(path).stem


def _share(score: Score) -> str:
    if not score.num_known:
        return f"none of {score.num_all:,} questions has its words in the vocabulary"
    return f"{100 * score.value:.1f} % of {score.num_known:,} questions right{_rest(score)}"


def _correlation(score: Score) -> str:
    if score.num_known < 2:
        return (
            f"{score.num_known} of {score.num_all:,} pairs has its words in the vocabulary: too few for a correlation"
        )
    chance = (score.num_known - 1) ** -0.5  # the standard deviation of Spearman's correlation of unrelated rankings
    return f"Spearman {score.value:.3f} (chance 0 ± {chance:.3f}) over {score.num_known:,} pairs{_rest(score)}"


def _rest(score: Score) -> str:
    """How many were left out."""
    rest = score.num_all - score.num_known
    return f"; {rest:,} have words that are not in the vocabulary" if rest else ""
