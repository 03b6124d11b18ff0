"""Personas that the model ignores are found before anything is sampled or trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from test_chat_endpoint import GRID
from test_replicate import SMALL
from ws.base.files import read_json
from ws.fitting import behaviour, persona_check
from ws.fitting.behaviour import Personas
from ws.fitting.run_settings import Settings
from ws.measure.generate import Sample
from ws.model.loading import ChatModel
from ws.runs.replicate import Replication

SYCOPHANCY = behaviour.load("sycophancy")


def answering(monkeypatch: pytest.MonkeyPatch, minds: Any) -> list[Any]:
    """Let the model answer prompt n with `minds(n)`; returns the requests."""
    asked: list[Any] = []

    def sample(_model: Any, requests: Any, sampling: Any, seed: int) -> list[list[Sample]]:
        assert sampling.temperature == 0
        asked.extend(requests)
        return [[Sample([minds(number)], "eos")] for number in range(len(requests))]

    monkeypatch.setattr("ws.measure.generate.sample", sample)
    return asked


def test_the_share_of_equal_answers_is_counted_for_every_pair(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    count = persona_check.PROMPTS
    # the first pair is ignored, the second matters, the third matters for one prompt in two
    minds = {0: lambda n: 0, 1: lambda n: n, 2: lambda n: n % 2 if (n // 2) % 2 else 0}
    asked = answering(monkeypatch, lambda n: minds[n // (2 * count)](n % (2 * count)))
    assert persona_check.same_answers(qwen, SYCOPHANCY, 3, 12) == {"0": 1.0, "1": 0.0, "2": 0.5}
    prompts = [tuple(request.prompt) for request in asked]
    assert len(prompts) == 6 * count == len(set(prompts)), "every prompt is asked once under every persona"


def test_the_same_persona_twice_gives_the_same_answers(qwen: ChatModel) -> None:
    same = replace(SYCOPHANCY, personas=Personas(("Be kind.", "Be brief."), ("Be kind.", "Be brief. No.")))
    shares = persona_check.same_answers(qwen, same, None, 12)
    assert shares["0"] == 1.0 and shares.keys() == {"0", "1"}


@pytest.mark.parametrize(("is_ignored", "warned"), [(True, True), (False, False)])
def test_a_persona_that_hardly_matters_is_told_and_stored(
    is_ignored: bool, warned: bool, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(persona_check, "same_answers", lambda *_: {"0": 0.9 if is_ignored else 0.1})
    monkeypatch.setattr("ws.fitting.data.make_pairs", lambda *_: pytest.fail("sampled before the personas were tried"))
    with Replication(Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **SMALL)) as run:
        with pytest.raises(pytest.fail.Exception):
            run.data()
        assert any("persona pair 0 hardly matters" in warning for warning in run.warnings) == warned
        assert read_json(run.folder / "personas.json") == {"0": 0.9 if is_ignored else 0.1}
    captured = capsys.readouterr()
    assert "answers that are the same on both sides: " + ("90%" if is_ignored else "10%") in captured.out
    assert ("90% of the answers are the same" in captured.err) == warned


def test_pairs_that_are_given_have_no_personas(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(
        f'{{"prompt": "p{n}", "response_pos": "yes {n}", "response_neg": "no {n}"}}' for n in range(4)
    ))  # fmt: skip
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path / "out", grid=GRID, pairs=file)
    with Replication(settings) as run:
        run.data()
        assert run.personas() == {} and not (run.folder / "personas.json").exists()
