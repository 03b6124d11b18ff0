"""Rewrite the marked blocks of README.md and docs/*.md from finished runs.

    python docs/update.py out/pocket/*/lora/seed0 out/pocket-gemma/*/lora/seed0 REBUILT_MODEL
    python docs/update.py out/pocket/sycophancy out/pocket/sycophancy/compare out/comparisons.json
    python docs/update.py out/pocket/sycophancy/lora/seed0/subspace_per_layer.csv

It stores the numbers of its arguments in docs/results: runs, an embedded model that was built again, a sweep, a
comparison, the table over several comparisons, or the alignment of a run's direction. The figure of the first
sycophancy run on pocket goes to docs/images. Then it fills the blocks between `begin: NAME` and `end: NAME` comments,
and writes the page of the comparison. Without arguments it uses the stored results. tests/test_update.py makes every
block again and compares.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
from blocks import checks, comparisons, rebuilds, runs, smollm2
from blocks.alignment import alignment
from blocks.fast_paths import fast_paths
from blocks.llama_cpp import llama_cpp
from blocks.serving import serving

from ws.base.records import plain, restore
from ws.base.store import content_key
from ws.comparing import page
from ws.comparing.across import Across
from ws.comparing.findings import Findings
from ws.model.library import SMOLLM2
from ws.pocket import build, card
from ws.report.behaviours import persona_changes
from ws.runs import sweep_tables
from ws.runs.sweep_tables import SweepTables

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"
FIRST = "pocket-sycophancy-lora-seed0"
SHAPE = RESULTS / "qwen3-0.6b-shape.json"
SWEEP = RESULTS / "pocket-sycophancy-sweep.json"
COMPARED = RESULTS / "pocket-sycophancy-compare"
ACROSS = RESULTS / "comparisons.json"
ALIGNMENT = RESULTS / "alignment.json"
PATHS = RESULTS / "fast-paths.json"
LLAMA_CPP = RESULTS / "llama-cpp.json"
SERVING = RESULTS / "serving.json"
REAL = RESULTS / "smollm2"
SEARCH = REAL / "search.jsonl"
LARGEST_KEPT = 2_000_000
"""Bytes up to which the numbers of a comparison are stored with its pages."""
MARKED = re.compile(r"(<!-- begin: (?P<name>\S+) -->\n)(?P<content>.*?)\n?(<!-- end: (?P=name) -->)", re.DOTALL)


def main(arguments: list[str]) -> None:
    for argument in arguments:
        store(Path(argument))
    for file in documents():
        file.write_text(MARKED.sub(_filled, file.read_text()))
    if (COMPARED / "comparison.json").is_file():
        (COMPARED / "comparison.md").write_text(page.markdown(stored_comparison()))


def documents() -> list[Path]:
    """The files that may hold blocks."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def _filled(match: re.Match[str]) -> str:
    return f"{match[1]}{block(match['name'])}\n{match[4]}"


@cache
def block(name: str) -> str:
    """The content of a block, from the stored results."""
    if name not in BLOCKS:
        raise SystemExit(f"there is no block {name!r}; known: {', '.join(BLOCKS)}")
    return BLOCKS[name]()


# -------------------------------------------------------------------- what is stored


def stored_runs() -> dict[str, runs.Summary]:
    """The summaries of runs by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("pocket*-seed*.json"))}


def stored_rebuilds() -> list[dict[str, Any]]:
    """The stored records of embedded models that were built again."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("rebuild-*.json"))]


def stored_comparison() -> Findings:
    """The comparison on pocket."""
    return restore(Findings, json.loads((COMPARED / "comparison.json").read_text()))


def stored_alignment() -> dict[str, list[dict[str, Any]]]:
    """The rows of `ws subspace` by run; empty before the first."""
    return json.loads(ALIGNMENT.read_text()) if ALIGNMENT.is_file() else {}


def stored_paths() -> list[dict[str, Any]]:
    """What fast paths gain; empty before the first measurement."""
    return json.loads(PATHS.read_text()) if PATHS.is_file() else []


def stored_agreements() -> list[dict[str, Any]]:
    """How well llama.cpp agrees with transformers on exported files; empty before the first measurement."""
    return json.loads(LLAMA_CPP.read_text()) if LLAMA_CPP.is_file() else []


def stored_throughputs() -> list[dict[str, Any]]:
    """Throughput of servers at mixed strengths; empty before the first measurement."""
    return json.loads(SERVING.read_text()) if SERVING.is_file() else []


