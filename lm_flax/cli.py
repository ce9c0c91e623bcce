"""``lm-flax``: prepare text, train, evaluate, generate, score lines, look at word vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from core_flax import cli
from core_flax.memory import keep_freed_memory

PROG = "lm-flax"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    from core_flax.logs import quiet_libraries

    quiet_libraries()
    cli.main(
        PROG,
        {
            "prepare": ("turn text into the folder that training reads", _prepare),
            "train": ("train, or resume, a model; without a preset a small one on the text that Python ships", _train),
            "evaluate": ("held-out loss, perplexity and bits per byte of a run", _evaluate),
            "generate": ("continue a text, or a file of them", _generate),
            "score": ("log-probability of every line of a file", _score),
            "analogies": ("what a model's word vectors know of analogies and likeness", _analogies),
            "neighbours": ("the words whose vectors are most like a word's", _neighbours),
            "import-hf": ("take in a GPT-2 or a Llama of Hugging Face's", _import_hf),
            "export-hf": ("write a GPT-2 or a Llama for Hugging Face's transformers", _export_hf),
            "presets": ("list the presets and their sizes", _presets),
        },
        argv,
    )


def _prepare(argv: Sequence[str]) -> None:
    from lm_flax.data import TokenStore, load_tokenizer
    from lm_flax.figures import share_unknown
    from lm_flax.prepare import PrepareConfig, prepare

    config = cli.parse(PrepareConfig, argv, f"{PROG} prepare", description="Turns text into streams of tokens.")
    manifest = prepare(config)
    print(f"{config.output}: vocabulary of {manifest.num_tokens:,} tokens")
    tokenizer = load_tokenizer(Path(config.output), manifest)
    for split, info in manifest.splits.items():
        text = f"{info.characters:,} characters, {info.words:,} words"
        print(f"  {split}: {info.documents:,} documents, {info.tokens:,} tokens of {text}")
        if unknown := share_unknown(TokenStore(config.output, split), tokenizer):
            print(f"    {unknown:.2%} of the tokens are <unk>: the vocabulary does not have what stood there")


def _train(argv: Sequence[str]) -> None:
    keep_freed_memory()  # before jax is imported
    from core_flax.distributed import join
    from lm_flax.presets import PRESETS
    from lm_flax.runs import COMMANDS, train

    def command_of(config: Any) -> type:
        return COMMANDS[type(config)]

    parsed = cli.parse_preset(PRESETS, command_of, "char_small", argv, f"{PROG} train", "trains a model")
    join()
    train(*parsed)


def _presets(argv: Sequence[str]) -> None:
    from lm_flax.presets import PRESETS
    from lm_flax.runs import num_parameters

    cli.parse(Nothing, argv, f"{PROG} presets")
    sizes = "Sizes hold for the vocabulary named; with another one's, the tables are smaller or larger."
    print(f"{sizes} {cli.SHORT_RUN}")
    for name, preset in PRESETS.items():
        config = preset()
        sizes = f"{num_parameters(config):>13,} parameters, vocabulary {config.model.vocab_size:>6,}"
        print(f"{name:<12} {sizes}  {cli.paragraphs(preset)[0]}")


@dataclass(frozen=True)
class Nothing:
    """No options."""


def _evaluate(argv: Sequence[str]) -> None:
    from lm_flax.evaluate import EvaluateCommand, evaluate

    doc = " ".join((EvaluateCommand.__doc__ or "").split())
    evaluate(cli.parse(EvaluateCommand, argv, f"{PROG} evaluate", description=doc))


def _generate(argv: Sequence[str]) -> None:
    from lm_flax.generate import GenerateCommand, run_command
    from lm_flax.runs import load_lm

    command = cli.parse(GenerateCommand, argv, f"{PROG} generate", description=GenerateCommand.__doc__ or "")
    run_command(command, *load_lm(command.workdir))


def _score(argv: Sequence[str]) -> None:
    from lm_flax.runs import load_lm
    from lm_flax.score import ScoreCommand, run_command

    doc = " ".join((ScoreCommand.__doc__ or "").split())
    command = cli.parse(ScoreCommand, argv, f"{PROG} score", description=doc)
    run_command(command, *load_lm(command.workdir))


def _analogies(argv: Sequence[str]) -> None:
    from lm_flax.runs import load_run
    from lm_flax.vectors import AnalogiesCommand, measure, vectors_of

    doc = "Measures a run's embedding table by files of analogies and of judgements of likeness."
    command = cli.parse(AnalogiesCommand, argv, f"{PROG} analogies", description=doc)
    vectors, step = vectors_of(*load_run(command.workdir), command.step)
    print(f"step {step}: {len(vectors.words):,} words")
    print("\n".join(measure(command, vectors)))


def _neighbours(argv: Sequence[str]) -> None:
    from core_flax.types import UserError
    from lm_flax.runs import load_run
    from lm_flax.vectors import NeighboursCommand, list_neighbours, vectors_of

    words, rest = cli.take_words(NeighboursCommand, argv)
    doc = f"{PROG} neighbours WORD [WORD ...] lists the words whose vectors are most like a word's, with the cosine."
    command = cli.parse(NeighboursCommand, rest, f"{PROG} neighbours WORD", description=doc)
    if not words:
        raise UserError(f"no word is given; see {PROG} neighbours --help")
    vectors, _ = vectors_of(*load_run(command.workdir), command.step)
    print("\n".join(list_neighbours(command, vectors, words)))


@dataclass(frozen=True)
class ImportCommand:
    """Turns a model of Hugging Face's, of GPT-2's or Llama's architecture, into a run's folder."""

    folder: tyro.conf.Positional[str]
    """Folder with config.json, a tokenizer (tokenizer.json, vocab.json and merges.txt, or tokenizer.model), and
    model.safetensors (whole or in parts) or pytorch_model.bin."""
    output: str
    """New folder to write."""


def _import_hf(argv: Sequence[str]) -> None:
    from lm_flax.pretrained import import_hf

    command = cli.parse(ImportCommand, argv, f"{PROG} import-hf", description=ImportCommand.__doc__ or "")
    import_hf(command.folder, command.output)


@dataclass(frozen=True)
class ExportCommand:
    """Writes a model as a folder that transformers loads."""

    workdir: str
    """Folder of a training run, or an imported model."""
    output: str
    """New folder to write."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""


def _export_hf(argv: Sequence[str]) -> None:
    from lm_flax.pretrained import export_hf

    command = cli.parse(ExportCommand, argv, f"{PROG} export-hf", description=ExportCommand.__doc__ or "")
    export_hf(command.workdir, command.output, command.step)


if __name__ == "__main__":
    main()
