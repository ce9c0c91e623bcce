"""char_small on tiny Shakespeare, beside nanoGPT's CPU recipe in torch: held-out loss and wall-clock, same machine.

    python benchmarks/char_quality.py --data input.txt --workdir runs/char_small

Both read the same prepared characters, split as nanoGPT splits them, and take 2000 steps of 12 x 64; ours trains three
times: as the preset has it with half the steps and with all, and with all by nanoGPT's optimizer, AdamW, whose steps
take less time than Muon's. One after the other, each runs in a process of its own, whose seconds are counted from its
start to its end: imports, compilation (of which nothing is kept from before), training and one evaluation at the end.
That is the mean over every held-out character, in rows of 64 one behind the other, for both.
Needs the extra [parity]. Writes docs/results/char_small.md, .json and .png.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import contest

DOCS = Path(__file__).parent.parent / "docs" / "results"
STEPS, ROWS, LENGTH = 2000, 12, 64
ADAMW = ["--optimizer.name=adamw", "--optimizer.learning-rate=4e-3", "--optimizer.weight-decay=0.1"]
"""By AdamW instead of Muon; beta2, as in nanoGPT's recipe, is the preset's."""


def parse() -> argparse.Namespace:
    """The options, for this process and the one it starts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="tiny Shakespeare, one text file")
    parser.add_argument("--workdir", type=Path, required=True, help="new folder for the prepared text and the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of both; the result is of the default")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the result")
    parser.add_argument("--worker", choices=("torch",), help=argparse.SUPPRESS)
    return parser.parse_args()


def train_torch(options: argparse.Namespace) -> None:
    """nanoGPT's recipe (README, "i only have a macbook"): prints a record every 100 steps, and the held-out loss."""
    import nanogpt
    import numpy as np
    import torch

    torch.manual_seed(options.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = options.workdir / "data"
    train, valid = (
        torch.from_numpy(np.fromfile(data / f"{split}.tokens", "<u2").astype(np.int64)) for split in ("train", "valid")
    )
    num_characters = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["num_tokens"]
    sizes = nanogpt.Sizes(num_characters, num_layers=4, num_heads=4, width=128, length=LENGTH, bias=False)
    model = nanogpt.GPT(sizes)
    optimizer = nanogpt.make_adamw(model, 1e-3, 0.99, 0.1)
    draw = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = nanogpt.cosine(step, 100, options.steps, 1e-3, 1e-4)
        starts = torch.randint(len(train) - LENGTH, (ROWS,), generator=draw)
        rows = train[starts[:, None] + torch.arange(LENGTH + 1)]
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            print(json.dumps({"step": step + 1, "loss": loss.item()}), flush=True)
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(valid) - 1, LENGTH * 256):
            part = valid[start : start + LENGTH * 256 + 1]
            whole = (len(part) - 1) // LENGTH * LENGTH
            for stop, length in ((whole, LENGTH), (len(part) - 1, (len(part) - 1) - whole)):
                begin = stop - (whole if length == LENGTH else length)
                if stop > begin:
                    read, told = (part[begin + move : stop + move].view(-1, length) for move in (0, 1))
                    total += model(read, told).item() * read.numel()
                    count += read.numel()
    parameters = sum(x.numel() for x in model.parameters())
    assert count == len(valid) - 1 and np.isfinite(total)
    print(json.dumps({"step": options.steps, "held_out/loss": total / count, "parameters": parameters}))


