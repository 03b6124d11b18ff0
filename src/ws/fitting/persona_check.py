"""Do the personas matter? Before anything is sampled, both personas of every pair answer a few prompts greedily.

Sampled responses differ by chance. Greedy answers that are the same on both sides show a persona that the model
ignores, so its pairs would train on noise.
"""

from __future__ import annotations

from dataclasses import replace

from ws.fitting.behaviour import Behaviour
from ws.measure import generate
from ws.measure.generate import Request, Sampling
from ws.model.chat import ask
from ws.model.loading import ChatModel

PROMPTS = 8
"""Training prompts that are asked, spread over all of them."""
LONGEST = 48
"""Tokens of an answer that are compared."""
COLLAPSED = 0.8
"""Share of identical answers above which a warning says that a persona pair hardly matters. In the embedded models,
sycophancy has 0, refusal up to 0.25, and honesty, where many prompts have one short answer, up to 0.75."""


def same_answers(model: ChatModel, behaviour: Behaviour, personas: int | None, longest: int) -> dict[str, float]:
    """Number of each persona pair -> share of the prompts that both of its sides answer with the same tokens."""
    topics = behaviour.train
    count = min(PROMPTS, len(topics))
    prompts = [topics[number * len(topics) // count].text for number in range(count)]
    pairs = list(zip(behaviour.personas.pos, behaviour.personas.neg, strict=True))[:personas]
    requests = [
        Request(model.chat.prompt(ask(prompt, system)), ("greedy",))
        for pair in pairs for prompt in prompts for system in pair
    ]  # fmt: skip
    greedy = replace(Sampling(), temperature=0.0, max_new_tokens=min(LONGEST, longest))
    answers = [one.ids for (one,) in generate.sample(model, requests, greedy, seed=0)]
    same = [positive == negative for positive, negative in zip(answers[::2], answers[1::2], strict=True)]
    return {str(n): sum(same[n * count : (n + 1) * count]) / count for n in range(len(pairs))}
