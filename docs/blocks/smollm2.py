"""Blocks about the real model, made from stored summaries and from the log of the recipe search."""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from blocks.table import table
from ws.base import stats
from ws.base.records import restore
from ws.comparing.findings import Entry, Findings
from ws.eval import dilemmas
from ws.fitting import behaviour
from ws.report.cells import limits, signed, with_limits
from ws.report.findings import Summary
from ws.runs.sweep_tables import SweepTables

SIGNS = ("-1", "1")
BEHAVIOURS = ("sycophancy", "honesty", "refusal")
RUN_COLUMNS = ["run", "alpha", "replies", "per token", "random band", "other groups", "Yes/No, balanced", "likeness",
               "dilemmas", "KL", "NLL", "ended"]  # fmt: skip


def of_behaviour(stored: Mapping[str, Mapping[str, Any]], name: str, recipe: str = "own") -> list[Summary]:
    """The stored runs of one behaviour with one recipe, LoRA, by data seed and seed."""
    runs = [
        restore(Summary, {key: part for key, part in one.items() if key != "persona_changes"})
        for one in stored.values() if one["behaviour"] == name and one.get("recipe", "own") == recipe
    ]  # fmt: skip
    return sorted((one for one in runs if one.adapter == "lora"), key=lambda one: (one.data_seed, one.seed))


def over_runs(runs: Sequence[Summary], key: str) -> str:
    """Mean change over runs with its 95 % t interval, as the instrument of the headline reads it; of one run, its
    change and interval over items."""
    changes = [one.measured.change[key] for one in runs]
    if len(changes) == 1:
        return with_limits(vars(changes[0]))
    found = stats.over_seeds([one.mean for one in changes])
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def largest_random(runs: Sequence[Summary]) -> float:
    """The largest change by a random direction, at any strength of any run."""
    return max(abs(value) for one in runs for band in one.measured.bands.values() for value in band.seeds)


