"""The arithmetic of the benchmarks: exponents, operations, the plan on paper, tables. Nothing is timed here."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aims
import fast_paths
import fixed_costs
import flops
import growth
import inputs
import machine
import memory
import opening
import page
import peers
import plan
import pytest
import results
import run
import shapes
import spending
import timing
import torch
import traffic
import workload
from aims import Aim
from algebra import Algebra
from generating import Generating
from growth import Series
from limits import GEMM, MEMORY, Limits, Need
from plan import LARGE, Job, Machines
from scoring import Scoring
from sweeping import Sweeping
from training import Branches, Training

from ws.base.errors import UserError
from ws.base.files import read_json, write_json
from ws.measure import lower_layers
from ws.model import forward, loading
from ws.model.loading import ChatModel

MACHINE = {
    "processor": "p", "device": "cpu", "cores": 2, "threads": 2, "versions": {"torch": "1"},
    "gemm_gflops": {"float32": 50.0}, "bandwidth_gb_per_s": 8.0,
}  # fmt: skip


def record(comparison: str = "scoring", size: str = "pocket", ours: float = 1.0, *met: Aim) -> dict[str, object]:
    row = timing.row(
        "work", "peer", size, [ours], [2.0, 4.0, 3.0], need=Need(2e9), limits=Limits(4.0, 1.0), memory=(10.4, None),
        profile=comparison,
    )  # fmt: skip
    return {"comparison": comparison, **row.aiming(*met).as_record()}


# -------------------------------------------------------------------- timing


def test_ways_are_run_in_turn_and_the_first_round_is_thrown_away() -> None:
    calls: list[str] = []
    ways = [timing.Way(name, lambda name=name: calls.append(name)) for name in "ab"]
    times = timing.in_turn(ways, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    assert len(timing.in_turn(ways, 1, warm_up=0)["a"]) == 1


def test_a_warm_up_may_be_a_part_of_the_work() -> None:
    calls: list[str] = []
    way = timing.Way("w", lambda: calls.append("whole"), lambda: calls.append("part"))
    timing.in_turn([way], 2)
    assert calls == ["part", "whole", "whole"]


def test_what_takes_long_is_repeated_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [timing.repetitions(3, known) for known in ([], [19.0], [21.0], [5.0, 91.0])] == [3, 3, 2, 1]
    assert timing.repetitions(1, [21.0]) == 1
    spent = {"quick": 1.0, "slow": 30.0, "very slow": 120.0}
    monkeypatch.setattr(timing, "seconds", lambda work, _clock: spent[work()])
    ways = [timing.Way(name, lambda name=name: name) for name in spent]
    assert {name: len(found) for name, found in timing.in_turn(ways, 3).items()} == {
        "quick": 3, "slow": 2, "very slow": 1,
    }  # fmt: skip


def test_row_has_medians_ratio_repetitions_and_share_of_the_limit() -> None:
    row = timing.row("w", "p", "s", [2.0, 1.0, 4.0], [6.0], need=Need(4e9), limits=Limits(8.0, 1.0))
    assert (row.ours, row.ours_range, row.ratio, row.repetitions) == (2.0, (1.0, 4.0), 3.0, (3, 1))
    assert row.share_of_limit == pytest.approx(4e9 / 2.0 / 1e9 / 8.0)
    assert timing.row("w", "p", "s", [1.0], [1.0], need=Need(1e9)).share_of_limit is None


def test_the_limit_that_binds_is_the_one_that_takes_longer() -> None:
    limits = Limits(gflops=100.0, gb_per_s=10.0)
    assert limits.least(Need(flops=2e11, bytes=1e9)) == (2.0, GEMM)
    assert limits.least(Need(flops=1e9, bytes=5e9)) == (0.5, MEMORY)
    assert machine.limits(MACHINE) == {"float32": Limits(50.0, 8.0)}


def test_versions_of_the_peers_are_recorded() -> None:
    found = dict(machine._versions())
    assert found["torch"] == torch.__version__
    assert list(found) == [name for name in machine.LIBRARIES if name in found]
    assert {"trl", "mergekit", "repeng", "steering-vectors"} <= set(machine.LIBRARIES)


def test_own_peak_is_not_that_of_the_parent() -> None:

    ballast = bytearray(300 * 2**20)
    command = "import memory; print(memory.own_peak())"
    folder = str(Path(memory.__file__).parent)
    child = subprocess.run([sys.executable, "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    assert float(child.stdout) < 200 < memory.own_peak()
    assert ballast


# -------------------------------------------------------------------- aims


def test_an_aim_binds_from_its_side() -> None:
    assert Aim("r", 2.0, 2.0).is_reached and not Aim("r", 2.0, 1.9).is_reached
    assert Aim("p", 2.0, 2.0, at_least=False).is_reached and not Aim("p", 2.0, 2.1, at_least=False).is_reached


def test_aims_are_those_of_the_work_the_peer_and_the_size() -> None:
    (found,) = aims.ratio("scoring", "in place", "smollm2", 2.76)
    assert (found.bound, found.is_reached) == (3.0, False)
    assert not [*aims.ratio("scoring", "in place", "another", 9.0)]
    assert not [*aims.share("scoring", "pocket", 0.1)] and not [*aims.share("scoring", aims.REAL, None)]
    assert [one.is_reached for one in aims.peak(700.0, 200.0, cache=512.0)] == [True]
    assert [one.is_reached for one in aims.peak(713.0, 200.0, cache=512.0)] == [False]
    assert not [*aims.peak(700.0, None, cache=512.0)]
    assert [one.is_reached for one in aims.whole("pocket", 46.0)] == [False]


def test_every_aim_belongs_to_a_comparison_of_its_size() -> None:
    wanted = {(comparison, size) for comparison, _, size in aims.RATIOS} | set(aims.GEMM_SHARES)
    for comparison, size in wanted:
        chosen = workload.choose(size, False)
        assert comparison in chosen.comparisons and chosen.has_aims
    assert not workload.QUICK.has_aims


def test_a_run_covers_every_size_that_has_aims() -> None:
    assert set(run.default_models(quick=False)) == {size for _, _, size in aims.RATIOS}
    assert run.default_models(quick=True) == ("pocket",)
    assert set(run.COMPARISONS) == set(workload.FULL.comparisons)


def test_a_miss_is_said_with_its_profile() -> None:
    profile = {"work": "scoring", "size": "pocket", "seconds": {"matrix products": 3.0, spending.OUTSIDE: 1.0}}
    missed, kept = Aim(aims.RATIO, 3.0, 1.5), Aim(aims.SHARE, 0.1, 0.5)
    rows = [record("scoring", "pocket", 1.0, missed, kept), record("scoring", "pocket", 2.0, missed)]
    (line,) = aims.misses(rows, [profile]).splitlines()
    assert "against peer: ratio >= 3 is missed, it is 1.5." in line
    assert "matrix products 75 %, outside of operations 25 %" in line
    assert "No profile" in aims.misses(rows, [])
    assert "missed" not in aims.misses([record("scoring", "pocket", 1.0, kept)], [profile])
    assert aims.misses([record()], [profile]) == "Nothing here has an aim."
    assert aims.verdicts(rows[0]["aims"]) == "ratio >= 3 **missed**; share of the GEMM peak >= 0.1 reached"


def test_memory_that_is_missed_is_not_blamed_on_time() -> None:
    missed = Aim(aims.PEAK, 100.0, 2000.0, at_least=False)
    line = aims.misses([record("scoring", "pocket", 1.0, missed)], [])
    assert line.endswith("peak MiB <= 100 is missed, it is 2000.")


# -------------------------------------------------------------------- fast paths


def test_a_fast_path_that_pays_nowhere_is_said() -> None:
    def tried(path: str, work: str, ratio: float) -> dict[str, object]:
        return {**record("paths"), "work": f"{path}: {work}", "ratio": ratio}

    rows = [tried("tree", "choices", 1.1), tried("tree", "texts", 1.2), tried("cache", "samples", 1.19)]
    assert aims.unpaid(rows) == "- cache: pays at most 1.19, less than 1.2: to be deleted."
    assert aims.unpaid(rows[:2]) == "Every fast path pays 1.2 or more somewhere."
    assert aims.unpaid([record()]) == ""
    assert "- cache: pays" in results.as_text({"machine": MACHINE, "rows": rows})


def test_rows_as_they_come_keep_their_order_within_the_budget() -> None:
    assert fast_paths.as_they_come([3, 9, 2, 2, 2, 30, 1], 12) == [[0], [1], [2, 3, 4], [5], [6]]
    assert sorted(i for batch in forward.plan_batches([3, 9, 2, 2, 2, 30, 1], 12) for i in batch) == list(range(7))
    assert fast_paths.as_they_come([], 12) == []


@pytest.mark.parametrize("path", fast_paths.PATHS, ids=lambda path: path.name)
def test_without_a_fast_path_the_work_is_the_same_and_everything_is_put_back(
    tiny_inputs: inputs.Inputs, path: fast_paths.FastPath
) -> None:
    """The same table of scores and the same samples up to rounding; afterwards nothing is switched off."""
    tried = fast_paths.FastPaths(tiny_inputs)
    network = tried.model.network
    before = [type(module) for module in network.modules()], network.config._attn_implementation
    for work in set(path.works) - {"fit", "samples", "replies"}:
        whole = tried._works[work]()
        with path.off(tried):
            without = tried._works[work]()
        torch.testing.assert_close(without["value"].to_torch(), whole["value"].to_torch(), rtol=1e-3, atol=1e-4)
    if "samples" in path.works:
        whole = tried._works["samples"]()
        with path.off(tried):
            without = tried._works["samples"]()
        assert [one for samples in without for one in samples] == [one for samples in whole for one in samples]
    assert ([type(module) for module in network.modules()], network.config._attn_implementation) == before


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


def test_generating_reads_a_prompt_once_and_the_weights_once_per_token() -> None:
    matrices = flops.Matrices((10, 20), 7)
    prompts, drawn = [5, 3], [[4, 1], [2]]
    further = 3 + 0 + 1
    assert flops.generating(matrices, prompts, drawn) == 2 * (30 * 8 + 7 * 2) + 2 * 37 * further
    cached = (5 + 1) + (5 + 2) + (5 + 3) + (3 + 1)
    assert traffic.generating(matrices, 2, 100, prompts, drawn) == 4 * 2 * 37 + 100 * cached


def test_bytes_of_a_cached_token_are_those_of_the_cache(qwen: ChatModel) -> None:
    with torch.no_grad():
        cache = qwen.network(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert traffic.kv_bytes_per_token(qwen) * 3 == held


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
    model = loading.load(str(tmp_path / "m"))
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


def test_the_inputs_may_be_those_of_a_run(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    model = str(tiny_folders["qwen3"])
    source = inputs.Inputs("tiny", model, replace(workload.SHAPE, written=4), tmp_path / "run")
    source.folder.mkdir()
    source._write_random()
    stored = {"model": model, "behaviour": "honesty", "adapter": "lora"}
    write_json(source.folder / "config.json", {"settings": stored})
    assert inputs.is_run(str(source.folder)) and not inputs.is_run(model)
    target = tmp_path / "inputs"
    target.mkdir()
    made = inputs.Inputs.make(str(source.folder), workload.choose("", False, of_run=True), target)
    assert (made.behaviour, made.size) == ("honesty", "tiny-qwen3, run on honesty")
    assert inputs.Inputs.read(target) == made and made.workload.comparisons == ("algebra", "activations")
    assert Algebra(made)._peer_error().cosine == pytest.approx(1.0)
    write_json(source.folder / "config.json", {"settings": {**stored, "adapter": "ia3"}})
    with pytest.raises(UserError, match="of the family ia3"):
        inputs.Inputs.make(str(source.folder), made.workload, target)


# -------------------------------------------------------------------- comparisons on a random model


@pytest.fixture
def tiny_inputs(tiny_folders: dict[str, Path], tmp_path: Path) -> inputs.Inputs:
    given = replace(
        workload.SHAPE, written=4, sweeps=2, seeds=(0, 1), families=("lora", "ia3"), has_aims=False,
        generation=workload.Generation(2, 3, (4,), 5, 2), paths=workload.Paths(6, 2, 2, 3, 5, 2, 1),
    )  # fmt: skip
    made = inputs.Inputs("tiny", str(tiny_folders["qwen3"]), given, tmp_path)
    made._write_random()
    return made


def test_the_peer_s_difference_is_held_against_the_exact_one(tiny_inputs: inputs.Inputs) -> None:
    missed = Algebra(tiny_inputs)._peer_error()
    assert 0 < missed.relative < 1e-4
    assert missed.cosine == pytest.approx(1.0)


def test_half_precision_costs_the_peer_s_difference_more(tiny_inputs: inputs.Inputs) -> None:
    rounded = Algebra(tiny_inputs)
    rounded.model.network.to(torch.bfloat16)
    assert rounded._peer_error().relative > 10 * Algebra(tiny_inputs)._peer_error().relative


def test_a_sweep_runs_the_lower_layers_once(tiny_inputs: inputs.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run_below = lower_layers._run_below

    def counted(model: ChatModel, layer: int, rows: object) -> object:
        runs.append(layer)
        return run_below(model, layer, rows)

    monkeypatch.setattr(lower_layers, "_run_below", counted)
    sweep = Sweeping(tiny_inputs)
    once = len({tuple(ids) for rows in sweep._families["lora"].examples.values() for ids, _ in rows})
    assert once == 8
    sweep.ours()
    first = len(runs)
    sweep.ours()
    assert first > 0
    assert len(runs) == 2 * first, "a repetition pays for them again"
    lower_layers.forget(sweep.model)
    runs.clear()
    sweep._families["lora"].ours(0, 1)
    assert len(runs) == first, "the second family adds nothing"


def test_seeds_share_what_lies_below_the_adapters(tiny_inputs: inputs.Inputs) -> None:
    model = tiny_inputs.load()
    fits = Branches(model, peers.SftPeer(model), tiny_inputs.pairs, "lora")
    below = fits.need(1).flops - fits.need(1, below=False).flops
    assert below > 0
    assert fits.need(3).flops == pytest.approx(3 * fits.need(1, below=False).flops + below)
    assert fits.need(1) == Training(tiny_inputs)._branches.need(1)


def test_what_generation_needs_is_counted_on_what_was_written(tiny_inputs: inputs.Inputs) -> None:
    ours = Generating(tiny_inputs)
    ours.ours()
    most = max(len(one.ids) + (one.finish == "eos") for samples in ours._written for one in samples)
    matrices = flops.Matrices.of(ours.model)
    assert [len(samples) for samples in ours._written] == [3, 3]
    assert ours._need(ours._written).bytes > most * 4 * (sum(matrices.layers) + matrices.head)


def test_half_precision_is_noted_beside_the_scores(tiny_inputs: inputs.Inputs) -> None:
    scoring = Scoring(tiny_inputs)
    line = timing.row("w", "p", "s", [1.0], [1.0], note="n")
    assert scoring._with_rounding(line) == line, "fp32 has nothing to say"
    scoring.model.network.to(torch.bfloat16)
    noted = scoring._with_rounding(line)
    assert noted.note.startswith("n; bfloat16 against float32 on 32 rows: mean shift ")
    assert [aim.bound for aim in noted.aims] == [0.01, 0.1]
    assert all(aim.found > 0 for aim in noted.aims)


def test_a_contiguous_head_gives_the_same_logits(qwen: ChatModel) -> None:
    head, states = qwen.network.get_output_embeddings(), torch.randn(3, 5, 64)[:, -1:]
    assert not states.is_contiguous()
    whole, seen = head(states), []
    with peers.contiguous_head(qwen.network):
        torch.testing.assert_close(head(states), whole)
        seen.append(head.forward)
    assert head.forward != seen[0]


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
    assert head.count("|") == line.count("|") == 11
    assert "| 1 (1-1, n=1) | peer | 3 (2-4, n=3) | 3.00 | 0.50 GEMM | 10 |  |  |" in line
    assert "- gemm gflops: float32 50.0" in results.as_text({"machine": MACHINE, "rows": [record()]})


def test_fixed_costs_are_a_small_table() -> None:
    cost = fixed_costs.Cost("import", 1.5, (1.0, 2.0))
    assert fixed_costs.as_table([cost.as_record()]).splitlines()[-1] == "| import | 1.50 (1.00-2.00) |  |"
    helped = [fixed_costs.Cost(fixed_costs.HELP, s, (s, s)).as_record() for s in (0.5, 0.51)]
    assert [line.split("|")[3].strip() for line in fixed_costs.as_table(helped).splitlines()[2:]] == [
        "<= 0.5 reached",
        "<= 0.5 **missed**",
    ]


def test_a_comparison_measured_again_replaces_its_rows() -> None:
    old = {"machine": MACHINE, "rows": [record(), record("training"), record(size="other")], "growth": [1]}
    new = {"machine": {**MACHINE, "gemm_gflops": {}}, "rows": [record(ours=5.0), record(ours=6.0)]}
    found = results.merged(old, new)
    assert [(row["comparison"], row["size"], row["ours"]) for row in found["rows"]] == [
        ("training", "pocket", 1.0), ("scoring", "other", 1.0), ("scoring", "pocket", 5.0), ("scoring", "pocket", 6.0),
    ]  # fmt: skip
    assert found["growth"] == [1]
    peer = {"machine": {**MACHINE, "versions": {"torch": "1", "peer": "3"}}, "rows": [record()]}
    assert len(results.merged(old, peer)["rows"]) == 3, "a new peer changes no old line"
    unknown = {"machine": {**MACHINE, "versions": {}}, "rows": [record()]}
    assert results.merged(old, unknown) == unknown, "nothing in common is no agreement"
    newer = {**MACHINE, "versions": {"torch": "2"}}
    assert results.merged(old, {"machine": newer, "rows": [record()]}) == {"machine": newer, "rows": [record()]}


def test_records_of_other_machines_stay_beside_the_one_that_ran_last() -> None:
    here, there = {"machine": MACHINE, "rows": [record()]}, {"machine": {**MACHINE, "device": "x"}, "rows": []}
    both = results.merged(here, there)
    assert both == {**there, "other_machines": [here]}
    again = {"machine": MACHINE, "rows": [record("training")]}
    back = results.merged(both, again)
    assert [row["comparison"] for row in back["rows"]] == ["scoring", "training"]
    assert back["other_machines"] == [there]
    text = results.as_text(back)
    assert text.index("- device: cpu") < text.index("- device: x")


def test_profiles_of_other_work_and_sizes_are_kept() -> None:
    def profiled(work: str, size: str, seconds: float) -> dict[str, object]:
        return {"work": work, "size": size, "seconds": {spending.OUTSIDE: seconds}}

    old = {"machine": MACHINE, "rows": [], "spending": [profiled("a", "s", 1.0), profiled("a", "l", 2.0)]}
    new = {"machine": MACHINE, "rows": [], "spending": [profiled("a", "s", 3.0)]}
    assert results.merged(old, new)["spending"] == [profiled("a", "l", 2.0), profiled("a", "s", 3.0)]
    assert results.merged(old, {"machine": MACHINE, "rows": []})["spending"] == old["spending"]


def test_time_is_spent_on_what_is_run() -> None:
    factor = torch.ones(400, 400)
    found = spending.measure(lambda: [factor @ factor for _ in range(40)], "w", "s")
    assert spending.together([found, found], "both").seconds["matrix products"] == pytest.approx(
        2 * found.seconds["matrix products"]
    )
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
    for name in ("opening", "measured", "fixed", "growth", "plan"):
        page.put(text, name, "")
    assert plan.as_table() in text


def test_seconds_are_written_as_a_person_reads_them() -> None:
    assert [*map(opening.seconds, (149.2, 99.4, 7.0, 0.0961))] == ["149", "99", "7", "0.096"]


def test_the_page_opens_with_eleven_jobs_of_the_stored_results() -> None:
    rows = read_json(run.RESULTS)["rows"]
    table = opening.as_table(rows)
    assert table.count("\n") == 1 + 11 and table in page.PAGE.read_text(encoding="utf-8")
    for job, shown in zip(opening.JOBS, table.split("\n")[2:], strict=True):
        (line, *others) = [one for one in rows if opening.measures(one, job)]
        assert not job.work or line["work"].startswith(job.work)
        assert f"| {opening.seconds(line['ours'])} |" in shown and f"| {line['ratio']:.1f}x |" in shown
        assert {one["peer"] for one in others} <= {line["peer"]}, f"{job.said}: which line is meant?"


def test_a_job_that_was_not_measured_has_no_line_on_the_page() -> None:
    rows = [one for one in read_json(run.RESULTS)["rows"] if one["comparison"] != "pipeline"]
    assert opening.as_table(rows).count("\n") == 1 + 9
