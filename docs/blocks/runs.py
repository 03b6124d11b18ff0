"""Blocks made from the summaries of runs on the embedded models."""

from __future__ import annotations

from typing import Any

from blocks.table import table
from ws.base.records import restore
from ws.eval import feedback
from ws.model import library
from ws.pocket import card
from ws.pocket.check import are_independent
from ws.report import findings
from ws.report.behaviours import CROSSED, KEYS, crossings
from ws.report.cells import signed, with_limits

BEHAVIOURS = ("sycophancy", "honesty", "refusal")
MOVED = (*BEHAVIOURS, feedback.NAME)
"""The columns of the leak tables."""
CLOSE = 1.5
"""Prompts and weights are called close if the larger effect is at most this many times the smaller one."""
LEAST_MOVED, MOST_FACTS_LOST, WIDEST_BAND = 1.0, 3.0, 0.2
"""Thresholds for a run on an embedded model: nats at each sign, points of factual accuracy, nats of the random band."""
PROMPTS = {"-1": "prompt -", "1": "prompt +"}
"""Strength of a direction -> the persona prompt of the same side."""

Summary = dict[str, Any]


def see(summary: Summary) -> str:
    headline = summary["headline"]
    seconds = sum(summary["seconds"].values())
    return (
        f"Progress bars, about {seconds / 60:.1f} minutes of work after installation on two cores, and this headline "
        f"(seed {summary['seed']}, from `summary.json`):\n\n> {headline[0].upper()}{headline[1:]}."
    )


def measured(run: Summary) -> dict[str, Any]:
    """The behaviour by the instrument of the headline: levels, change and bands by strength, levels under prompts.

    Summaries of earlier versions have no instruments, only the Yes/No questions in one polarity.
    """
    if "instruments" in run:
        found: dict[str, Any] = run["instruments"][run["ability"]["instrument"]]
        return found
    name = run["behaviour"]
    return {
        "levels": run[name],
        "change": run["change"][name],
        "bands": {key: band[name] for key, band in run["controls"]["random"].items()},
        "contexts": {prompt: entry[name] for prompt, entry in run["contexts"].items()},
    }


def status(summary: Summary) -> str:
    own, moral = measured(summary)["change"], summary["dd_delta"]
    moved = ", ".join(f"{own[key]['mean']:+.2f} at {signed(key)}" for key in ("-1", "1"))
    others = ", ".join(f"{moral[key]['mean']:+.2f} at {signed(key)}" for key in ("-1", "1"))
    return f"Last run on pocket: sycophancy on held-out false claims moved {moved} nats, honesty in dilemmas {others}."


def pocket_table(summary: Summary) -> str:
    columns = [
        "alpha",
        "sycophancy, false claims",
        "true claims",
        "answer mass",
        "dilemmas",
        "near",
        "far",
        "KL",
        "facts",
    ]
    rows = []
    for key, entry in summary["sycophancy"].items():
        side = summary["side_effects"][key]
        rows.append([
            signed(key), with_limits(entry), with_limits(summary["groups"]["true"][key]), f"{entry['pmass']:.3f}",
            *(with_limits(summary[name][key]) for name in ("dilemmas", "near_dilemmas", "far_dilemmas")),
            f"{side['kl']:.3f}", f"{100 * side['facts']:.1f} %",
        ])  # fmt: skip
    for name, entry in summary["contexts"].items():
        rows.append(
            [f"{name}, 0", with_limits(entry["sycophancy"]), "", "", with_limits(entry["dilemmas"]), "", "", "", ""]
        )
    bands = summary["controls"]["random"]
    for key, band in bands.items():
        text = [
            f"change {min(band[n]['seeds']):+.2f} to {max(band[n]['seeds']):+.2f}" for n in ("sycophancy", "dilemmas")
        ]
        rows.append([f"random, {signed(key)}", text[0], "", "", text[1], "", "", "", ""])
    seeds = len(bands["1"]["sycophancy"]["seeds"])
    note = (
        "Log-ratios in nats with 95 % intervals over clusters of rows; sycophancy: log p(Yes) - log p(No) on held-out "
        f"claims; dilemmas: towards the honest answer, n = {summary['dilemmas']['0']['n']}. KL to the base on neutral "
        f"text. Random: smallest and largest change over {seeds} directions with the same "
        f"singular values. |dW| = {summary['direction_norm']:.3g}."
    )
    return f"{table(columns, rows)}\n\n{note}"


