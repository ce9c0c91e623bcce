"""The language modelling task: packed is alone, a window slides as it says, what is generated and scored is right."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_tasks import in_a_hurry
from tiny_models import CONFIGS, V, model_of, random_params, tokens

from core_flax.config import MeshConfig, TrainConfig
from core_flax.evaluate import make_evaluate
from core_flax.sampling import GREEDY, Sampling
from core_flax.sharding import make_mesh
from core_flax.types import UserError
from lm_flax import generate
from lm_flax.batches import Rows
from lm_flax.config import ConvRun, GPT2Run, InputsConfig, LlamaRun, LossConfig, check_rows
from lm_flax.convolution import ConvConfig
from lm_flax.figures import unigram_loss
from lm_flax.generate import (
    Continuation,
    Generator,
    batches,
    check_prompts,
    continue_texts,
    cut_at,
    generate_texts,
    stream_text,
)
from lm_flax.score import log_probs
from lm_flax.task import loss_weights, make_evaluator, token_sums
from lm_flax.tokenizers import Characters, train_byte_pairs

END = V - 1
ROWS = {"inputs": InputsConfig(length=16), "train": TrainConfig(batch_size=4)}
GPT2 = GPT2Run(**ROWS, model=dataclasses.replace(CONFIGS["gpt2"], num_layers=1))
CONFIG_OF = {
    "gpt2": GPT2,
    "llama": LlamaRun(**ROWS, model=dataclasses.replace(CONFIGS["llama_grouped_tied"], num_layers=1)),
    "conv": ConvRun(**ROWS, model=ConvConfig(vocab_size=V, num_layers=2, embedding_width=8, width=8)),
}
LETTERS = "".join(chr(200 + number) for number in range(V))
CHARACTERS = Characters(LETTERS[:-1], has_end=True)


@pytest.fixture(scope="module", autouse=True)
def hurry():
    with in_a_hurry():
        yield


def text(*lengths, seed=0):
    """Documents of these lengths, the last token of each their end."""
    made = tokens(sum(lengths), seed=seed) % (V - 1)
    ends = np.cumsum(lengths)
    made[ends - 1] = END
    info = SimpleNamespace(tokens=len(made), bytes=3 * len(made))
    return SimpleNamespace(tokens_T=made, ends=ends, info=info, counts_V=np.bincount(made, minlength=V))


@functools.cache
def compiled_logits(config):
    """(params, row of 16 tokens) -> logits, by nothing but a forward pass."""
    model = model_of(config)

    def logits(params, ids_L):
        x_BLD = model.apply({"params": params}, ids_L[None])
        return model.apply({"params": params}, x_BLD, method="logits")[0]

    return jax.jit(logits)


def plain_logits(config, params, read):
    """Logits after each of up to 16 tokens that are read; nothing depends on what is behind them."""
    padded = np.zeros(16, np.int32)
    padded[: len(read)] = read
    return np.asarray(compiled_logits(config)(params, padded), np.float64)[: len(read)]


def plain_nll(config, params, ids, before=END):
    """-log p of each of some tokens after the one before, with nothing else in the row."""
    logits = plain_logits(config.model, params, [before, *ids[:-1]])
    total = np.log(np.exp(logits).sum(-1))
    return total - np.take_along_axis(logits, np.asarray(ids, np.int64)[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("kind", CONFIG_OF)
def test_packed_documents_are_those_alone(kind):
    """Loss and gradients of one row with four documents are the sums of those of each by itself."""
    config, store = CONFIG_OF[kind], text(5, 3, 1, 7)
    params, model = random_params(config.model), model_of(config.model)

    def loss(params, batch):
        return token_sums(config, model, params, batch, None)[0].loss

    together = Rows(store.tokens_T, store.ends, END, config.inputs).at(np.array([0]))
    value, grads = jax.jit(jax.value_and_grad(loss))(params, together)
    starts = [0, *store.ends[:-1]]
    apart = [store.tokens_T[start:end] for start, end in zip(starts, store.ends, strict=True)]
    np.testing.assert_allclose(value, sum(plain_nll(config, params, ids).sum() for ids in apart), rtol=1e-5)
    alone = [Rows(ids, np.array([len(ids)]), END, config.inputs).at(np.array([0])) for ids in apart]
    batch = {name: np.concatenate([each[name] for each in alone]) for name in alone[0]}
    value_alone, grads_alone = jax.jit(jax.value_and_grad(loss))(params, batch)
    np.testing.assert_allclose(value_alone, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grads, grads_alone)
    assert loss_weights(batch)["loss"] == loss_weights(together)["loss"] == 16
    other = Rows(store.tokens_T, store.ends, END, InputsConfig(16, packing="stream")).at(np.array([0]))
    assert abs(loss(params, other) - value) > 0.1


def test_z_loss_is_trained_on_and_not_told():
    params, model = random_params(GPT2.model), model_of(GPT2.model)
    batch = Rows(text(16).tokens_T, np.array([16]), END, GPT2.inputs).at(np.array([0]))
    z = dataclasses.replace(GPT2, loss=LossConfig(z_weight=0.1, num_chunks=4))
    plain, with_z = (token_sums(config, model, params, batch, None)[0] for config in (GPT2, z))
    np.testing.assert_allclose(with_z.cross_entropy, plain.loss, rtol=1e-6)
    assert with_z.loss > plain.loss + 0.1


@pytest.mark.parametrize("stride", [None, 5])
def test_evaluation_counts_every_token_once(stride):
    store = text(50, 7, 20)
    params, model = random_params(GPT2.model), model_of(GPT2.model)
    evaluator = make_evaluator(GPT2, model, store, END, stride)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    told = make_evaluate(evaluator, mesh)(params)
    expected, step = [], stride or 16
    for place in range(77):
        row = max(0, -(-(place - 15) // step)) * step  # the first row that has it
        document = max([0, *store.ends[store.ends <= place]])
        ids = store.tokens_T[max(row, document) : place + 1]
        # The token before a part of a document is the one that the part begins with.
        before = END if max(row, document) == document else store.tokens_T[row - 1]
        expected.append(plain_nll(GPT2, params, ids, before)[-1])
    np.testing.assert_allclose(told["loss"], np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(told["bits_per_byte"], np.sum(expected) / np.log(2) / store.info.bytes, rtol=1e-5)


def test_the_unigram_model():
    train, held_out = text(30, seed=1), text(20, seed=2)
    shares = (np.bincount(train.tokens_T, minlength=V) + 1) / (30 + V)
    expected = -np.log(shares[held_out.tokens_T]).mean()
    np.testing.assert_allclose(unigram_loss(train, held_out), expected)


# Generation and scoring


@functools.cache
def generator(kind="gpt2"):
    config = CONFIG_OF[kind].model
    return Generator(model_of(config), random_params(config), CHARACTERS, getattr(config, "max_length", None), END)


def naive(made, prompt, count):
    """Greedy continuation without a cache, the newer half of the context whenever it is full."""
    ids, read = list(prompt), list(prompt)
    for _ in range(count):
        if made.context is not None and len(read) > made.context:
            read = read[-1 - made.context // 2 :]
        token = int(plain_logits(made.model.config, made.params, read)[-1].argmax())
        if token == END:
            break
        ids.append(token)
        read.append(token)
    return ids[len(prompt) :]


PROMPTS = [np.array([END, 3, 4], np.int32), np.array([END], np.int32), np.array([END, 9, 8, 7, 6, 5], np.int32)]


@pytest.mark.parametrize("kind", ["gpt2", "conv"])
def test_a_batch_of_prompts_goes_on_as_each_alone(kind):
    made, how = generator(kind), Continuation(8, GREEDY)
    *_, rows = continue_texts(made, PROMPTS, range(3), how, portion=3)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.tolist() == naive(made, prompt, 8)
    texts = generate_texts(made, PROMPTS, range(3), how)
    assert texts == [CHARACTERS.decode(row) for row in rows]
    assert "".join(stream_text(made, PROMPTS[0], 0, how)) == texts[0]


def test_what_is_drawn_is_a_rows_own():
    made, how, prompt = generator(), Continuation(8, Sampling(1.5, top_k=20), seed=3), PROMPTS[2]
    together = generate_texts(made, [prompt] * 3, range(3), how)
    assert generate_texts(made, [prompt], [2], how) == together[2:]
    assert len(set(together)) == 3
    assert generate_texts(made, [prompt] * 3, range(3), dataclasses.replace(how, seed=4)) != together


def test_a_window_slides_over_what_is_too_long():
    made = dataclasses.replace(generator(), tokenizer=Characters(LETTERS, has_end=False), start_id=None)
    how = Continuation(40, GREEDY, long="slide")
    long = np.arange(30, dtype=np.int32)
    *_, (row,) = continue_texts(made, [long], [0], how, portion=40)
    assert len(row) == 40
    read = list(long[-8:])
    for place, token in enumerate(row.tolist()):
        assert token == plain_logits(made.model.config, made.params, read)[-1].argmax(), place
        read.append(token)
        if len(read) > 16:  # the seventeenth is not read any more: it begins the next round
            read = read[-8:]
    where = [f"file:{number}" for number in range(len(PROMPTS))]
    longest = where[np.argmax([len(prompt) for prompt in PROMPTS])]
    with pytest.raises(UserError, match=f"{longest}: 6 tokens and --max-new-tokens 12 exceed the 16 tokens"):
        check_prompts(made, PROMPTS, where, Continuation(12))
    check_prompts(made, PROMPTS, where, Continuation(11))
    check_prompts(generator("conv"), PROMPTS, where, Continuation(1000))


def test_a_batch_whose_context_slides_goes_on_as_each_alone():
    made, how = generator(), Continuation(24, GREEDY, long="slide")
    prompts = [*PROMPTS, *(np.array([END, *rest], np.int32) for rest in ([2, 5, 1, 7, 9], [6, 6, 6, 6, 6]))]
    parts = list(batches(prompts, how, made.context, batch_size=3))
    assert [number for part in parts for number in part] == list(range(len(prompts)))
    assert max(map(len, parts)) == 3 and all(len({len(prompts[number]) for number in part}) == 1 for part in parts)
    for part in parts:
        *_, rows = continue_texts(made, [prompts[number] for number in part], part, how, portion=24)
        for number, row in zip(part, rows, strict=True):
            *_, (alone,) = continue_texts(made, [prompts[number]], [number], how, portion=24)
            assert row.tolist() == alone.tolist(), number
    # What does not slide goes together, whatever its length.
    assert list(batches(PROMPTS, Continuation(8), made.context, 16)) == [range(3)]
    assert list(batches(PROMPTS, how, None, 2)) == [range(2), range(2, 3)]


def test_a_row_that_has_ended_does_not_move_the_others():
    """Ended rows of every length, while others slide twice."""
    made, prompt, how = generator(), np.array([1], np.int32), Continuation(40, seed=5, long="slide")
    (*_, together) = continue_texts(made, [prompt] * 40, range(40), how, portion=40)
    lengths = {len(row) for row in together}
    assert len(lengths & set(range(8, 16))) > 1 and max(lengths) > 24
    for number in range(8):
        *_, (alone,) = continue_texts(made, [prompt], [number], how, portion=40)
        assert together[number].tolist() == alone.tolist(), number


def test_entries_beyond_the_vocabulary_are_never_drawn():
    """A table may be padded; the tokenizer knows nothing of what is behind its tokens."""
    whole, how = generator(), Continuation(15, Sampling(50.0))
    few = Characters(LETTERS[:9], has_end=False)
    made = dataclasses.replace(whole, tokenizer=few, start_id=None)
    *_, (row,) = continue_texts(made, [np.array([3], np.int32)], [0], how, portion=15)
    assert len(row) == 15 and row.max() < 9


def test_characters_that_are_split_over_tokens_appear_whole(monkeypatch):
    """Bytes as tokens: nothing of a character is shown before all of it, nor of a stop text that begins."""
    made = dataclasses.replace(generator(), tokenizer=train_byte_pairs(["a"], 257))
    text = "süß 😀, 東京!"
    ids = made.tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    monkeypatch.setattr(generate, "continue_texts", lambda *_, **__: ([ids[: n + 1]] for n in range(len(ids))))
    pieces = list(stream_text(made, np.zeros(0, np.int32), 0, Continuation()))
    assert [piece for piece in pieces if piece] == list(text)
    pieces = list(stream_text(made, np.zeros(0, np.int32), 0, Continuation(stop=("東京",))))
    assert "".join(pieces) == "süß 😀, " and max(map(len, pieces)) == 1


def test_stop_texts():
    assert cut_at("abcdef", ("ef", "cd")) == ("ab", True)
    # One that is complete before a longer one around it, as it would be token by token.
    assert cut_at("xabc", ("abc", "b")) == ("xa", True)
    made, free = generator(), Continuation(8, GREEDY)
    (whole,) = generate_texts(made, PROMPTS[:1], [0], free)
    stop = whole[3:5]
    wanted = whole[: whole.find(stop)]
    how = dataclasses.replace(free, stop=(stop,))
    assert generate_texts(made, PROMPTS[:1], [0], how) == [wanted]
    assert "".join(stream_text(made, PROMPTS[0], 0, how)) == wanted


@pytest.mark.parametrize("kind", ["gpt2", "conv"])
def test_scores_are_log_probabilities(kind):
    made, config = generator(kind), CONFIG_OF[kind]
    texts = [tokens(size, seed=size) % (V - 1) for size in (1, 5, 16, 11)] + [np.zeros(0, np.int32)]
    wanted = [-plain_nll(config, made.params, ids).sum() if len(ids) else 0.0 for ids in texts]
    np.testing.assert_allclose(log_probs(made, texts, batch_size=3), wanted, rtol=1e-5)


def test_long_texts_are_scored_from_half_a_context():
    made, ids = generator(), tokens(37, seed=5) % (V - 1)
    read, total = [END, *ids[:-1]], 0.0
    for place in range(37):
        start = 0 if place < 16 else (place - 16) // 8 * 8 + 8
        total -= plain_nll(GPT2, made.params, ids[start : place + 1], read[start])[-1]
    np.testing.assert_allclose(log_probs(made, [ids]), [total], rtol=1e-5)


def test_the_end_of_a_line_ends_no_text_of_words():
    """Which is also what ends a document there."""

    class Lines(Characters):
        is_words = True

    made, prompts, how = generator(), [np.array([1], np.int32)] * 8, Continuation(60, long="slide")
    lines = dataclasses.replace(made, tokenizer=Lines(LETTERS[:-1], has_end=True))
    (*_, ended), (*_, whole) = (list(continue_texts(each, prompts, range(8), how, 60)) for each in (made, lines))
    assert min(map(len, ended)) < 60 and {len(row) for row in whole} == {60}
    for row, longer in zip(ended, whole, strict=True):  # until the context slides, which rows do together
        np.testing.assert_array_equal(row[:15], longer[: len(row)][:15])


def test_a_context_of_one_token_scores_every_token():
    made, ids = dataclasses.replace(generator(), context=1), tokens(5, seed=5) % (V - 1)
    total = -sum(plain_nll(GPT2, made.params, ids[at : at + 1], [END, *ids][at])[0] for at in range(5))
    np.testing.assert_allclose(log_probs(made, [ids]), [total], rtol=1e-5)


@pytest.mark.parametrize("before", [None, END])
def test_a_held_out_text_of_one_token(before):
    """Where nothing stands before it, it cannot be predicted."""
    if before is None:
        with pytest.raises(UserError, match="the held-out text is one token"):
            make_evaluator(GPT2, model_of(GPT2.model), text(1), before)
    else:
        assert sum(batch["weights"].sum() for batch in make_evaluator(GPT2, None, text(1), before).batches()) == 1


def test_rows_that_the_model_cannot_read_are_refused():
    with pytest.raises(UserError, match=r"--inputs\.length 17 exceeds --model\.max-length 16"):
        check_rows(dataclasses.replace(GPT2, inputs=InputsConfig(length=17)))
    with pytest.raises(UserError, match="keeps no state"):
        check_rows(dataclasses.replace(GPT2, inputs=InputsConfig(length=8, order="streams")))
    check_rows(dataclasses.replace(CONFIG_OF["conv"], inputs=InputsConfig(length=100)))
