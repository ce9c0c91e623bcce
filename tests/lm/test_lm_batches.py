"""Rows of a text against a reading of it in plain Python: every token once, documents apart, the same on any host."""

import numpy as np
import pytest

from core_flax.types import UserError
from lm_flax.batches import Rows, TextBatches, in_order
from lm_flax.config import InputsConfig

LENGTH, END = 8, 99
DOCUMENTS = [[1, 2, 3, END], [4, END], [*range(10, 31), END], [5, 6, 7, 8, 9, END], [END], [40, 41, END]]
TOKENS = np.concatenate(DOCUMENTS).astype(np.uint16)
ENDS = np.cumsum([len(document) for document in DOCUMENTS])


def rows(packing="documents", before=END, tokens=TOKENS, ends=ENDS, length=LENGTH):
    return Rows(tokens, ends, before, InputsConfig(length=length, packing=packing))


def expected(start):
    """One row: (read, predicted, document, place in the document's part), as lists."""
    flat = [(token, number) for number, document in enumerate(DOCUMENTS) for token in document]
    read, predicted, places = [], [], []
    for place in range(start, min(start + LENGTH, len(flat))):
        token, document = flat[place]
        read.append(flat[place - 1][0] if place else END)
        predicted.append(token)
        new = not places or places[-1][0] != document
        places.append((document, 0 if new else places[-1][1] + 1))
    return read, predicted, places


def test_rows_are_the_text():
    for start in range(len(TOKENS)):
        row = {name: array[0] for name, array in rows().at(np.array([start])).items()}
        read, predicted, places = expected(start)
        size = len(read)
        assert row["tokens"][:size].tolist() == read and row["labels"][:size].tolist() == predicted
        assert row["weights"].tolist() == [1.0] * size + [0.0] * (LENGTH - size)
        assert row["positions"][:size].tolist() == [place for _, place in places]
        documents = [document for document, _ in places]
        assert row["sequences"][:size].tolist() == [1 + document - documents[0] for document in documents]
        assert not row["sequences"][size:].any() and not row["tokens"][size:].any()


def test_a_stream_tells_no_documents_apart():
    stream, packed = (rows(packing).at(np.arange(20)) for packing in ("stream", "documents"))
    assert set(stream) == {"tokens", "labels", "weights"}
    for name in stream:
        np.testing.assert_array_equal(stream[name], packed[name])
    assert set(rows(ends=ENDS[-1:]).at(np.arange(3))) == set(stream)  # one document


@pytest.mark.parametrize("before", [END, None])
@pytest.mark.parametrize("stride", [None, 1, 3, LENGTH])
def test_in_order_every_token_counts_once(before, stride):
    counts, context = np.zeros(len(TOKENS)), np.zeros(len(TOKENS))
    first, step = int(before is None), stride or LENGTH
    for number, batch in enumerate(in_order(rows(before=before), 3, stride=stride)):
        for row in range(3):
            for place in np.flatnonzero(batch["weights"][row]):
                at = first + (number * 3 + row) * step + place
                counts[at] += batch["weights"][row, place]
                context[at] = place
                assert batch["labels"][row, place] == TOKENS[at]
                assert batch["tokens"][row, place] == (TOKENS[at - 1] if at else before)
    assert counts.tolist() == [1 - first] + [1] * (len(TOKENS) - 1)
    # Beyond the first row, at least so many tokens of the row stand before each.
    assert context[LENGTH + first :].min() >= LENGTH - step


def test_before_every_document_stands_the_same():
    """Where an imported model begins texts with another token than the one that ends them."""
    ids, ends = np.array([4, 5, 9, 6, 9, 7, 8, 9]), np.array([3, 5, 8])
    batch = Rows(ids, ends, 1, InputsConfig(length=3)).at(np.arange(3) * 3)
    assert batch["tokens"].tolist() == [[1, 4, 5], [1, 6, 1], [7, 8, 0]]
    assert batch["labels"].tolist() == [[4, 5, 9], [6, 9, 7], [8, 9, 0]]
    stream = Rows(ids, ends, 1, InputsConfig(length=3, packing="stream")).at(np.arange(3) * 3)
    assert stream["tokens"].tolist() == [[1, 4, 5], [9, 6, 9], [7, 8, 0]]


def test_in_order_stops_where_it_is_told():
    assert len(list(in_order(rows(), 2, max_batches=2))) == 2
    assert len(list(in_order(rows(length=64), 2))) == 1


LONG = np.arange(1003, dtype=np.uint16)


def batches(order="shuffled", seed=0, batch_size=6):
    return TextBatches(rows(tokens=LONG, ends=np.array([1003])), order, seed, batch_size)


@pytest.mark.parametrize("order", ["shuffled", "random"])
def test_a_batch_is_a_function_of_seed_and_step(order):
    whole = [batches(order).make_batch(step, range(6)) for step in range(50)]
    again = batches(order)
    for step in (49, 0, 21):
        parts = [again.make_batch(step, range(start, start + 2)) for start in (0, 2, 4)]
        for name, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    assert all((batch["weights"] == 1).all() for batch in whole), "every position of a row is real"
    other = batches(order, seed=1)
    assert any((other.make_batch(step, range(6))["tokens"] != whole[step]["tokens"]).any() for step in range(3))


def test_an_epoch_has_every_token_once_but_for_the_ends():
    made, seen = batches(batch_size=1), []
    for epoch in range(4):
        starts = np.concatenate([made.starts(epoch * made.num_rows + row, range(1)) for row in range(made.num_rows)])
        assert sorted(np.diff(np.sort(starts))) == [LENGTH] * (made.num_rows - 1)
        assert starts.min() >= 0 and starts.max() + LENGTH <= 1003 and len(starts) * LENGTH > 1003 - 2 * LENGTH
        seen.append(starts)
    assert len({starts.min() for starts in seen}) > 1, "epochs are cut at other places"
    assert any((one != other).any() for one, other in zip(seen[:-1] - seen[0].min(), seen[1:], strict=True))


def test_random_rows_begin_anywhere():
    """As torch.randint(len(data) - block_size): the first and the last possible one, evenly in between."""
    starts = np.concatenate([batches("random").starts(step, range(6)) for step in range(4000)])
    assert (starts.min(), starts.max()) == (0, 1003 - LENGTH)
    counts = np.bincount(starts // 100)[:9]
    assert counts.max() / counts.min() < 1.2


def test_a_text_shorter_than_a_row_is_refused():
    TextBatches(rows(tokens=LONG[:LENGTH], ends=np.array([LENGTH])), "shuffled", 0, 2).make_batch(5, range(2))
    for order in ("shuffled", "random"):
        with pytest.raises(UserError, match="the text has 7 tokens to predict, a row 8"):
            TextBatches(rows(tokens=LONG[:7], ends=np.array([7])), order, 0, 2)
