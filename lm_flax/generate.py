"""Text from a model: prompts in batches, token by token, within the model's context or sliding over it."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from core_flax import decode
from core_flax.config import check_range
from core_flax.data import corpora
from core_flax.hardware import compute_dtype
from core_flax.run import Run
from core_flax.sampling import GREEDY, Sampling
from core_flax.types import Array, Params, UserError
from lm_flax.architectures import context, make_model
from lm_flax.tokenizers import Tokenizer

DEFAULT_NEW_TOKENS = 256
_PARTIAL = "�"
"""What the beginning of a character's bytes is decoded to."""


@dataclass(frozen=True)
class Generator:
    """A model that continues texts.

    Attributes:
      model: the module.
      params: its parameters.
      tokenizer: the one it was trained with.
      context: tokens that it can take; None: any number.
      start_id: what stands before every text (``start_of``); None: nothing does.
    """

    model: Any
    params: Params
    tokenizer: Tokenizer
    context: int | None
    start_id: int | None

    @classmethod
    def of(cls, run: Run[Any], tokenizer: Tokenizer, step: int | None = None) -> "Generator":
        """From a checkpoint of a run, the newest if step is None."""
        model = make_model(run.config.model, compute_dtype(run.config.train.compute_dtype))
        return cls(model, run.params(step)[0], tokenizer, context(run.config.model), start_of(run, tokenizer))

    def encode(self, prompt: str, where: str = "the prompt") -> np.ndarray:
        """A prompt's tokens, after the one that stands before every text; at least one. Raises UserError if it cannot.

        A vocabulary without ends of documents has no such token: there a text begins as a line does, if there are
        lines, and else with token 0.
        """
        try:
            prompt.encode()
            ids = self.tokenizer.encode(prompt)
        except UnicodeEncodeError as error:
            raise UserError(f"{where} is not UTF-8") from error
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if self.start_id is None and len(ids):
            return ids
        return np.concatenate([self.first_token, ids])

    @property
    def first_token(self) -> np.ndarray:
        """What stands before a text, int32 [1]: the start, else a line's end, else token 0."""
        if self.start_id is not None:
            return np.array([self.start_id], np.int32)
        try:
            return self.tokenizer.encode("\n")[-1:]
        except UserError:
            return np.zeros(1, np.int32)


def start_of(run: Run[Any], tokenizer: Tokenizer) -> int | None:
    """The token that stands before every text: the one that ends documents, unless an imported model has another."""
    found = run.facts.get("start_id")
    return tokenizer.end_id if found is None else found


@dataclass(frozen=True)
class Continuation:
    """How texts are continued.

    Attributes:
      max_new_tokens: tokens to add at most.
      sampling: how they are chosen.
      seed: of what is drawn; what a row gets depends on its number, not on the others, as long as those whose context
        slides are of one length (``batches``).
      stop: texts at which a row ends; they are left out.
      long: what to do if prompt and new tokens exceed the context: "refuse", or "slide": forget the older half of the
        context whenever it is full.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()
    long: Literal["refuse", "slide"] = "refuse"

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "max_new_tokens", least=1, most=2**20)
        check_range("", self, "seed", least=0, below=2**31)


def check_prompts(generator: Generator, prompts: Sequence[np.ndarray], where: Sequence[str], how: Continuation) -> None:
    """Raises UserError if a prompt and what is to come exceed the context and that is to be refused."""
    for prompt, place in zip(prompts, where, strict=True):
        # The last token that is generated is not read again.
        needed = len(prompt) + how.max_new_tokens - 1
        if generator.context is not None and needed > generator.context and how.long == "refuse":
            raise UserError(
                f"{place}: {len(prompt)} tokens and --max-new-tokens {how.max_new_tokens} exceed the "
                f"{generator.context} tokens that the model can take; give less of either, or --long slide, which "
                "forgets the oldest"
            )


def continue_texts(
    generator: Generator, prompts: Sequence[np.ndarray], numbers: Sequence[int], how: Continuation, portion: int
) -> Iterator[list[np.ndarray]]:
    """Continues a batch of prompts, a portion of tokens at a time.

    Args:
      generator: the model.
      prompts: tokens of each, at least one (``Generator.encode``).
      numbers: each row's number among all rows, from which it draws.
      how: how.
      portion: tokens between results; the caller may stop at any.

    Yields:
      For each row its new tokens so far; the end of a document, which ends a row, left out. Where tokens are words
      that is also the end of a line, and ends nothing.
    """
    written = [np.zeros(0, np.int32) for _ in prompts]
    keys_B = decode.row_keys(how.seed, jnp.array(numbers))
    end_id = None if generator.tokenizer.is_words else generator.tokenizer.end_id
    stop = () if end_id is None else (end_id,)
    ended_B, num_rounds, allowed_V = np.zeros(len(prompts), bool), 0, _known(generator)
    while not ended_B.all() and (left := how.max_new_tokens - max(map(len, written))) > 0:
        read = [np.concatenate(both) for both in zip(prompts, written, strict=True)]
        # One that has ended must not have a say in when the others slide.
        read = [tokens[:1] if done else tokens for tokens, done in zip(read, ended_B, strict=True)]
        read, room = _fit(read, left, generator.context)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, num_rounds)
        now, before = _begin(generator, read, keys, ended_B, room), written
        for _ in range(0, room, portion):
            now = decode.proceed(
                generator.model,
                generator.params,
                now,
                portion,
                sampling=how.sampling,
                stop=stop,
                allowed_V=allowed_V,
            )
            new, ended_B = _new_tokens(now, stop, ended_B)
            written = [np.concatenate(both) for both in zip(before, new, strict=True)]
            yield written
            if ended_B.all():
                return
        num_rounds += 1


def _known(generator: Generator) -> Array | None:
    """Which tokens the tokenizer has, bool [V], where the model's tables are padded; None: all."""
    num_tokens, num_entries = generator.tokenizer.num_tokens, generator.model.config.vocab_size
    return jnp.arange(num_entries) < num_tokens if num_tokens < num_entries else None