def run(command: Sequence[str]) -> tuple[str, float]:
    """What a process prints, and its seconds."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout, time.perf_counter() - began


def records(lines: Sequence[str]) -> list[dict]:
    """JSON objects, one a line."""
    return [json.loads(line) for line in lines if line.startswith("{")]


def main() -> None:
    """Train both, print the table, write the result."""
    options = parse()
    if options.worker:
        return train_torch(options)
    load, python = contest.load(), [sys.executable]
    ours, data = [*python, "-m", "lm_flax.cli"], options.workdir / "data"
    home = options.workdir / f"run_{options.steps}"
    runs = {
        f"lm-flax, {options.steps // 2} steps": (options.workdir / f"run_{options.steps // 2}", options.steps // 2, []),
        f"lm-flax, {options.steps} steps by AdamW": (options.workdir / "run_adamw", options.steps, ADAMW),
        f"lm-flax, {options.steps} steps": (home, options.steps, []),
    }
    there = [path for name in ("run_*", "compiled_*") for path in options.workdir.glob(name)]
    if there:
        sys.exit(f"{there[0]} is there already: what goes on takes less time than a whole run; give a new --workdir")
    run([*ours, "prepare", "--input", str(options.data), "--output", str(data), "--tokenizer", "char"])
    found, printed = {}, ""
    for name, (workdir, steps, others) in runs.items():
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(workdir.resolve().with_name(f"compiled_{workdir.name}"))
        train = [*ours, "train", "char_small", "--workdir", str(workdir), "--data", str(data), f"--seed={options.seed}"]
        settings = [f"--train.num-steps={steps}", "--train.eval-every-steps=0", "--checkpoint.every-steps=0", *others]
        printed, seconds = run([*train, *settings, "--sample-tokens=0", "--log.no-tensorboard"])
        lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = records(lines), seconds
    their_lines, their_seconds = run([*python, *sys.argv, "--worker", "torch"])
    found[f"nanoGPT in torch, {options.steps} steps"] = records(their_lines.splitlines()), their_seconds
    sample, _ = run(
        [*ours, "generate", "--workdir", str(home), "--max-new-tokens=300", "--temperature=0.8", "--long=slide"]
    )
    figures = {
        name: {"held_out_loss": curve[-1]["held_out/loss"], "seconds": seconds, "curve": curve}
        for name, (curve, seconds) in found.items()
    }
    report = {
        "what": "held-out loss (nats a character) and seconds of whole processes, tiny Shakespeare",
        **contest.origin(),
        "load_at_start": load,
        "seed": options.seed,
        "steps": options.steps,
        "tokens_per_step": ROWS * LENGTH,
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "torch")},
        "figures": figures,
        "sample": sample,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    contest.write(report, options.output / "char_small.json")
    draw(figures, options.output / "char_small.png")
    (options.output / "char_small.md").write_text(page(report, printed), encoding="utf-8")
    for name, each in figures.items():
        print(f"{name:30} held out {each['held_out_loss']:.4f}   {each['seconds']:6.1f} s")


def page(report: dict, printed: str) -> str:
    """The result as Markdown."""
    rows = "\n".join(
        f"| {name} | {each['held_out_loss']:.4f} | {each['seconds']:.1f} s |"
        for name, each in report["figures"].items()
    )
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    told = "\n".join(line for line in printed.splitlines() if not line.startswith(("step ", "checkpoints")))
    return f"""# char_small on tiny Shakespeare

![curve](char_small.png)

Steps of {ROWS} x {LENGTH} characters; nanoGPT's split. Seconds are those of a whole process:
imports, compilation, training, one evaluation over every held-out character.

| | held out, nats a character | wall-clock |
|---|---|---|
{rows}

nanoGPT's README tells 1.88 for this recipe. Its split has no third part: our learning rate and schedule, as its own,
were chosen with this held-out text in sight. The preset's optimizer is Muon; by AdamW: `{" ".join(ADAMW)}`.

```
$ {report["command"]}
{told}
```

A sample, temperature 0.8:

```
{report["sample"].strip()}
```

Commit {report["commit"][:7]}, seed {report["seed"]}, {versions}, {contest.machine(report["hardware"])},
{report["date"][:10]}. Records: [char_small.json](char_small.json).
"""


def draw(figures: dict, path: Path) -> None:
    """Training loss over steps, and the held-out loss at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, each) in enumerate(figures.items()):
        points = [(record["step"], record["loss"]) for record in each["curve"] if "loss" in record]
        axes.plot(*zip(*points, strict=True), color=f"C{number}", alpha=0.4)
        label = f"{name}: held out {each['held_out_loss']:.3f}, {each['seconds']:.0f} s"
        axes.plot(each["curve"][-1]["step"], each["held_out_loss"], "o", color=f"C{number}", label=label)
    axes.set(xlabel="step", ylabel="loss (nats a character)", ylim=(1.2, 3.0))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
