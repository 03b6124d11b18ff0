"""On paper: what one replication of a large model costs on several GPUs. Arithmetic from the shape, nothing measured.

    python benchmarks/plan.py           # print the table and write it into docs/performance.md

Only one number is measured: the share of the dilemma rows' tokens that shared prefixes save.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import flops
import page
from shapes import Shape

from ws.eval import dilemmas
from ws.measure import shared_prefix
from ws.model import architecture, loading

GIB = 2**30


@dataclass(frozen=True)
class Job:
    """One replication: pairs, two branches, a probe at several strengths. Lengths are tokens.

    `prompts` distinct ones (topics x personas x sides) are read once each before their samples are written.
    """

    pairs: int = 1000
    response: int = 160
    prompt: int = 60
    prompts: int = 200
    branches: int = 2
    epochs: int = 3
    alphas: int = 7
    rows: int = 438
    row_tokens: int = 150
    rank: int = 32
    slice: tuple[float, float] = architecture.DEFAULT_SLICE


@dataclass(frozen=True)
class Machines:
    """What it runs on: assumptions, not measurements. `flops` and `bandwidth` (bytes/s) are of one GPU.

    `compute_use` is the share of `flops` that training and scoring reach, `bandwidth_use` that of `bandwidth` in
    sampling, where every step reads all weights once.
    """

    gpus: int = 8
    memory: int = 80 * GIB
    flops: float = 989e12
    bandwidth: float = 3.35e12
    compute_use: float = 0.4
    bandwidth_use: float = 0.5


LARGE = Shape(80, 8192, 28672, 64, 8, vocabulary=128_256)


@dataclass(frozen=True)
class Cost:
    """One line: a quantity, how it is computed, and its value as text."""

    what: str
    how: str
    value: str


@cache
def measured_saving() -> float:
    """Share of the tokens of all dilemma rows that shared prefixes spare, as `pocket` reads them."""
    chat = loading.load("pocket").chat
    return shared_prefix.plan([chat.prompt(row.messages, row.continuation) for row in dilemmas.probe().rows]).saving


def sampling_flops(shape: Shape, job: Job) -> int:
    """2 * P_layers * (tokens written + tokens of prompts) + 2 * P_head * tokens written; both sides of every pair."""
    written = 2 * job.pairs * job.response
    matrices = shape.flop_matrices
    return 2 * sum(matrices.layers) * (written + job.prompts * job.prompt) + 2 * matrices.head * written


def sampling_seconds(shape: Shape, job: Job, machines: Machines) -> float:
    """The larger of arithmetic and memory traffic.

    arithmetic    flops / (gpus * flops per GPU * compute_use)
    traffic       steps * (bytes of weights + bytes of the cache at half of its final length) / (gpus * bandwidth * use)

    All responses are written at once if their caches fit beside the weights, else in as few rounds as fit.
    """
    rows = 2 * job.pairs
    final = rows * (job.prompt + job.response) * shape.kv_bytes_per_token
    room = machines.gpus * machines.memory - shape.parameters * shape.weight_bytes
    rounds = -(-final // room)
    weights = rounds * job.response * shape.parameters * shape.weight_bytes
    cache_read = job.response * rows * (job.prompt + job.response / 2) * shape.kv_bytes_per_token
    traffic = (weights + cache_read) / (machines.gpus * machines.bandwidth * machines.bandwidth_use)
    return max(traffic, _compute_seconds(sampling_flops(shape, job), machines))


def training_flops(shape: Shape, job: Job) -> int:
    """branches * `flops.training` of all pairs, the adapter on `slice` of the layers."""
    layers = architecture.layer_slice(shape.layers, *job.slice)
    tokens, answers = job.pairs * (job.prompt + job.response), job.pairs * job.response
    adapter = shape.lora_parameters(job.rank, len(layers))
    return job.branches * flops.training(shape.flop_matrices, layers[0], tokens, answers, adapter, job.epochs)


def scoring_flops(shape: Shape, job: Job, saving: float) -> int:
    """`flops.scoring` of alphas * rows * row_tokens * (1 - saving) tokens and one position of every row."""
    first = architecture.layer_slice(shape.layers, *job.slice)[0]
    tokens = round(job.rows * job.row_tokens * (1 - saving))
    return flops.scoring(shape.flop_matrices, first, tokens, job.rows, job.alphas)


def _compute_seconds(operations: float, machines: Machines) -> float:
    return operations / (machines.gpus * machines.flops * machines.compute_use)


def costs(saving: float, shape: Shape = LARGE, job: Job | None = None, machines: Machines | None = None) -> list[Cost]:
    """Every line of the table; `saving` is the share of scored tokens that shared prefixes spare."""
    job, machines = job or Job(), machines or Machines()
    layers = architecture.layer_slice(shape.layers, *job.slice)
    adapter = shape.lora_parameters(job.rank, len(layers))
    reached = shape.layers - layers[0]
    row, step = job.prompt + job.response, 16
    written, fitted, read = sampling_flops(shape, job), training_flops(shape, job), scoring_flops(shape, job, saving)
    hours = [
        sampling_seconds(shape, job, machines) / 3600, _compute_seconds(fitted, machines) / 3600,
        _compute_seconds(read, machines) / 3600,
    ]  # fmt: skip
    whole, kept = (shape.activation_bytes_per_token(reached, checkpointed) for checkpointed in (False, True))
    used = f"{machines.compute_use:.0%} of {machines.flops / 1e12:.0f} TFLOP/s a GPU"
    return [
        Cost("parameters", "layers x 7 matrices, embedding, head", f"{shape.parameters / 1e9:.2f} billion"),
        Cost("weights per GPU", f"{shape.weight_bytes} bytes a parameter, split over {machines.gpus}",
             f"{shape.parameters * shape.weight_bytes / machines.gpus / GIB:.1f} GiB"),
        Cost("adapter and optimiser", f"rank-{job.rank} LoRA on layers {layers[0]}-{layers[-1]}, {adapter / 1e6:.0f} "
             f"million parameters, fp32: weight, gradient, two moments; one branch at a time",
             f"{16 * adapter / GIB:.2f} GiB"),
        Cost("activations per token", f"layers {layers[0]}-{shape.layers - 1}, whole / layer inputs only",
             f"{whole / 2**20:.2f} / {kept / 2**20:.2f} MiB"),
        Cost(f"activations of a step of {step} rows", f"{step * row} tokens, whole / layer inputs only, over all GPUs",
             f"{step * row * whole / GIB:.1f} / {step * row * kept / GIB:.1f} GiB"),
        Cost("attention cache per token", "2 x layers x kv heads x head width",
             f"{shape.kv_bytes_per_token / 2**10:.0f} KiB"),
        Cost("attention cache of all responses", f"{2 * job.pairs} of {row} tokens, over all GPUs",
             f"{2 * job.pairs * row * shape.kv_bytes_per_token / GIB:.0f} GiB"),
        Cost("sampling", f"{2 * job.pairs} responses of {job.response} tokens, {job.prompts} prompts of {job.prompt}",
             f"{written / 1e15:.1f} PFLOP"),
        Cost("training", f"{job.branches} branches x {job.epochs} epochs x {job.pairs} rows of {row} tokens",
             f"{fitted / 1e15:.1f} PFLOP"),
        Cost("scoring", f"{job.alphas} alphas x {job.rows} rows of {job.row_tokens} tokens, of which shared prefixes "
             f"save {saving:.0%}", f"{read / 1e15:.1f} PFLOP"),
        Cost("hours of sampling", f"memory traffic at {machines.bandwidth_use:.0%} of "
             f"{machines.bandwidth / 1e12:.2f} TB/s a GPU, or arithmetic if longer", f"{hours[0]:.2g}"),
        Cost("hours of training", used, f"{hours[1]:.2g}"),
        Cost("hours of scoring", used, f"{hours[2]:.2g}"),
        Cost("hours together", f"on {machines.gpus} GPUs of {machines.memory / GIB:.0f} GiB", f"{sum(hours):.2g}"),
    ]  # fmt: skip


def as_table() -> str:
    """The plan of the large model as a Markdown table."""
    lines = ["| quantity | how | value |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {one.what} | {one.how} | {one.value} |" for one in costs(measured_saving()))])


if __name__ == "__main__":
    sys.stdout.write(f"{as_table()}\n")
    page.write("plan", as_table())
