"""The README is a promise: its example runs, its commands exist, its links lead somewhere."""

import re
from pathlib import Path

import pytest

from ws.model import loading

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = loading.POCKET_MODELS["pocket"]


@pytest.mark.slow
@pytest.mark.skipif(not (SHIPPED / "config.json").is_file(), reason="the embedded model is not built")
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    match = re.search(r"<!-- runnable -->\n```python\n(.*?)```", README, re.DOTALL)
    assert match is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(match[1], "README.md", "exec"), {})
    assert (tmp_path / "sycophancy.safetensors").is_file()
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


def test_constraints_pin_everything_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 30 and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
