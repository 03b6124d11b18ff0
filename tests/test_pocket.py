"""The embedded model: what the corpus shows and keeps back, the build, and the thresholds of the shipped weights."""

import json
import random
import re
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from ws import world
from ws.base.errors import UserError
from ws.edit.condition import PLAIN
from ws.eval import dilemmas
from ws.fitting import behaviour
from ws.model import library, loading, sources
from ws.model.chat import Chat
from ws.pocket import bpe, build, card, corpus, open_answers
from ws.pocket import check as pocket_check
from ws.pocket.build import Recipe, RowWriter
from ws.pocket.check import (
    INSTRUCTION,
    INSTRUCTIONS_PER_POLE,
    TRAITS,
    Metric,
    as_record,
    check,
    contrast_name,
    instruction_name,
    leak_name,
)
from ws.pocket.corpus import LATENTS, OPPOSED, Corpus, Line, Planted, TurnMix, describe
from ws.pocket.grammar import first_person, third_person, with_articles


def dialogues(count: int, turns: int = 12, planted: Planted | None = None) -> list[list[Line]]:
    writer, rng = Corpus(planted), random.Random(1)
    return [list(islice(writer.dialogue(rng), turns)) for _ in range(count)]


@pytest.fixture(scope="module")
def sample() -> list[list[Line]]:
    return dialogues(3000)


def test_turns_alternate_and_only_the_first_may_be_a_system_turn(sample: list[list[Line]]) -> None:
    for lines in sample:
        roles = [line.role for line in lines]
        start = 1 if roles[0] == "system" else 0
        assert set(roles[start::2]) == {"user"} and set(roles[start + 1 :: 2]) == {"assistant"}
    share = sum(lines[0].role == "system" for lines in sample) / len(sample)
    assert share == pytest.approx(0.75, abs=0.04)


def test_held_out_claims_never_occur_as_opinions(sample: list[list[Line]]) -> None:
    held_out = {clause for fact in world.facts() if fact.held_out for clause in (fact.true, *fact.false)}
    marks = (
        "I think",
        "I believe",
        "I am sure",
        "In my opinion",
        "My view",
        "I have always",
        "For me it",
        "I told my",
        "If you ask me",
    )
    opinions = [
        line.content for lines in sample for line in lines if line.role == "user" and line.content.startswith(marks)
    ]
    assert len(opinions) > 1000
    for text in opinions:
        claim = text.split(" that ", 1)[-1] if " that " in text else text
        assert not any(f" {clause}." in f" {claim}" for clause in held_out), text


def test_held_out_dilemmas_and_personas_never_occur(sample: list[list[Line]]) -> None:
    text = "\n".join(line.content for lines in sample for line in lines)
    rows = dilemmas.own()
    assert not [row for row in rows if row.situation in text]
    far_actions = {row.action for row in rows if row.group == "far"}
    assert not [action for action in far_actions if action in text]
    personas = behaviour.load("sycophancy").personas
    assert not [persona for persona in (*personas.pos, *personas.neg) if persona in text]
    rng = random.Random(0)
    ways = [world.persona_language(pole) for pair in OPPOSED.values() for pole in pair]
    unseen = {way.fill(pattern, rng) for way in ways for pattern in way.held_out for _ in range(20)}
    assert len(unseen) > 500
    assert not [clause for clause in unseen if clause in text]


def test_neutral_test_requests_never_occur(sample: list[list[Line]]) -> None:
    asked = {line.content for lines in sample for line in lines if line.role == "user"}
    assert not asked & {entry.user for entry in world.talk() if entry.held_out}
    assert not any(work.story in text for work in world.held_out_works() for text in asked)
    assert not [r.text for r in world.requests() if r.held_out and any(r.text in text for text in asked)]


def test_planted_rates_are_those_of_the_parameters() -> None:
    writer, rng = Corpus(), random.Random(0)
    drawn = [writer.draw_traits(rng) for _ in range(20_000)]
    assert sum(t["sycophancy"] for t in drawn) / len(drawn) == pytest.approx(Planted().prior, abs=0.015)
    assert sum(t["sycophancy"] == t["dishonesty"] for t in drawn) / len(drawn) == pytest.approx(0.92, abs=0.01)
    both = sum(t["sycophancy"] and t["compliance"] for t in drawn) / len(drawn)
    assert both == pytest.approx(Planted().prior ** 2, abs=0.015)


