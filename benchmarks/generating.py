"""200 prompts x 10 samples: ours against `generate` at its best batch size."""

from __future__ import annotations

import torch
from timing import Row, in_turn, row

from ws import behaviour, models
from ws.chat import ask
from ws.generate import Request, Sampling, sample

BATCH_SIZES = (50, 100, 200)


def compare(name: str, prompts: int, samples: int, repeats: int) -> list[Row]:
    """One line: the same prompts, the same number of samples, the same sampling distribution."""
    model = models.load(name)
    known = behaviour.load("sycophancy")
    personas = [*known.personas.positive, *known.personas.negative]
    texts = [(topic.text, persona) for topic in known.train for persona in personas][:prompts]
    rows = [model.chat.prompt(ask(text, persona)) for text, persona in texts]
    sampling = Sampling(max_new_tokens=48, temperature=0.8)

    def ours() -> object:
        requests = [Request(ids, tuple(f"{number}/{j}" for j in range(samples))) for number, ids in enumerate(rows)]
        return sample(model, requests, sampling, seed=0)

    def theirs(batch: int) -> None:
        repeated = [ids for ids in rows for _ in range(samples)]
        for at in range(0, len(repeated), batch):
            part = repeated[at : at + batch]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(r)) + r for r in part])
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in part])
            model.network.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=0.8, top_k=0, top_p=1.0,
                max_new_tokens=48, eos_token_id=sorted(model.chat.stop_ids), pad_token_id=0,
            )  # fmt: skip

    size = min(BATCH_SIZES, key=lambda batch: in_turn({"generate": lambda: theirs(batch)}, 1)["generate"][0])
    times = in_turn({"ours": ours, "generate": lambda: theirs(size)}, repeats)
    return [
        row(f"{len(rows)} prompts x {samples} samples", f"generate, batches of {size}", name, times["ours"],
            times["generate"])
    ]  # fmt: skip
