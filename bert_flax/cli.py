"""``bert-flax``: prepare text, pretrain, evaluate, fill masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from core_flax import cli
from core_flax.types import UserError

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
            "presets": ("list the presets and their sizes", _presets),
        },
        argv,
    )


def _prepare(argv: Sequence[str]) -> None:
    from bert_flax.prepare import PrepareConfig, prepare

    config = cli.parse(PrepareConfig, argv, f"{PROG} prepare", description="Turns text into ArrayRecord shards.")
    manifest = prepare(config)
    print(f"{config.output}: vocabulary of {manifest.num_tokens:,} pieces")
    for split, info in manifest.splits.items():
        print(f"  {split}: {info.documents:,} documents, {info.sentences:,} sentences, {info.tokens:,} tokens")
    if manifest.dropped_documents:
        print(f"  left out: {manifest.dropped_documents:,} documents of less than two sentences")


def _presets(argv: Sequence[str]) -> None:
    from bert_flax.presets import PRESETS
    from bert_flax.runs import num_parameters

    cli.parse(Nothing, argv, f"{PROG} presets")
    for name, preset in PRESETS.items():
        config = preset()
        summary = (preset.__doc__ or "").strip().splitlines()[0]
        print(f"{name:<12} {num_parameters(config.model):>12,} parameters  {summary}")


@dataclass(frozen=True)
class Nothing:
    """No options."""


def _pretrain(argv: Sequence[str]) -> None:
    from bert_flax.presets import PRESETS
    from bert_flax.runs import PretrainCommand, pretrain
    from core_flax.hardware import keep_freed_memory

    name = argv[0] if argv and not argv[0].startswith("-") else None
    if name is not None and name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{cli.suggest(name, PRESETS)}; {PROG} presets lists them")
    preset = PRESETS[name or "bert_demo"]
    default = PretrainCommand.of(preset())
    rest = argv[1:] if name else argv
    doc = (
        f"{PROG} pretrain [PRESET] [options] pretrains, or resumes, in --workdir. Presets: {', '.join(PRESETS)}. "
        f"Preset {preset.__name__}: {preset.__doc__}"
    )
    command = cli.parse(PretrainCommand, rest, f"{PROG} pretrain {preset.__name__}", default, doc)
    keep_freed_memory()
    pretrain(command, preset())


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

    text: tyro.conf.Positional[tuple[str, ...]]
    """Texts with one or more [MASK] each."""
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
