"""Rewrite the marked blocks of README.md and docs/*.md from finished runs; nobody types a figure.

    python docs/update.py out/pocket/*/lora/seed0 out/pocket-gemma/*/lora/seed0 REBUILT_MODEL

Copies the summary of every run to docs/results, the figure of the first sycophancy run on pocket to docs/images and the
metrics of an embedded model that was built again with another seed, then fills the blocks between `begin: NAME` and
`end: NAME` comments. Without an argument the stored results are used.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from ws.base.store import content_key
from ws.eval import feedback
from ws.model import loading
from ws.pocket import build, card
from ws.pocket.check import are_independent
from ws.report.behaviours import CROSSED, KEYS, change, crossings, persona_changes
from ws.report.cells import signed, with_limits

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"
FIRST = "pocket-sycophancy-lora-seed0"
SHAPE = RESULTS / "qwen3-0.6b-shape.json"
SWEEP = RESULTS / "pocket-sycophancy-sweep.md"
COMPARED = RESULTS / "pocket-sycophancy-compare"
LARGEST_KEPT = 1_000_000
"""Bytes up to which the numbers of a comparison are kept beside its pages."""
ACROSS = RESULTS / "comparisons.md"
BEHAVIOURS = ("sycophancy", "honesty", "refusal")
MOVED = (*BEHAVIOURS, feedback.NAME)
"""What the leak tables have columns for."""
CLOSE = 1.5
"""Prompts and weights are called close where the larger effect is at most so many times the smaller one."""
LEAST_MOVED, MOST_FACTS_LOST, WIDEST_BAND = 1.0, 3.0, 0.2
"""Bars of a run on an embedded model: nats at each sign, points of factual accuracy, nats of the random band."""
PROMPTS = {"-1": "prompt -", "1": "prompt +"}
"""Strength of a direction -> the persona prompt of the same side."""

Summary = dict[str, Any]


def main(arguments: list[str]) -> None:
    for argument in arguments:
        store(Path(argument))
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("pocket*-seed*.json"))}
    first = runs[FIRST]
    blocks = {
        "see": see(first),
        "status": status(first),
        "pocket": pocket_table(first),
        "behaviours": behaviours(runs),
        "steering-leak": steering_leak(runs),
        "persona-leak": persona_leak(runs),
        "pocket-card": card_of("pocket", runs),
        "gemma-card": card_of("pocket-gemma", runs),
        "families": families(),
        "rebuild": rebuilds(),
    }
    if SHAPE.is_file():
        blocks["shape"] = shape_table(json.loads(SHAPE.read_text()))
    if SWEEP.is_file():
        blocks["sweep"] = SWEEP.read_text().split("\n", 2)[2].strip()
    if ACROSS.is_file():
        blocks["across"] = ACROSS.read_text().split("\n", 2)[2].strip()
    if COMPARED.is_dir():
        blocks["compare"] = compared(COMPARED)
    for file in (ROOT / "README.md", *DOCS.glob("*.md")):
        file.write_text(fill(file.read_text(), blocks))


def store(run: Path) -> None:
    """Keep what documents need of a run, a comparison, the table over several, a rebuilt model, or a sweep."""
    if run.name == ACROSS.name:
        shutil.copy(run, ACROSS)
        return
    if (run / "comparison.md").is_file():
        if (size := (run / "comparison.json").stat().st_size) >= LARGEST_KEPT:
            # nothing is kept then: pages of this comparison must not stand beside the numbers of another
            raise SystemExit(f"{run / 'comparison.json'}: {size} bytes are too many to keep (at most {LARGEST_KEPT})")
        for name in ("comparison.md", "comparison.json", "pareto.png"):
            shutil.copy(run / name, COMPARED / name)
        return
    if (run / "sweep.md").is_file():
        shutil.copy(run / "sweep.md", SWEEP)
        return
    if (run / card.METRICS_FILE).is_file():
        record = build.recorded(run)
        kept = {"recipe": record["recipe"], "minutes": record["minutes"], "texts": record["corpus"].get("texts"),
                "metrics": json.loads((run / card.METRICS_FILE).read_text())}  # fmt: skip
        name = f"rebuild-{record['recipe']['architecture']}-seed{record['recipe']['seed']}"
        if other := other_than_shipped(kept):
            name += f"-{content_key({key: record['recipe'][key] for key in other})[:6]}"
        (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        return
    summary = json.loads((run / "summary.json").read_text())
    scores = pl.read_parquet(run / "scores.parquet")
    summary["persona_changes"] = persona_changes(scores, summary["behaviour"], summary["headline_group"])
    name = f"{summary['model']}-{summary['behaviour']}-{summary['adapter']}-seed{summary['seed']}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    if name == FIRST:
        shutil.copy(run / "dose_response.png", DOCS / "images" / "dose_response.png")


def fill(text: str, blocks: dict[str, str]) -> str:
    """The text with every marked block replaced."""
    for name, content in blocks.items():
        pattern = rf"(<!-- begin: {name} -->\n).*?\n?(<!-- end: {name} -->)"
        text = re.sub(pattern, lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text, flags=re.DOTALL)
    return text


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -------------------------------------------------------------------- one run


def see(summary: Summary) -> str:
    headline = summary["headline"]
    seconds = sum(summary["seconds"].values())
    return (
        f"Progress bars, about {seconds / 60:.1f} minutes of work after installation on two cores, and this headline "
        f"(seed {summary['seed']}, from `summary.json`):\n\n> {headline[0].upper()}{headline[1:]}."
    )


def status(summary: Summary) -> str:
    own, moral = summary["change"]["sycophancy"], summary["dd_delta"]
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
        f"text. Random: smallest and largest change over {seeds} directions of the same "
        f"norm and rank. |dW| = {summary['direction_norm']:.3g}."
    )
    return f"{table(columns, rows)}\n\n{note}"


# -------------------------------------------------------------------- a comparison


def compared(folder: Path) -> str:
    """The headline of the stored comparison, under the replicates that it rests on where its numbers are stored."""
    headline = "> " + (folder / "comparison.md").read_text().split("\n")[2].strip("*")
    numbers = folder / "comparison.json"
    return f"{replicates_told(json.loads(numbers.read_text()))}\n\n{headline}" if numbers.is_file() else headline


def replicates_told(comparison: Summary) -> str:
    """Training seeds of the weight directions, and random directions."""
    entries = [entry for entry in comparison["own_strength"] if "+" in entry]
    seeds = {entry["name"]: len(entry["+"]["own"]["seeds"]) for entry in entries}
    trained = max(seeds[entry["name"]] for entry in entries if entry["kind"] == "weights")
    return f"On pocket, training seeds: {trained}, random directions: {seeds['random']}."


# -------------------------------------------------------------------- several runs


def behaviours(runs: dict[str, Summary]) -> str:
    """Every behaviour on every embedded model, at its own probe, then persona prompts beside the weights."""
    rows = []
    for name in sorted(runs):
        run = runs[name]
        own, moved = run[run["behaviour"]], run["change"][run["behaviour"]]
        bands = [run["controls"]["random"][key][run["behaviour"]] for key in KEYS]
        rows.append([
            run["model"], run["behaviour"], f"{own['0']['mean']:+.2f}",
            *(with_limits(moved[key]) for key in KEYS),
            *(f"{band['low']:+.2f} to {band['high']:+.2f}" for band in bands),
            f"{100 * run['side_effects']['-1']['facts']:.1f} / {100 * run['side_effects']['0']['facts']:.1f} / "
            f"{100 * run['side_effects']['1']['facts']:.1f} %",
        ])  # fmt: skip
    head = ["model", "behaviour", "base", "change at -1", "change at +1", "random band at -1", "random band at +1",
            "facts at -1 / 0 / +1"]  # fmt: skip
    return f"{table(head, rows)}\n\n{bars_told(runs)}\n\n{prompts_and_weights(runs)}"


def missed_bars(run: Summary) -> list[str]:
    """What a run of an embedded model misses of its bars, in words."""
    missed = []
    base = run["side_effects"]["0"]["facts"]
    for key in KEYS:
        moved = float(key) * run["change"][run["behaviour"]][key]["mean"]
        lost = 100 * (base - run["side_effects"][key]["facts"])
        band = run["controls"]["random"][key][run["behaviour"]]
        if moved < LEAST_MOVED:
            missed.append(f"moves {moved:.2f} nats at {signed(key)}")
        if lost > MOST_FACTS_LOST:
            missed.append(f"loses {lost:.1f} points of facts at {signed(key)}")
        if max(-band["low"], band["high"]) > WIDEST_BAND:
            missed.append(f"has a random band of {band['low']:+.2f} to {band['high']:+.2f} at {signed(key)}")
    return missed


def bars_told(runs: dict[str, Summary]) -> str:
    """How many runs reach the bars, and what the runs themselves warned of."""
    missed = [(f"{run['model']} {run['behaviour']}", missed_bars(run)) for run in runs.values()]
    short = [f"{name} {' and '.join(what)}" for name, what in missed if what]
    warned = [f"- {run['model']} {run['behaviour']}: {warning}" for run in runs.values() for warning in run["warnings"]]
    return (
        f"Bars: at least {LEAST_MOVED:g} nat on the own probe at each sign, at most {MOST_FACTS_LOST:g} points of "
        f"facts lost, random band within +-{WIDEST_BAND:g}. {len(missed) - len(short)} of {len(missed)} runs reach all "
        f"of them{'; short: ' + '; '.join(short) if short else ''}."
        + ("\n\nThe runs warned:\n\n" + "\n".join(warned) if warned else "")
    )


def prompts_and_weights(runs: dict[str, Summary]) -> str:
    """The first persona of each side as system prompt beside the weights at the same sign; how often they are close."""
    rows, cells, apart = [], 0, []
    for name in sorted(runs):
        run = runs[name]
        behaviour = run["behaviour"]
        base, moved = run[behaviour]["0"]["mean"], run["change"][behaviour]
        by_prompt = {key: run["contexts"][PROMPTS[key]][behaviour]["mean"] - base for key in KEYS}
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


def leak_row(own: str, moved: dict[str, Any]) -> list[str]:
    """Changes of behaviours and feedback as cells, the own one in bold; a dash where a run did not measure one."""
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


def steered(name: str, runs: dict[str, Summary]) -> str:
    """Which directions of a model move a trait that the corpus draws independently, in one sentence."""
    own = [run for run in runs.values() if run["model"] == name]
    if not own:
        return f"No directions of {name} have been stored."
    found = [
        text
        for run in own
        for text in crossings(run, [other for other in BEHAVIOURS if are_independent(run["behaviour"], other)])
    ]
    limit = f"more than {100 * CROSSED:.0f} % of its own effect"
    if not found:
        return f"No LoRA direction of {name} moves an independent trait by {limit}."
    return f"Independent in the corpus, yet moved by a LoRA direction by {limit}: {'; '.join(found)}."


def card_of(name: str, runs: dict[str, Summary]) -> str:
    """The card of an embedded model without its title, with what its directions do to independent traits."""
    if not (loading.POCKET_MODELS[name] / "config.json").is_file():
        return f"{name} has not been built."
    text = card.text(name).split("\n", 2)[2].replace("\n## ", "\n### ")
    return f"{text}\n\n### When it is steered\n\n{steered(name, runs)}"


def rebuilds() -> str:
    """Builds with other seeds: a sentence each, then their metrics beside those of the shipped weights."""
    kept = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("rebuild-*.json"))]
    if not kept:
        return "No rebuild has been made."
    return "\n\n".join([*(f"- {rebuild_told(one)}" for one in kept), *(rebuild_table(one) for one in kept)])


def rebuild_told(kept: dict[str, Any]) -> str:
    """How many bars a rebuild reached, which it missed, and what beside the seed differs from the shipped weights."""
    recipe, (name, folder) = kept["recipe"], shipped_of(kept)
    shipped = build.recorded(folder)
    judged = [entry for entry in kept["metrics"] if entry["bar"]]
    missed = [
        f"{entry['metric']} ({entry['value']:.3f}, bar {entry['bar']})" for entry in judged if not entry["passes"]
    ]
    other = other_than_shipped(kept)
    texts = kept.get("texts")
    if texts is not None and texts != shipped["corpus"].get("texts"):
        other.append("texts")
    made = (
        f"with other {', '.join(other)} than the shipped weights had" if other else "the recipe of the shipped weights"
    ) + (" (whether the texts were the same is not recorded)" if texts is None else "")
    misses = f"; missed: {'; '.join(missed)}" if missed else ""
    return (
        f"{name} ({recipe['architecture']}), seed {recipe['seed']}, {made}, {kept['minutes']:g} minutes: "
        f"{len(judged) - len(missed)} of {len(judged)} bars reached{misses}."
    )


def other_than_shipped(kept: dict[str, Any]) -> list[str]:
    """The parts of a rebuild's recipe, beside the seed, that differ from those of the shipped weights."""
    recipe, shipped = kept["recipe"], build.recorded(shipped_of(kept)[1])["recipe"]
    return sorted(key for key in recipe if key != "seed" and recipe[key] != shipped.get(key))