def stored_real() -> dict[str, dict[str, Any]]:
    """The summaries of runs on SmolLM2 by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(REAL.glob("*-seed*.json"))}


def stored_search() -> list[dict[str, Any]]:
    """The lines of the recipe search on SmolLM2."""
    return [json.loads(line) for line in SEARCH.read_text().splitlines()] if SEARCH.is_file() else []


def stored_data() -> dict[str, dict[str, Any]]:
    """What public data sets say about the first runs on SmolLM2, by behaviour and probe."""
    return {path.stem.removeprefix("data-"): json.loads(path.read_text()) for path in sorted(REAL.glob("data-*.json"))}


BLOCKS: Mapping[str, Callable[[], str]] = {
    "see": lambda: runs.see(stored_runs()[FIRST]),
    "status": lambda: runs.status(stored_runs()[FIRST]),
    "pocket": lambda: runs.pocket_table(stored_runs()[FIRST]),
    "behaviours": lambda: runs.behaviours(stored_runs()),
    "steering-leak": lambda: runs.steering_leak(stored_runs()),
    "persona-leak": lambda: runs.persona_leak(stored_runs()),
    "pocket-card": lambda: runs.card_of("pocket", stored_runs()),
    "gemma-card": lambda: runs.card_of("pocket-gemma", stored_runs()),
    "families": checks.families,
    "rebuild": lambda: rebuilds.rebuilds(stored_rebuilds()),
    "shape": lambda: checks.shape_table(json.loads(SHAPE.read_text())),
    "sweep": lambda: sweep_tables.markdown(restore(SweepTables, json.loads(SWEEP.read_text()))),
    "across": lambda: comparisons.across(restore(Across, json.loads(ACROSS.read_text()))),
    "compare": lambda: comparisons.compared(stored_comparison()),
    "contrast": lambda: comparisons.contrast(stored_comparison()),
    "winners": lambda: comparisons.winners(stored_comparison()),
    "alignment": lambda: alignment(stored_alignment()),
    "paths": lambda: fast_paths(stored_paths()),
    "smollm2-shown": lambda: smollm2.shown(stored_real()),
    "real-and-planted": lambda: smollm2.columns(stored_real(), stored_runs()),
    "smollm2-runs": lambda: smollm2.runs_table(stored_real()),
    "smollm2-minutes": lambda: smollm2.minutes(stored_real()),
    "smollm2-wordings": lambda: smollm2.wordings(stored_real()),
    "smollm2-instruments": lambda: smollm2.instruments(stored_real()),
    "smollm2-data": lambda: smollm2.public_data(stored_data()),
    "smollm2-replication": lambda: smollm2.replication(
        stored_real(), stored_data(), stored_alignment().get("smollm2-sycophancy-lora-seed0", [])
    ),
    "smollm2-search": lambda: smollm2.search(stored_search()),
    "llama-cpp": lambda: llama_cpp(stored_agreements()),
    "serving": lambda: serving(stored_throughputs()),
}


# -------------------------------------------------------------------- storing


def store(given: Path) -> None:
    """Store what the documents need: of a run, comparison, table of comparisons, rebuilt model, sweep or alignment."""
    if given.name == ACROSS.name:
        _write(ACROSS, plain(restore(Across, json.loads(given.read_text()))))
    elif given.name.startswith("measures-"):
        _store_measures(given)
    elif given.suffix == ".csv":
        _store_alignment(given)
    elif (given / "comparison.json").is_file():
        _store_comparison(given)
    elif (given / "sweep.json").is_file():
        _write(SWEEP, plain(restore(SweepTables, json.loads((given / "sweep.json").read_text()))))
    elif (given / card.METRICS_FILE).is_file():
        _store_rebuild(given)
    else:
        _store_run(given)


def _store_measures(file: Path) -> None:
    """The measures of a public data set; of its source only the name, because folders differ between machines."""
    behaviour, probe = file.resolve().parents[2].name, file.stem.removeprefix("measures-")
    record = json.loads(file.read_text())
    record["data"]["source"] = Path(record["data"]["source"]).name
    _write(REAL / f"data-{behaviour}-{probe}.json", record)


def _store_comparison(folder: Path) -> None:
    text = (folder / "comparison.json").read_text()
    if (size := len(text.encode())) >= LARGEST_KEPT:
        # then nothing is stored: the pages of this comparison must not be mixed with the numbers of another
        raise SystemExit(f"{folder / 'comparison.json'}: {size} bytes are too many to keep (at most {LARGEST_KEPT})")
    found = restore(Findings, json.loads(text))
    _write(COMPARED / "comparison.json", page.as_json(found))
    (COMPARED / "comparison.md").write_text(page.markdown(found))
    shutil.copy(folder / "pareto.png", COMPARED / "pareto.png")


def _store_alignment(file: Path) -> None:
    """The rows of `subspace_per_layer.csv`, under the name of its run."""
    name = _name_of(json.loads((file.parent / "summary.json").read_text()))
    rows = pl.read_csv(file, infer_schema_length=None).to_dicts()
    _write(ALIGNMENT, dict(sorted({**stored_alignment(), name: rows}.items())))


def _store_rebuild(folder: Path) -> None:
    record = build.recorded(folder)
    kept = {"recipe": record["recipe"], "minutes": record["minutes"], "texts": record["corpus"].get("texts"),
            "metrics": json.loads((folder / card.METRICS_FILE).read_text())}  # fmt: skip
    name = f"rebuild-{record['recipe']['architecture']}-seed{record['recipe']['seed']}"
    if other := rebuilds.other_than_shipped(kept):
        name += f"-{content_key({key: record['recipe'][key] for key in other})[:6]}"
    _write(RESULTS / f"{name}.json", kept)


def _store_run(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    scores = pl.read_parquet(folder / "scores.parquet")
    summary["persona_changes"] = plain(persona_changes(scores, summary["behaviour"], summary["headline_group"]))
    name = _name_of(summary)
    if summary["model"] == SMOLLM2:
        _write(REAL / f"{name.removeprefix('smollm2-')}.json", summary)
        return
    _write(RESULTS / f"{name}.json", summary)
    if name == FIRST:
        shutil.copy(folder / "dose_response.png", DOCS / "images" / "dose_response.png")


def _name_of(summary: runs.Summary) -> str:
    return (
        f"{summary['model']}-{summary['behaviour']}-{summary['adapter']}-seed{summary['seed']}"
        + (f"-data{summary['data_seed']}" if summary.get("data_seed") else "")
        + ("" if summary.get("recipe", "own") == "own" else f"-{summary['recipe']}")
    )


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
