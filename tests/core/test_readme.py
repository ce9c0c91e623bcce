"""The README shows code that runs and names the files that exist."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_shows_the_example_that_is_tested():
    assert (ROOT / "docs/examples/reuse_encoder.py").read_text(encoding="utf-8").rstrip() in README


def test_names_every_file_of_the_packages():
    for package in ("core_flax", "bert_flax"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.name == "__init__.py" or path.name in README, f"{path} is not in the README's tree"
