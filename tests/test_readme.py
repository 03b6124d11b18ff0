"""The README is a promise: its example runs, its commands exist, its links lead somewhere."""

import re
from pathlib import Path

import pytest

from ws.model import library

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPARING = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
COMPARED = ROOT / "docs" / "results" / "pocket-sycophancy-compare"
SHIPPED = library.POCKET_MODELS["pocket"]


@pytest.mark.slow
@pytest.mark.skipif(not (SHIPPED / "config.json").is_file(), reason="the embedded model is not built")
def test_the_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for document in ("README.md", "docs/commands.md"):  # the second begins with the file that the first leaves
        text = (ROOT / document).read_text(encoding="utf-8")
        match = re.search(r"<!-- runnable -->\n```python\n(.*?)```", text, re.DOTALL)
        assert match is not None
        exec(compile(match[1], document, "exec"), {})
    assert (tmp_path / "sycophancy.safetensors").is_file()
    assert (tmp_path / "sycophancy-lora" / "adapter_model.safetensors").is_file()
    assert "Direction(" in capsys.readouterr().out


def test_local_links_exist() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_both_commands_are_one_line_and_use_the_constraints() -> None:
    for number in (1, 2):
        match = re.search(rf"<!-- command {number} -->\n```bash\n(.+)\n```", README)
        assert match is not None and "-c constraints.txt" in match[1] and ".venv" in match[1]


def test_no_block_waits_for_its_figures() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        blocks = re.findall(r"<!-- begin: .+? -->\n(.*?)<!-- end", text, re.DOTALL)
        assert all(block.strip() for block in blocks), document.name
        assert "Not run yet" not in text and "Not measured yet" not in text, document.name


def test_figures_in_the_text_about_the_comparison_are_in_its_tables() -> None:
    tables = (COMPARED / "comparison.md").read_text(encoding="utf-8")
    text = README.split("## Compare\n")[1].split("\n## ")[0] + COMPARING
    figures = set(re.findall(r"[+-]?\d+\.\d+", re.sub(r"<!-- begin.*?<!-- end", "", text, flags=re.DOTALL)))
    assert {"0.46", "0.58"} <= figures, "the text quotes what it says of the best prompt"
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", tables), figure


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len(README.splitlines()) <= 120


def test_constraints_pin_everything_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 30 and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
