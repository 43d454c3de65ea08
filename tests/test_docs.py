"""What the documents say: tables come from committed results, examples run, notebooks run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import bicache
import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_readme_table_is_the_committed_measurement() -> None:
    script = ROOT / "bench" / "tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for document, tables in {"README.md": 5, "docs/measurements.md": 19}.items():
        assert (ROOT / document).read_text().count(": bench/tables.py -->") == tables


def test_there_is_a_notebook() -> None:
    assert list((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md"])
def test_python_examples_run(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {"questions": ["which of them are red ?", "which are red or blue ?"]}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    assert isinstance(names["llm"], bicache.LLM)
    if document == "README.md":
        assert capsys.readouterr().out.startswith("red-fox red-hare\n")


def test_tutorial_says_what_the_model_answers() -> None:
    llm = bicache.LLM("records")
    document = (
        "red fox, blue owl, green bear, red hare, black crow, white swan, gold deer, pink toad"
    )
    out = llm.generate("which are red or blue ?", prefix=document)[0]
    assert (
        f"out.text                              # {out.text!r}"
        in (ROOT / "docs" / "tutorial.md").read_text()
    )
    assert out.finish_reason == "eos"
    stopped = llm.generate("which are red or blue ?", prefix=document, stop=["blue", "white"])[0]
    gap = f" {bicache.MASK_TEXT}" * 3
    filled = llm.generate("which are red or blue ?", prefix=document, response=f"red-fox{gap}")[0]
    text = (ROOT / "docs" / "tutorial.md").read_text().split("## 10.")[1]
    assert f"{(stopped.text, stopped.finish_reason)!r}" in text and f"{filled.text!r}" in text


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_notebook_runs(notebook: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider", str(notebook)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
