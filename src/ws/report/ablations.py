"""The page of ablations: sentences, the projection table of the replicated work, a table per lens, and figures.

Sentences follow from the numbers by stated rules (`reading`); nothing on the page is written by hand for one result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ws.base.files import atomic_file, write_json, write_table, write_text
from ws.base.records import plain
from ws.eval.ability import Ability
from ws.report import ablation_figures, document
from ws.report.ablation_numbers import DIRECTION, WRITES
from ws.report.document import Block, Bullets, Figure, Heading, Paragraph, Table

MOSTLY, LITTLE = 0.75, 0.25
"""Shares of an effect that sentences call most of it, and little of it."""
SIDES: Mapping[float | None, str] = {1.0: "+1", -1.0: "-1", None: "both"}
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """What the page is made from: the tables of `ablation_numbers`, and what was asked.

    questions: by lens, in the order of the page. own: name of the behaviour's probe. noun: what the dilemmas are.
    controls: random twins per part. width: of the residual stream.
    """

    model: str
    behaviour: str
    ability: Ability
    questions: Mapping[str, str]
    table: pl.DataFrame
    summary: pl.DataFrame
    own: str
    dilemmas: str
    noun: str
    controls: int
    width: int

    @property
    def families(self) -> list[str]:
        """Families, in the order that was asked for."""
        return list(self.summary["family"].unique(maintain_order=True))

    @property
    def seeds(self) -> list[int]:
        """Training seeds."""
        return sorted(self.table["seed"].unique().to_list())

    def line(self, family: str, lens: str, part: str, operation: str, probe: str, alpha: float | None) -> Line | None:
        """One line of the summary; None if there is no such variant."""
        found = self.summary.filter(
            (pl.col("family") == family) & (pl.col("lens") == lens) & (pl.col("part") == part)
            & (pl.col("operation") == operation) & (pl.col("probe") == probe) & pl.col("alpha").eq_missing(alpha)
        )  # fmt: skip
        return found.to_dicts()[0] if len(found) else None

    def parts(self, lens: str) -> list[str]:
        """The parts of a lens, in order."""
        return list(self.summary.filter(pl.col("lens") == lens)["part"].unique(maintain_order=True))

    def title(self, probe: str) -> str:
        """What a probe is called."""
        return self.noun if probe == self.dilemmas else f"{self.behaviour}, held out"


# -------------------------------------------------------------------- sentences


def reading(part: str, keep: Line | None, rest: Line | None, matched: Line | None, ratio: str = "retained") -> str:
    """What keeping a part, its rest, and the part at the size of the whole say together. The rule:

    rest >= 0.75 and keep < 0.25    mostly outside the part
    keep >= 0.75 and rest < 0.25    mostly inside
    both >= 0.75                    either is enough, so it cannot be placed
    both < 0.25                     neither is enough, so it needs both together
    otherwise                       divided

    A part below 0.75 that reaches 0.75 at the size of the whole, beyond the band of random parts of that size, is
    "potent when amplified". A part that is kept and stays inside the band of its random twins is "not distinct from
    random parts of equal norm"; few twins make a wide band. Without a ratio the sentence gives the reason.
    """
    inside, outside = (None if one is None else one[ratio] for one in (keep, rest))
    if keep is None or rest is None or inside is None or outside is None:
        reasons = (one.get("unavailable") or one.get(_REASONS[ratio]) for one in (keep, rest) if one is not None)
        return f"cannot be told: {next(filter(None, reasons), 'not measured')}"
    if outside >= MOSTLY and inside < LITTLE:
        said = f"mostly outside {part}"
    elif inside >= MOSTLY and outside < LITTLE:
        said = f"mostly inside {part}"
    elif inside >= MOSTLY and outside >= MOSTLY:
        said = f"{part} or the rest is enough, so it cannot be placed"
    elif inside < LITTLE and outside < LITTLE:
        said = f"neither {part} nor the rest is enough"
    else:
        said = f"divided between {part} and the rest"
    grown = None if matched is None else matched[ratio]
    if inside < MOSTLY and matched is not None and grown is not None and grown >= MOSTLY and matched["beyond_null"]:
        said += "; potent when amplified"
    if keep["beyond_null"] is False:
        said += "; not distinct from random parts of equal norm"
    return said


_REASONS = {"retained": "suppressed", "of_writes": "of_writes_suppressed"}


def sentences(report: Report) -> list[str]:
    """The findings in words, per family, on both probes with both signs together."""
    found = []
    for family in report.families:
        for probe in (report.own, report.dilemmas):
            said = list(_sentences(report, family, probe))
            if said:
                found.append(f"{family}, {report.title(probe)}: {'; '.join(said)}.")
    return found


def _sentences(report: Report, family: str, probe: str) -> Iterator[str]:
    def line(lens: str, part: str, operation: str) -> Line | None:
        return report.line(family, lens, part, operation, probe, None)

    if known := _largest(report, family, "projection", probe):
        kept, rest, matched = (line("projection", known, name) for name in ("keep", "complement", "matched"))
        place = f"the activation subspace ({known} of {report.width})"
        yield f"the residual writes act {reading(place, kept, rest, matched, 'of_writes')}"
    if known := _largest(report, family, "shared", probe):
        kept, rest, matched = (line("shared", known, name) for name in ("keep", "complement", "matched"))
        place = f"the subspace shared by the other families ({known} of {report.width})"
        yield f"they act {reading(place, kept, rest, matched, 'of_writes')}"
    if (kept := line("whole", WRITES, "keep")) and kept["retained"] is not None:
        reads = line("whole", WRITES, "drop")
        left = "" if reads is None or reads["retained"] is None else f", the other matrices {_share(reads)}"
        yield f"residual writes alone retain {_share(kept)}{left}"
    layers = [one for part in report.parts("layers") if (one := line("layers", part, "keep")) and _is_layer(one)]
    if layers:
        best = max(layers, key=lambda one: one["retained"])
        without = line("layers", best["part"], "drop")
        left = "" if without is None or without["retained"] is None else f", without it {_share(without)}"
        yield f"the strongest single layer is {best['part'].removeprefix('layer ')}: {_share(best)} alone{left}"
    if (kept := line("norm", "direction only", "keep")) and kept["retained"] is not None:
        yield f"with equal norms in all matrices it retains {_share(kept)}"
    if (kept := line("smallest", "smallest set", "keep")) and kept["retained"] is not None:
        yield f"the set chosen on dev rows retains {_share(kept)} ({kept['remark']})"


def _is_layer(line: Line) -> bool:
    return line["layer"] is not None and line["retained"] is not None


def _share(line: Line) -> str:
    """`0.62 [0.50, 0.74]`."""
    low, high = line["retained_low"], line["retained_high"]
    return f"{line['retained']:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _largest(report: Report, family: str, lens: str, probe: str) -> str | None:
    """The largest K of a projection that this family has, up to a quarter of the residual stream.

    More than that is no small subspace: a random one would hold as large a share of everything.
    """
    rows = report.summary.filter(
        (pl.col("family") == family) & (pl.col("lens") == lens) & (pl.col("probe") == probe)
        & (pl.col("operation") == "keep") & pl.col("unavailable").is_null() & (pl.col("k") <= report.width // 4)
    )  # fmt: skip
    return None if rows.is_empty() else str(rows.sort("k")["part"][-1])


# -------------------------------------------------------------------- tables


def projection_table(report: Report, probe: str) -> Table:
    """The table of the replicated work, with intervals, at every strength, and with the reading of `reading`."""
    rows = []
    for family in report.families:
        known = _largest(report, family, "projection", probe)
        for alpha, said in SIDES.items():
            whole = report.line(family, "whole", DIRECTION, "full", probe, alpha)
            writes = report.line(family, "whole", WRITES, "keep", probe, alpha)
            kept, matched, rest, twin, grown = (
                None if known is None else report.line(family, "projection", known, operation, probe, alpha)
                for operation in ("keep", "matched", "complement", "random", "random matched")
            )
            rows.append([
                family, said, _change(whole), _change(writes),
                *(_ratio(one, "of_writes") for one in (kept, twin, matched, grown, rest)),
                reading(f"the activation subspace ({known})", kept, rest, matched, "of_writes"),
            ])  # fmt: skip
    return Table(
        ["adapter", "alpha", "full change", "residual-write change", "raw / residual", "(random)",
         "norm-matched / residual", "(random)", "complement / residual", "reading"], rows,
        f"{report.title(probe)}: the residual writes (o, down) projected on the principal directions of the change of "
        "activations that the direction itself causes in each layer, on FIT prompts. Raw: the projection. "
        "Norm-matched: the projection at the norm of the residual writes. Complement: the residual writes without it. "
        "Random: projections on random subspaces of as many dimensions, with the norms of the column before. "
        "Both: half of the difference between +1 and -1. A dash in a ratio: the residual writes alone have no effect "
        "that is distinct from noise or from random directions, and the reading says which.",
    )  # fmt: skip


def in_brief(table: Table) -> Table:
    """A projection table without intervals and readings, so that it fits into a terminal; the sentences have these."""
    header = ("adapter", "alpha", "full", "writes", "raw", "(random)", "matched", "(random)", "rest")
    return Table(header, [[cell.split(" [")[0] for cell in row[:-1]] for row in table.rows])


def lens_table(report: Report, lens: str, probe: str) -> Table:
    """All parts of a lens for all families, with both signs together."""
    rows = []
    for family in report.families:
        for part in report.parts(lens):
            lines = {
                operation: report.line(family, lens, part, operation, probe, None)
                for operation in ("keep", "full", "random", "matched", "drop", "complement")
            }
            first = lines["keep"] or lines["full"]
            if first is None:
                continue
            if first["unavailable"]:
                rows.append([f"{family}, {part}", *["-"] * 6, first["unavailable"]])
                continue
            rest = lines["complement"] or lines["drop"]
            rows.append([
                f"{family}, {part}", _energy(first), _change(first),
                *(_ratio(one, "retained") for one in (first, lines["random"], lines["matched"], rest)),
                first["suppressed"] or ("" if first["beyond_null"] is None else
                                        "beyond random" if first["beyond_null"] else "within random"),
            ])  # fmt: skip
    return Table(
        ["part", "energy (null)", "change, nats", "kept", "random twin", "norm-matched", "rest alone", "note"], rows,
        f"{report.title(probe)}, both signs together. Kept, random twin, norm-matched, rest: shares of the change of "
        "the whole direction, with 95 % intervals. Rest: the direction without the part (for projections: the residual "
        "writes without it). Energy: share of |dW|^2, and the mean share of a random part of as many dimensions. "
        "Note: whether the change of the part is outside the 95 % band of its random twins.",
    )  # fmt: skip


def _change(line: Line | None) -> str:
    if line is None or line["mean"] is None:
        return "-"
    return f"{line['mean']:+.2f}" + ("" if line["low"] is None else f" [{line['low']:+.2f}, {line['high']:+.2f}]")


def _ratio(line: Line | None, name: str) -> str:
    if line is None or line[name] is None:
        return "-"
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return f"{line[name]:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _energy(line: Line) -> str:
    null = line["null_energy"]
    return f"{line['energy']:.3f}" + ("" if null is None else f" ({null:.3f})")


# -------------------------------------------------------------------- the page

FIGURES = (
    ("ablations_energy.png", ablation_figures.retained_against_energy,
     "Share of the effect that a part retains, over the share of |dW|^2 that it has; own probe, both signs together. "
     "Crosses: random twins of equal norm. The dashed line is what a part would retain if effects were shared out by "
     "energy."),
    ("ablations_layers.png", ablation_figures.by_layer,
     "Single layers: each alone (crosses: its random twin), and the direction without it; own probe, both signs."),
    ("ablations_modules.png", ablation_figures.by_module,
     "Kinds of modules alone, own probe, both signs together."),
)  # fmt: skip
"""File, how it is drawn, caption."""


def blocks(report: Report, folder: Path) -> list[Block]:
    """Everything on the page; figures are drawn into `folder`."""
    own = report.summary.filter((pl.col("probe") == report.own) & pl.col("alpha").is_null())
    probes = (report.own, report.dilemmas)
    measured = [name for name in report.questions if len(report.parts(name))]
    several = len(report.seeds) > 1
    figures = [Figure(folder / name, name.removesuffix(".png"), caption) for name, draw, caption in FIGURES
               if draw(own, folder / name)]  # fmt: skip
    projected: list[Block] = []
    if "projection" in measured:
        projected = [Heading("The projection table"), *(projection_table(report, probe) for probe in probes)]
    return [
        Bullets(sentences(report)),
        Paragraph(_method(report, several), note=True),
        *projected,
        Heading("Figures"),
        *figures,
        *itertools.chain.from_iterable(_of_lens(report, name) for name in measured),
    ]


def _of_lens(report: Report, lens: str) -> list[Block]:
    tables = [lens_table(report, lens, probe) for probe in (report.own, report.dilemmas)]
    return [Heading(f"{lens}: {report.questions[lens]}"), *tables]


def _method(report: Report, several: bool) -> str:
    seeds = ", ".join(map(str, report.seeds))
    asked = report.table.filter(pl.col("n").is_not_null()).group_by("probe", maintain_order=True).agg(pl.first("n"))
    rows = ", ".join(f"{n} {report.title(probe)}" for probe, n in asked.iter_rows())
    over = "t intervals over seeds" if several else "intervals over rows (clusters), because there is one seed"
    return (
        f"Rows: {rows}, the same test rows for every variant; subspaces and sets were chosen on dev rows. Seeds: "
        f"{seeds}. Every part has {report.controls} random twins. Intervals are {over}. Ratios are left out where the "
        "change of the whole is within its noise or within the band of random directions."
    )


def write(place: Path, report: Report) -> None:
    """Write `ablations.parquet`, `ablations_summary.csv`, `ablations.json`, `.md`, `.html` and the figures."""
    write_table(place / "ablations.parquet", report.table)
    with atomic_file(place / "ablations_summary.csv") as temporary:
        report.summary.write_csv(temporary)
    write_json(place / "ablations.json", as_json(report))
    title = f"{report.behaviour} in {report.model}: where the direction lives"
    content = blocks(report, place)
    write_text(place / "ablations.md", document.to_markdown(title, content))
    subtitle = f"causal ablations of trained directions: {', '.join(report.families)}"
    write_text(place / "ablations.html", document.to_html(title, subtitle, content))


_JSON = ("family", "lens", "part", "operation", "probe", "seeds", "n", "mean", "low", "high", "retained",
         "retained_low", "retained_high", "of_writes", "of_writes_low", "of_writes_high", "null_mean", "null_low",
         "null_high", "energy", "null_energy", "suppressed", "unavailable", "remark")  # fmt: skip
"""Columns of `ablations.json`; the CSV file has all."""


def as_json(report: Report) -> dict[str, Any]:
    """The sentences, and the main columns of the summary with both signs together, as plain data."""
    return {
        "model": report.model, "behaviour": report.behaviour, "families": report.families, "seeds": report.seeds,
        "instrument": report.ability.instrument, "sentences": sentences(report),
        "summary": plain(report.summary.filter(pl.col("alpha").is_null()).select(_JSON).to_dicts()),
    }  # fmt: skip
