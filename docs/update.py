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

from ws import models
from ws.pocket import build, card
from ws.report.cells import signed, with_limits

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"
FIRST = "pocket-sycophancy-lora-seed0"
SHAPE = RESULTS / "qwen3-0.6b-shape.json"
SWEEP = RESULTS / "pocket-sycophancy-sweep.md"
COMPARED = RESULTS / "pocket-sycophancy-compare"
ACROSS = RESULTS / "comparisons.md"
BEHAVIOURS = ("sycophancy", "honesty", "refusal")

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
        "pocket-card": card_of("pocket"),
        "gemma-card": card_of("pocket-gemma"),
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
        headline = (COMPARED / "comparison.md").read_text().split("\n")[2].strip("*")
        blocks["compare"] = f"On pocket, three training seeds, 20 random directions:\n\n> {headline}"
    for file in (ROOT / "README.md", *DOCS.glob("*.md")):
        file.write_text(fill(file.read_text(), blocks))


def store(run: Path) -> None:
    """Keep what documents need of a run, a comparison, the table over several, a rebuilt model, or a sweep."""
    if run.name == ACROSS.name:
        shutil.copy(run, ACROSS)
        return
    if (run / "comparison.md").is_file():
        for name in ("comparison.md", "pareto.png"):
            shutil.copy(run / name, COMPARED / name)
        return
    if (run / "sweep.md").is_file():
        shutil.copy(run / "sweep.md", SWEEP)
        return
    if (run / card.METRICS_FILE).is_file():
        record = build.recorded(run)
        kept = {"recipe": record["recipe"], "minutes": record["minutes"],
                "metrics": json.loads((run / card.METRICS_FILE).read_text())}  # fmt: skip
        name = f"rebuild-{record['recipe']['architecture']}-seed{record['recipe']['seed']}"
        (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        return
    summary = json.loads((run / "summary.json").read_text())
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


# -------------------------------------------------------------------- several runs


def behaviours(runs: dict[str, Summary]) -> str:
    """Every behaviour on every embedded model, at its own probe."""
    rows = []
    for name in sorted(runs):
        run = runs[name]
        own, change = run[run["behaviour"]], run["change"][run["behaviour"]]
        band = run["controls"]["random"]["1"][run["behaviour"]]
        rows.append([
            run["model"], run["behaviour"], f"{own['0']['mean']:+.2f}",
            *(with_limits(change[key]) for key in ("-1", "1")),
            f"{band['low']:+.2f} to {band['high']:+.2f}",
            f"{100 * run['side_effects']['-1']['facts']:.1f} / {100 * run['side_effects']['0']['facts']:.1f} / "
            f"{100 * run['side_effects']['1']['facts']:.1f} %",
        ])  # fmt: skip
    head = ["model", "behaviour", "base", "change at -1", "change at +1", "random band", "facts at -1 / 0 / +1"]
    return table(head, rows)


def steering_leak(runs: dict[str, Summary]) -> str:
    """How far each direction moves each behaviour."""
    rows = []
    for name in sorted(runs):
        run = runs[name]
        for key in ("-1", "1"):
            cells = []
            for behaviour in BEHAVIOURS:
                own = behaviour == run["behaviour"]
                change = run["change"][behaviour] if own else run["other_behaviours"][behaviour]["change"]
                cells.append(f"**{change[key]['mean']:+.2f}**" if own else f"{change[key]['mean']:+.2f}")
            rows.append([run["model"], f"{run['behaviour']} at {signed(key)}", *cells])
    return table(["model", "direction", *BEHAVIOURS], rows)


def card_of(name: str) -> str:
    """The card of an embedded model without its title."""
    if not (models.POCKET_MODELS[name] / "config.json").is_file():
        return f"{name} has not been built."
    return card.text(name).split("\n", 2)[2].replace("\n## ", "\n### ")


def rebuilds() -> str:
    """Metrics of builds with other seeds beside those of the shipped weights."""
    parts = []
    for path in sorted(RESULTS.glob("rebuild-*.json")):
        kept = json.loads(path.read_text())
        recipe = kept["recipe"]
        shipped_folder = next(f for f in models.POCKET_MODELS.values() if f.name == recipe["architecture"])
        shipped = {entry["metric"]: entry for entry in json.loads((shipped_folder / card.METRICS_FILE).read_text())}
        judged = [entry for entry in kept["metrics"] if entry["bar"]]
        reached = sum(entry["passes"] for entry in judged)
        rows = [
            [entry["metric"], f"{shipped[entry['metric']]['value']:.3f}", f"{entry['value']:.3f}", entry["bar"],
             "" if not entry["bar"] else "ok" if entry["passes"] else "**missed**"]
            for entry in kept["metrics"]
        ]  # fmt: skip
        seed = f"seed {recipe['seed']}"
        parts.append(
            f"{recipe['architecture']}, {seed}, {kept['minutes']:g} minutes: {reached} of {len(judged)} "
            f"bars reached.\n\n{table(['metric', 'shipped', seed, 'bar', ''], rows)}"
        )
    return "\n\n".join(parts) or "No rebuild has been made."


def families() -> str:
    """The support matrix, from the check that the tests make on small random models."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families import support_matrix  # noqa: PLC0415 - lives with the tests
    from ws import tiny  # noqa: PLC0415

    networks = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*tiny.ARCHITECTURES, "mistral", "phi3", "gpt-neox", "qwen3-moe"):
            tiny.make(name, Path(scratch) / name, layers=4)
            networks[name] = models.load(str(Path(scratch) / name)).network
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
