"""``bert-flax``: prepare text, pretrain, evaluate, fill masks, fine-tune, predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bert_flax.finetune import cli as tasks
from core_flax import cli
from core_flax.memory import keep_freed_memory

PROG = "bert-flax"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    from core_flax.logs import quiet_libraries

    quiet_libraries()
    cli.main(
        PROG,
        {
            "prepare": ("turn text into the folder that pretraining reads", _prepare),
            "pretrain": ("pretrain, or resume, a model", _pretrain),
            "evaluate": ("held-out losses and accuracies of a run", _evaluate),
            "fill-mask": ("what the model would put in place of [MASK]", _fill_mask),
            "finetune": ("train on a task: GLUE, SQuAD, SWAG, CoNLL, or a table of your own", tasks.finetune),
            "predict": ("what a fine-tuned model says of a file or a text", tasks.predict),
            "score": ("official metric of any file of predictions", tasks.score),
            "import-hf": ("take in a model of Hugging Face's", tasks.import_hf),
            "export-hf": ("write a model for Hugging Face's transformers", tasks.export_hf),
            "presets": ("list the presets and their sizes", _presets),
        },
        argv,
    )


def _prepare(argv: Sequence[str]) -> None:
    from bert_flax.prepare import PrepareConfig, prepare
    from core_flax.data.records import VOCAB, PassageStore
    from core_flax.text.wordpiece import WordPiece

    config = cli.parse(PrepareConfig, argv, f"{PROG} prepare", description="Turns text into ArrayRecord shards.")
    manifest = prepare(config)
    fewer = config.vocab is None and manifest.num_tokens < config.vocab_size
    asked = f", not {config.vocab_size:,}: the text has no more to learn" if fewer else ""
    print(f"{config.output}: vocabulary of {manifest.num_tokens:,} pieces{asked}")
    vocabulary = WordPiece.load(Path(config.output) / VOCAB, manifest.lowercase)
    capitals = [piece for piece in vocabulary.pieces if piece != piece.lower() and not piece.startswith("[")]
    if manifest.lowercase and capitals:
        print(f"  {len(capitals):,} pieces have capitals, such as {capitals[0]!r}, and lower-cased text has none:")
        print("  give --no-lowercase")
    for split, info in manifest.splits.items():
        print(f"  {split}: {info.documents:,} documents, {info.sentences:,} sentences, {info.tokens:,} tokens")
        unknown = int(PassageStore(config.output, split).unigram[vocabulary.unk_id])
        if unknown:
            print(f"    {unknown:,} of them ({unknown / info.tokens:.2%}) are [UNK]: words the vocabulary cannot spell")
    if manifest.dropped_documents:
        print(f"  left out: {manifest.dropped_documents:,} documents of less than two sentences")


def _presets(argv: Sequence[str]) -> None:
    from bert_flax.presets import PRESETS
    from bert_flax.runs import num_parameters

    cli.parse(Nothing, argv, f"{PROG} presets")
    sizes = "Sizes hold for the vocabulary named; with another one's, the embedding table is smaller or larger."
    print(f"{sizes} {cli.SHORT_RUN}")
    for name, preset in PRESETS.items():
        model = preset().model
        sizes = f"{num_parameters(model):>11,} parameters, vocabulary {model.vocab_size:>6,}"
        print(f"{name:<12} {sizes}  {cli.paragraphs(preset)[0]}")


@dataclass(frozen=True)
class Nothing:
    """No options."""


def _pretrain(argv: Sequence[str]) -> None:
    keep_freed_memory()  # before jax is imported
    from bert_flax.presets import PRESETS
    from bert_flax.runs import PretrainCommand, pretrain
    from core_flax.distributed import join

    parsed = cli.parse_preset(
        PRESETS, lambda config: PretrainCommand, "bert_demo", argv, f"{PROG} pretrain", "pretrains a model"
    )
    join()
    pretrain(*parsed)


@dataclass(frozen=True)
class EvaluateCommand:
    """Held-out losses and accuracies, beside the unigram baseline."""

    workdir: str
    """Folder of a pretraining run."""
    data: str | None = None
    """Prepared folder to evaluate on; None: the one that the run was trained on."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""


def _evaluate(argv: Sequence[str]) -> None:
    from bert_flax.runs import evaluate

    command = cli.parse(EvaluateCommand, argv, f"{PROG} evaluate", description=EvaluateCommand.__doc__ or "")
    evaluate(command.workdir, command.data, command.step)


@dataclass(frozen=True)
class FillMaskCommand:
    """The most probable tokens for every [MASK] of a text."""

    text: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT ...", help_behavior_hint="")]
    """One or more texts in quotes, each with one or more [MASK] in it."""
    workdir: str
    """Folder of a pretraining run."""
    top: int = 5
    """How many tokens to show."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""


def _fill_mask(argv: Sequence[str]) -> None:
    from bert_flax.fill_mask import fill_mask

    command = cli.parse(FillMaskCommand, argv, f"{PROG} fill-mask", description=FillMaskCommand.__doc__ or "")
    fill_mask(command.workdir, command.text, command.top, command.step)


if __name__ == "__main__":
    main()
