"""gpt_speedrun with each of its pieces replaced in turn: which of them earn their place. (GELU is there by its result.)

    python benchmarks/speedrun_pieces.py --data wiki --workdir runs/speedrun

Text, sizes, rows and steps are those of speedrun_quality.py's run of gpt_speedrun. In every run but the first one piece
gives way to what GPT-2 or Llama has in its place.
--again repeats some with another seed, and gpt_speedrun itself. It can be started again. Writes
docs/results/gpt_speedrun_pieces.md and .json.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from core_flax.memory import keep_freed_memory

if "--as" in sys.argv:  # a run with a change, see changed: before jax starts a thread
    keep_freed_memory()

import contest
import flax.linen as nn
import jax
import jax.numpy as jnp
from speedrun_quality import LM_FLAX, RATE, SHARE, add_sizes, train

from lm_flax import speedrun

HERE, AS, BASE = Path(__file__).resolve(), "--as", "-squared-relu"


def without_qk_norm() -> None:
    """Queries and keys, which alone have a dimension of heads, as they come."""
    whole = speedrun.normalised
    speedrun.normalised = lambda x: x if x.ndim == 4 else whole(x)


def swiglu() -> None:
    """Llama's gated feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

    def gated(x: jax.Array) -> jax.Array:
        gate, value = jnp.split(x, 2, axis=-1)
        return jax.nn.silu(gate) * value

    speedrun.ACTIVATIONS["squared_relu"] = gated


def random_projections() -> None:
    """Those that are added to the hidden states begin as GPT-2's do."""
    speedrun._out_init = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class Variant:
    """What is tried.

    Attributes:
      about: for the table.
      rate: learning rate.
      settings: of lm-flax train.
      change: what it does to lm_flax.speedrun before that.
    """

    about: str
    rate: float = RATE
    settings: dict[str, str | float] = field(default_factory=dict)
    change: Callable[[], None] | None = None


def variants(width: int, steps: int) -> dict[str, Variant]:
    """All, by name; the first is gpt_speedrun itself."""
    adamw = {"optimizer.name": "adamw", "optimizer.weight-decay": 0.1}
    gated_width = 2 * round(4 * width * 2 / 3)  # two tables in, one out: as many weights as 4 x width has
    return {
        BASE: Variant("gpt_speedrun, with squared ReLU"),
        "-adamw-2e-3": Variant("AdamW for Muon, weight decay 0.1", 2e-3, adamw),
        "-adamw-4e-3": Variant("AdamW for Muon, weight decay 0.1", 4e-3, adamw),
        "-cosine": Variant(
            "cosine decay to a tenth for warmup-stable-decay",
            settings={"schedule.name": "cosine", "schedule.decay-steps": "None", "schedule.final-fraction": 0.1},
        ),
        "-decay": Variant("decay over the last fifth rather than half", settings={"schedule.decay-steps": steps // 5}),
        "-no-cap": Variant("no soft cap (a cap of a million)", settings={"model.soft-cap": 1e6}),
        "-no-qk-norm": Variant("no QK-norm", change=without_qk_norm),
        "-gelu": Variant("GELU for squared ReLU", settings={"model.activation": "gelu"}),
        "-swiglu": Variant(
            "SwiGLU of as many weights for squared ReLU", settings={"model.mlp-width": gated_width}, change=swiglu
        ),
        "-random": Variant("projections begin as GPT-2's, not at zero", change=random_projections),
    }


def main() -> None:
    """Train all, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_sizes(parser)
    parser.add_argument("--again", nargs="*", default=[], help="pieces to try with the seed after, such as gelu")
    options = parser.parse_args()
    steps, runs = round(SHARE * options.steps), []
    tried = variants(options.width, steps)
    again = [BASE, *(f"-{name}" for name in options.again)] if options.again else []
    if unknown := [name for name in again if name not in tried]:
        parser.error(f"--again {unknown[0].removeprefix('-')}: the pieces are {', '.join(name[1:] for name in tried)}")
    for number, name in [*((0, name) for name in tried), *((1, name) for name in again)]:
        each, seed = tried[name], options.seed + number
        program = [str(HERE), AS, name] if each.change else LM_FLAX
        settings = {"model.activation": "squared_relu"} | each.settings | ({"seed": seed} if number else {})
        run = train(options, "gpt_speedrun", each.rate, steps, program, name + "-again" * number, **settings)
        del run["parameters"]  # counted without the change
        runs.append({"about": each.about, "seed": seed, **run})
        print(f"  held-out loss {run['held_out_loss']:.4f}", flush=True)
    report = {"what": "held-out loss, nats a token", **contest.origin(), "runs": runs}
    contest.write(report, options.output / "gpt_speedrun_pieces.json")
    whole = {run["seed"]: run["held_out_loss"] for run in reversed(runs) if run["about"] == tried[BASE].about}
    rows = [
        f"| {run['about']} | {run['learning_rate']:g} | {run['seed']} | {run['held_out_loss']:.4f} | "
        f"{run['held_out_loss'] - whole[run['seed']]:+.4f} |"
        for run in runs
    ]
    head = ["| run | learning rate | seed | held-out loss, nats a token | more than gpt_speedrun |"]
    table = "\n".join([*head, "|---|---|---|---|---|", *rows])
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    text = (
        f"# gpt_speedrun, a piece replaced at a time\n\n{options.layers} layers, {options.width} wide, rows of "
        f"{options.length} tokens, {runs[0]['tokens']:,} tokens in {steps} steps: small differences are "
        f"chance.\n\n{table}\n\nLosses are those at the end of each run, over all of the held-out "
        f"text.\n\n`{report['command']}`, commit {report['commit'][:7]}, {versions}, "
        f"{contest.machine(report['hardware'])}, {report['date'][:10]}. Curves and settings: "
        "[gpt_speedrun_pieces.json](gpt_speedrun_pieces.json).\n"
    )
    (options.output / "gpt_speedrun_pieces.md").write_text(text, encoding="utf-8")
    print(table)


def changed(name: str) -> None:
    """``lm-flax`` with a variant's change: what this program is when it starts itself with --as NAME."""
    change = variants(2, 1)[name].change
    assert change is not None, name
    change()
    from lm_flax import cli

    cli.main(sys.argv[2:])


if __name__ == "__main__":
    changed(sys.argv.pop(2)) if sys.argv[1:2] == [AS] else main()
