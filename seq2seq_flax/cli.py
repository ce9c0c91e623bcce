"""``seq2seq-flax``: prepare parallel text, train, evaluate, translate, exchange models with Hugging Face."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from core_flax import cli
from core_flax.memory import keep_freed_memory

PROG = "seq2seq-flax"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    from core_flax.logs import quiet_libraries

    quiet_libraries()
    cli.main(
        PROG,
        {
            "prepare": ("turn parallel text into the folder that training reads", _prepare),
            "train": ("train, or resume, a model", _train),
            "evaluate": ("BLEU and chrF with their signatures, and the held-out loss", _evaluate),
            "translate": ("translate a file or a pipe", _translate),
            "align": ("which source words each target word looks at", _align),
            "average": ("average the last checkpoints of a run", _average),
            "import-hf": ("take in a Marian model of Hugging Face's", _import_hf),
            "export-hf": ("write a model for Hugging Face's transformers", _export_hf),
            "presets": ("list the presets and their sizes", _presets),
        },
        argv,
    )


def _prepare(argv: Sequence[str]) -> None:
    import numpy as np

    from seq2seq_flax.pairs import PairStore
    from seq2seq_flax.prepare import PrepareConfig, prepare

    config = cli.parse(PrepareConfig, argv, f"{PROG} prepare", description="Turns sentence pairs into token shards.")
    manifest = prepare(config)
    tags = f", asking for {', '.join(dict.fromkeys(str(d[1]) for d in manifest.directions))}" if manifest.tagged else ""
    print(f"{config.output}: vocabulary of {manifest.num_tokens:,} pieces{tags}")
    for split, info in manifest.splits.items():
        print(f"  {split}: {info.pairs:,} pairs")
        if info.pairs and len(manifest.directions) > 1:
            counts = np.bincount(PairStore(config.output, split).direction, minlength=len(manifest.directions))
            each = zip(counts, manifest.directions, strict=True)
            print("    " + ", ".join(f"{count:,} {before} -> {after}" for count, (before, after) in each if count))
        for side, tokens, unknown, lengths in (
            ("source", info.source_tokens, info.source_unknown, info.source),
            ("target", info.target_tokens, info.target_unknown, info.target),
        ):
            if info.pairs:
                print(
                    f"    {side}: {tokens:,} tokens; a sentence has {lengths.mean:.1f}, half at most {lengths.median}, "
                    f"90 % {lengths.percentile_90}, 99 % {lengths.percentile_99}, the longest {lengths.longest}"
                )
            if unknown:
                print(f"      {unknown:,} of them ({unknown / tokens:.2%}) are <unk>: characters without a piece")
        for reason, count in info.dropped.items():
            print(f"    left out: {count:,} {reason}")


def _translate(argv: Sequence[str]) -> None:
    keep_freed_memory()  # before jax is imported
    from seq2seq_flax.translate import TranslateCommand, run

    run(cli.parse(TranslateCommand, argv, f"{PROG} translate", description=TranslateCommand.__doc__ or ""))


def _align(argv: Sequence[str]) -> None:
    from seq2seq_flax.align import AlignCommand, run

    run(cli.parse(AlignCommand, argv, f"{PROG} align", description=AlignCommand.__doc__ or ""))


def _presets(argv: Sequence[str]) -> None:
    from seq2seq_flax.presets import PRESETS
    from seq2seq_flax.runs import num_parameters

    cli.parse(Nothing, argv, f"{PROG} presets")
    sizes = "Sizes hold for the vocabulary named; with another one's, the embedding tables are smaller or larger."
    print(f"{sizes} {cli.SHORT_RUN}")
    width = max(map(len, PRESETS))
    for name, preset in PRESETS.items():
        model = preset().model
        sizes = f"{num_parameters(model):>11,} parameters, vocabulary {model.vocab_size:>6,}"
        print(f"{name:<{width}}  {sizes}  {cli.paragraphs(preset)[0]}")


@dataclass(frozen=True)
class Nothing:
    """No options."""


def _train(argv: Sequence[str]) -> None:
    keep_freed_memory()  # before jax is imported
    from core_flax.distributed import first_does, join
    from seq2seq_flax.evaluate import EvaluateCommand, print_numbers
    from seq2seq_flax.presets import PRESETS
    from seq2seq_flax.runs import command_of, train

    asked = cli.parse_preset(PRESETS, command_of, "numbers_demo", argv, f"{PROG} train", "trains a model")
    join()
    run = train(*asked)
    # The others wait: one that left would be taken for lost.
    first_does(lambda: print_numbers(run, EvaluateCommand(workdir=str(run.workdir))))


def _evaluate(argv: Sequence[str]) -> None:
    from seq2seq_flax.evaluate import EvaluateCommand, evaluate

    command = cli.parse(EvaluateCommand, argv, f"{PROG} evaluate", description=EvaluateCommand.__doc__ or "")
    evaluate(command, cli.options_given(EvaluateCommand, argv))


@dataclass(frozen=True)
class AverageCommand:
    """Averages the parameters of a run's last checkpoints; the result is a folder like a run's, to translate with."""

    workdir: str
    """Folder of a run."""
    last: int | None = None
    """How many checkpoints, the newest of those that are there; None: all of them, but no more than 10."""
    output: str | None = None
    """Folder to write, which must not exist or be empty; None: averaged-N under the workdir."""


def _average(argv: Sequence[str]) -> None:
    from core_flax.average import average
    from seq2seq_flax.runs import KINDS

    command = cli.parse(AverageCommand, argv, f"{PROG} average", description=AverageCommand.__doc__ or "")
    output, steps = average(command.workdir, command.last, command.output, kinds=KINDS)
    of = "checkpoint, step" if len(steps) == 1 else "checkpoints, steps"
    print(f"{output}: the mean of {len(steps)} {of} {', '.join(map(str, steps))}")


@dataclass(frozen=True)
class ImportCommand:
    """Turns a folder of Hugging Face's with a Marian model into one of ours, to translate with."""

    folder: tyro.conf.Positional[str]
    """Folder with config.json, source.spm, target.spm, vocab.json and model.safetensors or pytorch_model.bin."""
    output: str
    """Folder to write, which must not exist or be empty."""


def _import_hf(argv: Sequence[str]) -> None:
    from seq2seq_flax.pretrained import import_hf

    command = cli.parse(ImportCommand, argv, f"{PROG} import-hf", description=ImportCommand.__doc__ or "")
    import_hf(command.folder, command.output)


@dataclass(frozen=True)
class ExportCommand:
    """Writes a model as a folder that transformers loads as MarianMTModel with its MarianTokenizer."""

    workdir: str
    """Folder of a run, an average of its checkpoints, or an imported model."""
    output: str
    """Folder to write, which must not exist or be empty."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""


def _export_hf(argv: Sequence[str]) -> None:
    from seq2seq_flax.pretrained import export_hf

    command = cli.parse(ExportCommand, argv, f"{PROG} export-hf", description=ExportCommand.__doc__ or "")
    export_hf(command.workdir, command.output, command.step)


if __name__ == "__main__":
    main()
