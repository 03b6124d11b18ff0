"""Seven strengths of one direction on the dilemma probe: ours, the replicated work's way, and PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Row, in_turn, row
from torch import Tensor, nn

from ws import models, shared_prefix
from ws.condition import Condition, Edit
from ws.direction import Direction
from ws.eval import dilemmas
from ws.export import write_peft
from ws.models import ChatModel
from ws.probe import Probe
from ws.score import score

ALPHAS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
BATCH_SIZES = (8, 16, 32, 64)


def compare(name: str, direction: Direction, rows: int, repeats: int, peak: float) -> list[Row]:
    """Lines of the table for one model and one direction on it."""
    model = models.load(name)
    direction = direction.bind(model)
    whole = dilemmas.probe()
    probe = Probe(whole.name, whole.kind, whole.rows[:rows])
    tokens = [model.chat.prompt(one.messages, one.continuation) for one in probe.rows]
    answers = [[i for (i,) in model.chat.answers(word)] for word in ("Yes", "No")]
    edit = Edit("d", direction)

    def ours() -> dict[float, Tensor]:
        table = score(model, [probe], [Condition.of(edit, alpha) for alpha in ALPHAS])
        ratios = table.filter(metric="logratio")
        return {a: torch.tensor(ratios.filter(alpha=a)["value"].to_list()) for a in ALPHAS}

    def without_tree() -> dict[float, Tensor]:
        kept, shared_prefix.worthwhile = shared_prefix.worthwhile, lambda *_: None
        try:
            return ours()
        finally:
            shared_prefix.worthwhile = kept

    original = in_place(models.load(name), direction, tokens, answers)
    with tempfile.TemporaryDirectory() as scratch:
        write_peft(direction, model.network, Path(scratch), alpha=1.0)
        adapter = with_peft(models.load(name), Path(scratch), tokens, answers)
        _agree(ours(), original())
        size = min(BATCH_SIZES, key=lambda batch: in_turn({"peft": lambda: adapter(batch)}, 1)["peft"][0])
        _agree(ours(), adapter(size))
        times = in_turn(
            {"ours": ours, "rows": without_tree, "original": original, "peft": lambda: adapter(size)}, repeats
        )
    tree = shared_prefix.plan(tokens)
    trunk = model.parameter_count - model.network.get_input_embeddings().weight.numel()
    flops = 2 * trunk * tree.tokens * len(ALPHAS)
    work = f"{len(ALPHAS)} alphas x {len(tokens)} dilemma rows"
    return [
        row(work, "weights changed in place, left-padded batches of 8, all logits", name, times["ours"],
            times["original"], flops=flops, peak=peak, note=f"the tree saves {100 * tree.saving:.0f} % of the tokens"),
        row(work, f"PEFT side path, sorted, batches of {size}, one logit row", name, times["ours"], times["peft"]),
        row(work, "ours without shared prefixes", name, times["ours"], times["rows"]),
    ]  # fmt: skip


def _agree(ours: dict[float, Tensor], theirs: dict[float, Tensor]) -> None:
    worst = max(float((ours[alpha] - theirs[alpha]).abs().max()) for alpha in ALPHAS)
    if worst > 5e-2:
        raise AssertionError(f"the ways disagree by {worst:.2g} nats: they do not do the same work")


def _ratios(logits: Tensor, answers: list[list[int]]) -> Tensor:
    logp = logits.float().log_softmax(-1)
    return logp[:, answers[0]].logsumexp(-1) - logp[:, answers[1]].logsumexp(-1)


def _left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def in_place(
    model: ChatModel, direction: Direction, tokens: list[list[int]], answers: list[list[int]]
) -> Callable[[], dict[float, Tensor]]:
    """The replicated work's way: add alpha dW to the weights, batches of 8 as they come, logits of every position."""
    parameters = dict(model.network.named_parameters())
    dense = {name: direction.materialise(name).reshape(parameters[name].shape) for name in direction.deltas}

    @torch.no_grad()
    def work() -> dict[float, Tensor]:
        found = {}
        for alpha in ALPHAS:
            backup = {name: parameters[name].data.clone() for name in dense}
            for name, change in dense.items():
                parameters[name].data.add_((alpha * change).to(parameters[name].dtype))
            parts = [
                _ratios(model.network(**_left_padded(tokens[at : at + 8])).logits[:, -1], answers)
                for at in range(0, len(tokens), 8)
            ]
            found[alpha] = torch.cat(parts)
            for name, values in backup.items():
                parameters[name].data.copy_(values)
        return found

    return work


def with_peft(
    model: ChatModel, folder: Path, tokens: list[list[int]], answers: list[list[int]]
) -> Callable[[int], dict[float, Tensor]]:
    """PEFT's LoRA side path with its scale set per strength; rows sorted by length, logits of the last position.

    The head is given a contiguous matrix: with the slice that `logits_to_keep` makes, a CPU would copy the whole head
    once per row, and the peer would look far slower than it is.
    """
    import peft  # noqa: PLC0415

    network = peft.PeftModel.from_pretrained(model.network, str(folder)).eval()
    layers = [module for module in network.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    scales = [dict(module.scaling) for module in layers]
    head = network.get_output_embeddings()
    head.forward = lambda states: nn.functional.linear(states.reshape(-1, states.shape[-1]).contiguous(), head.weight)
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))

    @torch.no_grad()
    def work(batch: int) -> dict[float, Tensor]:
        found = {}
        for alpha in ALPHAS:
            for module, scale in zip(layers, scales, strict=True):
                module.scaling = {name: alpha * value for name, value in scale.items()}
            values = torch.empty(len(tokens))
            for at in range(0, len(order), batch):
                chosen = order[at : at + batch]
                logits = network(**_left_padded([tokens[i] for i in chosen]), logits_to_keep=1).logits
                values[chosen] = _ratios(logits.reshape(len(chosen), -1), answers)
            found[alpha] = values
        return found

    return work
