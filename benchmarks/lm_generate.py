"""Time generation of ours against transformers' ``generate`` with its cache: the same GPT-2, greedy, token for token.

    python benchmarks/lm_generate.py                       # GPT-2's 124M parameters, 256 tokens
    python benchmarks/lm_generate.py --layers 4 --width 128 --heads 4 --vocab 65 --prompt 16 \\
        --output benchmarks/results/lm_generate_char_small_cpu.json

The weights are drawn, and written once in Hugging Face's format, which transformers reads. Each program runs in a
process of its own; they take turns (see contest.py), and every time the tokens must be equal, which float32 gives but
for near ties: their number is told. On a CPU our command line lets malloc keep freed memory; so that the difference is
not malloc's alone, transformers runs twice, as it comes and with the same setting. Needs the extra [parity]. Writes
everything to benchmarks/results.
"""

import argparse
import os
import statistics
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import contest

from core_flax.memory import keep_freed_memory

if {"ours", "transformers_keeping_memory"} & set(
    sys.argv
):  # a worker's name: before jax, torch or numpy start a thread
    keep_freed_memory()

import numpy as np

SIZES = ("layers", "width", "heads", "vocab", "batch", "prompt")


def parse() -> argparse.Namespace:
    """The options, for this process and for those it starts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--batch", type=int, default=1, help="prompts side by side")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens that are added to each")
    parser.add_argument("--blocks", type=int, default=5, help="turns each takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/lm_generate_DEVICE.json")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(options: argparse.Namespace, folder: Path) -> None:
    """A GPT-2 with drawn weights, large enough that the most probable token is a clear one."""
    import jax

    from lm_flax.architectures import init_params, make_model
    from lm_flax.huggingface import save_pretrained
    from lm_flax.model import GPT2Config

    config = GPT2Config(
        vocab_size=options.vocab,
        num_layers=options.layers,
        width=options.width,
        num_heads=options.heads,
        mlp_width=4 * options.width,
    )
    params = jax.device_get(jax.jit(partial(init_params, make_model(config)))(jax.random.key(options.seed)))
    save_pretrained(folder, config, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params))


def make_prompts(options: argparse.Namespace, turn: int) -> np.ndarray:
    """Tokens drawn at random."""
    draw = np.random.default_rng([options.seed, turn])
    return draw.integers(0, options.vocab, (options.batch, options.prompt), np.int32)


class Ours:
    """What ``lm-flax generate`` runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        import jax

        from core_flax.hardware import compute_dtype
        from lm_flax.architectures import make_model
        from lm_flax.huggingface import load_pretrained

        self.options, pretrained = options, load_pretrained(options.model)
        self.model = make_model(pretrained.config, compute_dtype("auto"))
        self.params = jax.device_put(pretrained.params)
        self.facts = {
            "device": jax.devices()[0].device_kind,
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        }

    def take(self, turn: int) -> list[list[int]]:
        """The tokens that follow a turn's prompts."""
        from core_flax.decode import generate

        options = self.options
        cache = self.model.init_cache(options.batch, options.prompt + options.new_tokens)
        done = generate(self.model, self.params, cache, make_prompts(options, turn), length=options.new_tokens)
        return np.asarray(done.tokens_BL).tolist()


class Transformers:
    """``generate`` of transformers, greedy, with its cache."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch, self.options = torch, options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.model = transformers.GPT2LMHeadModel.from_pretrained(options.model, dtype=dtype).to(self.device).eval()
        self.facts = {
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def take(self, turn: int) -> list[list[int]]:
        """As Ours.take."""
        ids = self.torch.from_numpy(make_prompts(self.options, turn).astype(np.int64)).to(self.device)
        count = self.options.new_tokens
        with self.torch.no_grad():
            found = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
        return found[:, ids.shape[1] :].tolist()


CONTESTANTS = {"ours": Ours, "transformers": Transformers, "transformers_keeping_memory": Transformers}


def main() -> None:
    """Take turns, compare what is generated, print the table, write the file."""
    options = parse()
    if options.worker:
        return contest.serve(partial(CONTESTANTS[options.worker], options))
    load = contest.load()
    with tempfile.TemporaryDirectory() as folder:
        write_model(options, Path(folder))
        sys.argv += ["--model", folder]
        workers = {"ours": contest.Worker("ours")}
        on_cpu = workers["ours"].facts["device"] == "cpu"
        others = [name for name in CONTESTANTS if name == "transformers" or (on_cpu and name not in workers)]
        workers |= {name: contest.Worker(name) for name in others}
        try:
            for worker in workers.values():
                worker.take(0)  # ours compiles
            answers: dict[str, list] = {name: [] for name in workers}
            for turn in range(1, options.blocks + 1):
                for name in list(workers) if turn % 2 else list(workers)[::-1]:
                    answers[name].append(workers[name].take(turn))
        finally:
            for worker in workers.values():
                worker.close()
        del sys.argv[-2:]
    tokens = options.batch * options.new_tokens
    timings = {name: [answer["seconds"] for answer in each] for name, each in answers.items()}
    medians = {name: statistics.median(each) for name, each in timings.items()}
    rows = [
        (one == other)
        for ours, theirs in zip(answers["ours"], answers["transformers"], strict=True)
        for one, other in zip(ours["told"], theirs["told"], strict=True)
    ]
    print(f"GPT-2 of {options.layers} layers, {options.width} wide; {options.batch} x {options.new_tokens} tokens")
    print(f"{'':28}{'tokens/s':>10}{'ours, times as fast':>21}")
    for name, seconds in medians.items():
        print(f"{name:28}{tokens / seconds:10.1f}{seconds / medians['ours']:21.2f}")
    print(f"{sum(rows)} of {len(rows)} continuations are equal token for token")
    facts = {name: worker.facts for name, worker in workers.items()}
    report = {
        "what": "seconds to generate greedily, ours and transformers' in turn",
        **contest.origin(),
        "load_at_start": load,
        "seed": options.seed,
        "sizes": {name: getattr(options, name) for name in SIZES},
        "new_tokens": options.new_tokens,
        "median_seconds": medians,
        "tokens_per_second": {name: tokens / seconds for name, seconds in medians.items()},
        "ratio_of_tokens_per_second": {name: seconds / medians["ours"] for name, seconds in medians.items()},
        "equal_continuations": [sum(rows), len(rows)],
        "seconds_of_each_turn": timings,
        "facts": facts,
    }
    device = facts["ours"]["device"].lower().replace(" ", "_")
    contest.write(report, options.output or contest.RESULTS / f"lm_generate_{device}.json")


if __name__ == "__main__":
    main()