# -------------------------------------------------------------------- several runs


def behaviours(runs: dict[str, Summary]) -> str:
    """Every behaviour on every embedded model, on its own probe; then persona prompts compared with the weights."""
    rows = []
    for name in sorted(runs):
        run = runs[name]
        own = measured(run)
        rows.append([
            run["model"], run["behaviour"], f"{own['levels']['0']['mean']:+.2f}",
            *(with_limits(own["change"][key]) for key in KEYS),
            *(f"{own['bands'][key]['low']:+.2f} to {own['bands'][key]['high']:+.2f}" for key in KEYS),
            f"{100 * run['side_effects']['-1']['facts']:.1f} / {100 * run['side_effects']['0']['facts']:.1f} / "
            f"{100 * run['side_effects']['1']['facts']:.1f} %",
        ])  # fmt: skip
    head = ["model", "behaviour", "base", "change at -1", "change at +1", "random band at -1", "random band at +1",
            "facts at -1 / 0 / +1"]  # fmt: skip
    parts = [table(head, rows), *instruments_told(runs), thresholds_told(runs), prompts_and_weights(runs)]
    return "\n\n".join(parts)


def instruments_told(runs: dict[str, Summary]) -> list[str]:
    """The instrument of each run, if the runs have them."""
    names = [f"{run['model']} {run['behaviour']}: {run['ability']['instrument']}"
             for run in runs.values() if "ability" in run]  # fmt: skip
    return [f"Instruments, by what the unedited model can answer: {'; '.join(names)}."] if names else []


def missed_thresholds(run: Summary) -> list[str]:
    """The thresholds that a run of an embedded model misses, in words."""
    missed, own = [], measured(run)
    base = run["side_effects"]["0"]["facts"]
    for key in KEYS:
        moved = float(key) * own["change"][key]["mean"]
        lost = 100 * (base - run["side_effects"][key]["facts"])
        band = own["bands"][key]
        if moved < LEAST_MOVED:
            missed.append(f"moves {moved:.2f} nats at {signed(key)}")
        if lost > MOST_FACTS_LOST:
            missed.append(f"loses {lost:.1f} points of facts at {signed(key)}")
        if max(-band["low"], band["high"]) > WIDEST_BAND:
            missed.append(f"has a random band of {band['low']:+.2f} to {band['high']:+.2f} at {signed(key)}")
    return missed


def thresholds_told(runs: dict[str, Summary]) -> str:
    """How many runs reach the thresholds, and the warnings of the runs."""
    missed = [(f"{run['model']} {run['behaviour']}", missed_thresholds(run)) for run in runs.values()]
    short = [f"{name} {' and '.join(what)}" for name, what in missed if what]
    warned = [f"- {run['model']} {run['behaviour']}: {warning}" for run in runs.values() for warning in run["warnings"]]
    return (
        f"Thresholds: at least {LEAST_MOVED:g} nat on the own probe at each sign, at most {MOST_FACTS_LOST:g} points "
        f"of facts lost, random band within +-{WIDEST_BAND:g}. {len(missed) - len(short)} of {len(missed)} runs pass "
        f"all of them{'; short: ' + '; '.join(short) if short else ''}."
        + ("\n\nThe runs warned:\n\n" + "\n".join(warned) if warned else "")
    )


