"""A text in which every token occurs once, so that a token says in which document, sentence and place it stands."""

import itertools
import random

import numpy as np

from core_flax.data import records
from core_flax.data.folder import describe_file, token_type
from core_flax.data.records import Manifest, SplitWriter, pack_passages
from core_flax.text.wordpiece import SPECIALS, WordPiece

NUM_DOCUMENTS = 12
RNG = random.Random(0)
SENTENCES = [[RNG.randint(1, 25) for _ in range(RNG.choice([2, 3, 40, 400]))] for _ in range(NUM_DOCUMENTS)]
NUM_TEXT = sum(map(sum, SENTENCES))
DOCUMENT = np.repeat(np.arange(NUM_DOCUMENTS), [sum(lengths) for lengths in SENTENCES])
SENTENCE = np.repeat(np.arange(sum(map(len, SENTENCES))), list(itertools.chain(*SENTENCES)))
NUM_SPECIAL = len(SPECIALS)
PAD, UNK, CLS, SEP, MASK = range(NUM_SPECIAL)
INSIDE = np.array([RNG.random() < 0.4 for _ in range(NUM_TEXT)])


def make_vocabulary():
    return WordPiece([*SPECIALS, *(f"{'##' * int(INSIDE[n])}w{n}" for n in range(NUM_TEXT))])


def make_folder(directory, vocabulary, valid_documents=3):
    counter = itertools.count(NUM_SPECIAL)
    documents = [[[next(counter) for _ in range(length)] for length in lengths] for lengths in SENTENCES]
    dtype = token_type(vocabulary.num_tokens)
    (directory / records.VOCAB).write_text("")
    files, splits = {records.VOCAB: describe_file(directory / records.VOCAB)}, {}
    for split, chosen in (("train", documents), ("valid", documents[:valid_documents])):
        writer = SplitWriter(directory, split, vocabulary.num_tokens)
        for sentences in chosen:
            writer.write(pack_passages(sentences, dtype), new_document=True)
        splits[split], new = writer.finish()
        files |= new
    Manifest(vocabulary.fingerprint, vocabulary.num_tokens, True, splits, files, 0, {}).save(directory)
