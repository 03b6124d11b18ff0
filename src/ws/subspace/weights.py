"""The weights of each layer as they meet the residual stream: what reads from it and what writes to it.

    reads:    y = W N h        N: linear part of the norm in front: diag(gain), for LayerNorm diag(gain) (I - 11'/d)
    writes:   h + N W z        N: the same of the norm behind, if the layout has one (Gemma 3)

A matrix of `reads` or `writes` has its norm folded in, because only then its singular vectors are directions of the
residual stream itself; the scale of the norm, which depends on the token, is left out. All matrices are (out, in), also
those that are stored transposed (GPT-2) or fused (Phi-3, GPT-NeoX). The gain of a norm is measured, not read from its
parameters: `N` of a vector of signs has norm sqrt(d), so gain = (norm(x) - norm(-x)) / 2x. This holds for RMSNorm, for
Gemma's `1 + weight`, and for LayerNorm with its bias.

Heads. With grouped queries one key-value head serves a block of query heads, so heads are repeated as whole blocks.
(Repeating single rows instead scrambles the heads of QK and OV products.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ws.model import architecture
from ws.model.architecture import Site
from ws.model.loading import ChatModel

READERS = ("q", "k", "v", "gate", "up")
WRITERS = ("o", "down")
ATTENTION = ("q", "k", "v", "o")

_FRONT = {"attention": ("input_layernorm", "ln_1"),
          "mlp": ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm")}  # fmt: skip
_BEHIND = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
_FINAL = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_ROWS_AT_ONCE = 16_384


class Unavailable(Exception):  # noqa: N818 - not an error: the model does not have the thing
    """Something that a model or a run does not have; the message says why."""


@dataclass(frozen=True, eq=False)
class Norm:
    """The linear part of a norm: `diag(gain)`, after subtraction of the mean if `centred`. gain: (width,) fp64."""

    gain: Float[Tensor, " width"]
    centred: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """Measured on vectors of signs and of ones."""
        parameter = next(module.parameters())
        signs = torch.ones(len(parameter), dtype=parameter.dtype, device=parameter.device)
        ones = signs.clone()
        signs[1::2] = -1
        with torch.no_grad():
            gain = (module(signs) - module(-signs)).double() / (2 * signs.double())
            centred = not (module(ones) - module(-ones)).any()
        return cls(gain.cpu(), centred)

    def before(self, matrix: Float[Tensor, "out width"]) -> Float[Tensor, "out width"]:
        """`matrix N`: what the matrix reads from the residual stream in front of the norm."""
        scaled = matrix * self.gain
        return scaled - scaled.mean(dim=1, keepdim=True) if self.centred else scaled

    def behind(self, matrix: Float[Tensor, "width in"]) -> Float[Tensor, "width in"]:
        """`N matrix`: what the matrix writes behind the norm."""
        centred = matrix - matrix.mean(dim=0, keepdim=True) if self.centred else matrix
        return centred * self.gain[:, None]


@dataclass(frozen=True, eq=False)
class Heads:
    """The attention of one layer by head, norms folded in, fp64; keys and values are repeated per block of query heads.

    q, k, v: (heads, head width, width). o: (heads, width, head width).
    """

    q: Float[Tensor, "heads head width"]
    k: Float[Tensor, "heads head width"]
    v: Float[Tensor, "heads head width"]
    o: Float[Tensor, "heads width head"]

    @property
    def qk(self) -> Float[Tensor, "heads width width"]:
        """`W_q' W_k` of every head: what a query at one token looks for in another."""
        return self.q.mT @ self.k

    @property
    def ov(self) -> Float[Tensor, "heads width width"]:
        """`W_o W_v` of every head: what it writes for what it reads."""
        return self.o @ self.v


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The matrices of one layer by role, (out, in) fp64 without norms, and its norms.

    front, behind: the norms in front of and behind "attention" and "mlp". activation: the function of the gate.
    """

    layer: int
    raw: Mapping[str, Float[Tensor, "out in"]]
    front: Mapping[str, Norm]
    behind: Mapping[str, Norm]
    head_norms: Mapping[str, Norm]
    query_heads: int
    key_heads: int
    activation: Callable[[Tensor], Tensor] | None

    def matrix(self, role: str) -> Float[Tensor, "out in"]:
        """The matrix of a role without any norm; `Unavailable` if the layer has none."""
        if role not in self.raw:
            raise Unavailable(f"the model has no {role} matrix of its own in layer {self.layer}")
        return self.raw[role]

    def reads(self, *roles: str) -> Float[Tensor, "out width"]:
        """The readers of these roles, one above the other, with the norm in front folded in."""
        return torch.cat([self.front[part_of(role)].before(self.matrix(role)) for role in roles])

    def writes(self, *roles: str) -> Float[Tensor, "width in"]:
        """The writers of these roles, side by side, with the norm behind folded in."""
        return torch.cat([self.behind[part_of(role)].behind(self.matrix(role)) for role in roles], dim=1)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Roles that read and that this layer has."""
        return tuple(role for role in READERS if role in self.raw)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Roles that write and that this layer has."""
        return tuple(role for role in WRITERS if role in self.raw)

    @cached_property
    def heads(self) -> Heads:
        """The attention by head; the gains of norms of queries and keys are folded in."""
        width = len(self.matrix("q")) // self.query_heads
        q, k, v = (self.reads(role).unflatten(0, (-1, width)) for role in ("q", "k", "v"))
        q, k = (part * self.head_norms[name].gain[:, None] if name in self.head_norms else part
                for name, part in (("q", q), ("k", k)))  # fmt: skip
        repeats = len(q) // len(k)
        o = self.writes("o").unflatten(1, (-1, width)).movedim(1, 0)
        if len(k) != self.key_heads or len(q) != len(o):
            raise Unavailable(f"the heads of layer {self.layer} do not have the shapes of its configuration")
        return Heads(q, k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0), o)