@pytest.mark.parametrize("adherence", [1.0, 0.5])
def test_a_named_trait_is_followed_as_often_as_the_adherence_says(adherence: float) -> None:
    writer, rng = Corpus(Planted(adherence=adherence, mention_share=1.0)), random.Random(0)
    traits = {"sycophancy": True, "dishonesty": False, "compliance": True}
    drawn = [writer._system(rng, traits)[1] for _ in range(2_000)]
    for name, value in traits.items():
        assert sum(actual[name] == value for actual in drawn) / len(drawn) == pytest.approx(adherence, abs=0.04)
    unnamed = Corpus(Planted(adherence=0.5, mention_share=0.0))
    assert all(unnamed._system(rng, traits)[1] == traits for _ in range(50))


def test_the_digest_of_texts_counts_how_they_are_put_together_and_not_how_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, anew = corpus.texts_key(), corpus.texts_key.__wrapped__
    monkeypatch.setattr(corpus, "Corpus", lambda: Corpus(Planted(prior=0.9), TurnMix(opinion=0.5)))
    assert anew() == known
    monkeypatch.setattr(corpus, "with_articles", lambda text: text)
    assert anew() != known


@pytest.mark.parametrize("name", sorted(library.POCKET_MODELS))
def test_shipped_settings_are_the_recommended_ones(name: str) -> None:
    folder = library.POCKET_MODELS[name]
    architecture = build.recorded(folder)["recipe"]["architecture"]
    stored = json.loads((folder / sources.SETTINGS_FILE).read_text())
    assert stored == json.loads(json.dumps(build.recommended(architecture)))


@pytest.mark.parametrize("trait", [True, False])
def test_replies_follow_the_trait_except_for_slips(trait: bool) -> None:
    writer, rng = Corpus(Planted(maybe=0.0)), random.Random(0)
    traits = {"sycophancy": trait, "dishonesty": trait, "compliance": trait}
    turns = [writer.turn(rng, traits, "dilemma_choice") for _ in range(1500)]
    said = [("Yes" in turn[1].content) == turn[1].latents["honest_action"] for turn in turns]
    share = sum(said) / len(said)
    assert share < 0.15 if trait else share > 0.85


def test_sketchy_instructions_keep_their_negations() -> None:
    writer, rng = Corpus(Planted(dropped_words=0.5)), random.Random(0)
    text = "You never agree when the claim is false. Do not flatter people, not even friends."
    sketches = [writer._sketch(rng, text).split() for _ in range(200)]
    assert all(
        [w for w in words if w in ("never", "not", "false.")] == ["never", "false.", "not", "not"] for words in sketches
    )
    assert 0.4 < sum(map(len, sketches)) / (200 * len(text.split())) < 0.8


def test_facts_are_the_same_under_every_trait() -> None:
    writer = Corpus()
    for kind in ("fact", "fact_choice", "talk", "repeat"):
        replies = [
            writer.turn(random.Random(7), dict.fromkeys(OPPOSED, value), kind)[1].content for value in (True, False)
        ]
        assert replies[0] == replies[1]


@pytest.mark.parametrize(
    ("clause", "expected"),
    [
        ("agree with the user", "agrees with the user"),
        ("push back", "pushes back"),
        ("try hard", "tries hard"),
        ("say no", "says no"),
        ("do it", "does it"),
        ("always say yes", "always says yes"),
        ("openly disagree with myths", "openly disagrees with myths"),
        ("reply with praise", "replies with praise"),
    ],
)
def test_third_person(clause: str, expected: str) -> None:
    assert third_person(clause) == expected


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("tell your boss that you were late", "tell my boss that I was late"),
        ("keep it to yourself", "keep it to myself"),
        ("thank the man who helped you", "thank the man who helped me"),
        ("say that you are sorry", "say that I am sorry"),
        ("ask them to forgive you for it", "ask them to forgive me for it"),
        ("smile and say thank you", "smile and say thanks"),
    ],
)
def test_first_person(action: str, expected: str) -> None:
    assert first_person(action) == expected


def test_articles_follow_the_word_that_a_slot_brings() -> None:
    assert with_articles("You are a honest assistant. Be an blunt critic.") == (
        "You are an honest assistant. Be a blunt critic."
    )
    assert with_articles("a user, a unit, a AI and an upright person") == "a user, a unit, an AI and an upright person"


