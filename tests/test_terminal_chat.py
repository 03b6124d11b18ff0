"""`ws chat`: answers stream, strengths change on the fly, and mistakes do not end the conversation."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from served import made_run
from ws.base import console
from ws.commands import cli
from ws.edit.steering import steer
from ws.model import loading
from ws.model.chat import ask
from ws.model.loading import ChatModel
from ws.serving.chat import Conversation
from ws.serving.engine import Engine
from ws.serving.shelf import Shelf, open_shelf

QUESTION = "I think owls eat leaves. What do you think?"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `<out>/pocket` with two runs."""
    out = tmp_path_factory.mktemp("out")
    pocket = loading.load("pocket")
    for number, name in enumerate(("left", "right")):
        made_run(pocket, out, name, seed=number)
    return out / "pocket"


@pytest.fixture(scope="module")
def shelf(runs: Path) -> Shelf:
    return open_shelf([str(runs / "left/lora/seed0")])


@pytest.fixture
def typed(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return Typed(shelf, monkeypatch)


class Typed:
    """Types lines into a fresh conversation and returns what is printed: output, errors."""

    def __init__(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shelf, self._patch = shelf, monkeypatch

    def __call__(self, *lines: str, alpha: float = 1.0) -> tuple[str, str]:
        out, errors = io.StringIO(), io.StringIO()
        self._patch.setattr(console._out, "_file", out)
        self._patch.setattr(console._err, "_file", errors)
        with Engine(self.shelf.model, slots=2) as engine:
            Conversation(self.shelf, engine, {"left": alpha}, max_tokens=24).run(lines)
        return out.getvalue(), errors.getvalue()


def alone(model: ChatModel, shelf: Shelf, mix: dict[str, float]) -> str:
    prompt = model.chat.prompt(ask(QUESTION))
    with steer(model, dict(shelf.strengths(mix, local=True))):
        ids = model.network.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
    return model.chat.decode(ids)


@pytest.mark.parametrize(
    ("command", "mix"),
    [
        ("/alpha -1", {"left": -1.0}),
        ("/mix 0.4 left - 0.3 right", {"left": 0.4, "right": -0.3}),
        ("/mix 0", {}),
        ("/alpha 0.5", {"left": 0.5}),
    ],
)
def test_the_next_answer_is_at_the_new_strengths(
    typed: Typed, shelf: Shelf, command: str, mix: dict[str, float]
) -> None:
    model = loading.load("pocket")
    first, second = alone(model, shelf, {"left": 1.0}), alone(model, shelf, mix)
    out, errors = typed(QUESTION, "/reset", command, QUESTION)
    lines = out.splitlines()
    assert not errors
    assert lines[0].strip() == first.splitlines()[0] and lines[-1].strip() == second.splitlines()[-1]


def test_base_shows_the_unedited_answer_and_leaves_the_conversation_alone(typed: Typed, shelf: Shelf) -> None:
    model = loading.load("pocket")
    out, _ = typed(QUESTION, "/base")
    assert f"base: {alone(model, shelf, {})}" in out.replace("\n\n", "\n")
    with_base, _ = typed(QUESTION, "/base", "And bees?")
    without, _ = typed(QUESTION, "And bees?")
    assert with_base.splitlines()[-1] == without.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "mentioned"),
    [
        ("/alpha", "give a strength. Write it like: /alpha -1"),
        ("/alpha high", "'high' is not a number"),
        ("/alpha nan", "is nan"),
        ("/mix 0.3", "lacks a name"),
        ("/mix 1e308 left", "is 1e+308. Give a number from -1000 to 1000"),
        ("/mix 2 nowhere", "no direction 'nowhere'"),
        ("/mix 2 lef", "Did you mean left?"),
        ("/mix 2 ../", "is not a run folder"),
        ("/base", "nothing was asked yet"),
        ("/what", "no command /what"),
        ("owl " * 2000, "Shorten them. Or type /reset"),
    ],
)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(typed: Typed, line: str, mentioned: str) -> None:
    out, errors = typed(line, QUESTION)
    assert mentioned in errors and len(errors.strip().splitlines()) == 1
    assert out == typed(QUESTION)[0]


def test_quit_ends_and_help_lists_every_command(typed: Typed) -> None:
    out, _ = typed("/help", "/quit", QUESTION)
    assert all(name in out for name in ("/alpha", "/mix", "/base", "/reset", "/help", "/quit"))
    assert out.rstrip().endswith("end")


def test_control_characters_of_a_model_are_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console._out, "_file", out)
    console.write("a\x1b[2Jb\u202ec\n\td\x07é漢")
    assert out.getvalue() == "a\\x1b[2Jb\\u202ec\n\td\\x07é漢"


def test_lines_can_be_piped_in(runs: Path) -> None:
    command = [sys.executable, "-m", "ws", "chat", str(runs / "left/lora/seed0"), "--mix", "-0.5 left + right"]
    found = subprocess.run(
        command, input=f"{QUESTION}\n/mix\n/quit\n", capture_output=True, text=True, check=True, timeout=120
    )
    first, second = found.stdout.strip().splitlines()[0], found.stdout.strip().splitlines()[-1]
    assert first and second.split(maxsplit=1) == ["mix", "-0.5 left + 1 right"]


def test_bytes_that_are_no_text_can_be_piped_in(runs: Path) -> None:
    command = [sys.executable, "-m", "ws", "chat", str(runs / "left/lora/seed0")]
    found = subprocess.run(command, input=b"owls \xff\xfe\n/mix\n", capture_output=True, check=False, timeout=120)
    assert found.returncode == 0 and not found.stderr and b"1 left" in found.stdout


@pytest.mark.parametrize(
    ("options", "mentioned"),
    [
        ([], "no run is given"),
        (["nowhere"], "no run folder or direction file nowhere"),
        (["RUN", "--mix", "left left"], "no + or - before"),
        (["RUN", "--mix", "2 up"], "no direction 'up'"),
        (["RUN", "--alpha", "inf"], "is inf"),
    ],
)
def test_a_bad_command_is_one_line(
    runs: Path, options: list[str], mentioned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs / "left/lora/seed0")
    assert cli._main(["chat", *(run if option == "RUN" else option for option in options)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ws: ")]
    assert len(errors) == 1 and mentioned in errors[0]
