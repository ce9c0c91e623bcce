"""Compare our WordPiece ids with those of transformers' BertTokenizer on every line of text files.

    python benchmarks/wordpiece_parity.py --vocab bert-base-uncased-vocab.txt FILE [FILE ...] [--cased] [--output JSON]

Exits with status 1 at the first line that differs. Needs the extra [parity].
"""

import argparse
import gzip
import hashlib
import itertools
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from transformers import BertTokenizer

from core_flax.text.wordpiece import WordPiece


def main() -> None:
    """Compare, print, and write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--cased", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    ours = WordPiece.load(options.vocab, lowercase=not options.cased)
    theirs = BertTokenizer(options.vocab, do_lower_case=not options.cased)
    counts = {name: compare(name, ours, theirs) for name in options.files}
    report = {
        "what": "WordPiece ids equal to transformers' BertTokenizer on every line",
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("tokenizers", "transformers")}
        | {"python": platform.python_version()},
        "vocab_sha256": hashlib.sha256(Path(options.vocab).read_bytes()).hexdigest(),
        "files": counts,
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def compare(name: str, ours: WordPiece, theirs: BertTokenizer) -> dict[str, int | float]:
    """Lines and tokens compared, and the seconds that each tokenizer took. Ends the program at a difference."""
    with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file]
    times = [time.perf_counter()]
    # Two of theirs are the reference: special tokens in the text taken as such (its default) or as text.
    special = theirs(lines, add_special_tokens=False)["input_ids"]
    times.append(time.perf_counter())
    found = ours.encode(lines, specials=True)
    times.append(time.perf_counter())
    plain = theirs(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for what, expected, got in (("special", special, found), ("plain", plain, ours.encode(lines))):
        for number, (left, right) in enumerate(itertools.zip_longest(expected, got), 1):
            if left != right:
                sys.exit(f"{name}:{number} differs ({what}): {left} and {right}")
    return {
        "lines": len(lines),
        "tokens": sum(map(len, found)),
        "lines_that_differ": 0,
        "seconds_theirs": round(times[1] - times[0], 2),
        "seconds_ours": round(times[2] - times[1], 2),
    }


if __name__ == "__main__":
    main()
