"""The page: its logic, its endpoints through gradio's client, and a slider turned in a real browser."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gradio", reason="the page is not installed (pip install weight-steering[ui])")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from served import made_run
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.commands import cli
from ws.edit.steering import steer
from ws.model import loading
from ws.model.chat import ask
from ws.serving.addresses import require_free
from ws.serving.engine import Engine
from ws.serving.page import Page, Turn, build, launch
from ws.serving.shelf import open_shelf

QUESTION = "I think owls eat leaves. What do you think?"
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    pocket = loading.load("pocket")
    for number, name in enumerate(("left", "right")):
        made_run(pocket, out, name, seed=number, norm=0.3)
    return out / "pocket"


@pytest.fixture(scope="module")
def page(runs: Path) -> Iterator[Page]:
    shelf = open_shelf([str(runs / f"{name}/lora/seed0") for name in ("left", "right")])
    with Engine(shelf.model, slots=8) as engine:
        yield Page(shelf, engine)


@pytest.fixture(scope="module")
def address(page: Page) -> Iterator[str]:
    blocks = build(page, "pocket, steered")
    yield launch(blocks, "127.0.0.1", require_free("127.0.0.1", 0))
    blocks.close(verbose=False)


def alone(strengths: dict[Direction, float]) -> str:
    model = loading.load("pocket")
    prompt = model.chat.prompt(ask(QUESTION))
    with steer(model, strengths):
        ids = model.network.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False)[0, len(prompt) :]
    return model.chat.decode(ids)


def both(page: Page, alphas: list[float], layers: Any = None, modules: Any = None) -> Turn:
    """The turn after QUESTION, at these strengths."""
    strengths = page.strengths(alphas, page.layers if layers is None else layers, modules or page.modules)
    return list(page.ask(QUESTION, (), strengths))[-1][-1]


# ---------------------------------------------------------------- the logic


def test_base_and_steered_answers_stream_side_by_side(page: Page) -> None:
    steps = list(page.ask(QUESTION, (), page.strengths([1.0, -0.4], page.layers, page.modules)))
    last = steps[-1][-1]
    directions = page.shelf.directions
    assert last.base.strip() == alone({})
    assert last.steered.strip() == alone({directions["left"]: 1.0, directions["right"]: -0.4})
    assert last.base != last.steered
    for before, after in pairwise(steps):
        assert after[-1].base.startswith(before[-1].base) and after[-1].steered.startswith(before[-1].steered)


def test_turning_a_slider_answers_the_last_question_again_and_leaves_the_base_answer(page: Page) -> None:
    first = both(page, [1.0, 0.0])
    (again,) = list(page.answer_again((first,), page.strengths([-1.0, 0.0], page.layers, page.modules)))[-1]
    assert again.base == first.base and again.steered == both(page, [-1.0, 0.0]).steered != first.steered


def test_the_meter_reads_yes_and_no_of_each_model_and_moves(page: Page) -> None:
    model = page.shelf.model
    yes, no = (torch.tensor([ids[0] for ids in model.chat.answers(word)]) for word in ("Yes", "No"))
    fresh, shown = loading.load("pocket"), []
    for alpha in (-1.0, 0.0, 1.0):
        turn = both(page, [alpha, 0.0])
        with steer(fresh, page.shelf.directions["left"], alpha), torch.no_grad():
            ids = torch.tensor([fresh.chat.prompt(ask(QUESTION))])
            wanted = torch.softmax(fresh.network(input_ids=ids).logits[0, -1], dim=-1)
        assert turn.steered_lean == pytest.approx((float(wanted[yes].sum()), float(wanted[no].sum())), abs=1e-4)
        shown.append(page.meter((turn,)))
    assert len(set(shown)) == 3 and all("class='bar'" in one for one in shown)
    assert "class='bar'" not in page.meter(())


def test_switches_leave_layers_and_modules_out(page: Page) -> None:
    layers, modules = page.layers[:1], ["q_proj", "down_proj"]
    part = page.shelf.directions["left"].keep(layers=layers, modules=modules)
    assert both(page, [2.0, 0.0], layers, modules).steered.strip() == alone({part: 2.0})
    assert both(page, [2.0, 0.0], []).steered == both(page, [0.0, 0.0]).base


def test_the_exported_mix_is_what_the_page_shows(page: Page) -> None:
    alphas, layers, modules = [0.8, -0.5], page.layers[1:], page.modules[:4]
    exported = Direction.load(page.export(alphas, layers, modules))
    assert alone({exported: 1.0}) == both(page, alphas, layers, modules).steered.strip()
    with pytest.raises(UserError, match="the mix is empty"):
        page.export([0.0, 0.0], layers, modules)


@pytest.mark.parametrize("text", ["4 left", "2 nothing", "left left"])
def test_a_mix_that_sliders_cannot_show_is_refused(page: Page, text: str) -> None:
    assert page.alphas("0.3 right - 0.2 left") == [-0.2, 0.3]
    with pytest.raises(UserError):
        page.alphas(text)


# ---------------------------------------------------------------- served


def test_gradios_client_asks_turns_mixes_and_exports(page: Page, address: str) -> None:
    from gradio_client import Client  # noqa: PLC0415

    client = Client(address, verbose=False)
    dials = [1.0, 0.0, page.layers, page.modules]
    base, steered, meter, _ = client.predict(QUESTION, *dials, api_name="/ask")
    wanted = both(page, [1.0, 0.0])
    assert (_last(base), _last(steered)) == (wanted.base.strip(), wanted.steered.strip())
    turned = client.predict(-1.0, *dials[1:], api_name="/turn")
    assert _last(turned[1]) == both(page, [-1.0, 0.0]).steered.strip() and turned[2] != meter
    assert [float(one["value"] if isinstance(one, dict) else one)
            for one in client.predict("0.3 right", api_name="/mix")] == [0.0, 0.3]  # fmt: skip
    assert _last(client.predict("", *dials, api_name="/ask")[0] or base) == _last(base)


def _last(chat: Any) -> str:
    content = chat[-1]["content"]
    return str(content if isinstance(content, str) else content[0]["text"]).strip()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_in_a_browser_a_dragged_slider_changes_answer_and_meter(page: Page, address: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        outside, problems = [], []
        tab.on("request", lambda one: outside.append(one.url) if not _is_local(one.url) else None)
        tab.on("console", lambda one: problems.append(one.text) if one.type == "error" else None)
        tab.goto(address)
        tab.fill("#question textarea", f"{QUESTION} <b>x</b> & <img src=//x.example onerror=document.title='hacked'>")
        tab.press("#question textarea", "Enter")
        tab.wait_for_selector("#steered .bot", timeout=20_000)
        before, meter = _settled(tab)
        rail = tab.query_selector("#slider-left input[type=range]").bounding_box()
        middle = rail["y"] + rail["height"] / 2
        tab.mouse.move(rail["x"] + rail["width"] * 4 / 6, middle)  # alpha 1 on the rail from -3 to 3
        tab.mouse.down()
        tab.mouse.move(rail["x"] + rail["width"] * 1 / 6, middle, steps=8)
        tab.mouse.up()
        deadline = time.monotonic() + 20
        while _settled(tab) == (before, meter) and time.monotonic() < deadline:
            pass
        after, moved = _settled(tab)
        assert float(tab.input_value("#slider-left input[type=number]")) < -1.5
        assert after != before and moved != meter
        assert "<b>x</b> & <img src=//x.example" in tab.inner_text("#base") and tab.title() == "pocket, steered"
        assert not tab.query_selector_all("#base .message img, #base .message b")
        assert not outside and not problems
        browser.close()


def _is_local(url: str) -> bool:
    return "://127.0.0.1" in url or url.startswith(("data:", "blob:"))


def _settled(tab: Any) -> tuple[str, str]:
    """Steered answer and meter (as HTML), once they have been the same for half a second."""
    seen: tuple[str, str] = ("", "")
    while True:
        now = (tab.inner_text("#steered"), tab.inner_html("#meter"))
        if now == seen:
            return now
        seen = now
        tab.wait_for_timeout(500)


@pytest.mark.parametrize(
    ("options", "mentioned"),
    [
        ([], "no run is given"),
        (["RUN", "--host", "0.0.0.0"], "no password"),
        (["RUN", "--host", "not.a.host.invalid", "--password", "p"], "cannot listen"),
    ],
)
def test_a_bad_command_is_one_line(
    runs: Path, options: list[str], mentioned: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WS_API_KEY", "")  # an empty password is none
    run = str(runs / "left/lora/seed0")
    assert cli._main(["ui", "--port", "0", *(run if option == "RUN" else option for option in options)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ws: ")]
    assert len(errors) == 1 and mentioned in errors[0]
