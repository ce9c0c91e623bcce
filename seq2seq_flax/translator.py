"""A model that translates texts: lines to tokens, tokens to translations, and back to lines."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from core_flax import storage
from core_flax.beam import BeamSearch
from core_flax.config import MeshConfig
from core_flax.hardware import compute_dtype
from core_flax.run import kind_of
from core_flax.sharding import make_mesh, replicated
from core_flax.text.sentences import split_sentences
from core_flax.types import Params, UserError
from seq2seq_flax.architectures import make_model
from seq2seq_flax.decode import Draws, Hypothesis, translate
from seq2seq_flax.pretrained import load_model
from seq2seq_flax.runs import KINDS, load_run

_LINE_ENDS = re.compile(r"[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]+")
"""What ends a line or a column to some program."""


@dataclass(frozen=True)
class Line:
    """A line to translate.

    Attributes:
      where: "FILE:LINE", for messages.
      pieces: token ids of what is translated by itself, ``</s>`` included: none of an empty line, one of most.
    """

    where: str
    pieces: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Candidate:
    """A translation of a line. Attributes: text; score, of all its pieces; whether every piece came to its end."""

    text: str
    score: float
    is_complete: bool


@dataclass(frozen=True)
class Translator:
    """A model that translates texts, on all devices of this process.

    Attributes:
      model: the encoder-decoder.
      params: its parameters, on the devices.
      tokenizer: SentencePiece, or what serves as one.
      max_length: tokens of a source that the model takes, ``</s>`` and language piece included.
      targets: languages it translates into, if they have names.
      tagged: whether sources must ask for one.
      mesh: the devices.
      name: what it is called in messages.
    """

    model: Any
    params: Params
    tokenizer: Any
    max_length: int
    targets: tuple[str, ...]
    tagged: bool
    mesh: Mesh
    name: str = "the model"

    @classmethod
    def load(cls, workdir: str, step: int | None = None) -> "Translator":
        """From a folder of ours or of Hugging Face's. Raises UserError if it holds no model that translates."""
        mesh = make_mesh(MeshConfig(), jax.local_devices())
        if kind_of(storage.folder("--workdir", workdir)) in KINDS:
            run, tokenizer = load_run(workdir)
            model = make_model(run.config.model, compute_dtype(run.config.train.compute_dtype))
            params, _ = run.params(step, replicated(mesh))
            # Training has seen no sentence that does not fit a row.
            most, tagged = run.config.inputs.row_length, run.facts["tagged"]
            targets = dict.fromkeys(target for _, target in run.facts["directions"] if target is not None)
            return cls(model, params, tokenizer, most, tuple(targets), tagged, mesh, f"the run in {workdir}")
        found = load_model(workdir, step)
        model = make_model(found.config, compute_dtype("auto"))
        params = jax.device_put(dict(found.params), replicated(mesh))
        targets = tuple(found.tokenizer.languages)
        return cls(
            model, params, found.tokenizer, found.max_length, targets, bool(targets), mesh, f"the model in {workdir}"
        )

    def language_prefix(self, target_lang: str | None) -> tuple[int, ...]:
        """What sources begin with, to ask for a language; nothing if the model has one only.

        Raises:
          UserError: the model does not translate into this language, or must be told into which.
        """
        known = (
            f"translates into {', '.join(self.targets)}" if self.targets else "has one target language without a name"
        )
        if target_lang is not None and target_lang not in self.targets:
            raise UserError(f"--target-lang {target_lang}: {self.name} {known}")
        if not self.tagged:
            return ()
        if target_lang is None:
            raise UserError(f"--target-lang must be given: {self.name} {known}")
        return (self.tokenizer.languages[target_lang],)

    def encode(self, texts: Sequence[tuple[str, str]], prefix: tuple[int, ...], long: str) -> list[Line]:
        """Texts, each with where it is from, as tokens; ``long`` is that of TranslateCommand, or "never" to split.

        Raises:
          UserError: a text is longer than the model takes, and that is to be refused or has no parts.
        """
        room = self.max_length - len(prefix) - 1
        lines = []
        for (where, text), ids in zip(texts, self.tokenizer.encode([text for _, text in texts]), strict=True):
            parts = [ids] if ids else []
            if len(ids) > room:
                if long != "split":
                    or_split = ", or give --long split to translate it in pieces" if long == "refuse" else ""
                    raise UserError(
                        f"{where} has {len(ids) + len(prefix) + 1} tokens, more than the {self.max_length} that "
                        f"{self.name} takes; shorten it{or_split}"
                    )
                parts = self.tokenizer.encode(pieces_of(text, lambda x: len(self.tokenizer.encode([x])[0]) <= room))
                if max(map(len, parts)) > room:
                    raise UserError(
                        f"{where} has a character that is more tokens than the {self.max_length} that {self.name} takes"
                    )
            lines.append(Line(where, tuple((*prefix, *part, self.tokenizer.eos_id) for part in parts)))
        return lines

    def translate(
        self,
        lines: Sequence[Line],
        search: BeamSearch | Draws,
        batch_size: int = 64,
        first_number: int = 0,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[list[Candidate]]:
        """Of every line its translations, the best first; ``done`` is told how many more pieces are done."""
        tokenizer = self.tokenizer
        padding = range(tokenizer.num_tokens, self.model.config.vocab_size)
        found = iter(
            translate(
                self.model,
                self.params,
                [piece for line in lines for piece in line.pieces],
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                search=search,
                mesh=self.mesh,
                batch_size=batch_size,
                first_number=first_number,
                banned=[*tokenizer.languages.values(), *padding],
                done=done,
            )
        )
        return [self._joined([next(found) for _ in line.pieces]) for line in lines]

    def _joined(self, pieces: list[list[Hypothesis]]) -> list[Candidate]:
        """The k-th best translations of all pieces, one after another, for every k."""
        if not pieces:
            return [Candidate("", 0.0, True)]
        return [
            Candidate(
                " ".join(filter(None, (_in_one_line(self.tokenizer.decode(each.tokens)) for each in ranked))),
                sum(each.score for each in ranked),
                all(each.is_complete for each in ranked),
            )
            for ranked in zip(*pieces, strict=False)
        ]


def _in_one_line(text: str) -> str:
    """A vocabulary with all bytes can spell ends of lines and tabs, which would shift what stands behind them."""
    return _LINE_ENDS.sub(" ", text).strip()


def pieces_of(text: str, fits: Callable[[str], bool]) -> list[str]:
    """A text in pieces that fit: as many sentences each as go in; where one is too long, words; then characters."""
    for parts, glue in ((split_sentences(text), " "), (text.split(), " "), (list(text), "")):
        if len(parts) > 1:
            return [
                piece
                for part in _filled(parts, glue, fits)
                for piece in ([part] if fits(part) else pieces_of(part, fits))
            ]
    return [text]


def _filled(parts: list[str], glue: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """As many parts together as fit, in order; one that does not fit is by itself."""
    held = parts[0]
    for part in parts[1:]:
        if fits(longer := f"{held}{glue}{part}"):
            held = longer
        else:
            yield held
            held = part
    yield held
