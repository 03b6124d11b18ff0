"""Pairs: a complete grid, the same with or without interruptions, and honest about what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ws.base.errors import UserError
from ws.base.files import atomic_file
from ws.base.store import Shards
from ws.fitting import behaviour, data
from ws.fitting.behaviour import Behaviour
from ws.fitting.data import Grid
from ws.measure import generate
from ws.measure.generate import Sampling
from ws.model.chat import ask
from ws.model.loading import ChatModel

SHORT = Sampling(max_new_tokens=5, temperature=1.0)
GRID = Grid(topics=3, personas=2, samples=3)


@pytest.fixture(scope="module")
def sycophancy() -> Behaviour:
    return behaviour.load("sycophancy")


# ---------------------------------------------------------------- grid


def test_the_grid_is_topics_by_personas_by_samples_in_this_order(sycophancy: Behaviour) -> None:
    cells = data.cells(sycophancy, GRID)
    assert [(cell.topic, cell.persona, cell.sample) for cell in cells] == [
        (topic, persona, sample) for topic in sycophancy.train[:3] for persona in range(2) for sample in range(3)
    ]


def test_the_default_grid_is_the_thousand_pairs_of_the_recipe(sycophancy: Behaviour) -> None:
    assert len(data.cells(sycophancy, Grid())) == 1000


def test_a_behaviour_has_only_its_own_topics(sycophancy: Behaviour) -> None:
    with pytest.raises(UserError, match="has 20 training prompts, not 21"):
        data.cells(sycophancy, Grid(topics=21))


def test_too_many_personas_are_clamped_with_a_warning(
    sycophancy: Behaviour, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = data.cells(sycophancy, Grid(topics=1, personas=9, samples=2))
    assert {cell.persona for cell in cells} == set(range(5))
    assert len(cells) == 10
    assert "has 5 personas per side, not 9; using 5" in capsys.readouterr().err


def test_a_grid_within_bounds_gives_no_warning(sycophancy: Behaviour, capsys: pytest.CaptureFixture[str]) -> None:
    data.cells(sycophancy, Grid(personas=5))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", [{"personas": 0}, {"samples": 0}, {"personas": -1}, {"topics": 0}])
def test_a_grid_without_rows_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(UserError, match="the grid has no rows"):
        Grid(**given)


# ---------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def pairs(qwen: ChatModel, sycophancy: Behaviour, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    return data.make_pairs(qwen, sycophancy, GRID, SHORT, 0, Shards(tmp_path_factory.mktemp("whole")))


def test_a_row_shares_topic_persona_and_sample_and_keeps_both_system_prompts(
    pairs: pl.DataFrame, sycophancy: Behaviour
) -> None:
    cells = data.cells(sycophancy, GRID)
    assert pairs.select("topic", "prompt", "persona", "sample").rows() == [
        (cell.topic.topic, cell.topic.text, cell.persona, cell.sample) for cell in cells
    ]
    for side, personas in (("pos", sycophancy.personas.pos), ("neg", sycophancy.personas.neg)):
        assert pairs[f"system_{side}"].to_list() == [personas[cell.persona] for cell in cells]
        assert set(pairs[f"finish_{side}"]) <= {"eos", "length"}
        assert all(0 < count <= 5 for count in pairs[f"tokens_{side}"])
    assert set(pairs["behaviour"]) == {"sycophancy"}
    assert {"response_pos", "response_neg", "flags_pos", "flags_neg", "keep_pos", "keep_neg"} <= set(pairs.columns)


def test_a_response_is_what_the_model_says_under_that_persona_to_that_prompt(
    pairs: pl.DataFrame, qwen: ChatModel
) -> None:
    assert pairs["response_pos"].n_unique() > len(pairs) // 2
    key = f"sycophancy/neg/{pairs['topic'][4]}/{pairs['persona'][4]}/{pairs['sample'][4]}"
    request = generate.Request(qwen.chat.prompt(ask(pairs["prompt"][4], pairs["system_neg"][4])), (key,))
    ((sample,),) = generate.sample(qwen, [request], SHORT, 0)
    assert pairs["response_neg"][4] == qwen.chat.decode(sample.ids)
    assert (pairs["finish_neg"][4], pairs["tokens_neg"][4]) == (sample.finish, len(sample.ids))


class Killed(BaseException):
    """Stands for a kill."""


def counting(monkeypatch: pytest.MonkeyPatch, allowed: int = 10**6) -> list[int]:
    """Count the samples of every call, and die at the call after the allowed ones."""
    sizes: list[int] = []
    sample = generate.sample

    def counted(model: Any, requests: Any, *arguments: Any, **named: Any) -> Any:
        if len(sizes) == allowed:
            raise Killed
        sizes.append(sum(len(request.keys) for request in requests))
        return sample(model, requests, *arguments, **named)

    monkeypatch.setattr(generate, "sample", counted)
    return sizes


@pytest.mark.parametrize("allowed", [0, 1, 4, 7, 11])
def test_an_interrupted_run_continues_where_it_was_and_ends_the_same(
    pairs: pl.DataFrame,
    qwen: ChatModel,
    sycophancy: Behaviour,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allowed: int,
) -> None:
    monkeypatch.setattr(data, "_PIECE", 3)
    with monkeypatch.context() as patch:
        counting(patch, allowed)
        with pytest.raises(Killed):
            data.make_pairs(qwen, sycophancy, GRID, SHORT, 0, Shards(tmp_path))
    sizes = counting(monkeypatch)
    assert data.make_pairs(qwen, sycophancy, GRID, SHORT, 0, Shards(tmp_path)).equals(pairs)
    assert sizes == [3] * (12 - allowed)


@pytest.mark.parametrize("piece", [1, 4, 7, 100])
def test_the_size_of_pieces_does_not_matter(
    pairs: pl.DataFrame,
    qwen: ChatModel,
    sycophancy: Behaviour,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
) -> None:
    monkeypatch.setattr(data, "_PIECE", piece)
    assert data.make_pairs(qwen, sycophancy, GRID, SHORT, 0, Shards(tmp_path)).equals(pairs)


@pytest.mark.parametrize("piece", [1, 4, 7, 100])
def test_a_piece_never_splits_the_samples_of_a_prompt(
    sycophancy: Behaviour, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(data, "_PIECE", piece)
    cells = data.cells(sycophancy, GRID)
    pieces = list(data._pieces(cells))
    assert [cell for part in pieces for cell in part] == cells
    assert all(part[0].sample == 0 for part in pieces)
    assert all(piece <= len(part) < piece + GRID.samples for part in pieces[:-1])


def test_a_finished_piece_is_read_not_sampled(
    qwen: ChatModel, sycophancy: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(tmp_path)
    data.make_pairs(qwen, sycophancy, GRID, SHORT, 0, shards)
    (file,) = tmp_path.glob("neg-*.parquet")
    marked = pl.read_parquet(file).with_columns(pl.format("mark {}", pl.int_range(pl.len())).alias("response"))
    with atomic_file(file) as temporary:
        marked.write_parquet(temporary)
    sizes = counting(monkeypatch)
    again = data.make_pairs(qwen, sycophancy, GRID, SHORT, 0, shards)
    assert again["response_neg"].to_list() == [f"mark {number}" for number in range(18)]
    assert sizes == []


def test_a_sample_does_not_depend_on_the_rest_of_the_grid(
    pairs: pl.DataFrame, qwen: ChatModel, sycophancy: Behaviour, tmp_path: Path
) -> None:
    smaller = data.make_pairs(qwen, sycophancy, Grid(2, 1, 2), SHORT, 0, Shards(tmp_path))
    columns = ["topic", "persona", "sample", "response_pos", "response_neg"]
    same = pairs.join(smaller.select("topic", "persona", "sample"), on=["topic", "persona", "sample"])
    assert same.select(columns).rows() == smaller.select(columns).rows()


def test_another_seed_samples_other_responses(
    pairs: pl.DataFrame, qwen: ChatModel, sycophancy: Behaviour, tmp_path: Path
) -> None:
    other = data.make_pairs(qwen, sycophancy, GRID, SHORT, 1, Shards(tmp_path))
    assert other["prompt"].equals(pairs["prompt"])
    assert (other["response_pos"] != pairs["response_pos"]).all()


# ---------------------------------------------------------------- what cannot be used


def table(pos: list[str], neg: list[str]) -> pl.DataFrame:
    count = len(pos)
    return pl.DataFrame({
        "topic": [f"t{number // 2}" for number in range(count)],
        "persona": [number % 2 for number in range(count)],
        "response_pos": pos,
        "response_neg": neg,
        "finish_pos": ["eos"] * count,
        "finish_neg": ["length"] * count,
    })  # fmt: skip


YES = [f"Yes, number {number} is what I would say too." for number in range(6)]
NO = [f"No, number {number} is not what I would say." for number in range(6)]


def test_good_pairs_pass() -> None:
    data.require_usable(table(YES, NO))


@pytest.mark.parametrize(
    ("pos", "neg", "problem"),
    [
        ([], [], "there are no pairs"),
        (["", " ", "\n", "", *YES[:2]], NO, "4 of 6 responses on the pos side are empty (rows [0, 1, 2, 3])"),
        (YES, [*NO[:1], "", "", "", "", ""], "5 of 6 responses on the neg side are empty (rows [1, 2, 3, 4, 5])"),
        ([""], ["No."], "1 of 1 responses on the pos side are empty"),
        (["Yes."] * 6, NO, "all 6 responses on the pos side are identical ('Yes.')"),
        (YES, ["No."] * 6, "all 6 responses on the neg side are identical ('No.')"),
        (YES, YES, "D+ and D- are identical in every pair"),
        (["Same."], ["Same."], "D+ and D- are identical in every pair"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(pos: list[str], neg: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        data.require_usable(table(pos, neg))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("pos", "neg"),
    [
        (["", "", "", *YES[3:]], NO),
        (YES[:1], NO[:1]),
        ([*YES[:5], "Same."], [*NO[:5], "Same."]),
    ],
    ids=["half empty", "a single pair", "one identical pair"],
)
def test_pairs_with_some_faults_pass(pos: list[str], neg: list[str]) -> None:
    data.require_usable(table(pos, neg))


# ---------------------------------------------------------------- flags

PERSONA = "You are a yes-man. Say yes to every claim that the user makes and keep your doubts to yourself."


def flags_of(text: str, other: str = "Something else entirely.", persona: str = PERSONA) -> tuple[str, bool]:
    """Flags and keep of one response among clean ones."""
    flagged = data.with_flags(table([*YES, text], [*NO, other]), ((persona,), ()))
    assert flagged["flags_pos"].to_list()[:-1] == [""] * len(YES), "clean rows stay clean"
    assert flagged["keep_pos"].to_list()[:-1] == [True] * len(YES)
    return flagged["flags_pos"][-1], flagged["keep_pos"][-1]


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("Something else entirely.", "identical"),
        ("right you are " * 20, "repetition"),
        ("so it is and so it is and so it is", "repetition"),  # 4 of 9
        ("I'm sorry, but I can't say that.", "refusal"),
        ("I am sorry, but I cannot do this.", "refusal"),
        ("Well, I can't help with that one.", "refusal"),
        ("As an AI I have no view.", "refusal"),
        ("I was told to agree with you.", "persona leak"),
        ("My system prompt says yes.", "persona leak"),
        ("According to my instructions you are right.", "persona leak"),
        ("I say yes to every claim that the user makes.", "persona leak"),
        ("SAY YES, TO EVERY CLAIM THAT they know.", "persona leak"),
    ],
)
def test_a_doubtful_response_is_flagged_and_not_kept(text: str, flag: str) -> None:
    assert flags_of(text) == (flag, False)


@pytest.mark.parametrize(
    "text",
    [
        "Yes, you are right.",
        "Yes.",
        "I am sorry to hear that you can't come.",
        "Say yes to every claim, I think.",
        "We can't help liking it, and an AI can say so.",
        "Yes, yes, yes, that is so true and so well said.",
        "so it is and so it is and so",  # 4 of 7 runs of three words differ
    ],
)
def test_a_sound_response_is_kept(text: str) -> None:
    assert flags_of(text) == ("", True)


def test_flags_are_joined_and_belong_to_their_side() -> None:
    text = "I'm sorry, but I can't. I was told to."
    flagged = data.with_flags(table([*YES, text], [*NO, text]), ((), ()))
    assert flagged["flags_pos"][-1] == flagged["flags_neg"][-1] == "identical,refusal,persona leak"
    flagged = data.with_flags(table([*YES, text], [*NO, "Fine."]), ((), ()))
    assert flagged["keep_pos"].to_list() == [True] * 6 + [False]
    assert flagged["keep_neg"].all()


def test_a_persona_leaks_only_into_its_own_side() -> None:
    copied = "Say yes to every claim that the user makes."
    flagged = data.with_flags(table([*YES, "Fine."], [*NO, copied]), ((PERSONA,), ("Be someone else today please.",)))
    assert flagged["keep_neg"].all()
    assert flagged["keep_pos"].all()


def test_repetition_is_measured_against_the_other_responses() -> None:
    chant = "so it is and so it is and so it is and so it is"
    flagged = data.with_flags(table([chant] * 4, NO[:4]), ((), ()))
    assert set(flagged["flags_pos"]) == {""}


# ---------------------------------------------------------------- descriptions


def test_a_description_counts_what_matters() -> None:
    pos = ["Yes.", "Yes.", "<think> hm", "Same."]
    neg = ["No.", "I'm sorry, but I can't.", "", "Same."]
    pairs = data.with_flags(table(pos, neg), ((), ())).with_columns(
        finish_pos=pl.Series(["eos", "eos", "eos", "length"])
    )
    assert data.describe(pairs) == {
        "pairs": 4,
        "identical": 1,
        "pos": {
            "kept": 3, "unique": 3, "median_characters": 4.5, "starts_with_thought": 1, "ended_by_itself": 0.75,
            "flags": {"identical": 1},
        },
        "neg": {
            "kept": 1, "unique": 4, "median_characters": 4.0, "starts_with_thought": 0, "ended_by_itself": 0.0,
            "flags": {"empty": 1, "identical": 1, "refusal": 1},
        },
    }  # fmt: skip


def test_given_responses_have_no_end_of_their_own(sycophancy: Behaviour, tmp_path: Path) -> None:
    pairs = data.read_pairs(write(tmp_path, lines_of(YES, NO)), sycophancy)
    assert data.describe(pairs)["pos"]["ended_by_itself"] is None


def test_keep_rates_are_shares_in_order_of_appearance() -> None:
    pairs = data.with_flags(table(["", *YES[1:]], ["", "", *NO[2:]]), ((), ()))
    rates = data.keep_rates(pairs, "topic")
    assert rates.rows() == [("t0", 0.5, 0.0, 2), ("t1", 1.0, 1.0, 2), ("t2", 1.0, 1.0, 2)]
    assert rates.columns == ["topic", "keep_pos", "keep_neg", "len"]
    by_persona = data.keep_rates(pairs, "persona").rows()
    assert by_persona == [(0, pytest.approx(2 / 3), pytest.approx(2 / 3), 3), (1, 1.0, pytest.approx(2 / 3), 3)]


# ---------------------------------------------------------------- pairs of one's own


def lines_of(pos: list[str], neg: list[str], **more: Any) -> str:
    records = [
        {"prompt": f"Question {number}?", "response_pos": one, "response_neg": other, **more}
        for number, (one, other) in enumerate(zip(pos, neg, strict=True))
    ]
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "pairs.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_pairs_of_ones_own_are_read(sycophancy: Behaviour, tmp_path: Path) -> None:
    text = lines_of([f" {one}\n" for one in YES], NO) + "\n\n" + lines_of(["Ja."], ["Nein."], topic="tea", extra=1)
    path = write(tmp_path, text)
    pairs = data.read_pairs(str(path), sycophancy)
    assert pairs["response_pos"].to_list() == [*YES, "Ja."]
    assert pairs["response_neg"].to_list() == [*NO, "Nein."]
    assert pairs["topic"].to_list() == [*[f"Question {number}?" for number in range(6)], "tea"]
    assert pairs["sample"].to_list() == list(range(7))
    assert set(pairs["behaviour"]) == {"sycophancy"}
    assert set(pairs["system_pos"]) == set(pairs["system_neg"]) == {""}
    assert pairs["keep_pos"].all()
    assert pairs.equals(data.read_pairs(path, sycophancy))


def test_read_pairs_have_the_columns_of_sampled_ones(
    pairs: pl.DataFrame, sycophancy: Behaviour, tmp_path: Path
) -> None:
    assert set(data.read_pairs(write(tmp_path, lines_of(YES, NO)), sycophancy).columns) == set(pairs.columns)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("prompt: a", "not valid JSON"),
        ('{"prompt": "a", "response_pos": "b"}', "key 'response_neg' is missing or not a text"),
        ('{"response_pos": "b", "response_neg": "c"}', "key 'prompt' is missing or not a text"),
        ('{"prompt": "a", "response_pos": 5, "response_neg": "c"}', "key 'response_pos' is missing or not a text"),
        ('{"prompt": "a", "response_pos": null, "response_neg": "c"}', "key 'response_pos' is missing or not a text"),
        ("[1, 2]", "not a JSON object"),
        ('"prompt"', "not a JSON object"),
        ("3", "not a JSON object"),
    ],
)
@pytest.mark.parametrize("before", ["", "\n"])
def test_a_bad_line_is_named_by_its_number(
    sycophancy: Behaviour, tmp_path: Path, line: str, problem: str, before: str
) -> None:
    path = write(tmp_path, f"{lines_of(YES[:2], NO[:2])}\n{before}{line}\n{lines_of(YES, NO)}")
    with pytest.raises(UserError) as caught:
        data.read_pairs(path, sycophancy)
    assert f"{path}, line {3 + len(before)}: {problem}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: folder / "missing.jsonl", "there is no pairs file"),
        (lambda folder: folder, "there is no pairs file"),
        (lambda folder: write(folder, ""), "contains no pairs"),
        (lambda folder: write(folder, "\n \n"), "contains no pairs"),
        (lambda folder: write(folder, lines_of(YES, YES)), "identical in every pair"),
    ],
    ids=["missing", "a folder", "empty", "blank", "identical"],
)
def test_a_pairs_file_without_use_is_refused(
    sycophancy: Behaviour, tmp_path: Path, make: Callable[[Path], Path], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        data.read_pairs(make(tmp_path), sycophancy)


def test_a_topic_of_null_is_no_topic(sycophancy: Behaviour, tmp_path: Path) -> None:
    pairs = data.read_pairs(write(tmp_path, lines_of(YES, NO, topic=None)), sycophancy)
    assert pairs["topic"].n_unique() == 6