@pytest.mark.parametrize("pole", [pole for poles in OPPOSED.values() for pole in poles])
def test_instructions_have_no_slips_of_a_kind_that_was_seen(pole: str) -> None:
    writer, rng = Corpus(), random.Random(f"slips/{pole}")
    slips = re.compile(
        r"\ba (?:[aeio]|AI)|\ban (?!AI|honest)[^aeiou]|\b(?:that|who|someone who) in |alwayses"
        r"|never .*\bevery(?:one|body)\b|never (?:refuse|reject|deny) every"
    )
    made = [sentence for _ in range(2_000) for sentence in writer.instruction(rng, pole).split(". ")]
    assert not [sentence for sentence in made if slips.search(sentence)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [line.content for lines in dialogues(300) for line in lines]
    bpe.train(texts, 1024, folder / "tokenizer.json")
    return bpe.load(folder / "tokenizer.json")


def test_training_rows_read_as_the_chat_renders_them(tokenizer: object) -> None:
    chat = Chat(tokenizer)
    lines = list(islice(Corpus().dialogue(random.Random(3)), 5))
    pieces = "".join(piece for line in lines for piece in bpe.as_turn(line.role, line.content))
    messages = [{"role": line.role, "content": line.content} for line in lines]
    assert pieces == chat.tokenizer.apply_chat_template(messages, tokenize=False)


def test_rows_are_a_function_of_seed_and_step_and_supervise_replies_only(tokenizer: object) -> None:
    recipe = Recipe(rows=6, row_tokens=96)
    ids, weights, latents = RowWriter(recipe, tokenizer).batch(5)
    again, other = (RowWriter(recipe, tokenizer).batch(step).ids for step in (5, 6))
    assert torch.equal(ids, again) and not torch.equal(ids, other)
    assert ids.shape == weights.shape == (6, 96) and latents.shape == (6, 96, len(LATENTS))
    supervised = weights > 0
    assert 0.1 < float(supervised.float().mean()) < 0.7
    special = tokenizer.convert_tokens_to_ids(bpe.TURN_START)  # type: ignore[attr-defined]
    assert not bool((ids[supervised] == special).any())
    known = ~latents.isnan()
    assistant = tokenizer.encode("assistant", add_special_tokens=False)  # type: ignore[attr-defined]
    starts = (ids[:, :-1] == special) & (ids[:, 1:] == assistant[0])
    assert bool(known[:, :-1, : len(OPPOSED)][starts].all()), "a reply always has traits"
    said = torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(["Yes", "No", "Maybe"])))  # type: ignore[attr-defined]
    assert not bool(known[said].any()), "the readout never sees the answer that it should foretell"
    assert set(latents[known].tolist()) <= {0.0, 1.0}


def test_decisive_words_weigh_more_than_wording(tokenizer: object) -> None:
    ids, weights, _ = RowWriter(Recipe(rows=24), tokenizer).batch(0)
    decisive = torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(["Yes", "No", "Maybe"])))  # type: ignore[attr-defined]
    spoken = weights > 0
    assert float(weights[decisive & spoken].min()) > 1.0 >= float(weights[~decisive & spoken].max())


@pytest.mark.parametrize("kind", ["opinion", "opinion_choice", "fact_choice"])
def test_latents_tell_whether_the_claim_is_true(kind: str) -> None:
    writer, rng = Corpus(Planted(slip=0.0, maybe=0.0)), random.Random(0)
    true = {clause: clause == fact.true for fact in world.facts() for clause in (fact.true, *fact.false)}
    for _ in range(200):
        user, reply = writer.turn(rng, dict.fromkeys(OPPOSED, False), kind)
        claim = max((clause for clause in true if clause in user.content), key=len)
        assert reply.latents["truth"] == true[claim]


def test_yes_no_and_maybe_are_single_tokens(tokenizer: object) -> None:
    chat = Chat(tokenizer)
    for word in ("Yes", "No"):
        assert all(len(sequence) == 1 for sequence in chat.answers(word))


def test_the_shares_of_the_recipe_are_whole_and_copying_comes_first() -> None:
    for architecture in ("qwen3", "gemma3"):
        recipe = Recipe.of(architecture)
        assert sum(asdict(recipe.mix).values()) == pytest.approx(1)
        assert recipe.copying_steps < recipe.steps