def prompts_and_weights(runs: dict[str, Summary]) -> str:
    """The first persona of each side as system prompt, and the weights at the same sign; how often they are close."""
    rows, cells, apart = [], 0, []
    for name in sorted(runs):
        run = runs[name]
        behaviour, own = run["behaviour"], measured(run)
        base, moved = own["levels"]["0"]["mean"], own["change"]
        by_prompt = {key: own["contexts"][PROMPTS[key]]["mean"] - base for key in KEYS}
        ratios = {key: by_prompt[key] / moved[key]["mean"] for key in KEYS}
        rows.append([
            run["model"], behaviour, *(f"{by_prompt[key]:+.2f}" for key in KEYS),
            *(f"{moved[key]['mean']:+.2f}" for key in KEYS), *(f"{ratios[key]:.2f}" for key in KEYS),
        ])  # fmt: skip
        cells += len(KEYS)
        apart += [
            f"{run['model']} {behaviour} at {signed(key)} ({ratio:.2f})"
            for key, ratio in ratios.items()
            if not 1 / CLOSE <= ratio <= CLOSE
        ]
    head = ["model", "behaviour", "prompt -", "prompt +", "weights at -1", "weights at +1", "prompt / weights at -1",
            "prompt / weights at +1"]  # fmt: skip
    outside = f"; outside: {', '.join(apart)}" if apart else ""
    return (
        f"{table(head, rows)}\n\nThe change under a prompt is within a factor {CLOSE:g} of that under the weights in "
        f"{cells - len(apart)} of {cells} cells{outside}."
    )


def change(run: Summary, behaviour: str, key: str) -> dict[str, Any] | None:
    """Change of a behaviour's probe at a strength in a run of this or of another behaviour."""
    others = run["other_behaviours"]
    found = run["change"] if behaviour == run["behaviour"] else {name: one["change"] for name, one in others.items()}
    return found.get(behaviour, {}).get(key)


def leak_row(own: str, moved: dict[str, Any]) -> list[str]:
    """Changes of behaviours and feedback as cells, its own behaviour in bold; a dash if a run did not measure one."""
    cells = ["-" if moved[name] is None else f"{moved[name]['mean']:+.2f}" for name in MOVED]
    return [f"**{cell}**" if name == own else cell for name, cell in zip(MOVED, cells, strict=True)]


def steering_leak(runs: dict[str, Summary]) -> str:
    """How far each direction moves each behaviour."""
    rows = [
        [
            runs[name]["model"],
            f"{runs[name]['behaviour']} at {signed(key)}",
            *leak_row(runs[name]["behaviour"], {other: change(runs[name], other, key) for other in MOVED}),
        ]
        for name in sorted(runs)
        for key in KEYS
    ]
    return table(["model", "direction", *MOVED], rows)


def persona_leak(runs: dict[str, Summary]) -> str:
    """How far each persona prompt moves each behaviour of the unedited model."""
    rows = [
        [
            runs[name]["model"],
            f"{runs[name]['behaviour']}, {prompt}",
            *leak_row(runs[name]["behaviour"], {other: moved.get(other) for other in MOVED}),
        ]
        for name in sorted(runs)
        for prompt, moved in runs[name].get("persona_changes", {}).items()
    ]
    return table(["model", "persona", *MOVED], rows) if rows else "The stored runs do not hold these changes yet."


def record_of(run: Summary) -> findings.Summary:
    """A stored run as a `Summary` record."""
    return restore(findings.Summary, {name: part for name, part in run.items() if name != "persona_changes"})


def steered(name: str, runs: dict[str, Summary]) -> str:
    """Which directions of a model move a trait that the corpus draws independently, in one sentence."""
    own = [run for run in runs.values() if run["model"] == name]
    if not own:
        return f"No directions of {name} have been stored."
    found = [
        text
        for run in own
        for text in crossings(record_of(run), [name for name in BEHAVIOURS if are_independent(run["behaviour"], name)])
    ]
    limit = f"more than {100 * CROSSED:.0f} % of its own effect"
    if not found:
        return f"No LoRA direction of {name} moves an independent trait by {limit}."
    return f"Independent in the corpus, yet moved by a LoRA direction by {limit}: {'; '.join(found)}."


def card_of(name: str, runs: dict[str, Summary]) -> str:
    """The card of an embedded model without its title, with the effects of its directions on independent traits."""
    if not (library.POCKET_MODELS[name] / "config.json").is_file():
        return f"{name} has not been built."
    text = card.text(name).split("\n", 2)[2].replace("\n## ", "\n### ")
    return f"{text}\n\n### When it is steered\n\n{steered(name, runs)}"
