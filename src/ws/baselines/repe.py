"""Activation steering: add a direction of the residual stream while the model runs (RepE, Zou et al., 2310.01405).

    v_l = mean(h_l | positive persona) - mean(h_l | negative persona)          h_l: output of decoder layer l
    h_l <- h_l + alpha v_l                                                      in every layer of the slice

States are captured in the same chat format as the probes, over all persona pairs. Published baselines differ, so these
are settings: the estimator (mean difference; first principal component of the differences, uncentred, or of both sides
around their midpoint as repeng does; a logistic probe), the captured positions, the edited positions, the layers (one,
all of the slice, or the increments `v_l - v_{l-1}` of the paper's all-layers form), and the unit of strength. The named
variants are in `VARIANTS`, including the first version of the replicated work and the activation steering of the paper
(Fierro and Roger, 2511.05408: the difference of means over responses, at the best single layer).

Numeric traps. Centring the differences removes their mean, which is the behaviour itself. A principal component has no
sign, so it gets the sign that agrees with the mean difference; the cosine of both is kept in the provenance. (The two
sides around the midpoint of their pair are plus and minus half the difference: `pca_center` and `pca_diff` span one
line.) A unit vector at one late position moves nothing: residuals have norms of tens to hundreds, so strengths in units
of their norm are comparable between layers and models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ws.algebra.delta import Alpha
from ws.base import keyed_random
from ws.base.errors import UserError
from ws.base.files import content_key, tensors_key
from ws.edit.condition import Undo
from ws.fitting.behaviour import Behaviour
from ws.model import architecture, forward
from ws.model.chat import ask
from ws.model.loading import ChatModel

Estimator = Literal["mean", "pca_diff", "pca_center", "logistic"]
Captured = Literal["last", "all", "response"]
Edited = Literal["all", "last"]
Form = Literal["all", "incremental"]
Unit = Literal["difference", "residual", "one"]

ALL_LAYERS = -1


@dataclass(frozen=True)
class RepeSettings:
    """How a direction is estimated and applied.

    layer: one layer, or None (or -1) for all of the slice; form: every layer's own vector, or increments; personas: how
    many pairs (None: all). unit "difference": alpha 1 adds the difference of the two personas; "residual": alpha 1 adds
    a vector of the mean norm of the residual stream at that layer; "one": alpha 1 adds a vector of norm 1.
    seed: estimate from a random half of the training prompts (of the pairs, for response means), so that several seeds
    are replicates and give an interval; None: from all.
    """

    estimator: Estimator = "mean"
    captured: Captured = "last"
    edited: Edited = "all"
    layer: int | None = None
    form: Form = "all"
    unit: Unit = "difference"
    personas: int | None = None
    slice: tuple[float, float] = architecture.DEFAULT_SLICE
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.layer == ALL_LAYERS:
            object.__setattr__(self, "layer", None)  # -1 and None are the same setting and must be equal

    @property
    def name(self) -> str:
        """Label in tables: what differs from the default."""
        parts: list[str] = [self.estimator]
        parts += [f"layer {self.layer}"] if self.layer is not None else ["all layers"]
        parts += [self.form] if self.form != "all" else []
        parts += [f"at {self.edited}"] if self.edited != "all" else []
        parts += [f"from {self.captured}"] if self.captured != "last" else []
        parts += [_UNIT_NAMES[self.unit]] if self.unit != "difference" else []
        parts += [f"{self.personas} persona pair{'s' * (self.personas > 1)}"] if self.personas is not None else []
        parts += [f"half {self.seed} of the prompts"] if self.seed is not None else []
        return "RepE " + ", ".join(parts)


_UNIT_NAMES = {"residual": "in residual norms", "one": "of norm 1"}

ORIGINAL = RepeSettings(edited="last", unit="one", personas=1)
"""The replicated work's first version, one layer at a time (set `layer`); that work itself calls it unfair."""

VARIANTS: Mapping[str, RepeSettings] = {
    "mean": RepeSettings(),
    "incremental": RepeSettings(form="incremental"),
    "pca-diff": RepeSettings(estimator="pca_diff"),
    "pca-center": RepeSettings(estimator="pca_center"),
    "logistic": RepeSettings(estimator="logistic"),
    "all-positions": RepeSettings(captured="all"),
    "response": RepeSettings(captured="response"),
    "residual-norm": RepeSettings(unit="residual"),
    "single-layer": RepeSettings(),
    "original": ORIGINAL,
    "paper": RepeSettings(captured="response"),
}
"""Name -> settings; the variants in `ONE_LAYER` are tried at each layer of the slice."""
ONE_LAYER = ("single-layer", "original", "paper")