def rebuild_table(kept: dict[str, Any]) -> str:
    """All metrics of a rebuild beside those of the shipped weights; a dash where one has not been measured."""
    name, folder = shipped_of(kept)
    shipped, again = (
        {entry["metric"]: entry for entry in metrics}
        for metrics in (json.loads((folder / card.METRICS_FILE).read_text()), kept["metrics"])
    )
    rows = []
    for metric in dict.fromkeys([*shipped, *again]):
        values = ["-" if metric not in found else f"{found[metric]['value']:.3f}" for found in (shipped, again)]
        entry = again.get(metric, {"bar": "", "passes": True})
        rows.append([metric, *values, entry["bar"], card.verdict(entry["bar"], entry["passes"])])
    other = other_than_shipped(kept)
    again_is = f"seed {kept['recipe']['seed']}" + (f", other {', '.join(other)}" if other else "")
    return table(["metric", f"{name}, shipped", again_is, "bar", ""], rows)


def shipped_of(kept: dict[str, Any]) -> tuple[str, Path]:
    """Name and folder of the shipped model with the architecture of a rebuild."""
    return next(item for item in loading.POCKET_MODELS.items() if item[1].name == kept["recipe"]["architecture"])


def families() -> str:
    """The support matrix, from the check that the tests make on small random models."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families import support_matrix  # noqa: PLC0415 - lives with the tests
    from ws.pocket import tiny  # noqa: PLC0415

    networks = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*tiny.ARCHITECTURES, "mistral", "phi3", "gpt-neox", "qwen3-moe"):
            tiny.make(name, Path(scratch) / name, layers=4)
            networks[name] = loading.load(str(Path(scratch) / name)).network
    return support_matrix(networks)


def shape_table(result: dict[str, Any]) -> str:
    stages = "\n".join(f"| {name} | {seconds:.0f} |" for name, seconds in result["seconds"].items())
    return (
        f"{result['parameters']:,} random parameters in {result['dtype']}, {result['grid']}. Whole process "
        f"{result['wall_seconds']:.0f} s, peak memory {result['peak_gib']:.1f} GiB, run folder "
        f"{result['folder_mib']:.0f} MiB.\n\n| stage | seconds |\n|---|---|\n{stages}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