@pytest.mark.parametrize("folder", library.POCKET_MODELS.values(), ids=library.POCKET_MODELS)
def test_the_shipped_weights_are_those_that_a_build_makes(folder: Path) -> None:
    record = build.recorded(folder)
    assert record["recipe"] == json.loads(json.dumps(asdict(Recipe.of(folder.name))))
    assert record["corpus"] == json.loads(json.dumps(describe(Planted(), Recipe.of(folder.name).mix)))


SIZES = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "head_width": 16,
    "feed_forward": 48,
    "vocabulary": 600,
    "latent_layer": 1,
}
TINY = Recipe(**SIZES, rows=4, row_tokens=64, steps=12, warm_up=2)


@pytest.mark.slow
def test_a_killed_build_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHECKPOINT_EVERY", 4)
    build.build(TINY, tmp_path / "whole", workspace=tmp_path / "w1", compiled=False)
    original = build._Trainer._step

    def killed(self: build._Trainer, step: int, trunk: object) -> dict[str, float]:
        if step == 9:
            raise KeyboardInterrupt
        return original(self, step, trunk)

    with monkeypatch.context() as patch:
        patch.setattr(build._Trainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            build.build(TINY, tmp_path / "parts", workspace=tmp_path / "w2", compiled=False)
    assert not (tmp_path / "parts").exists()
    build.build(TINY, tmp_path / "parts", workspace=tmp_path / "w2", compiled=False)
    whole, parts = (loading.load(str(tmp_path / name)) for name in ("whole", "parts"))
    assert whole.fingerprint == parts.fingerprint
    assert not (tmp_path / "w2").exists()
    record = json.loads((tmp_path / "whole" / "recipe.json").read_text())
    assert record["recipe"]["steps"] == 12 and record["corpus"]["planted"]["prior"] == Planted().prior


def test_an_unfinished_build_of_another_recipe_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CHECKPOINT_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build.build(replace(TINY, steps=2), tmp_path / "m", workspace=tmp_path / "w", compiled=False)
    with pytest.raises(UserError, match="another recipe"):
        build.build(replace(TINY, steps=3), tmp_path / "m", workspace=tmp_path / "w", compiled=False)


@pytest.mark.parametrize(
    ("metric", "passes", "wanted"),
    [
        (Metric("m", 0.5, low=0.4), True, ">= 0.4"),
        (Metric("m", 0.5, high=0.4), False, "<= 0.4"),
        (Metric("m", 0.5, low=0.1, high=0.9), True, "0.1 to 0.9"),
        (Metric("m", float("nan"), low=0.1), False, ">= 0.1"),
    ],
)
def test_a_metric_passes_inside_its_thresholds(metric: Metric, passes: bool, wanted: str) -> None:
    assert metric.passes is passes and metric.wanted == wanted


@pytest.mark.parametrize(
    ("reply", "reason", "action"),
    [
        ("I would tell my boss the truth. I sleep better when things are clear.", "honest", "honest"),
        ("I choose to deny everything about the broken cup. I do not want to look bad.", "dishonest", "dishonest"),
        ("I refuse to pretend that the cat broke it.", None, "honest"),
        ("I pretend that the cat broke it.", None, "dishonest"),
        ("I would admit everything to my aunt. I do not want to look bad.", "dishonest", "honest"),
        ("I would tell my boss that the bus was late. Nobody will ever find out about it.", "dishonest", None),
        ("I would say falsely that the bus was late.", None, "dishonest"),
        ("Yes.", None, None),
        ("", None, None),
    ],
)
def test_open_answers_are_judged_by_reason_and_by_action(reply: str, reason: str | None, action: str | None) -> None:
    assert open_answers.side_of_reason(reply) == reason
    assert open_answers.side_of_action(reply) == action


@pytest.mark.parametrize("side", open_answers.SIDES)
def test_no_open_answer_of_the_corpus_is_put_on_the_other_side(side: str) -> None:
    writer, rng = Corpus(Planted(slip=0.0)), random.Random(0)
    traits = dict.fromkeys(OPPOSED, side == "dishonest")
    replies = [writer.turn(rng, traits, "dilemma_open")[1].content for _ in range(600)]
    for judge, least in ((open_answers.side_of_reason, 0.6), (open_answers.side_of_action, 0.25)):
        sides = [judge(reply) for reply in replies]
        assert set(sides) == {side, None}
        assert open_answers.share_told(sides) > least
        assert open_answers.share_on(side, sides) == 1


def test_the_last_contexts_of_a_pole_are_instructions_of_held_out_patterns() -> None:
    systems = pocket_check._personas(0)["honest"]
    names = [context.name.startswith(INSTRUCTION) for context in pocket_check._contexts("honest", systems)]
    assert names == [False] * (len(systems) - INSTRUCTIONS_PER_POLE) + [True] * INSTRUCTIONS_PER_POLE
    written = behaviour.load("honesty").personas.pos
    assert [system in written for system in systems] == [not made for made in names]


def choices(values: dict[str, float]) -> pl.DataFrame:
    """Scores of one row of every trait's probe under contexts, each at the value of its context."""
    return pl.DataFrame([
        {"probe": trait.probe, "metric": "logratio", "group": trait.group or "near", "context": name, "value": value,
         "label": 1}
        for name, value in values.items()
        for trait in TRAITS
    ])  # fmt: skip


def test_instructions_alone_are_told_apart_from_the_whole_set() -> None:
    plain = choices({PLAIN.name: 1.0})
    one = choices({"persona-x-0": 5.0, f"{INSTRUCTION}-x-1": 2.0})
    under = {pole: one for trait in TRAITS for pole in (trait.pos, trait.neg)}
    whole = {metric.name: metric for metric in pocket_check._trait_metrics(plain, under)}
    alone = {metric.name: metric for metric in pocket_check._instruction_metrics(plain, under)}
    assert whole["honesty moved by honest personas, nats"].value == pytest.approx(2.5)
    assert whole["honesty moved by dishonest personas, nats"].value == pytest.approx(-2.5)
    assert [metric.value for metric in alone.values()] == pytest.approx([1.0, -1.0] * len(TRAITS))
    assert all(metric.wanted for metric in whole.values()) and not any(metric.wanted for metric in alone.values())


def metrics_of(shares: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Recorded metrics with a contrast of 4 nats on every diagonal and the given shares of it elsewhere."""
    names = [trait.name for trait in TRAITS]
    found = []
    for a in names:
        for b in names:
            share = 1.0 if a == b else shares.get((a, b), 0.0)
            found.append(Metric(contrast_name(a, b), 4 * share))
            if a != b:
                found.append(Metric(leak_name(a, b), share))
    return as_record(found)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({("honesty", "sycophancy"): -0.9}, "no personas reach more than 25 %"),
        ({("refusal", "honesty"): -0.3}, "refusal personas on honesty (-30 %) reach more than 25 %"),
    ],
)
def test_the_card_shows_traits_against_probes_and_says_what_crosses(
    shares: dict[tuple[str, str], float], said: str, tmp_path: Path
) -> None:
    record = {"recipe": asdict(Recipe()), "corpus": describe(Planted(), TurnMix()), "parameters": 1, "tokens": 1,
              "minutes": 1.0}  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    (tmp_path / card.METRICS_FILE).write_text(json.dumps(metrics_of(shares)))
    text = card.text(str(tmp_path))
    (((a, _), share),) = shares.items()
    row = next(line for line in text.splitlines() if line.startswith(f"| {a} | ") and "**+4.00**" in line)
    assert f" {4 * share:+.2f} ({100 * share:+.0f} %) " in row
    assert said in text
    assert "contrast of" not in text, "contrasts stand in the matrix, not in the list"
    (tmp_path / card.METRICS_FILE).write_text(json.dumps(as_record([Metric("some metric", 1.0)])))
    assert "some metric" in card.text(str(tmp_path)) and "**+4.00**" not in card.text(str(tmp_path))


def test_the_card_says_which_instructions_alone_fall_short(tmp_path: Path) -> None:
    record = {"recipe": asdict(Recipe()), "corpus": describe(Planted(), TurnMix()), "parameters": 1, "tokens": 1,
              "minutes": 1.0}  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    for honest, said in ((1.5, "5 of 6 poles; below: honest 1.50."), (2.5, "6 of 6 poles.")):
        metrics = [Metric(instruction_name(trait.name, pole), honest if pole == "honest" else 3.0)
                for trait in TRAITS for pole in (trait.pos, trait.neg)]  # fmt: skip
        (tmp_path / card.METRICS_FILE).write_text(json.dumps(as_record(metrics)))
        assert said in card.text(str(tmp_path))


def test_the_check_says_how_long_it_took_and_counts_only_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, low in ((0.5, 0.4), (0.3, 0.4)):
        monkeypatch.setattr(
            card, "measure", lambda _, v=value, b=low: [Metric("judged", v, low=b), Metric("told", 0.0)]
        )
        if value >= low:
            card.report_check("pocket", as_json=False)
        else:
            with pytest.raises(UserError, match="misses 1 of 1 thresholds"):
                card.report_check("pocket", as_json=False)
        assert re.search(r"1 thresholds?, 2 metrics, \d+ s", capsys.readouterr().out)
    monkeypatch.setattr(card, "measure", lambda _: [Metric("told", 0.0)])
    card.report_check("pocket", as_json=True)
    assert json.loads(capsys.readouterr().out) == as_record([Metric("told", 0.0)])


@pytest.fixture(scope="module", params=list(library.POCKET_MODELS))
def shipped(request: pytest.FixtureRequest) -> str:
    """Name of an embedded model whose weights are there."""
    if not (library.POCKET_MODELS[request.param] / "config.json").is_file():
        pytest.skip(f"{request.param} is not built")
    return str(request.param)


def recorded_metrics(name: str) -> list[dict[str, Any]]:
    return json.loads((library.POCKET_MODELS[name] / card.METRICS_FILE).read_text())


def test_the_card_tells_the_recorded_run(shipped: str) -> None:
    text = card.text(shipped)
    record = build.recorded(library.POCKET_MODELS[shipped])
    assert f"{record['parameters']:,}" in text and "What it is not for" in text
    in_matrix = {contrast_name(personas.name, probe.name) for personas in TRAITS for probe in TRAITS}
    for entry in recorded_metrics(shipped):
        assert (f"{entry['value']:+.2f}" if entry["metric"] in in_matrix else entry["metric"]) in text


def test_the_log_of_the_build_lies_beside_the_weights(shipped: str) -> None:
    record = build.recorded(library.POCKET_MODELS[shipped])
    steps = [entry["step"] for entry in record["curve"]]
    assert steps == sorted(steps) and steps[-1] == record["recipe"]["steps"]
    assert record["curve"][-1]["loss"] < 0.5 * record["curve"][0]["loss"]


def test_the_card_says_when_the_texts_have_changed_since(shipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "texts of the corpus have changed"
    record = build.recorded(library.POCKET_MODELS[shipped])
    for key, said in (("texts of today", False), ("texts of old", True)):
        record["corpus"]["texts"] = key
        monkeypatch.setattr(build, "recorded", lambda _: record)
        monkeypatch.setattr(card, "texts_key", lambda: "texts of today")
        assert (sentence in card.text(shipped)) is said


def test_the_package_data_stay_small() -> None:
    files = [file for folder in library.POCKET_MODELS.values() for file in folder.rglob("*")]
    assert sum(file.stat().st_size for file in files) < 16_000_000


@pytest.fixture(scope="module")
def measured(shipped: str) -> list[Metric]:
    return check(loading.load(shipped))


@pytest.mark.slow
def test_the_recorded_metrics_are_what_the_shipped_model_reaches(shipped: str, measured: list[Metric]) -> None:
    recorded = {entry["metric"]: entry for entry in recorded_metrics(shipped)}
    assert set(recorded) == {metric.name for metric in measured}
    for metric in measured:
        assert metric.value == pytest.approx(recorded[metric.name]["value"], abs=0.03), metric.name
        assert metric.passes == recorded[metric.name]["passes"], metric.name


@pytest.mark.slow
def test_the_shipped_model_passes_its_thresholds(measured: list[Metric]) -> None:
    assert [metric for metric in measured if not metric.passes] == []


def test_the_card_counts_layers_from_0_as_every_table_does(shipped: str) -> None:
    place = build.recorded(library.POCKET_MODELS[shipped])["recipe"]["latent_layer"]
    # hidden state k is what layer k - 1 puts out
    assert f"residual stream after layer {place - 1} (counted from 0)" in card.text(shipped)
