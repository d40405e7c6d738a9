"""Every python block of README.md and of the documentation runs, page by page, top to bottom."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
]
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(text):
    """Each python block, moved down to its own line, so that errors name the page's line."""
    for found in FENCE.finditer(text):
        yield "\n" * text[: found.start(1)].count("\n") + found.group(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_of_the_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages may write files
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(page.read_text()):
            exec(compile(block, str(page), "exec"), namespace)


def test_there_are_blocks_to_run():
    assert sum(1 for page in PAGES for _ in blocks(page.read_text())) >= 25


def test_examples_of_bilevel_problems_are_short():
    page = ROOT / "docs" / "howto" / "bilevel.md"
    sizes = [len(block.strip().splitlines()) for block in blocks(page.read_text())]
    assert len(sizes) == 3
    assert max(sizes) <= 40
