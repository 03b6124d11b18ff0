"""The arithmetic of the benchmarks: exponents, operations, the plan on paper, tables. Nothing is timed here."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fixed_costs
import flops
import growth
import inputs
import memory
import page
import plan
import pytest
import results
import shapes
import spending
import timing
import torch
import workload
from growth import Series
from plan import LARGE, Job, Machines

from ws import forward, models
from ws.models import ChatModel

MACHINE = {"processor": "p", "cores": 2, "threads": 2, "versions": {"torch": "1"}, "gemm_gflops": {"float32": 50.0}}


def record(comparison: str = "scoring", size: str = "pocket", ours: float = 1.0) -> dict[str, object]:
    row = timing.row("work", "peer", size, [ours], [2.0, 4.0, 3.0], flops=2e9, peak=4.0, memory=(10.4, None))
    return {"comparison": comparison, **row.as_record()}


# -------------------------------------------------------------------- timing


def test_ways_are_run_in_turn_and_the_first_round_is_thrown_away() -> None:
    calls: list[str] = []
    ways = [timing.Way(name, lambda name=name: calls.append(name)) for name in "ab"]
    times = timing.in_turn(ways, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    assert len(timing.in_turn(ways, 1, warm_up=0)["a"]) == 1


def test_row_has_medians_ratio_and_share_of_the_limit() -> None:
    row = timing.row("w", "p", "s", [2.0, 1.0, 4.0], [6.0], flops=4e9, peak=8.0)
    assert (row.ours, row.ours_range, row.ratio) == (2.0, (1.0, 4.0), 3.0)
    assert row.share_of_limit == pytest.approx(4e9 / 2.0 / 1e9 / 8.0)
    assert timing.row("w", "p", "s", [1.0], [1.0], flops=1e9).share_of_limit is None


def test_own_peak_is_not_that_of_the_parent() -> None:

    ballast = bytearray(300 * 2**20)
    command = "import memory; print(memory.own_peak())"
    folder = str(Path(memory.__file__).parent)
    child = subprocess.run([sys.executable, "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    assert float(child.stdout) < 200 < memory.own_peak()
    assert ballast


# -------------------------------------------------------------------- growth


def test_exponent_of_a_power_law_is_found() -> None:
    sizes = (1, 2, 4, 8, 16)
    assert growth.fitted_exponent(sizes, [3 * n**1.25 for n in sizes]) == pytest.approx(1.25)
    assert growth.fitted_exponent(sizes, [5.0] * 5) == pytest.approx(0.0, abs=1e-12)


def test_exponent_is_of_the_medians_and_its_range_of_the_repetitions() -> None:
    series = Series("s", (1, 2), ((1.0, 1.0, 1.0), (2.0, 4.0, 2.0)))
    assert series.medians == [1.0, 2.0]
    assert series.exponent == pytest.approx(1.0)
    assert series.exponent_range == pytest.approx((1.0, 2.0))
    assert "| s | 1, 2 | 1, 2 | 1.00 (1.00-2.00) |" in growth.as_table([series.as_record()])


def test_distinct_rows_repeat_no_question_and_keep_clusters_together() -> None:
    probe = growth.distinct_rows(2000)
    texts = [(row.messages[0]["content"], row.continuation) for row in probe.rows]
    assert len(probe.rows) == len(set(texts)) == 2000
    numbers = {row.cluster: set() for row in probe.rows}
    for row, (text, _) in zip(probe.rows, texts, strict=True):
        numbers[row.cluster].add(text.split(". ")[0])
    assert all(len(found) == 1 for found in numbers.values())
    assert growth.distinct_rows(50).rows == probe.rows[:50]


# -------------------------------------------------------------------- operations


def test_scoring_sends_all_tokens_through_the_layers_and_one_position_through_the_head() -> None:
    matrices = flops.Matrices((10, 20), 7)
    assert flops.scoring(matrices, first=0, tokens=5, rows=3, conditions=2) == 2 * (2 * 30 * 5 + 2 * 7 * 3)
    assert flops.scoring(matrices, first=1, tokens=5, rows=3, conditions=2) == 2 * 10 * 5 + 2 * (2 * 20 * 5 + 2 * 7 * 3)


def test_training_goes_back_to_the_lowest_adapted_layer_only() -> None:
    matrices = flops.Matrices((10, 20, 30), 7)
    found = flops.training(matrices, first=1, tokens=5, answer_tokens=2, adapter=4, epochs=3)
    epoch = (2 * 50 * 5 + 2 * 7 * 2) + (2 * 7 * 2 + 2 * 30 * 5) + 6 * 4 * 5
    assert found == 2 * 10 * 5 + 3 * epoch


def test_matrices_of_a_model_leave_out_norms_and_embeddings(qwen: ChatModel) -> None:
    matrices = flops.Matrices.of(qwen)
    layer = 64 * (4 * 16) * 2 + 64 * (2 * 16) * 2 + 3 * 64 * 128
    assert matrices == flops.Matrices((layer,) * 4, 1024 * 64)


# -------------------------------------------------------------------- shapes and workloads


def test_shapes_have_the_published_sizes() -> None:
    totals = {
        name: shape.layers * shape.layer_parameters + shape.vocabulary * shape.width
        for name, shape in shapes.SHAPES.items()
    }
    assert totals["qwen3-0.6b-shape"] == pytest.approx(0.596e9, rel=1e-3)
    assert totals["qwen3-1.7b-shape"] == pytest.approx(1.720e9, rel=1e-3)
    assert totals["qwen3-0.1b-shape"] == pytest.approx(0.125e9, rel=1e-2)


def test_made_shape_loads_as_an_ordinary_model(tmp_path: Path) -> None:
    small = replace(shapes.SHAPES["qwen3-0.04b-shape"], layers=2, width=64, feed_forward=96, vocabulary=2048)
    shapes.make(small, tmp_path / "m", torch.float32)
    model = models.load(str(tmp_path / "m"))
    assert flops.Matrices.of(model) == flops.Matrices((small.layer_parameters,) * 2, 2048 * 64)
    ids = forward.pad_right([model.chat.prompt([{"role": "user", "content": "Yes?"}])], model.device)
    assert int(ids.max()) < 1024


def test_workload_is_chosen_by_size_and_quick_covers_every_comparison() -> None:
    assert workload.choose("pocket", False) is workload.FULL
    assert workload.choose("pocket", True) is workload.QUICK
    assert workload.choose("qwen3-0.6b-shape", True) is workload.SHAPE
    assert workload.QUICK.comparisons == workload.FULL.comparisons
    assert workload.QUICK.growth is not None
    assert workload.without(("a", "b", "c"), ["b"]) == ("a", "c")
    for one in workload.WORKLOADS.values():
        assert not one.growth or set(one.growth.shapes) <= set(shapes.SHAPES)
        assert not one.growth or len(one.growth.shapes) > 1


def test_written_pairs_are_all_kept_and_differ() -> None:
    pairs = inputs.written_pairs(64)
    assert len(pairs) == 64
    assert pairs["keep_pos"].all() and pairs["keep_neg"].all()
    assert not (pairs["response_pos"] == pairs["response_neg"]).any()


def test_random_adapters_make_a_direction_on_the_default_slice(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    small = replace(workload.SHAPE, written=4)
    made = inputs.Inputs("tiny", str(tiny_folders["qwen3"]), small, tmp_path)
    made._write_random()
    direction = made.direction(made.load())
    assert direction.layer_numbers == [1, 2]
    assert direction.rank == 64
    assert direction.norm() > 0


# -------------------------------------------------------------------- the plan


def test_plan_counts_the_large_shape_by_hand() -> None:
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert LARGE.layer_parameters == layer == 855_638_016
    assert LARGE.parameters == 80 * layer + 2 * 128_256 * 8192 == 70_552_387_584
    assert LARGE.kv_bytes_per_token == 2 * 80 * 1024 * 2
    assert LARGE.lora_parameters(32, 1) == 32 * (2 * 16_384 + 2 * 9216 + 3 * 36_864)
    assert LARGE.activation_bytes_per_token(2, checkpointed=True) == 2 * 2 * 8192
    kept = 4 * 8192 + 8192 + 2 * 1024 + 8192 + 3 * 28672
    assert LARGE.activation_bytes_per_token(1, checkpointed=False) == 2 * kept


def test_plan_counts_operations_by_hand() -> None:
    tiny = plan.Shape(10, 4, 8, 2, 1, 2, 16)
    layer = 4 * 4 * 2 + 4 * 2 * 2 + 3 * 4 * 8
    job = Job(pairs=3, response=5, prompt=2, prompts=4, branches=2, epochs=3, alphas=7, rows=6, row_tokens=10, rank=1)
    assert tiny.layer_parameters == layer == 144
    assert plan.sampling_flops(tiny, job) == 2 * 1440 * (30 + 8) + 2 * 64 * 30
    assert plan.scoring_flops(tiny, job, saving=0.5) == 2 * 432 * 30 + 7 * 2 * (1008 * 30 + 64 * 6)
    adapter = 5 * (2 * 8 + 2 * 6 + 3 * 12)
    epoch = (2 * 1008 * 21 + 2 * 64 * 15) + (2 * 64 * 15 + 2 * 6 * 144 * 21) + 6 * adapter * 21
    assert plan.training_flops(tiny, job) == 2 * (2 * 432 * 21 + 3 * epoch)


def test_sampling_is_bound_by_traffic_until_the_memory_is_fast() -> None:
    job, slow = Job(), Machines()
    weights = job.response * LARGE.parameters * 2
    cache = job.response * 2000 * (60 + 80) * LARGE.kv_bytes_per_token
    assert plan.sampling_seconds(LARGE, job, slow) == pytest.approx(
        max((weights + cache) / (8 * 3.35e12 * 0.5), plan.sampling_flops(LARGE, job) / (8 * 989e12 * 0.4))
    )
    fast = replace(slow, bandwidth=1e18)
    assert plan.sampling_seconds(LARGE, job, fast) == pytest.approx(
        plan.sampling_flops(LARGE, job) / (8 * 989e12 * 0.4)
    )


def test_better_utilisation_and_more_sharing_cost_less() -> None:
    def last(saving: float, machines: Machines) -> float:
        return float(plan.costs(saving, machines=machines)[-1].value)

    assert last(0.5, Machines(compute_use=0.2)) > last(0.5, Machines())
    assert last(0.0, Machines()) > last(0.9, Machines())


# -------------------------------------------------------------------- tables


def test_table_shows_medians_notes_shares_and_peaks() -> None:
    head, _, line = results.as_table([record()]).splitlines()
    assert head.count("|") == line.count("|") == 10
    assert "| 1 (1-1) | peer | 3 (2-4) | 3.00 | 0.50 | 10 |  |" in line
    assert "- gemm gflops: float32 50.0" in results.as_text({"machine": MACHINE, "rows": [record()]})


def test_fixed_costs_are_a_small_table() -> None:
    cost = fixed_costs.Cost("import", 1.5, (1.0, 2.0))
    assert fixed_costs.as_table([cost.as_record()]).splitlines()[-1] == "| import | 1.50 (1.00-2.00) |"


def test_a_comparison_measured_again_replaces_its_rows() -> None:
    old = {"machine": MACHINE, "rows": [record(), record("training"), record(size="other")], "growth": [1]}
    new = {"machine": {**MACHINE, "gemm_gflops": {}}, "rows": [record(ours=5.0), record(ours=6.0)]}
    found = results.merged(old, new)
    assert [(row["comparison"], row["size"], row["ours"]) for row in found["rows"]] == [
        ("training", "pocket", 1.0), ("scoring", "other", 1.0), ("scoring", "pocket", 5.0), ("scoring", "pocket", 6.0),
    ]  # fmt: skip
    assert found["growth"] == [1]
    other = {**MACHINE, "processor": "q"}
    assert results.merged(old, {"machine": other, "rows": [record()]}) == {"machine": other, "rows": [record()]}


def test_profiles_of_other_work_and_sizes_are_kept() -> None:
    def profiled(work: str, size: str, seconds: float) -> dict[str, object]:
        return {"work": work, "size": size, "seconds": {spending.OUTSIDE: seconds}}

    old = {"machine": MACHINE, "rows": [], "spending": [profiled("a", "s", 1.0), profiled("a", "l", 2.0)]}
    new = {"machine": MACHINE, "rows": [], "spending": [profiled("a", "s", 3.0)]}
    assert results.merged(old, new)["spending"] == [profiled("a", "l", 2.0), profiled("a", "s", 3.0)]
    assert results.merged(old, {"machine": MACHINE, "rows": []})["spending"] == old["spending"]


def test_time_is_spent_on_what_is_run() -> None:
    factor = torch.ones(400, 400)
    found = spending.measure(timing.Way("w", lambda: [factor @ factor for _ in range(40)]), "w", "s")
    assert max(found.seconds, key=found.seconds.__getitem__) == "matrix products"
    assert spending.kind_of("_softmax") == "softmax" and spending.kind_of("silu") == spending.ELEMENTWISE
    head, _, line = spending.as_table([found.as_record()]).splitlines()
    assert head.count("|") == line.count("|")
    assert sum(int(cell.split()[0]) for cell in line.split("|") if "%" in cell) in range(97, 104)


def test_a_part_of_the_page_is_replaced_between_its_marks() -> None:
    text = "a\n<!-- x -->\nold\n<!-- x -->\nb <!-- y -->\n<!-- y -->"
    assert page.put(text, "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- x -->\nb <!-- y -->\n<!-- y -->"
    with pytest.raises(ValueError, match="1 marks"):
        page.put("<!-- x -->", "x", "new")


def test_the_page_has_every_mark_and_the_plan_of_the_code() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    for name in ("measured", "fixed", "growth", "plan"):
        page.put(text, name, "")
    assert plan.as_table() in text