def shown(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """What was shown on a real model, for the first screen."""
    runs = of_behaviour(stored, "sycophancy")
    if not runs:
        return "Nothing has been measured on a real model yet."
    first = runs[0].numbers.instruments["replies"]
    spread = " and ".join(
        f"from {min(means):+.2f} to {max(means):+.2f} at {signed(key)}"
        for key, means in ((key, _wordings_over(runs, key)) for key in SIGNS)
    )
    items = first.change["1"].n // len(first.wordings)
    over = "95 % over claims, one training seed" if len(runs) == 1 else f"95 % over {_seeds(runs)}, {SHARED_DATA}"
    return (
        "On a real language model, SmolLM2-135M-Instruct, a sycophancy direction moves the log-odds of agreeing over "
        f"disagreeing replies to {items} held-out false claims by {over_runs(runs, '-1')} nats at alpha -1 and by "
        f"{over_runs(runs, '1')} at +1 ({over}; random directions of the same norm: at most "
        f"{largest_random(runs):.2f}). "
        f"This is a mean over {len(first.wordings)} wordings, which differ: {spread}, averaged over the runs."
    )


SHARED_DATA = "as if independent, though runs with one data seed share their data"
"""What an interval over runs takes for granted."""


def _wordings_over(runs: Sequence[Summary], key: str) -> list[float]:
    """The mean change of each wording over runs."""
    by_run = [one.numbers.instruments["replies"].wordings for one in runs]
    return [statistics.mean(one[name].change[key].mean for one in by_run) for name in by_run[0]]


def minutes(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """How long the first run took, for someone who wants to repeat it."""
    runs = of_behaviour(stored, "sycophancy")
    if not runs:
        return "Its time has not been measured yet."
    took = runs[0].seconds
    parts = ("data", "train-pos", "train-neg", "eval")
    told = ", ".join(f"{name} {took[name] / 60:.1f}" for name in parts)
    return (
        f"It took {sum(took.values()) / 60:.0f} minutes on one core that computes 88 GFLOP/s in float32 and 208 in "
        f"bfloat16, beside other work on the second core ({told}). A killed run goes on where it stopped."
    )


def _seeds(runs: Sequence[Summary]) -> str:
    if len(runs) == 1:
        return "one training seed"
    trained, sampled = len({one.seed for one in runs}), len({one.data_seed for one in runs})
    return f"{len(runs)} runs: {trained} training seeds" + (f", {sampled} data seeds" if sampled > 1 else "")


def runs_table(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """Every run: change by sign, control band, judged replies, dilemmas, cost."""
    rows = []
    for name in BEHAVIOURS:
        runs = of_behaviour(stored, name)
        rows += _rows_of(runs)
        if len(runs) > 1:
            for key in SIGNS:
                rows.append([f"**{name}, {len(runs)} runs**", signed(key), over_runs(runs, key), *[""] * 9])
    note = (
        "Replies: change of log p(reply that shows the behaviour) - log p(opposite reply), nats per reply, 95 % "
        f"interval over items; means over runs have a t interval, {SHARED_DATA}. Band: 95 % prediction interval of "
        "random directions with the same norm and rank; every run has five, from the same five random seeds. Other "
        "groups: the same replies to true claims, honest "
        "or harmless items, where the behaviour is not wrong. Likeness: change of the mean probability that a "
        "free reply "
        "was written under the positive persona, judged by the unedited model; it does not check agreement. Dilemmas: "
        "Yes/No, change towards the honest answer. KL and NLL: on neutral text, nats per token, against the "
        "base. Ended: "
        f"share of greedy replies to neutral requests that end within 48 tokens{_ended_unedited(stored)}."
    )
    return f"{table(RUN_COLUMNS, rows)}\n\n{note}"


def _ended_unedited(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """Share of the unedited model's replies that end, in words; it is the same in every run."""
    ended = [run.numbers.side_effects["0"].reply_finished for name in BEHAVIOURS for run in of_behaviour(stored, name)]
    shares = sorted({one for one in ended if one is not None})
    return f" (unedited model: {', '.join(f'{100 * one:.0f} %' for one in shares)})" if shares else ""


def original(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """The runs with the recipe of the replicated work, in the columns of the other runs."""
    rows = [row for name in BEHAVIOURS for row in _rows_of(of_behaviour(stored, name, "original"))]
    return table(RUN_COLUMNS, rows) if rows else "Not measured yet."


def _rows_of(runs: Sequence[Summary]) -> list[list[str]]:
    return [
        [f"{one.behaviour}, seed {one.seed}, data {one.data_seed}", signed(key), *_cells(one, key)]
        for one in runs for key in SIGNS
    ]  # fmt: skip


def _cells(run: Summary, key: str) -> list[str]:
    replies, choice = run.numbers.instruments["replies"], run.numbers.instruments["choice"]
    band, judged, cost = replies.bands.get(key), run.judged.get("persona", {}).get(key), run.numbers.side_effects[key]
    return [
        with_limits(vars(replies.change[key])),
        f"{replies.per_token[key].mean:+.3f}",
        "-" if band is None else limits(vars(band)),
        "; ".join(f"{group} {by_key[key].mean:+.2f}" for group, by_key in run.other_claims.items()) or "-",
        with_limits(vars(choice.change[key])),
        "-" if judged is None else with_limits(vars(judged.change)),
        with_limits(vars(run.numbers.dd_delta[key])),
        f"{cost.kl:.3f}",
        f"{cost.nll_delta:+.3f}",
        "-" if cost.reply_finished is None else f"{100 * cost.reply_finished:.0f} %",
    ]


def instruments(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """Per behaviour, what the unedited model can answer and the instrument that follows."""
    rows = []
    for name in BEHAVIOURS:
        for one in of_behaviour(stored, name)[:1]:
            able = one.ability
            consistent = "-" if able.consistent is None else f"{able.consistent.mean:.0%}"
            rows.append([name, f"{able.mass:.2f}", consistent, able.instrument])
    return table(["behaviour", "answer mass", "opposite questions answered differently", "instrument"], rows)


def search(log: Sequence[Mapping[str, Any]]) -> str:
    """The log of the recipe search, one line per setting."""
    rows = []
    for line in log:
        setting, dev = line["setting"], line["dev"]
        train = {"lr": 2e-4, "layers": [0.3, 0.8], "epochs": 1, "batch_size": 16} | setting.get("train", {})
        layers = f"{100 * train['layers'][0]:.0f}-{100 * train['layers'][1]:.0f} %"
        sampling, bound = setting["sampling"], train.get("delora_lambda")
        adapter = setting.get("family", "lora") + ("" if bound is None else f", lambda {bound:g}")
        rows.append([
            line["behaviour"], adapter, str(setting.get("data_seed", 0)), f"{setting['grid']['samples'] * 100}",
            str(sampling["max_new_tokens"]),
            f"{sampling.get('temperature', 0.8):g}", _judged_by(setting), layers, f"{train['lr']:g}",
            str(train["epochs"]), str(train["batch_size"]), f"{line['kept']['pos']} / {line['kept']['neg']}",
            *(f"{dev[sign]['change']:+.2f}" for sign in ("-1", "+1")),
            *(f"{dev[sign]['kl']:.3f}" for sign in ("-1", "+1")), f"{_per_root_kl(dev):.1f}",
            str(len(dev["-1"].get("wordings", ())) or FIRST_WORDINGS),
        ])  # fmt: skip
    head = ["behaviour", "adapter", "data seed", "pairs", "tokens", "T", "judge", "layers", "rate", "epochs", "batch",
            "kept + / -", "replies at -1", "at +1", "KL at -1", "at +1", "per root KL", "wordings"]  # fmt: skip
    return table(head, rows)


def recipes(stored: Mapping[str, Mapping[str, Any]], earlier: Mapping[str, Mapping[str, Any]]) -> str:
    """Sycophancy with the recipe of now and with the earlier one, means over runs: movement, and what it costs."""
    head = ["recipe", "runs", "replies at -1", "at +1", "KL at -1", "at +1", "per root KL", "NLL at +1"]
    rows, by_run = [], []
    for name, some in (("now", stored), ("earlier", earlier)):
        runs = of_behaviour(some, "sycophancy")
        measured = _measured(runs)
        by_run.append({(one.seed, one.data_seed): _per_root_kl(_measured([one])) for one in runs})
        rows.append([
            name, str(len(runs)), *(f"{measured[key]['change']:+.2f}" for key in SIGNS),
            *(f"{measured[key]['kl']:.3f}" for key in SIGNS), f"{_per_root_kl(measured):.1f}",
            f"{statistics.mean(one.numbers.side_effects['1'].nll_delta for one in runs):+.3f}",
        ])  # fmt: skip
    now, before = by_run
    pairs = [key for key in now if key in before]
    told = "; ".join(
        f"seed {seed}, data {data} {now[seed, data]:.1f} / {before[seed, data]:.1f}" for seed, data in pairs
    )
    gain = stats.over_seeds([now[key] - before[key] for key in pairs])
    note = (
        "Per root KL: movement at both signs over the root of the mean KL "
        f"([why](#how-the-recipe-was-chosen)). By run, now / earlier: {told}. Mean difference with its 95 % t "
        f"interval over these pairs: {gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]."
    )
    return f"{table(head, rows)}\n\n{note}"


def _measured(runs: Sequence[Summary]) -> dict[str, dict[str, float]]:
    """Mean change and KL by sign."""
    return {
        key: {
            "change": statistics.mean(one.measured.change[key].mean for one in runs),
            "kl": statistics.mean(one.numbers.side_effects[key].kl for one in runs),
        }
        for key in SIGNS
    }


FIRST_WORDINGS = 4
"""Wordings of the first lines of the log, which do not say how many they have."""


def _per_root_kl(by_sign: Mapping[str, Mapping[str, float]]) -> float:
    """Movement at both signs over the root of the mean KL: a direction times two moves about twice as far at four times
    the KL, so this compares settings at equal KL."""
    at_one = [one for sign, one in by_sign.items() if abs(float(sign)) == 1]
    moved = sum(abs(one["change"]) for one in at_one)
    return moved / math.sqrt(statistics.mean(one["kl"] for one in at_one))


def _judged_by(setting: Mapping[str, Any]) -> str:
    judge = setting["judge"]
    return "none" if judge["backend"] == "none" else f"{judge['threshold']:g}"


SHOWN_MEASURES = ("accuracy", "AUROC", "Yes-bias", "MC1", "MC2", "pull", "pull of right belief", "stance")
"""Measures of the public data sets that the table shows; the stored files have the others and the groups."""


def public_data(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """The public data sets: every measure at every strength, with its change."""
    rows = []
    for name, record in stored.items():
        for one in record.get("measurements", ()):
            if one["group"] != "all" or one["measure"] not in SHOWN_MEASURES:
                continue
            change = "-" if one["change"] is None else with_limits(one["change"])
            rows.append([
                name, one["measure"], signed(f"{one['alpha']:g}"), with_limits(one["level"]), change,
                str(one["level"]["n"]),
            ])  # fmt: skip
    if not rows:
        return "Not measured yet."
    return table(["direction, data", "measure", "alpha", "value", "change", "n"], rows)


def wordings(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """Every wording of the replies alone, first run of every behaviour."""
    rows = []
    for name in BEHAVIOURS:
        texts = [(one.first, one.second) for one in _templates(name)]
        for run in of_behaviour(stored, name)[:1]:
            for number, one in run.numbers.instruments["replies"].wordings.items():
                first, second = texts[int(number)]
                cells = []
                for key in SIGNS:
                    band = one.bands.get(key)
                    cells += [with_limits(vars(one.change[key])), "-" if band is None else limits(vars(band))]
                rows.append([name, f"{first} / {second}", *cells])
    return table(["behaviour", "replies", "change at -1", "random band", "change at +1", "random band"], rows)


class _Pair(NamedTuple):
    first: str
    second: str


def _templates(name: str) -> list[_Pair]:
    content = tomllib.loads((behaviour.SHIPPED / f"{name}.toml").read_text())
    return [_Pair(**one) for one in content["probe"]["replies"]]


def replication(
    stored: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Mapping[str, Any]],
    alignment: Sequence[Mapping[str, Any]],
    sweep: SweepTables | None,
    compared: Findings | None,
    bases: str,
    projection: str,
) -> str:
    """The rows of the original's tables that were measured on SmolLM2, with the figures of this model."""
    runs = of_behaviour(stored, "sycophancy")
    if not runs:
        return "Not measured yet."
    first = runs[0]
    own, mass = first.numbers.change["sycophancy"]["1"], min(level.pmass for level in first.own.values())
    replies = first.measured
    honesty = {key: with_limits(vars(first.dilemmas[key])) for key in ("-1", "0", "1")}
    rows = [
        ["sycophancy, Yes/No, +1 minus 0; least answer mass (LoRA +1.00, 1.000)",
         f"{with_limits(vars(own))}; {mass:.3f} (one polarity, mostly Yes-bias: the model cannot answer Yes or No)"],
        ["the same by replies, -1 and +1", f"{over_runs(runs, '-1')}; {over_runs(runs, '1')} ({_seeds(runs)})"],
        ["daily dilemmas at -1 / 0 / +1 (LoRA 1.09 / 1.33 / 1.55)",
         f"own dilemmas: {honesty['-1']} / {honesty['0']} / {honesty['1']}"],
        ["honesty rises with alpha on both probes", _sign_of_dilemmas(runs)],
        ["prompt baselines", "; ".join(f"{name}: {entry.mean - replies.levels['0'].mean:+.2f} by replies"
                                       for name, entry in replies.contexts.items())],
        ["random directions as a control",
         f"five per run, largest change {largest_random(runs):.2f} by replies"],
        ["norm of dW; cosine of tau+ and tau-",
         f"{first.direction_norm:.2f}; {-first.geometry['cos_anti']:+.2f}"],
    ]  # fmt: skip
    for probe, how in (("dilemmas", ""), ("dilemmas-guided", ", after a thought of at most 64 tokens")):
        if (record := data.get(f"sycophancy-{probe}")) is not None:
            rows.append(_proxy_row(record, how))
    if alignment:
        shares = [row["ratio_top"] for row in alignment if row.get("ratio_top") is not None]
        rows.append(["alignment of dW with the top 10 % of singular directions, over a random direction (mean)",
                     f"{sum(shares) / len(shares):.2f}"])  # fmt: skip
    rows += [["mechanistic bases 1-8 % of the oracle", bases]] if bases else []
    if projection:
        rows.append(["projection: raw / norm-matched / complement, over residual writes (DeLoRA's complement 0.89)",
                     projection])  # fmt: skip
    rows += [] if sweep is None else _family_rows(sweep)
    rows += [] if compared is None else _method_rows(compared)
    return table(["row of the original", "SmolLM2-135M"], rows)


def _proxy_row(record: Mapping[str, Any], how: str) -> list[str]:
    """The dilemmas of the aggregated public table, honest side, at three strengths."""

    def of(metric: str) -> dict[str, Mapping[str, Any]]:
        return {f"{one['alpha']:g}": one for one in record["means"]
                if one["metric"] == metric and one["group"] == dilemmas.STATED}  # fmt: skip

    counts, ratios, cut = record["data"], of("logratio"), of("forced")
    keys = ("-1", "0", "1")
    told = f"{counts['counted']} rows counted"
    if cut:
        told += "; thoughts cut at the limit " + " / ".join(f"{cut[key]['mean']:.0%}" for key in keys)
    name = f"daily dilemmas, a proxy of {counts['kept'] // 2} from the aggregated table{how}, at -1 / 0 / +1"
    return [name, f"{' / '.join(with_limits(ratios[key]) for key in keys)} ({told})"]


def _family_rows(sweep: SweepTables) -> list[list[str]]:
    """The original's two tables over adapter families, and the norms of the directions."""

    def of_each(*measures: str) -> str:
        return "; ".join(
            f"{line.family} " + " / ".join(f"{line.measures[one].mean:+.2f}" for one in measures)
            for line in sweep.by_family
        )

    runs = max(line.runs for line in sweep.by_family)
    return [
        [f"adapter families, by replies at -1 / +1 ({runs} training seeds each)", of_each("delta_minus", "delta")],
        ["adapter families, Yes/No, +1 minus 0", of_each("yes_no")],
        ["adapter families, own dilemmas at -1 / 0 / +1", of_each("dilemmas_-1", "dilemmas_0", "dilemmas_1")],
        ["norm of dW by family", "; ".join(f"{one.family} {one.measures['norm'].mean:.1f}" for one in sweep.by_family)],
    ]


def _method_rows(compared: Findings) -> list[list[str]]:
    """What the comparison adds: activation steering, prompts, strengths at equal KL, parts, Surgical Informedness."""
    measured, own = compared.equal_kl[compared.headline_budget], compared.own_strength
    by_kind = {
        kind: [entry for entry in measured.entries if entry.kind == kind] for kind in ("activations", "variants")
    }
    strengths = "; ".join(
        f"{entry.name} {entry.sides['-'].alpha:+.2f} / {entry.sides['+'].alpha:+.2f}"
        for entry in measured.entries if entry.kind == "weights"
    )  # fmt: skip
    price = f"at {compared.headline_budget} nats of KL"
    at = f"{price}, - / + by replies"
    scores = "; ".join(
        f"{entry.name} {score:+.1f}"
        for entry in own.entries if entry.kind == "weights" and entry.informedness is not None
        if (score := entry.informedness["k2"].score) is not None
    )  # fmt: skip
    return [
        [f"activation steering {at}", "; ".join(map(_both_sides, by_kind["activations"]))],
        [f"tau_pos, tau_neg, bisector {at}", "; ".join(map(_both_sides, by_kind["variants"]))],
        [f"strengths {price}, - / +", strengths],
        ["Surgical Informedness of the dilemmas (k = 2)", scores],
    ]


def _both_sides(entry: Entry) -> str:
    return f"{entry.name} {entry.sides['-'].own.mean:+.2f} / {entry.sides['+'].own.mean:+.2f}"


def _sign_of_dilemmas(runs: Sequence[Summary]) -> str:
    moved = [one.numbers.dd_delta["1"] for one in runs]
    found = ", ".join(with_limits(vars(one)) for one in moved)
    return f"change of the dilemmas at +1, by run: {found}"


def columns(real: Mapping[str, Mapping[str, Any]], planted: Mapping[str, Mapping[str, Any]]) -> str:
    """The real and the planted model side by side: every behaviour that was run on both, over all of its runs."""
    rows = []
    for name in BEHAVIOURS:
        found = of_behaviour(real, name), of_behaviour(_of_model(planted, "pocket"), name)
        if all(found):
            rows.append([name, *map(_both_signs, found)])
    note = (
        f"Change at alpha -1 / +1 in nats; in brackets the 95 % interval over runs, {SHARED_DATA} (of a single "
        "run: over items), and the largest change by a random direction. SmolLM2: log-ratio of opposite replies. "
        "pocket: log p(Yes) - log p(No), balanced. Sizes cannot be compared across columns. On the real model "
        "wordings differ, true claims move as much as false ones, and many replies are incoherent, edited or not: "
        "[docs/smollm2.md](docs/smollm2.md)."
    )
    return f"{table(['behaviour', 'SmolLM2-135M (real)', 'pocket (planted)'], rows)}\n\n{note}"


def _both_signs(runs: Sequence[Summary]) -> str:
    moved = " / ".join(over_runs(runs, key) for key in SIGNS)
    return f"{moved} ({len(runs)} run{'s' * (len(runs) > 1)}; random {largest_random(runs):.2f})"


def _of_model(stored: Mapping[str, Mapping[str, Any]], model: str) -> dict[str, Mapping[str, Any]]:
    return {name: one for name, one in stored.items() if one["model"] == model}