def part_of(role: str) -> str:
    """The half of the layer that a role belongs to: attention or mlp."""
    return "attention" if role in ATTENTION else "mlp"


class ResidualWeights:
    """The view of a model's weights; a layer is made when it is asked for."""

    def __init__(self, model: ChatModel) -> None:
        self._network = model.network
        self._modules = dict(model.network.named_modules())
        self._prefix, blocks = architecture.decoder_layers(model.network)
        self.layer_count = len(blocks)
        config = architecture.text_config(model.network)
        self._query_heads = int(config.num_attention_heads)
        self._key_heads = int(getattr(config, "num_key_value_heads", None) or self._query_heads)
        self.width = int(model.network.get_input_embeddings().weight.shape[1])
        self.sites: dict[int, list[Site]] = {layer: [] for layer in range(self.layer_count)}
        for site in architecture.sites(model.network):
            self.sites[site.layer].append(site)

    def layer(self, layer: int) -> LayerWeights:
        """The matrices and norms of one layer."""
        raw: dict[str, Tensor] = {}
        twice: set[str] = set()
        for site in self.sites[layer]:
            for role, part in self._parts(site).items():
                twice |= {role} & raw.keys()
                raw[role] = part
        front, behind = self.norms(layer)
        attention = next((site.module.rsplit(".", 1)[0] for site in self.sites[layer] if "o" in site.roles), "")
        head_norms = {role: Norm.of(self._modules[name]) for role in ("q", "k")
                      if (name := f"{attention}.{role}_norm") in self._modules}  # fmt: skip
        gate = next((site.module.rsplit(".", 1)[0] for site in self.sites[layer] if "gate" in site.roles), None)
        mlp = None if gate is None else self._modules[gate]
        activation = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
        kept = {role: part for role, part in raw.items() if role not in twice}
        return LayerWeights(layer, kept, front, behind, head_norms, self._query_heads, self._key_heads, activation)

    def norms(self, layer: int) -> tuple[dict[str, Norm], dict[str, Norm]]:
        """The norms in front of and behind the attention and the MLP of a layer; ones where there is none."""
        place = f"{self._prefix}.{layer}."
        sandwiched = f"{place}pre_feedforward_layernorm" in self._modules
        found: tuple[dict[str, Norm], dict[str, Norm]] = {}, {}
        for part in ("attention", "mlp"):
            ahead = next((place + name for name in _FRONT[part] if place + name in self._modules), None)
            after = place + _BEHIND[part] if sandwiched else None
            for norms, name in zip(found, (ahead, after), strict=True):
                norms[part] = Norm.of(self._modules[name]) if name in self._modules else self._ones()
        return found

    @cached_property
    def final_norm(self) -> Norm:
        """The norm in front of the unembedding."""
        parent = self._prefix.rsplit(".", 1)[0]
        name = next((f"{parent}.{name}" for name in _FINAL if f"{parent}.{name}" in self._modules), None)
        return self._ones() if name is None else Norm.of(self._modules[name])

    def head_rows(self, tokens: list[int]) -> Float[Tensor, "tokens width"]:
        """Rows of the unembedding, final norm folded in, fp64: what the logits of these tokens read."""
        return self.final_norm.before(self._head[tokens].detach().cpu().double())

    @cached_property
    def head_gram(self) -> Float[Tensor, "width width"]:
        """`U' U` of the unembedding with the final norm folded in, fp64."""
        return self._gram(lambda rows: rows)

    @cached_property
    def unit_head_gram(self) -> Float[Tensor, "width width"]:
        """`U' U` with every row of U (final norm folded in) scaled to norm 1, for token energies."""
        return self._gram(lambda rows: nn.functional.normalize(rows, dim=1))

    @property
    def vocabulary(self) -> int:
        """Number of rows of the unembedding."""
        return len(self._head)

    def embedding(self, token: int) -> Float[Tensor, " width"]:
        """The residual stream that a token starts with, fp64 (without position embeddings)."""
        embed = self._network.get_input_embeddings()
        with torch.no_grad():
            return embed(torch.tensor([token], device=embed.weight.device))[0].cpu().double()

    @property
    def _head(self) -> Tensor:
        weight: Tensor = self._network.get_output_embeddings().weight
        return weight

    def _gram(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(self.width, self.width, dtype=torch.float64)
        for part in self._head.detach().split(_ROWS_AT_ONCE):
            rows = change(self.final_norm.before(part.cpu().double()))
            total += rows.T @ rows
        return total

    def _ones(self) -> Norm:
        return Norm(torch.ones(self.width, dtype=torch.float64))

    def _parts(self, site: Site) -> dict[str, Tensor]:
        """The matrices of the roles that a stored matrix holds, (out, in) fp64."""
        stored = self._network.get_parameter(site.parameter).detach().cpu().double()
        weight = stored.T if site.transposed else stored
        if len(site.roles) == 1:
            return {site.roles[0]: weight}
        if site.kind == "query_key_value":  # GPT-NeoX: q, k, v of one head after the other
            by_head = weight.unflatten(0, (self._query_heads, 3, -1))
            return {role: by_head[:, number].flatten(0, 1) for number, role in enumerate(site.roles)}
        if site.roles == ("gate", "up"):
            sizes = [len(weight) // 2] * 2
        else:
            head = len(weight) // (self._query_heads + 2 * self._key_heads)
            sizes = [self._query_heads * head, self._key_heads * head, self._key_heads * head]
        return dict(zip(site.roles, weight.split(sizes), strict=True))
