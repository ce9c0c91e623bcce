"""``seq2seq-flax``: prepare parallel text."""

from collections.abc import Sequence

from core_flax import cli

PROG = "seq2seq-flax"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    from core_flax.logs import quiet_libraries

    quiet_libraries()
    cli.main(PROG, {"prepare": ("turn parallel text into the folder that training reads", _prepare)}, argv)


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


if __name__ == "__main__":
    main()
