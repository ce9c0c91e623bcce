"""``seq2seq-flax``: prepare parallel text, average checkpoints, exchange models with Hugging Face."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from core_flax import cli

PROG = "seq2seq-flax"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    from core_flax.logs import quiet_libraries

    quiet_libraries()
    cli.main(
        PROG,
        {
            "prepare": ("turn parallel text into the folder that training reads", _prepare),
            "average": ("average the last checkpoints of a run", _average),
            "import-hf": ("take in a Marian model of Hugging Face's", _import_hf),
            "export-hf": ("write a model for Hugging Face's transformers", _export_hf),
        },
        argv,
    )


def _prepare(argv: Sequence[str]) -> None:
    from seq2seq_flax.prepare import PrepareConfig, prepare

    config = cli.parse(PrepareConfig, argv, f"{PROG} prepare", description="Turns sentence pairs into token shards.")
    manifest = prepare(config)
    tags = f", asking for {', '.join(dict.fromkeys(str(d[1]) for d in manifest.directions))}" if manifest.tagged else ""
    print(f"{config.output}: vocabulary of {manifest.num_tokens:,} pieces{tags}")
    for split, info in manifest.splits.items():
        print(f"  {split}: {info.pairs:,} pairs")
        for side, tokens, lengths in (
            ("source", info.source_tokens, info.source),
            ("target", info.target_tokens, info.target),
        ):
            if info.pairs:
                print(
                    f"    {side}: {tokens:,} tokens; a sentence has {lengths.mean:.1f}, half at most {lengths.median}, "
                    f"90 % {lengths.percentile_90}, 99 % {lengths.percentile_99}, the longest {lengths.longest}"
                )
        for reason, count in info.dropped.items():
            print(f"    left out: {count:,} {reason}")


@dataclass(frozen=True)
class AverageCommand:
    """Averages the parameters of a run's last checkpoints; the result is a folder like a run's, to translate with."""

    workdir: str
    """Folder of a run."""
    last: int = 10
    """How many checkpoints, the newest of those that are there."""
    output: str | None = None
    """Folder to write, which must not exist or be empty; None: averaged-N under the workdir."""


def _average(argv: Sequence[str]) -> None:
    from core_flax.average import average

    command = cli.parse(AverageCommand, argv, f"{PROG} average", description=AverageCommand.__doc__ or "")
    output, steps = average(command.workdir, command.last, command.output)
    print(f"{output}: the mean of {len(steps)} checkpoints, steps {', '.join(map(str, steps))}")


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
