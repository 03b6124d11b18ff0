"""The dilemma probe: balanced, opposite labels within a dilemma, and nothing that training has shown."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from conftest import SHARED_DATA
from ws import world
from ws.base.errors import UserError
from ws.eval import dilemmas, tables
from ws.eval.dilemmas import Dilemma

OWN = dilemmas.own()
AGGREGATED = SHARED_DATA / "daily_dilemmas" / "dilemma_to_action_to_values_aggregated.csv"


def pairs_of(rows: list[Dilemma]) -> dict[str, list[Dilemma]]:
    """Rows of our own set by dilemma."""
    pairs: dict[str, list[Dilemma]] = defaultdict(list)
    for row in rows:
        pairs[row.row.rsplit("/", 1)[0]].append(row)
    return pairs


# ---------------------------------------------------------------- our own


def test_there_are_two_hundred_dilemmas_of_two_rows() -> None:
    pairs = pairs_of(OWN)
    assert len(pairs) >= 200
    assert len(OWN) == 2 * len(pairs)
    assert len({row.row for row in OWN}) == len(OWN)


@pytest.mark.parametrize("groups", [{"near", "far"}, {"near"}, {"far"}], ids=["all", "near", "far"])
def test_labels_are_balanced(groups: set[str]) -> None:
    labels = Counter(row.label for row in OWN if row.group in groups)
    assert set(labels) == {1, -1}
    assert labels[1] == labels[-1] >= 50


def test_the_rows_of_a_dilemma_share_the_situation_and_have_opposite_labels() -> None:
    for pair in pairs_of(OWN).values():
        one, other = pair
        assert one.situation == other.situation
        assert one.action != other.action
        assert one.label == -other.label
        assert (one.cluster, one.group) == (other.cluster, other.group)


def test_a_label_says_on_which_side_the_action_stands() -> None:
    categories = {category.name: category for category in world.dilemma_categories()}
    for row in OWN:
        category = categories[row.cluster.split("/")[0]]
        honest = row.label == 1
        actions = (*(category.honest if honest else category.dishonest), *category.shared_actions(honest=honest))
        assert any(is_filled(row.action, action) for action in actions), row.row


def is_filled(text: str, template: str) -> bool:
    """Whether `text` is `template` with its slots filled."""
    position = 0
    for piece in [part.split("}")[-1] for part in template.split("{")]:
        position = text.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return True


def test_near_situations_are_only_those_that_training_never_shows() -> None:
    categories = {category.name: category for category in world.dilemma_categories()}
    for row in OWN:
        name, number = row.cluster.split("/")
        category = categories[name]
        assert (row.group == "far") == category.far
        assert is_filled(row.situation, category.situations[int(number)])
        assert category.far or int(number) >= len(category.situations) - world.HELD_OUT_SITUATIONS


def test_every_category_is_asked() -> None:
    assert {row.cluster.split("/")[0] for row in OWN} == {category.name for category in world.dilemma_categories()}


def test_all_slots_are_filled() -> None:
    assert not [row.row for row in OWN if set("{}") & set(row.situation + row.action)]


def test_a_dilemma_is_not_asked_twice() -> None:
    asked = [(row.situation, row.action) for row in OWN]
    assert len(set(asked)) == len(asked)


def test_it_is_the_same_set_every_time() -> None:
    assert dilemmas.own() == OWN


def test_the_probe_asks_situation_and_action_up_to_the_anchor() -> None:
    probe = dilemmas.probe()
    assert (probe.name, probe.kind, probe.answers) == ("dilemmas", "choice", ("Yes", "No"))
    assert len(probe.rows) == len(OWN)
    for row, source in zip(probe.rows, OWN, strict=True):
        (message,) = row.messages
        assert message["role"] == "user"
        assert f"\n\nSituation: {source.situation}\nDo you choose to: {source.action}?" in message["content"]
        assert row.continuation == "My choice: **"
        assert (row.row, row.cluster, row.group, row.label) == (source.row, source.cluster, source.group, source.label)
    assert "`My choice: **Yes**` or `My choice: **No**`" in dilemmas.TEMPLATE
    assert dilemmas.probe().key == probe.key


@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_takes_whole_situations_of_each_group(limit: int) -> None:
    rows = dilemmas.probe(limit=limit).rows
    for group in ("near", "far"):
        of_group = [row for row in rows if row.group == group]
        assert len({row.cluster for row in of_group}) == limit
        assert sum(row.label for row in of_group) == 0
    everything = {row.cluster: [r.row for r in OWN if r.cluster == row.cluster] for row in rows}
    assert [row.row for row in rows] == [row.row for row in OWN if row.cluster in everything]


def with_fillers(clusters: int = 4) -> list[Dilemma]:
    """Dilemmas whose second row is labelled only by the first, and one in which both are stated."""
    groups = {(n, side): "filler" if side and n else "stated" for n in range(clusters) for side in (0, 1)}
    return [
        Dilemma(f"{n}/{side}", f"{n}", group, "You err.", f"do {side}", 1 - 2 * side)
        for (n, side), group in groups.items()
    ]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_never_splits_the_two_actions_of_a_dilemma(limit: int) -> None:
    rows = with_fillers()
    kept = dilemmas._first_clusters(rows, limit)
    assert list(kept) == [row for row in rows if int(row.cluster) < limit]
    turned = [*rows[1:2], *rows[:1], *(row for n in range(1, 4) for row in (rows[2 * n + 1], rows[2 * n]))]
    assert {row.row for row in dilemmas._first_clusters(turned, limit)} == {row.row for row in kept}, "a filler first"


# ---------------------------------------------------------------- files

MINE = [
    {"row": "r1", "cluster": "c1", "situation": "You see it.", "action": "say so", "label": 1},
    {"row": "r2", "cluster": "c1", "situation": "You see it.", "action": "hide it", "label": -1},
    {"row": "r3", "cluster": "c2", "situation": "You hear it.", "action": "wait", "label": 0},
]
MINE_READ = [
    Dilemma("r1", "c1", "all", "You see it.", "say so", 1),
    Dilemma("r2", "c1", "all", "You see it.", "hide it", -1),
]
REPLICATED = [
    {"idx": 7, "dilemma_idx": 3, "dilemma_situation": "You err.", "action": "tell", "honesty_label": 1},
    {"idx": 8, "dilemma_idx": 3, "dilemma_situation": "You err.", "action": "not tell", "honesty_label": -1},
]
REPLICATED_READ = [
    Dilemma("7", "3", "all", "You err.", "tell", 1),
    Dilemma("8", "3", "all", "You err.", "not tell", -1),
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "csv": lambda path, rows: pl.DataFrame(rows).write_csv(path),
    "jsonl": write_jsonl,
    "parquet": lambda path, rows: pl.DataFrame(rows).write_parquet(path),
    "CSV": lambda path, rows: pl.DataFrame(rows).write_csv(path),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("rows", "expected"), [(MINE, MINE_READ), (REPLICATED, REPLICATED_READ)], ids=["own", "first"])
def test_labelled_rows_are_read_from_any_kind_of_file(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]], expected: list[Dilemma]
) -> None:
    path = tmp_path / f"set.{kind}"
    WRITERS[kind](path, rows)
    assert dilemmas.read(str(path)) == expected


def test_reading_says_how_many_rows_were_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "set.jsonl", MINE)
    dilemmas.read(str(tmp_path / "set.jsonl"))
    said = " ".join(capsys.readouterr().out.split())
    assert "kept 2 of 3 rows" in said and "not counted" not in said
    assert "honest answer is Yes on 1 and No on 1 counted rows" in said


def flagged(*own_side: bool) -> list[dict[str, Any]]:
    """Rows of the replicated set: of each dilemma the first action is honest, the second says so or does not."""
    return [
        {"idx": 2 * number + side, "dilemma_idx": number, "dilemma_situation": f"You err {number}.",
         "action": f"do {side}", "action_type": ("to_do", "not_to_do")[side], "honesty_label": 1 - 2 * side,
         "to_do_has_positive_honesty": True, "to_do_has_negative_honesty": False,
         "not_to_do_has_positive_honesty": False, "not_to_do_has_negative_honesty": stated}
        for number, stated in enumerate(own_side)
        for side in (0, 1)
    ]  # fmt: skip


def test_rows_that_are_not_counted_are_kept_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "set.jsonl", flagged(False, True, False))
    found = dilemmas.load(str(tmp_path / "set.jsonl"))
    said = " ".join(capsys.readouterr().out.split())
    assert "kept 6 of 6 rows" in said and "2 are not counted, because only the other action" in said
    assert "honest answer is Yes on 3 and No on 1 counted rows" in said
    record = found.record()
    assert {name: record[name] for name in ("read", "kept", "counted", "honest_yes", "honest_no")} == {
        "read": 6, "kept": 6, "counted": 4, "honest_yes": 3, "honest_no": 1,
    }  # fmt: skip
    assert [row.group for row in found.probe().rows] == ["stated", "filler", "stated", "stated", "stated", "filler"]


def test_counted_rows_are_all_but_the_fillers_of_the_dilemmas() -> None:
    groups = ["stated", "filler", "near", "filler"]
    table = pl.DataFrame({"probe": ["dilemmas", "dilemmas", "dilemmas", "facts"], "group": groups})
    assert dilemmas.counted(table)["group"].to_list() == ["stated", "near", "filler"]
    assert dilemmas.counted(table)["probe"].to_list() == ["dilemmas", "dilemmas", "facts"]


def test_a_set_of_nothing_but_fillers_is_refused(tmp_path: Path) -> None:
    rows = [row for row in flagged(False, False) if row["action_type"] == "not_to_do"]
    write_jsonl(tmp_path / "set.jsonl", rows)
    with pytest.raises(UserError, match=r"set\.jsonl: no row can be counted"):
        dilemmas.load(str(tmp_path / "set.jsonl"))


def test_a_probe_takes_its_rows_from_a_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set.jsonl", MINE)
    probe = dilemmas.probe(str(tmp_path / "set.jsonl"))
    assert [(row.row, row.cluster, row.label) for row in probe.rows] == [("r1", "c1", 1), ("r2", "c1", -1)]


def test_rows_without_names_are_numbered(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set.jsonl", [{k: row[k] for k in ("situation", "action", "label")} for row in MINE])
    assert [(row.row, row.cluster) for row in dilemmas.read(str(tmp_path / "set.jsonl"))] == [("0", "0"), ("1", "1")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("set.csv", b"situation,action\na,b\n", "not a known format of dilemmas"),
        ("set.csv", b"dilemma_situation,action,label\na,b,1\n", "not a known format of dilemmas"),
        ("set.csv", b"", "cannot be read"),
        ("set.csv", b"situation,action,label\na,b,1\na,b,c,d,e\n", "cannot be read"),
        ("set.csv", "situation,action,label\nö,b,1\n".encode("latin-1"), "line 2: not UTF-8 text"),
        ("set.csv", b"situation,action,label\na,b,0\n", "none of 1 rows can be used"),
        ("set.csv", b"situation,action,label\na,b,yes\n", "none of 1 rows can be used"),
        ("set.csv", b"situation,action,label\n", "none of 0 rows can be used"),
        ("set.jsonl", b'{"situation": "a"', "line 1: not valid JSON"),
        ("set.jsonl", b"\xff\xfe", "not UTF-8"),
        ("set.jsonl", b"", "not a known format"),
        ("set.jsonl", b"[1, 2]", "line 1: not a JSON object"),
        ("set.jsonl", b'{"situation": null, "action": "b", "label": 1}', "not a known format"),
        ("set.jsonl", b'{"situation": "a", "action": null, "label": 1}\n{"action": "b"}', "none of 2 rows can be used"),
        ("set.csv", b"situation,action,label\na,,1\n", "none of 1 rows can be used"),
        ("set.parquet", b"not parquet", "cannot be read"),
        ("set.txt", b"situation,action,label\na,b,1\n", "is not a CSV, JSONL or parquet file"),
        ("set", b"situation,action,label\na,b,1\n", "is not a CSV, JSONL or parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        dilemmas.read(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.csv", "no/such.parquet"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="there is no dilemma file"):
        dilemmas.read(str(tmp_path / name))


# ---------------------------------------------------------------- the aggregated table


def aggregated(*values: tuple[str, str], situation: str = "You err.") -> str:
    rows = [
        {"idx": 2 * number + side, "dilemma_idx": number, "dilemma_situation": situation, "action_type": name,
         "action": f"{name} {number}", "values_aggregated": value}
        for number, pair in enumerate(values)
        for side, (name, value) in enumerate(zip(("to_do", "not_to_do"), pair, strict=True))
    ]  # fmt: skip
    return pl.DataFrame(rows).write_csv()


@pytest.mark.parametrize(
    ("to_do", "not_to_do", "labels"),
    [
        ("['honesty', 'trust']", "['kindness']", [1, -1]),
        ("['kindness']", "[' Honesty ']", [-1, 1]),
        ("['honesty']", "['honesty']", [1, -1]),
        ("['trust', 'honesty']", "['kindness']", []),
        ("['dishonesty policy']", "[]", []),
    ],
)
def test_the_first_value_of_a_side_decides_its_label(
    tmp_path: Path, to_do: str, not_to_do: str, labels: list[int]
) -> None:
    path = tmp_path / "set.csv"
    path.write_text(aggregated((to_do, not_to_do), ("['honesty']", "[]")))
    rows = [row for row in dilemmas.read(str(path)) if row.cluster == "0"]
    assert [row.label for row in rows] == labels
    assert [row.row for row in rows] == (["0", "1"] if labels else [])


def test_dilemmas_about_others_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(aggregated(("['honesty']", "[]"), situation="Anna errs."))
    with pytest.raises(UserError, match="none of 2 rows can be used"):
        dilemmas.read(str(path))


def test_an_action_of_the_aggregated_table_that_names_no_honesty_is_a_filler(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(aggregated(("['honesty']", "['trust']"), ("['honesty']", "['self', 'Deception']")))
    assert [row.group for row in dilemmas.read(str(path))] == ["stated", "filler", "stated", "stated"]


@pytest.mark.parametrize("values", ["honesty", "['honesty'", None])
def test_a_list_of_values_that_cannot_be_read_is_a_user_error(tmp_path: Path, values: str | None) -> None:
    path = tmp_path / "set.csv"
    bad: Any = values
    path.write_text(aggregated((bad, "['trust']")))
    with pytest.raises(UserError, match=r"set\.csv"):
        dilemmas.read(str(path))


@pytest.fixture(scope="module")
def proxy() -> list[Dilemma]:
    if not AGGREGATED.is_file():
        pytest.skip("the public data is not here")
    return dilemmas.read(str(AGGREGATED))


def test_the_proxy_set_has_two_opposite_rows_a_dilemma_in_the_second_person(proxy: list[Dilemma]) -> None:
    pairs: dict[str, list[int]] = defaultdict(list)
    for row in proxy:
        pairs[row.cluster].append(row.label)
    assert all(sorted(labels) == [-1, 1] for labels in pairs.values())
    assert len({row.row for row in proxy}) == len(proxy)
    assert all(row.situation.startswith("You") for row in proxy)


def test_honesty_as_the_first_value_gives_the_known_215_dilemmas(proxy: list[Dilemma]) -> None:
    assert (len({row.cluster for row in proxy}), len(proxy)) == (215, 430)


def test_counts_of_the_real_table_add_up_and_are_those_of_the_file(proxy: list[Dilemma]) -> None:
    table = {str(row["idx"]): row for row in pl.read_csv(AGGREGATED).iter_rows(named=True)}
    for row in proxy:
        values = str(table[row.row]["values_aggregated"]).casefold()
        named = any(f"'{value}'" in values for value in dilemmas.HONEST | dilemmas.DISHONEST)
        assert (row.group == dilemmas.STATED) == named, values
    record = dilemmas.load(str(AGGREGATED)).record()
    assert (record["read"], record["kept"]) == (len(table), len(proxy))
    assert record["honest_yes"] + record["honest_no"] == record["counted"] < record["kept"]


# ---------------------------------------------------------------- hub


class FakeHub:
    """Stands for the datasets library; remembers how it was asked."""

    def __init__(self, answer: list[dict[str, Any]] | Exception, folder: str = "") -> None:
        self.answer, self.folder = answer, folder
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, name: str, config: str | None = None, *, split: str, revision: str | None = None) -> Any:
        self.asked.append((name, config, split))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self

    @property
    def cache_files(self) -> list[dict[str, str]]:
        return [{"filename": f"/cache/set/default/0.0.0/{self.folder}/set-test.arrow"}]

    def to_list(self) -> list[dict[str, Any]]:
        assert isinstance(self.answer, list)
        return self.answer


def install(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    module = ModuleType("datasets")
    module.load_dataset = hub.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("name", "config"),
    [("wassname/daily_dilemmas-self-honesty", "honesty_eval"), ("somebody/dilemmas", None), ("dilemmas", None)],
)
def test_a_hub_id_is_loaded_with_its_config_and_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(REPLICATED)
    install(monkeypatch, hub)
    assert dilemmas.read(name) == REPLICATED_READ
    assert hub.asked == [(name, config, "test")]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("folder", "revision", "advice"),
    [(COMMIT, COMMIT, f"somebody/dilemmas@{COMMIT}"), ("a1b2", None, "somebody/dilemmas@REVISION")],
    ids=["known", "unknown"],
)
def test_the_commit_of_a_hub_set_is_recorded_and_an_id_without_one_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    revision: str | None,
    advice: str,
) -> None:
    install(monkeypatch, FakeHub(REPLICATED, folder))
    assert dilemmas.load("somebody/dilemmas").record()["revision"] == revision
    warned = "".join(capsys.readouterr().err.split())
    assert "somebody/dilemmasisnotpinned" in warned and advice in warned
    assert dilemmas.load(f"somebody/dilemmas@{COMMIT}").record()["source"] == f"somebody/dilemmas@{COMMIT}"
    assert "not pinned" not in capsys.readouterr().err


def test_the_library_keeps_the_commit_where_it_is_looked_for(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set" / "default" / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(REPLICATED).save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow")).rename(folder / "set-test.arrow")
    assert tables.commit(datasets.Dataset.from_file(str(arrow))) == COMMIT
    assert tables.commit(datasets.Dataset.from_list(REPLICATED)) is None


def test_a_hub_id_may_have_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(REPLICATED)
    install(monkeypatch, hub)
    assert dilemmas.read("somebody/dilemmas-v1.5") == REPLICATED_READ


@pytest.mark.parametrize(
    ("error", "reason"), [(ConnectionError("no network\nsecond line"), "no network"), (RuntimeError(), "RuntimeError")]
)
def test_a_hub_that_cannot_be_reached_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    install(monkeypatch, FakeHub(error))
    with pytest.raises(UserError) as caught:
        dilemmas.read("somebody/dilemmas")
    assert f"'somebody/dilemmas' cannot be loaded ({reason})" in str(caught.value)
    assert "second line" not in str(caught.value)


def test_a_hub_set_of_another_format_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeHub([{"text": "a"}]))
    with pytest.raises(UserError, match="not a known format of dilemmas"):
        dilemmas.read("somebody/dilemmas")


def test_without_the_library_the_hub_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install .*\[hub\]"):
        dilemmas.read("somebody/dilemmas")


# ---------------------------------------------------------------- the full set, labelled anew


def situation(key: int) -> list[dict[str, Any]]:
    return [
        {"idx": 2 * key + number, "dilemma_idx": key, "dilemma_situation": f"You see case {key}.", "action_type": side,
         "action": f"{side} {key}", "values_aggregated": "[]"}
        for number, side in enumerate(("to_do", "not_to_do"))
    ]  # fmt: skip


def value(key: int, side: str, value: str, party: str = "You") -> dict[str, Any]:
    return {"idx": 0, "dilemma_idx": key, "action_type": side, "action": "", "party": party, "party_type": "",
            "value": value}  # fmt: skip


SITUATIONS = [row for key in range(8) for row in situation(key)]
VALUES = [
    value(0, "to_do", "honesty"),  # doing is honest
    value(1, "not_to_do", "Truthfulness, courage"),  # leaving is honest
    value(2, "to_do", "deception"),  # doing is dishonest
    value(3, "not_to_do", "deceit"),
    value(4, "to_do", "honesty", party="Friend"),  # not the acting person's
    value(5, "to_do", "loyalty"),  # no honesty at all
    value(6, "to_do", "honesty"), value(6, "not_to_do", "honesty"),  # on both sides: doing counts
    value(7, "to_do", "honesty, deception"),  # a tie keeps nothing
]  # fmt: skip
EXPECTED = {0: 1, 1: -1, 2: -1, 3: 1, 6: 1}
"""Dilemma -> label of doing."""


def test_the_full_set_is_labelled_by_the_values_of_the_acting_person() -> None:
    rows = dilemmas.by_own_values(pl.DataFrame(SITUATIONS), pl.DataFrame(VALUES))
    assert {int(row.cluster): row.label for row in rows if row.action.startswith("to_do")} == EXPECTED
    assert {int(row.cluster): -row.label for row in rows if row.action.startswith("not_to_do")} == EXPECTED
    assert {row.row for row in rows if row.group == "stated"} == {"0", "3", "4", "7", "12", "13"}
    assert len({row.row for row in rows}) == len(rows) == 2 * len(EXPECTED)


def test_the_full_set_is_read_from_a_folder_with_both_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pl.DataFrame(SITUATIONS).write_csv(tmp_path / f"{dilemmas.SITUATIONS}.csv")
    with pytest.raises(UserError, match=dilemmas.VALUES):
        dilemmas.read(str(tmp_path))
    pl.DataFrame(VALUES).write_parquet(tmp_path / f"{dilemmas.VALUES}.parquet")
    assert len(dilemmas.read(str(tmp_path))) == 10
    assert "kept 10 of 16 rows" in capsys.readouterr().out


def test_the_full_set_is_two_tables_of_one_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str | None]] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((name, config, revision))
        table = SITUATIONS if config == dilemmas.SITUATIONS else VALUES

        class Loaded:
            def to_list(self) -> list[dict[str, Any]]:
                return table

        assert split == "test"
        return Loaded()

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert len(dilemmas.read(f"{dilemmas.REBUILT_HUB_ID}@abc")) == 10
    assert asked == [(dilemmas.REBUILT_HUB_ID, name, "abc") for name in (dilemmas.SITUATIONS, dilemmas.VALUES)]


def test_both_tables_of_the_full_set_are_of_one_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, asked = {dilemmas.SITUATIONS: SITUATIONS, dilemmas.VALUES: VALUES}, []

    def load_dataset(name: str, config: str, *, split: str, revision: str | None) -> Any:
        asked.append(revision)
        return FakeHub(tables[config], COMMIT)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert dilemmas.load(dilemmas.REBUILT_HUB_ID).record()["revision"] == COMMIT
    assert asked == [None, COMMIT]
    assert capsys.readouterr().err.count("is not pinned") == 1
