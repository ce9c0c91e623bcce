"""The README shows code that runs and names the files that exist; no page leads to one that does not."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("core_flax/", "bert_flax/", "seq2seq_flax/", "lm_flax/", "launch/")


def test_shows_the_example_that_is_tested():
    assert (ROOT / "docs/examples/reuse_encoder.py").read_text(encoding="utf-8").rstrip() in README


def listed() -> set[str]:
    """The files in the tree, each under the folder whose heading it stands below."""
    tree = re.search(r"## Where things are\n+```\n(.*?)```", README, re.DOTALL)
    assert tree
    found, package, folder = set(), "", ""
    for line in tree[1].splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        if indent == 0:
            package = folder = name
        elif indent == 2:
            folder = package + name if name.endswith("/") else package
        # Deeper: a file of the folder above, or the line before goes on.
        if package in PACKAGES:
            found |= {folder + file for file in re.findall(r"\w+\.py\b", line)}
    return found


def test_links_lead_to_files():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    links = [
        (page.relative_to(ROOT), link)
        for page in pages
        for link in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert len(links) > 20
    assert [(page, link) for page, link in links if not (ROOT / page.parent / link).exists()] == []


def test_its_tree_is_that_of_the_packages():
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed() == there
