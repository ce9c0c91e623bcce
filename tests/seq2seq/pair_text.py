"""Made-up sentence pairs: files of them, and stores of given lengths."""

import numpy as np

from core_flax.data.folder import describe_file
from seq2seq_flax.pairs import TOKENIZER, Manifest, PairStore, PairWriter

NOUNS = "river farmer teacher garden window market letter winter engine village doctor bridge road song"


def sentences(num_pairs, seed=0, longest=9):
    """(sentence, its translation): every word spelled backwards, in reverse order."""
    draw = np.random.default_rng(seed)
    for number in range(num_pairs):
        words = [str(word) for word in draw.choice(NOUNS.split(), draw.integers(2, longest + 1))] + [str(number)]
        yield " ".join(words), " ".join(word[::-1] for word in reversed(words))


def write_files(folder, num_pairs=60, seed=0, name="train"):
    """Paths of the two files."""
    sides = zip(*sentences(num_pairs, seed), strict=True)
    paths = [folder / f"{name}.{side}" for side in ("en", "ne")]
    for path, lines in zip(paths, sides, strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [str(path) for path in paths]


def write_store(folder, lengths, num_tokens=50, seed=0):
    """A store of pairs with these (source, target) lengths, of random tokens; every sentence ends with token 2."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    writer = PairWriter(folder, "train", num_tokens, unk_id=0)
    for both in lengths:
        writer.write(*([*draw.integers(3, num_tokens, length - 1), 2] for length in both), 0)
    info, files = writer.finish()
    (folder / TOKENIZER).write_bytes(b"none")
    files[TOKENIZER] = describe_file(folder / TOKENIZER)
    Manifest("none", num_tokens, [[None, None]], False, {"train": info}, files, {}).save(folder)
    return PairStore(folder, "train")


def caption_lengths(num_pairs, seed=0):
    """Lengths like those of image captions in two languages: 15 tokens on average, a few of three times that."""
    draw = np.random.default_rng(seed)
    source = np.clip(np.exp(draw.normal(2.65, 0.33, num_pairs)), 4, 50)
    target = np.clip(source * draw.normal(1.06, 0.16, num_pairs), 4, 60)
    return np.stack([source, target], axis=1).astype(int)
