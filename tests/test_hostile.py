"""Texts and files that try to do more than be read: markup, control characters, code, paths that leave their folder."""

from __future__ import annotations

import ast
import io
import pickle
import re
import zipfile
from pathlib import Path

import polars as pl
import pytest
import torch
from rich.table import Table

from test_cli import one_line, run
from ws import adapters
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UserError
from ws.fitting import behaviour
from ws.model import sources
from ws.report import terminal
from ws.report.document import Bullets, Heading, Paragraph, Samples, Tile, Tiles, to_html
from ws.report.document import Table as HtmlTable
from ws.runs import evaluate

SOURCES = sorted((Path(__file__).parents[1] / "src" / "ws").rglob("*.py"))
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b>&amp;",
    "[bold red]loud[/bold red] [/] [link=http://x]y[/link] :bomb:",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J",
    "\x9b31m \x08\x08 \x7f \r gone",
    "\u202edesrever\u202c",
    "]]> --> </style>",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_page_shows_a_text_and_never_obeys_it(text: str) -> None:
    def made(said: str) -> str:
        return to_html(said, said, [
            Heading(said), Paragraph(said), Paragraph(said, note=True), Bullets([said]), Bullets([said], warning=True),
            HtmlTable([said], [[said]], said), Tiles([Tile(said, said, said)]), Samples([said], [(said, [said])]),
        ])  # fmt: skip

    page, harmless = made(text), made("harmless")
    assert re.findall(r"</?\w+", page) == re.findall(r"</?\w+", harmless), "no tag comes from the text"
    for mark in ("<script>alert", "<img", "onerror=alert(1)>"):
        assert mark not in page


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_terminal_shows_a_text_and_never_obeys_it(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.say(text)
    console.warn(text)
    console.fail(text)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.show(table)
    terminal.show(pl.DataFrame({text: [text]}), text)
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed)
    for word in ("bold red", ":bomb:", r"\x1b[31mred", r"\x202edesrever"):
        assert (word in printed) == (word in console.visible(text)), word


def test_a_table_of_scores_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("dilemmas", "logratio", "stated", -1.0, -0.171, -0.303, -0.041, 69, 60, "cluster bootstrap"),
            ("dilemmas", "pmass", "filler", 1.0, 0.75, None, None, 33, 33, "cluster bootstrap")]  # fmt: skip
    names = ["probe", "metric", "group", "alpha", "mean", "low", "high", "n", "clusters", "method"]
    terminal.show(pl.DataFrame(rows, schema=names, orient="row"), "dilemmas, out/run")
    printed = capsys.readouterr().out
    assert "dilemmas, out/run, probe dilemmas, method cluster bootstrap" in printed
    assert "-0.171 [-0.303, -0.041]" in printed and "0.750 │" in printed and "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_ordinary_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "two\nlines, Zürich, 東京, 🙂, a [list] of C:\\paths"
    console.say(text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("name", ["../evil", "..", "a/b", "/etc/x", "a\\b", ".hidden", "a\nb", "a\0b", "CON:", "", " "])
def test_no_behaviour_name_leaves_its_folder(name: str, tmp_path: Path) -> None:
    file = tmp_path / "b.toml"
    text = behaviour.TEMPLATE.format(name="mine")
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\0", "\\u0000")
    file.write_text(text.replace('name = "mine"', f'name = "{escaped}"'))
    with pytest.raises(UserError, match="name"):
        behaviour.load(str(file))


@pytest.mark.parametrize(
    "name", ["../../x", "a/../../b", "/etc/passwd", "hub/../../x.gguf", "hub:../../x.gguf", "~/x/y"]
)
def test_no_model_name_leaves_its_folder(name: str) -> None:
    slug = sources.model_slug(name)
    assert "/" not in slug and slug not in ("", ".", "..")


def test_no_task_name_leaves_the_run_folder(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("lm-eval:../../evil", "lm-eval:", "lm-eval:/x"):
        assert run("eval", "--task", task, "--model", tiny_folders["qwen3"], "--out", tmp_path) == 2
        assert "is not the name of a task" in one_line(capsys)
    assert evaluate.task_name("lm-eval:leaderboard|mmlu_pro-5.shot") == "leaderboard|mmlu_pro-5.shot"


# ---------------------------------------------------------------- no code is executed


class Bomb:
    """Unpickling it runs a command."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return exec, ("raise SystemExit('code was executed')",)


def bombs() -> dict[str, bytes]:
    plain, archive, saved = pickle.dumps(Bomb()), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("../../evil", "x")
        opened.writestr("archive/data.pkl", plain)
    torch.save({"x": torch.zeros(1)}, saved)
    return {"pickle": plain, "archive": archive.getvalue(), "torch": saved.getvalue()}


@pytest.mark.parametrize("kind", bombs())
def test_a_pickle_or_archive_is_refused_and_never_opened(kind: str, tmp_path: Path) -> None:
    content = bombs()[kind]
    file, folder = tmp_path / "direction.safetensors", tmp_path / "adapter"
    file.write_bytes(content)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(UserError):
        Direction.load(file)
    with pytest.raises(UserError, match="pickle files are not read"):
        adapters.read(folder)
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        adapters.read(folder)
    assert sorted(path.name for path in tmp_path.parent.glob("evil")) == []


SAFE_LOADER = "peer_vectors.py"
"""Reads the files of another library, with the loader that takes tensors and refuses everything else."""


def test_nothing_in_the_package_unpickles_or_evaluates_what_it_reads() -> None:
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "zipfile", "tarfile"}
    functions = {"eval", "exec", "compile", "__import__"}
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names} & modules
                assert found <= ({"pickle"} if file.name == SAFE_LOADER else set()), file
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", "only what the safe loader raises"
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in modules, file
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in functions and name not in ("np.load", "numpy.load"), (file, name)
                if name == "torch.load":
                    assert file.name == SAFE_LOADER
                    assert {"weights_only": "True"}.items() <= {
                        k.arg: ast.unparse(k.value) for k in node.keywords
                    }.items()
                for keyword in node.keywords:
                    is_on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                    assert not (keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and is_on), file
