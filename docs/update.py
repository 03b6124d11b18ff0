"""Rewrite the marked blocks of README.md and docs/*.md from finished runs.

    python docs/update.py out/pocket/*/lora/seed0 out/pocket-gemma/*/lora/seed0 REBUILT_MODEL
    python docs/update.py out/pocket/sycophancy out/pocket/sycophancy/compare out/comparisons.json
    python docs/update.py out/pocket/generalisation/lora out/pocket/sycophancy/{subspace,ablations}.json
    python docs/update.py out/pocket/sycophancy/lora/seed0/subspace_per_layer.csv

It stores the numbers of its arguments in docs/results: runs, an embedded model that was built again, a sweep, a
comparison, the table over several comparisons, a study of generalisation, of bases or of ablations, or the alignment
of a run's direction. Then it fills the blocks between `begin: NAME` and
`end: NAME` comments, and writes the page of the comparison. Without arguments it uses the stored results.
tests/test_update.py makes every block again and compares.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from blocks import checks, comparisons, location, rebuilds, runs, smollm2
from blocks.alignment import alignment
from blocks.fast_paths import fast_paths
from blocks.llama_cpp import llama_cpp
from blocks.scale import scale
from blocks.serving import serving

from ws.base.files import content_key
from ws.base.records import plain, restore
from ws.comparing import generalisation_page, page
from ws.comparing.across import Across
from ws.comparing.findings import KINDS, Findings
from ws.comparing.generalisation import Generalisation
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
ACROSS = RESULTS / "comparisons.json"
ALIGNMENT = RESULTS / "alignment.json"
PATHS = RESULTS / "fast-paths.json"
LLAMA_CPP = RESULTS / "llama-cpp.json"
SERVING = RESULTS / "serving.json"
WAITS = RESULTS / "first-token.json"
SCALE = RESULTS / "scale.json"
REAL = RESULTS / "smollm2"
REAL_SWEEP = REAL / "sweep.json"
SEARCH = REAL / "search.jsonl"
POCKET_SEARCH = RESULTS / "pocket-search.jsonl"
COMPARED = {"": "pocket", "gemma-": "pocket-gemma", "smollm2-": f"{SMOLLM2}-variants-activations",
            "smollm2-earlier-": SMOLLM2}  # fmt: skip
"""Comparisons of methods for sycophancy, by how the names of their blocks begin: the model, and the kinds of methods
that are compared with weight directions if they are not all. On SmolLM2, all kinds were compared with the direction of
an earlier recipe."""
LARGEST_KEPT = 3_000_000
"""Bytes up to which the numbers of a comparison are stored with its pages."""
RANKED_AXES = ("block", "written", "read")
RANKED_COLUMNS = ("family", "basis", "metric", "runs", "percent", "percent_low", "percent_high", "null_percent", "z",
                  "verdict")  # fmt: skip
"""What is stored of a study of bases."""
MARKED = re.compile(r"(<!-- begin: (?P<name>\S+) -->\n)(?P<content>.*?)\n?(<!-- end: (?P=name) -->)", re.DOTALL)


def main(arguments: list[str]) -> None:
    for argument in arguments:
        store(Path(argument))
    for file in documents():
        file.write_text(MARKED.sub(_filled, file.read_text()))
    for name in COMPARED.values():
        if (found := stored_comparison(name)) is not None:
            (place_of_comparison(name) / "comparison.md").write_text(page.markdown(found))


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


def place_of_comparison(name: str) -> Path:
    """The folder of a comparison of methods."""
    return RESULTS / f"{name}-sycophancy-compare"


def name_of_comparison(found: Findings) -> str:
    """Its model; if it does not have all kinds of methods, also those that it has beside weight directions."""
    kinds = [] if set(found.best) >= set(KINDS) else [kind for kind in found.best if kind != "weights"]
    return "-".join([found.model, *kinds])


def stored_comparison(name: str) -> Findings | None:
    """A comparison of methods; None before it was made."""
    file = place_of_comparison(name) / "comparison.json"
    return restore(Findings, json.loads(file.read_text())) if file.is_file() else None


def stored_sweep(file: Path = SWEEP) -> SweepTables | None:
    """The sweep over families on pocket, or the one on the real model; None before it was made."""
    return restore(SweepTables, json.loads(file.read_text())) if file.is_file() else None


def stored_generalisations() -> list[Generalisation]:
    """What directions do to other probes, by model."""
    files = sorted(RESULTS.glob("*-generalisation.json"))
    return [restore(Generalisation, json.loads(path.read_text())) for path in files]


def stored_location(study: str) -> list[dict[str, Any]]:
    """Studies of where directions live, `subspace` or `ablations`, by model; the real one first."""
    files = sorted(RESULTS.glob(f"*-where/{study}.json"), key=lambda path: not path.parent.name.startswith(SMOLLM2))
    return [json.loads(path.read_text()) for path in files]


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


def stored_waits() -> list[dict[str, Any]]:
    """Waits for the first token by model; empty before the first measurement."""
    return json.loads(WAITS.read_text()) if WAITS.is_file() else []


def stored_scale() -> dict[str, Any] | None:
    """Costs of many runs on Ray; None before the first measurement."""
    return json.loads(SCALE.read_text()) if SCALE.is_file() else None


def run_minutes() -> float:
    """Minutes of one run of the sweep on SmolLM2, which used one thread."""
    rows = [] if (found := stored_sweep(REAL_SWEEP)) is None else found.per_run
    return statistics.mean(row["seconds"] for row in rows) / 60 if rows else float("nan")


def stored_real() -> dict[str, dict[str, Any]]:
    """The summaries of runs on SmolLM2 by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(REAL.glob("*-seed*.json"))}


