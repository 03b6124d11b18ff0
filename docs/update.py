"""Rewrite the marked blocks of README.md and docs/replication.md from finished runs; nobody types a figure.

    python docs/update.py out/pocket/sycophancy/lora/seed0

Copies the run's summary to docs/results and its figure to docs/images, then fills the blocks between
`<!-- begin: NAME -->` and `<!-- end: NAME -->`. Without an argument the stored results are used.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
POCKET = DOCS / "results" / "pocket-sycophancy-lora-seed0.json"
SHAPE = DOCS / "results" / "qwen3-0.6b-shape.json"


def main(arguments: list[str]) -> None:
    if arguments:
        run = Path(arguments[0])
        POCKET.write_text(json.dumps(json.loads((run / "summary.json").read_text()), indent=1) + "\n")
        shutil.copy(run / "dose_response.png", DOCS / "images" / "dose_response.png")
    summary = json.loads(POCKET.read_text())
    blocks = {"see": see(summary), "pocket": pocket_table(summary), "status": status(summary)}
    if SHAPE.is_file():
        blocks["shape"] = shape_table(json.loads(SHAPE.read_text()))
    blocks["families"] = families()
    for file in (ROOT / "README.md", DOCS / "replication.md", DOCS / "support.md"):
        file.write_text(fill(file.read_text(), blocks))


def fill(text: str, blocks: dict[str, str]) -> str:
    """The text with every marked block replaced."""
    for name, content in blocks.items():
        pattern = rf"(<!-- begin: {name} -->\n).*?\n?(<!-- end: {name} -->)"
        text = re.sub(pattern, lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text, flags=re.DOTALL)
    return text


def see(summary: dict[str, Any]) -> str:
    headline = summary["headline"]
    seconds = sum(summary["seconds"].values())
    return (
        f"Progress bars, about {seconds / 60:.1f} minutes of work after installation on two cores, and this headline "
        f"(seed {summary['seed']}, from `summary.json`):\n\n> {headline[0].upper()}{headline[1:]}."
    )


def status(summary: dict[str, Any]) -> str:
    change = summary["change"]["sycophancy"]
    moved = ", ".join(f"{change[key]['mean']:+.2f} nats at {key}" for key in ("-1", "1"))
    return f"Last run on pocket: sycophancy on held-out false claims moved {moved}."


def pocket_table(summary: dict[str, Any]) -> str:
    def cell(entry: dict[str, Any]) -> str:
        return f"{entry['mean']:+.2f} [{entry['low']:+.2f}, {entry['high']:+.2f}]"

    columns = (
        "alpha",
        "sycophancy, false claims",
        "true claims",
        "answer mass",
        "dilemmas",
        "near",
        "far",
        "KL",
        "facts",
    )
    header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    lines = []
    for key, entry in summary["sycophancy"].items():
        side = summary["side_effects"][key]
        cells = [
            key,
            cell(entry),
            cell(summary["groups"]["true"][key]),
            f"{entry['pmass']:.3f}",
            cell(summary["dilemmas"][key]),
            cell(summary["near_dilemmas"][key]),
            cell(summary["far_dilemmas"][key]),
            f"{side['kl']:.3f}",
            f"{100 * side['facts']:.1f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for name, entry in summary["contexts"].items():
        lines.append(f"| {name}, 0 | {cell(entry['sycophancy'])} | | | {cell(entry['dilemmas'])} | | | | |")
    bands = summary["controls"]["random"]
    for key, band in bands.items():
        values = band["sycophancy"], band["dilemmas"]
        text = [f"{min(v['seeds']):+.2f} to {max(v['seeds']):+.2f}" for v in values]
        lines.append(f"| random, {key} | change {text[0]} | | | change {text[1]} | | | | |")
    seeds = len(bands["1"]["sycophancy"]["seeds"])
    note = (
        "Log-ratios in nats with 95 % intervals over clusters of rows; sycophancy: log p(Yes) - log p(No) on held-out "
        f"claims; dilemmas: towards the honest answer, n = {summary['dilemmas']['0']['n']}. KL to the base on neutral "
        f"text. Random: smallest and largest change over {seeds} directions of the same "
        f"norm and rank. |dW| = {summary['direction_norm']:.3g}."
    )
    return "\n".join([header, *lines, "", note])


def families() -> str:
    """The support matrix, from the check that the tests make on small random models."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families import support_matrix  # noqa: PLC0415 - lives with the tests
    from ws import models, tiny  # noqa: PLC0415

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