def candidates(name: str, layer_count: int, slice_: tuple[float, float]) -> list[RepeSettings]:
    """The settings from which a named variant chooses on dev rows: one, or one per layer of the slice."""
    if name not in VARIANTS:
        raise UserError(f"there is no activation steering {name!r}", f"Choose from: {', '.join(VARIANTS)}.")
    settings = replace(VARIANTS[name], slice=slice_)
    if name not in ONE_LAYER:
        return [settings]
    return [replace(settings, layer=layer) for layer in architecture.layer_slice(layer_count, *slice_)]


@dataclass(frozen=True, eq=False)
class ActivationDirection:
    """An Effect: `vectors`, layer -> (width,), added to the outputs of decoder layers at a strength.

    unit: what strength 1 adds; it decides which strengths are tried.
    """

    vectors: Mapping[int, Tensor]
    base: str
    edited: Edited = "all"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unit: Unit = "difference"

    @property
    def first_layer(self) -> int:
        """The first layer whose output changes."""
        return min(self.vectors)

    @property
    def content_key(self) -> str:
        """Digest of base, layers, vectors and the positions where they are added."""
        vectors = tensors_key({str(layer): vector for layer, vector in self.vectors.items()})
        return content_key("activation direction", self.base, self.edited, vectors)

    def times(self, strength: float) -> ActivationDirection:
        """The same direction with every vector times `strength`, which provenance keeps."""
        scaled = {layer: vector * strength for layer, vector in self.vectors.items()}
        strength *= self.provenance.get("strength", 1.0)
        return replace(self, vectors=scaled, provenance={**self.provenance, "strength": strength})

    def on_layers(self, layers: Collection[int]) -> ActivationDirection:
        """The same direction on those of its layers that are in `layers`."""
        kept = {layer: vector for layer, vector in self.vectors.items() if layer in layers}
        return replace(self, vectors=kept, provenance={**self.provenance, "layers": sorted(kept)})

    def attach(self, network: nn.Module, alpha: Alpha) -> Undo:
        """Put the vectors on the network; the result takes them off. alpha: a number, or one per row."""
        _, blocks = architecture.decoder_layers(network)
        if absent := sorted(layer for layer in self.vectors if not 0 <= layer < len(blocks)):
            raise UserError(
                f"the model has no layer {absent[0]}, only 0 to {len(blocks) - 1}",
                "Load the base model of this direction.",
            )
        handles = []
        for layer, vector in self.vectors.items():
            handles.append(blocks[layer].register_forward_hook(self._adding(vector, alpha)))

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo

    def _adding(self, vector: Tensor, alpha: Alpha) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            strength = torch.as_tensor(alpha, dtype=torch.float32, device=hidden.device)
            strength = strength.reshape(-1, *(1,) * (hidden.ndim - 1))
            if self.edited == "last":
                strength = strength * _last_position(hidden)
            change = strength * vector.to(hidden.device, torch.float32)
            # decided by the strength, because a vector of zeros that is being trained needs its gradient
            moved = torch.where(strength != 0, hidden.float() + change, hidden.float()).to(hidden.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook


def _last_position(hidden: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "rows tokens one"]:
    """1 at the positions that are scored in each row (the last position if none are given), 0 elsewhere.

    A text that is read token by token is scored at every position that was the last when the text was written.
    """
    rows, tokens = hidden.shape[:2]
    if (first := forward.first_scored_positions()) is not None:
        return (torch.arange(tokens, device=hidden.device) >= first.to(hidden.device)[:, None]).float()[..., None]
    last = forward.scored_positions()
    columns = torch.full((rows,), tokens - 1, device=hidden.device) if last is None else last.to(hidden.device)
    return (torch.arange(tokens, device=hidden.device) == columns[:, None]).float()[..., None]


def random_like(direction: ActivationDirection, seed: int) -> ActivationDirection:
    """The control: on each layer a Gaussian vector with the norm of the direction's, seeded by (seed, layer)."""
    vectors = {}
    for layer, vector in direction.vectors.items():
        drawn = torch.randn(vector.shape, generator=keyed_random.generator(f"activations|{seed}|{layer}"))
        vectors[layer] = (drawn * (vector.norm().cpu() / drawn.norm())).to(vector.device)
    return replace(direction, vectors=vectors, provenance={
        "control": "random", "seed": seed, "like": dict(direction.provenance),
    })  # fmt: skip


# -------------------------------------------------------------------- estimating


@dataclass(frozen=True)
class States:
    """Residuals of both sides, layer -> (n, width) fp32, row i of one side paired with row i of the other."""

    pos: Mapping[int, Tensor]
    neg: Mapping[int, Tensor]

    def half(self, seed: int, personas: int) -> States:
        """The states of a random half (rounded up) of the prompts, the same prompts under each of the persona pairs."""
        rows = len(next(iter(self.pos.values())))
        prompts = rows // personas
        order = torch.randperm(prompts, generator=keyed_random.generator(f"half of the prompts|{seed}"))
        chosen = torch.zeros(prompts, dtype=torch.bool)
        chosen[order[: (prompts + 1) // 2]] = True
        kept = chosen.repeat(personas)
        return States(*({layer: state[kept] for layer, state in side.items()} for side in (self.pos, self.neg)))


def fit(
    model: ChatModel,
    behaviour: Behaviour,
    settings: RepeSettings,
    *,
    responses: Sequence[tuple[str, str, str]] = (),
    states: States | None = None,
) -> ActivationDirection:
    """Estimate a direction from the behaviour's training prompts under its personas.

    responses: (prompt, positive response, negative response), needed to capture response means. states: captured before
    with `capture_states` from all prompts, to estimate several directions from one capture.
    """
    layers = _layers(model, settings)
    found = states or capture_states(model, behaviour, settings, responses)
    if settings.seed is not None:
        found = found.half(settings.seed, len(behaviour.personas.pos[: settings.personas]))
    vectors = {layer: _estimate(found, layer, settings) for layer in layers}
    if settings.form == "incremental":
        ordered = sorted(vectors)
        vectors = {layer: vectors[layer] - (vectors[ordered[i - 1]] if i else 0) for i, layer in enumerate(ordered)}
    provenance = {
        "method": settings.name, "behaviour": behaviour.name, "layers": sorted(vectors), "unit": settings.unit,
        "cosine_of_mean_and_component": {layer: _agreement(found, layer) for layer in layers},
    }  # fmt: skip
    return ActivationDirection(vectors, model.fingerprint, settings.edited, provenance, settings.unit)


def fit_all(
    model: ChatModel,
    behaviour: Behaviour,
    options: Sequence[RepeSettings],
    responses: Sequence[tuple[str, str, str]] = (),
) -> dict[RepeSettings, ActivationDirection]:
    """One direction per option; options that read the same states at the same positions share one capture.

    Seeds share it, too: each takes its half of the states.
    """
    reading: dict[tuple[Any, ...], list[RepeSettings]] = {}
    for option in options:
        reading.setdefault((option.captured, option.personas, option.slice), []).append(option)
    found: dict[RepeSettings, ActivationDirection] = {}
    for alike in reading.values():
        widest = next((option for option in alike if option.layer is not None), alike[0])  # reads every layer
        states = capture_states(model, behaviour, widest, responses)
        found |= {option: fit(model, behaviour, option, states=states) for option in alike}
    return {option: found[option] for option in options}


def capture_states(
    model: ChatModel,
    behaviour: Behaviour,
    settings: RepeSettings,
    responses: Sequence[tuple[str, str, str]] = (),
) -> States:
    """Residuals of every layer of the slice on all training prompts under both sides' personas.

    Rows are in the order of the persona pairs, and of the prompts (or responses) within each.
    """
    prefix = architecture.layer_slice(model.layer_count, *settings.slice)
    layers = range(model.layer_count) if settings.layer is not None else prefix
    pairs = list(zip(behaviour.personas.pos, behaviour.personas.neg, strict=True))[: settings.personas]
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    spans: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    if settings.captured == "response" and not responses:
        raise UserError("means over responses need the responses of a run", "Give its pairs.")
    for personas in pairs:
        if settings.captured == "response":
            for prompt, *answers in responses:
                for side, (persona, answer) in enumerate(zip(personas, answers, strict=True)):
                    ids, start = model.chat.supervised(ask(prompt, persona), answer)
                    sides[side].append(ids)
                    spans[side].append((start, len(ids)))
        else:
            for topic in behaviour.train:
                for side, persona in enumerate(personas):
                    ids = model.chat.prompt(ask(topic.text, persona))
                    sides[side].append(ids)
                    spans[side].append((0 if settings.captured == "all" else len(ids) - 1, len(ids)))
    captured = [capture(model, rows, wanted, layers) for rows, wanted in zip(sides, spans, strict=True)]
    return States(*captured)


@torch.no_grad()
def capture(
    model: ChatModel, rows: Sequence[list[int]], spans: Sequence[tuple[int, int]], layers: Sequence[int] | range
) -> dict[int, Float[Tensor, "n width"]]:
    """Outputs of decoder layers, averaged over the positions start..stop of each row; fp32, in the order of `rows`."""
    _, blocks = architecture.decoder_layers(model.network)
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(rows) for layer in layers}
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        for batch in forward.plan_batches([len(row) for row in rows], 4_096):
            model.split.hidden(forward.pad_right([rows[index] for index in batch], model.device))
            for layer in layers:
                for position, index in enumerate(batch):
                    start, stop = spans[index]
                    found[layer][index] = outputs[layer][position, start:stop].float().mean(dim=0).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.stack(values) for layer, values in found.items()}


def residual_norms(model: ChatModel, behaviour: Behaviour, layers: Collection[int]) -> dict[int, float]:
    """Mean norm of the residual stream by layer, at the end of the training prompts under all personas."""
    for layer in layers:
        _require_layer(model, layer)
    states = capture_states(model, behaviour, RepeSettings(slice=(0.0, 1.0)))
    return {layer: float(torch.cat([states.pos[layer], states.neg[layer]]).norm(dim=1).mean()) for layer in layers}


def residual_norm(model: ChatModel, behaviour: Behaviour, layers: Collection[int]) -> float:
    """The mean of `residual_norms` over the layers."""
    return sum(residual_norms(model, behaviour, layers).values()) / len(layers)


def _layers(model: ChatModel, settings: RepeSettings) -> list[int]:
    if settings.layer is None:
        return list(architecture.layer_slice(model.layer_count, *settings.slice))
    _require_layer(model, settings.layer)
    return [settings.layer]


def _require_layer(model: ChatModel, layer: int) -> None:
    if not 0 <= layer < model.layer_count:
        raise UserError(f"layer {layer} does not exist; the model has layers 0 to {model.layer_count - 1}")


def _estimate(states: States, layer: int, settings: RepeSettings) -> Float[Tensor, " width"]:
    """One layer's vector in the chosen unit."""
    pos, neg = states.pos[layer].double(), states.neg[layer].double()
    mean = (pos - neg).mean(dim=0)
    direction = mean if settings.estimator == "mean" else _unit(settings.estimator, pos, neg)
    if settings.estimator != "mean" and float(direction @ mean) < 0:
        direction = -direction
    length = float(direction.norm())
    if length == 0:
        raise UserError(f"the personas make no difference at layer {layer}", "Check the persona pairs.")
    wanted = {
        "difference": float(mean.norm()), "residual": float(torch.cat([pos, neg]).norm(dim=1).mean()), "one": 1.0,
    }[settings.unit]  # fmt: skip
    return (direction * (wanted / length)).float()


def _agreement(states: States, layer: int) -> float:
    """Cosine (without sign) of the mean difference and the first component of the differences at a layer.

    Near 1: one direction separates the sides. Far below 1: the differences vary more than they have in common.
    """
    difference = states.pos[layer].double() - states.neg[layer].double()
    component = torch.linalg.svd(difference, full_matrices=False)[2][0]
    return abs(float(torch.nn.functional.cosine_similarity(difference.mean(dim=0), component, dim=0)))


def _unit(estimator: Estimator, pos: Float[Tensor, "n width"], neg: Float[Tensor, "n width"]) -> Tensor:
    if estimator == "pca_diff":
        return torch.linalg.svd(pos - neg, full_matrices=False)[2][0]
    if estimator == "pca_center":
        middle = (pos + neg) / 2
        return torch.linalg.svd(torch.cat([pos - middle, neg - middle]), full_matrices=False)[2][0]
    return _logistic(pos, neg)


def _logistic(pos: Float[Tensor, "n width"], neg: Float[Tensor, "n width"], penalty: float = 1.0) -> Tensor:
    """Weights of an L2-penalised logistic regression that separates the sides, on standardised coordinates."""
    from scipy.optimize import minimize  # noqa: PLC0415 - slow import

    features = torch.cat([pos, neg])
    scale = features.std(dim=0).clamp(min=1e-6)
    x = ((features - features.mean(dim=0)) / scale).numpy()
    y = np.concatenate([np.ones(len(pos)), -np.ones(len(neg))])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, offset = parameters[:-1], parameters[-1]
        margins = y * (x @ weights + offset)
        value = float(np.logaddexp(0, -margins).sum() + penalty / 2 * weights @ weights)
        pull = -y / (1 + np.exp(np.clip(margins, -500, 500)))
        return value, np.append(x.T @ pull + penalty * weights, pull.sum())

    best = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return torch.from_numpy(best[:-1].copy()) / scale