def stored_earlier() -> dict[str, dict[str, Any]]:
    """The summaries of runs with a recipe that a later one replaced; other pages build on them."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((REAL / "earlier").glob("*.json"))}


def stored_search(file: Path = SEARCH) -> list[dict[str, Any]]:
    """The lines of a recipe search."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def stored_data() -> dict[str, dict[str, Any]]:
    """What public data sets say about the first runs on SmolLM2, by behaviour and probe."""
    return {path.stem.removeprefix("data-"): json.loads(path.read_text()) for path in sorted(REAL.glob("data-*.json"))}


Stored = TypeVar("Stored")


def _made(make: Callable[[Stored], str], stored: Stored | None) -> str:
    return "Not measured yet." if stored is None else make(stored)


def _of_comparison(name: str, make: Callable[[Findings], str]) -> str:
    return _made(make, stored_comparison(name))


BLOCKS: Mapping[str, Callable[[], str]] = {
    "pocket-search": lambda: comparisons.dev_search(stored_search(POCKET_SEARCH)),
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
    "sweep": lambda: _made(sweep_tables.markdown, stored_sweep()),
    "across": lambda: comparisons.across(restore(Across, json.loads(ACROSS.read_text()))),
    **{
        f"{start}{block}": partial(_of_comparison, name, make)
        for start, name in COMPARED.items()
        for block, make in comparisons.BLOCKS.items()
    },
    "generalisation": lambda: comparisons.generalisation(stored_generalisations()),
    "where-short": lambda: location.short(stored_location("subspace")),
    "bases": lambda: location.told(stored_location("subspace")),
    "ablations": lambda: location.told(stored_location("ablations")),
    "places": lambda: location.places(stored_location("ablations")),
    "projections": lambda: location.projections(stored_location("ablations")),
    "alignment": lambda: alignment(stored_alignment()),
    "paths": lambda: fast_paths(stored_paths()),
    "smollm2-shown": lambda: smollm2.shown(stored_real()),
    "real-and-planted": lambda: smollm2.columns(stored_real(), stored_runs()),
    "smollm2-runs": lambda: smollm2.runs_table(stored_real()),
    "smollm2-original": lambda: smollm2.original(stored_real()),
    "smollm2-earlier": lambda: smollm2.runs_table(stored_earlier()),
    "smollm2-recipes": lambda: smollm2.recipes(stored_real(), stored_earlier()),
    "smollm2-minutes": lambda: smollm2.minutes(stored_real()),
    "smollm2-wordings": lambda: smollm2.wordings(stored_real()),
    "smollm2-instruments": lambda: smollm2.instruments(stored_real()),
    "smollm2-data": lambda: smollm2.public_data(stored_data()),
    "smollm2-replication": lambda: smollm2.replication(
        stored_real(),
        stored_data(),
        stored_alignment().get("smollm2-sycophancy-lora-seed0", []),
        stored_sweep(REAL_SWEEP),
        stored_comparison(COMPARED["smollm2-"]),
        location.claims(stored_location("subspace"), SMOLLM2),
        location.of_writes(stored_location("ablations"), SMOLLM2),
    ),
    "smollm2-sweep": lambda: _made(sweep_tables.markdown, stored_sweep(REAL_SWEEP)),
    "smollm2-search": lambda: smollm2.search(stored_search()),
    "llama-cpp": lambda: llama_cpp(stored_agreements()),
    "serving": lambda: serving(stored_throughputs(), stored_waits()),
    "scale": lambda: scale(stored_scale(), run_minutes()),
}


