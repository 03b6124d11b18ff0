"""Activation steering by training: one vector per layer, fitted by gradient on the same pairs as the adapters.

    h_l <- h_l + s v_l at every position,      s = +1 on positive rows, -1 on negative ones
    minimise over v:   L_pos(+v) + L_neg(-v)          L: mean loss per response token, persona removed

So +v makes the positive responses likelier and -v the negative ones: the same data, loss and number of signs as the
weight direction, with a vector per layer in place of matrices. Strength 1 is the vector as trained.

It resembles BiPO (Cao et al., 2406.00045), which also trains one vector for both signs by AdamW. BiPO has a preference
loss (as DPO, against the model without the vector: v must make one response likelier than the other), a random sign per
step, and one layer. Here each sign only has to explain its own responses, as each adapter does. Raising the likelihood
of given texts by an added vector is older (Subramani et al., 2205.05124).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from ws.base import console
from ws.baselines import repe
from ws.baselines.gradient import MICRO_TOKENS, deal, mean_loss
from ws.baselines.repe import ActivationDirection
from ws.edit.steering import steer
from ws.fitting.behaviour import Behaviour
from ws.model import architecture
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel
from ws.model.restore import restored


def fit(
    model: ChatModel,
    behaviour: Behaviour,
    positive: Sequence[SupervisedTokens],
    negative: Sequence[SupervisedTokens],
    *,
    layers: Collection[int],
    seed: int = 0,
    lr: float = 0.03,
    epochs: int = 10,
    batch_size: int = 16,
    micro_tokens: int = MICRO_TOKENS,
) -> ActivationDirection:
    """Train vectors of these layers together, from zero, with AdamW (no decay) and a rate that falls linearly to zero.

    positive, negative: rows of `train.examples`. `seed` deals them out to the steps, every epoch anew; a step reads
    about `batch_size` rows of each side, and all rows are read once per epoch. lr: the most by which the first step
    moves a vector, in mean norms of the residual stream at its layer (`repe.residual_norms`). micro_tokens: padded
    tokens per pass; it changes results by rounding only. provenance has the mean of the summed losses over the first
    and over the last epoch. The model is unchanged afterwards. Raises if the loss is not finite.
    """
    per_epoch = math.ceil(min(len(positive), len(negative)) / batch_size)
    width = int(architecture.text_config(model.network).hidden_size)
    vectors = {layer: torch.zeros(width, device=model.device, requires_grad=True) for layer in sorted(layers)}
    direction = ActivationDirection(vectors, model.fingerprint)
    losses = []
    with restored(model.network), console.progress("training vectors", epochs * per_epoch) as bar:
        model.network.eval()
        norms = repe.residual_norms(model, behaviour, layers)
        # Adam moves every coordinate by about its rate, so the rate of a whole vector is divided among them
        optimiser = torch.optim.AdamW(
            [{"params": [vector], "lr": lr * norms[layer] / math.sqrt(width)} for layer, vector in vectors.items()],
            weight_decay=0.0,
        )
        falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / (epochs * per_epoch))
        for epoch in range(epochs):
            dealt = [deal(rows, per_epoch, f"trained vector|{seed}|{epoch}") for rows in (positive, negative)]
            for parts in zip(*dealt, strict=True):
                losses.append(0.0)
                optimiser.zero_grad()
                for sign, rows in zip((1.0, -1.0), parts, strict=True):
                    with steer(model, direction, sign):
                        loss, gradients = mean_loss(model, rows, list(vectors.values()), micro_tokens)
                    losses[-1] += loss
                    for vector, gradient in zip(vectors.values(), gradients, strict=True):
                        vector.grad = gradient if vector.grad is None else vector.grad + gradient
                optimiser.step()
                falling.step()
                bar.advance(note=f"{losses[-1]:.3f}")
    provenance = {
        "method": "trained vector", "behaviour": behaviour.name, "layers": list(vectors), "unit": "difference",
        "seed": seed, "lr": lr, "epochs": epochs, "batch_size": batch_size,
        "first_loss": sum(losses[:per_epoch]) / per_epoch, "last_loss": sum(losses[-per_epoch:]) / per_epoch,
    }  # fmt: skip
    trained = {layer: vector.detach().cpu() for layer, vector in vectors.items()}
    return ActivationDirection(trained, model.fingerprint, provenance=provenance)