def _fit(read: list[np.ndarray], left: int, most: int | None) -> tuple[list[np.ndarray], int]:
    """What is read, and how many tokens to add: of a row that leaves no room for more, the newer half is read.

    Say a context has 8. A row of 5 is read and has room for 4, the last of which is not read again. So a row of 8 has
    room for one; if more are to come, its newer 4 are read, with room for 5.
    """
    if most is None:
        return read, left
    full = most + (left == 1)  # the last token that is generated is not read again
    read = [tokens if len(tokens) < full else tokens[-max(1, most // 2) :] for tokens in read]
    return read, min(left, most - max(map(len, read)) + 1)


def _begin(
    generator: Generator, read: list[np.ndarray], keys_B: Any, ended_B: np.ndarray, room: int
) -> decode.Generation:
    longest = max(map(len, read))
    prompts_BL = np.stack([np.pad(tokens, (0, longest - len(tokens))) for tokens in read])
    num_prompt_B = np.array([len(tokens) for tokens in read], np.int32)
    limit_B = np.where(ended_B, 0, room).astype(np.int32)
    cache = generator.model.init_cache(len(read), longest + room - 1)
    return decode.begin(
        generator.model, generator.params, cache, prompts_BL, num_prompt_B, limit_B, keys_B, length=room
    )


def _new_tokens(
    now: decode.Generation, stop: tuple[int, ...], ended_B: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Each row's tokens without the one that ends it, and which rows have ended with one, now or before."""
    tokens_BL, num_B = np.asarray(now.tokens_BL), np.asarray(now.num_tokens_B)
    last_B = np.take_along_axis(tokens_BL, np.maximum(num_B - 1, 0)[:, None], axis=1)[:, 0]
    stopped_B = np.isin(last_B, stop) & (num_B > 0)
    rows = [row[:number] for row, number in zip(tokens_BL, num_B - stopped_B, strict=True)]
    return rows, ended_B | stopped_B


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """(the text before that of the stop texts in it which is complete first, whether there is one)."""
    found = [(place + len(each), place) for each in stop if (place := text.find(each)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


def stream_text(generator: Generator, prompt: np.ndarray, number: int, how: Continuation) -> Iterator[str]:
    """The continuation of one prompt in pieces, as soon as they are certain."""
    before, shown = generator.tokenizer.decode(prompt), ""
    longest_stop = max(map(len, how.stop), default=0)
    text, stopped = "", False
    for (new,) in continue_texts(generator, [prompt], [number], how, portion=1):
        text, stopped = cut_at(_behind(generator, prompt, new, before), how.stop)
        certain = text
        if not stopped:  # what may be the beginning of a character, and before it of a stop text, waits
            whole = text.rstrip(_PARTIAL)
            certain = whole[: max(len(shown), len(whole) - max(0, longest_stop - 1))]
        yield certain[len(shown) :]
        shown = certain
        if stopped:
            return
    yield text[len(shown) :]


def generate_texts(
    generator: Generator, prompts: Sequence[np.ndarray], numbers: Sequence[int], how: Continuation
) -> list[str]:
    """The continuations of a batch of prompts."""
    befores = [generator.tokenizer.decode(prompt) for prompt in prompts]
    texts = [""] * len(prompts)
    # Without stop texts there is nothing to look for on the way.
    portion = 16 if how.stop else how.max_new_tokens
    for rows in continue_texts(generator, prompts, numbers, how, portion):
        found = [
            cut_at(_behind(generator, prompt, new, before), how.stop)
            for prompt, new, before in zip(prompts, rows, befores, strict=True)
        ]
        texts = [text for text, _ in found]
        if all(stopped for _, stopped in found):
            break
    return texts


def _behind(generator: Generator, prompt: np.ndarray, new: np.ndarray, before: str) -> str:
    """The text of new tokens, where it joins that of the prompt: a word's space depends on what is before it."""
    return generator.tokenizer.decode(np.concatenate([prompt, new]))[len(before) :]


def batches(prompts: Sequence[np.ndarray], how: Continuation, most: int | None, batch_size: int) -> Iterator[range]:
    """The numbers of the prompts in batches, in each of which a prompt goes on as it would alone.

    Rows slide together, when the first is full: so those whose context slides go with others of their length alone.
    """

    def slides(prompt: np.ndarray) -> int:
        """The prompt's length if its context slides, else 0."""
        return len(prompt) if most is not None and len(prompt) + how.max_new_tokens - 1 > most else 0

    start = 0
    while start < len(prompts):
        stop = start + 1
        while stop < min(len(prompts), start + batch_size) and slides(prompts[stop]) == slides(prompts[start]):
            stop += 1
        yield range(start, stop)
        start = stop


def print_sample(run: Run[Any], tokenizer: Tokenizer, num_tokens: int) -> None:
    """A text of the run's own, from nothing."""
    generator = Generator.of(run, tokenizer)
    how = Continuation(num_tokens, Sampling(temperature=0.8), long="slide")
    (text,) = generate_texts(generator, [generator.encode("")], [0], how)
    print(f"a sample, temperature 0.8:\n{text}")


@dataclass(frozen=True)
class GenerateCommand:
    """Continues a prompt, or a file of them. One alone appears as it is generated."""

    workdir: str
    """Folder of a training run, or an imported model."""
    prompt: str = ""
    """Text to continue; none: begin a text of one's own."""
    prompts: str | None = None
    """File of texts to continue instead, one a line (also .gz; - is the standard input)."""
    max_new_tokens: int | None = None
    """Tokens to add at most; the end of a document ends a text before. None: 256 or, unless the context slides, what it
    has room for behind the longest prompt."""
    temperature: float = 1.0
    """What scores are divided by before they become probabilities; 0: no chance, always the most probable token."""
    top_k: int | None = None
    """Draw from this many most probable tokens; None: from all."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities sum to at least this; None: from all."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the probability of the most probable one; None: from all."""
    seed: int = 0
    """Seed of what is drawn."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stop: tuple[str, ...] = ()
    """Texts at which a continuation ends; they are left out."""
    long: Literal["refuse", "slide"] = "refuse"
    """If prompt and new tokens exceed what the model can take: refuse, or slide, forgetting the older half whenever the
    context is full."""
    batch_size: int = 16
    """Texts that are continued side by side."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "num_samples", "batch_size", least=1)
        if self.prompt and self.prompts is not None:
            raise UserError("give --prompt or --prompts, not both")
        if "" in self.stop:
            raise UserError("--stop is empty; give a text")

    @property
    def continuation(self) -> Continuation:
        """How texts are continued, if there is room for it. Raises UserError on a value out of range."""
        sampling = GREEDY
        if self.temperature != 0:
            sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        elif (self.top_k, self.top_p, self.min_p) != (None, None, None):
            raise UserError("--temperature 0 takes the most probable token; leave out --top-k, --top-p and --min-p")
        elif self.num_samples > 1:
            raise UserError("--temperature 0 has one continuation of a prompt; leave out --num-samples")
        most = DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return Continuation(most, sampling, self.seed, self.stop, self.long)


def run_command(command: GenerateCommand, run: Run[Any], tokenizer: Tokenizer) -> None:
    """``lm-flax generate``. Raises UserError as the functions above do."""
    how = command.continuation
    texts = [command.prompt] if command.prompts is None else _read_prompts(command.prompts)
    generator = Generator.of(run, tokenizer, command.step)
    named = [f"{command.prompts}:{line}" for line in range(1, len(texts) + 1)] if command.prompts else ["--prompt"]
    prompts = [generator.encode(text, where) for text, where in zip(texts, named, strict=True)]
    if command.max_new_tokens is None and generator.context is not None and how.long == "refuse":
        room = generator.context + 1 - max(map(len, prompts))
        how = dataclasses.replace(how, max_new_tokens=max(1, min(how.max_new_tokens, room)))
    check_prompts(generator, prompts, named, how)
    jobs = [(text, prompt) for text, prompt in zip(texts, prompts, strict=True) for _ in range(command.num_samples)]
    if len(jobs) == 1:
        print(texts[0], end="", flush=True)
        for piece in stream_text(generator, prompts[0], 0, how):
            print(piece, end="", flush=True)
        print()
        return
    for numbers in batches([prompt for _, prompt in jobs], how, generator.context, command.batch_size):
        new = generate_texts(generator, [jobs[number][1] for number in numbers], numbers, how)
        for number, following in zip(numbers, new, strict=True):
            prompt, sample = divmod(number, command.num_samples)
            print(f"--- prompt {prompt + 1}, sample {sample + 1}\n{jobs[number][0]}{following}", flush=True)


def _read_prompts(path: str) -> list[str]:
    lines = [text for _, text in corpora.read_lines(path)]
    if not lines:
        raise UserError(f"{path} holds no prompts; write one a line")
    return lines
