"""Materials for bases on tiny models: states under two persona pairs, two random directions, a random gradient."""

from __future__ import annotations

from dataclasses import replace

from making import random_direction
from ws.algebra.direction import Direction
from ws.edit.condition import Condition, Context, Edit
from ws.fitting import behaviour
from ws.measure.probe import Probe
from ws.model.loading import ChatModel
from ws.subspace import capture, prompts
from ws.subspace.bases import Background, Material, Run
from ws.subspace.weights import ResidualWeights

LAYER, RANK = 2, 3
PERSONAS = behaviour.load("sycophancy").personas


def halves() -> tuple[Probe, Probe]:
    found = prompts.of(behaviour.load("sycophancy"))
    fit, evaluation = (replace(half, rows=half.rows[:10]) for half in (found.fit, found.evaluation))
    return fit, evaluation


def background_of(model: ChatModel) -> Background:
    fit, _ = halves()
    contexts = [(Context(f"+{n}", PERSONAS.pos[n]), Context(f"-{n}", PERSONAS.neg[n])) for n in range(2)]
    pairs = [tuple(capture.at_anchor(model, fit, Condition(one)) for one in pair) for pair in contexts]
    tokens = tuple(capture.all_tokens(model, fit, Condition(one)) for one in contexts[0])
    first = model.chat.prompt(fit.rows[0].messages)[0]
    gradient = random_direction(model, rank=8, seed=9)
    return Background(ResidualWeights(model), capture.at_anchor(model, fit), pairs, tokens, gradient, first)


def run_of(model: ChatModel, family: str, seed: int, direction: Direction) -> Run:
    fit, evaluation = (
        tuple(capture.at_anchor(model, half, Condition.of(Edit(family, direction), alpha)) for alpha in (1.0, -1.0))
        for half in halves()
    )
    return Run(family, seed, direction, fit, evaluation)


def material_of(model: ChatModel) -> Material:
    directions = {name: random_direction(model, seed=n, relative_norm=0.1) for n, name in enumerate(("lora", "dora"))}
    run = run_of(model, "lora", 0, directions["lora"])
    return Material(background_of(model), LAYER, RANK, run, directions)