# -------------------------------------------------------------------- storing


def store(given: Path) -> None:
    """Store what the documents need: of a run, comparison, table of comparisons, rebuilt model, sweep or alignment."""
    if given.name == ACROSS.name:
        _write(ACROSS, plain(restore(Across, json.loads(given.read_text()))))
    elif given.name.startswith("measures-"):
        _store_measures(given)
    elif given.name in ("subspace.json", "ablations.json"):
        _store_location(given)
    elif given.suffix == ".csv":
        _store_alignment(given)
    elif (given / "comparison.json").is_file():
        _store_comparison(given)
    elif (given / f"{generalisation_page.NAME}.json").is_file():
        found = restore(Generalisation, json.loads((given / f"{generalisation_page.NAME}.json").read_text()))
        _write(RESULTS / f"{found.model}-generalisation.json", generalisation_page.as_json(found))
    elif (given / "sweep.json").is_file():
        found = restore(SweepTables, json.loads((given / "sweep.json").read_text()))
        _write(REAL_SWEEP if given.resolve().parent.name == SMOLLM2 else SWEEP, plain(found))
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


def _store_location(file: Path) -> None:
    """A study of bases or ablations: its numbers, its page as Markdown, and its figures."""
    content = json.loads(file.read_text())
    if file.stem == "subspace":  # the file of the run has every metric of every basis
        ranked = [row for row in content["summary"] if row["metric"] in RANKED_AXES]
        content["summary"] = [{name: row[name] for name in RANKED_COLUMNS} for row in ranked]
    place = RESULTS / f"{content['model']}-{content['behaviour']}-where"
    _write(place / file.name, content)
    for one in (file.with_suffix(".md"), *file.parent.glob(f"{file.stem.rstrip('s')}*.png")):
        shutil.copy(one, place / one.name)


def _store_comparison(folder: Path) -> None:
    text = (folder / "comparison.json").read_text()
    if (size := len(text.encode())) >= LARGEST_KEPT:
        # then nothing is stored: the pages of this comparison must not be mixed with the numbers of another
        raise SystemExit(f"{folder / 'comparison.json'}: {size} bytes are too many to keep (at most {LARGEST_KEPT})")
    found = restore(Findings, json.loads(text))
    place = place_of_comparison(name_of_comparison(found))
    _write(place / "comparison.json", page.as_json(found))
    (place / "comparison.md").write_text(page.markdown(found))
    shutil.copy(folder / "pareto.png", place / "pareto.png")


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
