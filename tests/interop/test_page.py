"""The how-to page's blocks that need other libraries: fenced as ``py``, run here by section."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "use_it_in_your_loop.md"
FENCE = re.compile(r"^```py\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SECTIONS = {
    "Lightning": "lightning",
    "Hugging Face": "transformers",
    "accelerate": "accelerate",
    "PEFT": "peft",
}

pytestmark = [
    # Lightning's own use of torch's trees, and its advice on speed.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def blocks(title):
    """The section's blocks, each moved down to its own line, so that errors name it."""
    text = PAGE.read_text()
    start = text.index(f"\n## {title}\n") + 1
    end = text.find("\n## ", start)
    for found in FENCE.finditer(text, start, len(text) if end < 0 else end):
        yield "\n" * text[: found.start(1)].count("\n") + found.group(1)


@pytest.mark.parametrize("title", SECTIONS)
def test_section_runs(title, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its imports warn of is not ours
        pytest.importorskip(SECTIONS[title])
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    found = list(blocks(title))
    assert found
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in found:
            exec(compile(block, str(PAGE), "exec"), namespace)


def test_the_script_for_many_processes_runs_on_two(tmp_path):
    pytest.importorskip("torch.distributed.checkpoint")
    script = tmp_path / "train.py"
    script.write_text("\n".join(blocks("DDP and FSDP2")))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, script.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "checkpoint" / ".metadata").exists()


def test_every_block_belongs_to_a_section():
    titles = [*SECTIONS, "DDP and FSDP2"]
    assert len(FENCE.findall(PAGE.read_text())) == sum(len(list(blocks(t))) for t in titles)
