"""A Direction: named, exact weight deltas with their provenance, and arithmetic on them.

    dW = theta_pos - theta_neg = tau_pos - tau_neg          (Fierro and Roger, 2511.05408)

A Direction belongs to one base model, identified by its fingerprint. Sums and differences keep the factored form of
every delta and the union of the parameters: a parameter that only one side changes counts as zero on the other. One
safetensors file holds everything: the factors as fp32 tensors, the provenance as JSON in the header.

Deltas of some adapter families are functions of the base weights. For these, norms, cosines and dense matrices need a
*bound* Direction: `direction.bind(model)`. `ws.fit` and `ws.adapters.diff` return bound Directions; `Direction.load`
returns unbound ones. Arithmetic, saving and steering need no binding.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ws.algebra import hub, spectrum
from ws.algebra.delta import BaseTerm, Delta
from ws.base.errors import BaseMismatchError, UserError
from ws.base.files import atomic_file, canonical_json, content_key, tensors_key
from ws.model import architecture
from ws.model.fingerprint import fingerprint
from ws.model.loading import ChatModel

FORMAT = "weight-steering direction 1"
HEADER_KEY = "weight_steering"


def told_base(base: str, provenance: Mapping[str, Any]) -> str:
    """A base model in words: its name, if the provenance has one, and its fingerprint."""
    name = provenance.get("base", {}).get("name") if isinstance(provenance.get("base"), Mapping) else None
    return f"the base model {name} ({base})" if name else f"the base model {base}"


@dataclass(frozen=True, eq=False)
class Direction:
    """`deltas`: full parameter name -> Delta; `base`: fingerprint of the model that they belong to.

    `layers`: decoder layer of each parameter (absent for parameters outside the layers). `provenance`: its origin,
    JSON-like. `weights`: once bound, the base weights of the deltas that are functions of them. Supports `a + b`,
    `a - b`, `-a`, `2 * a`, `a / 2`, `keep`, `drop`, `norm`, `dot`, `cosine`, `save`, `load`.
    """

    deltas: Mapping[str, Delta]
    base: str
    layers: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def bind(self, model: ChatModel | nn.Module) -> Direction:
        """The same direction with references to the weights of its base (no copies). Raises for a different base."""
        network = model.network if isinstance(model, ChatModel) else model
        own = fingerprint(network)
        if own != self.base:
            raise BaseMismatchError(
                f"the direction belongs to {told_base(self.base, self.provenance)}, but this model is {own}",
                "Load that model (in commands: --model NAME, or leave --model out).",
            )
        parameters = dict(network.named_parameters())
        if absent := sorted(self.deltas.keys() - parameters.keys()):
            raise architecture.no_own_parameter(network, absent[0])
        needed = [name for name, delta in self.deltas.items() if delta.needs_weight]
        return replace(self, weights={name: as_matrix(parameters[name].data) for name in needed})

    # ---------------------------------------------------------------- arithmetic

    def __add__(self, other: Direction) -> Direction:
        return self._combine(other, "+", lambda a, b: a + b)

    def __sub__(self, other: Direction) -> Direction:
        return self._combine(other, "-", lambda a, b: a - b)

    def __mul__(self, factor: float) -> Direction:
        return self._map(lambda delta: delta * factor, {"scaled": factor, "of": dict(self.provenance)})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        return self._map(lambda delta: delta / divisor, {"divided": divisor, "of": dict(self.provenance)})

    def __neg__(self) -> Direction:
        return self * -1.0

    def _map(self, change: Callable[[Delta], Delta], provenance: Mapping[str, Any]) -> Direction:
        deltas = {name: change(delta) for name, delta in self.deltas.items()}
        return replace(self, deltas=deltas, provenance=provenance)

    def _combine(self, other: Direction, sign: str, operate: Callable[[Delta, Delta], Delta]) -> Direction:
        if self.base != other.base:
            raise BaseMismatchError(
                f"the directions belong to different base models ({self.base} and {other.base})",
                "Combine only directions of the same base model.",
            )
        deltas = {}
        for name in sorted({*self.deltas, *other.deltas}):
            mine, theirs = self.deltas.get(name), other.deltas.get(name)
            present = mine if mine is not None else theirs
            assert present is not None
            if mine is None or theirs is None:
                zero = Delta.zero(present.shape, present.device)
                mine, theirs = mine or zero, theirs or zero
            deltas[name] = operate(mine, theirs)
        provenance = {"operation": sign, "first": dict(self.provenance), "second": dict(other.provenance)}
        layers, weights = {**self.layers, **other.layers}, {**self.weights, **other.weights}
        return Direction(deltas, self.base, layers, provenance, weights)

    # ---------------------------------------------------------------- selection

    def keep(self, *, layers: Collection[int] | None = None, modules: Iterable[str] | None = None) -> Direction:
        """Only the deltas of these layers and of modules whose name ends in one of `modules` (e.g. `o_proj`)."""
        return self._select(layers, modules, wanted=True)

    def drop(self, *, layers: Collection[int] | None = None, modules: Iterable[str] | None = None) -> Direction:
        """All deltas that `keep` with the same arguments leaves out: keep + drop is the whole direction."""
        return self._select(layers, modules, wanted=False)

    def _select(self, layers: Collection[int] | None, modules: Iterable[str] | None, *, wanted: bool) -> Direction:
        endings = None if modules is None else tuple(modules)

        def matches(name: str) -> bool:
            in_layers = layers is None or self.layers.get(name) in layers
            module = name.rsplit(".", 1)[0]
            in_modules = endings is None or any(module == e or module.endswith("." + e) for e in endings)
            return in_layers and in_modules

        deltas = {name: delta for name, delta in self.deltas.items() if matches(name) == wanted}
        what = {
            "layers": None if layers is None else sorted(layers),
            "modules": None if endings is None else list(endings),
        }
        provenance = {"operation": "keep" if wanted else "drop", **what, "of": dict(self.provenance)}
        return replace(self, deltas=deltas, provenance=provenance)

    def to(self, device: torch.device | str) -> Direction:
        """The same direction with its factors on another device."""
        deltas = {name: delta.to(device) for name, delta in self.deltas.items()}
        return replace(self, deltas=deltas, weights={name: w.to(device) for name, w in self.weights.items()})

    # ---------------------------------------------------------------- geometry

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every delta."""
        return {name: spectrum.norm(delta, self.weights.get(name)) for name, delta in self.deltas.items()}

    def norms_by_layer(self) -> dict[int, float]:
        """Frobenius norm over the parameters of each decoder layer."""
        squares: dict[int, float] = {}
        for name, value in self.norms().items():
            if name in self.layers:
                squares[self.layers[name]] = squares.get(self.layers[name], 0.0) + value**2
        return {layer: math.sqrt(squares[layer]) for layer in sorted(squares)}

    def norm(self) -> float:
        """Frobenius norm over all parameters: the root of the sum of squares."""
        return math.sqrt(sum(value**2 for value in self.norms().values()))

    def dot(self, other: Direction) -> float:
        """Frobenius inner product over the shared parameters."""
        shared = self.deltas.keys() & other.deltas.keys()
        weights = {**self.weights, **other.weights}
        return sum(
            spectrum.inner_product(self.deltas[name], other.deltas[name], weights.get(name)) for name in sorted(shared)
        )

    def cosine(self, other: Direction) -> float:
        """Cosine over all parameters; NaN if one direction is zero."""
        return spectrum.cosine(self.dot(other), self.norm(), other.norm())

    @property
    def layer_numbers(self) -> list[int]:
        """Sorted decoder layers that the direction changes."""
        return sorted({self.layers[name] for name in self.deltas if name in self.layers})

    @property
    def rank(self) -> int:
        """Largest stored rank of any delta."""
        return max((delta.rank for delta in self.deltas.values()), default=0)

    @property
    def needs_weights(self) -> bool:
        """Whether any delta is a function of the base weights."""
        return any(delta.needs_weight for delta in self.deltas.values())

    @property
    def is_bound(self) -> bool:
        """Whether every delta that needs base weights has them."""
        return all(name in self.weights for name, delta in self.deltas.items() if delta.needs_weight)

    def materialise(self, name: str) -> torch.Tensor:
        """The dense update of one parameter, fp32, in the shape of `Delta` (a bias has one column)."""
        return self.deltas[name].materialise(self.weights.get(name))

    def resolved(self) -> Direction:
        """The same update with functions of the base weights made dense, for use on a different base."""
        deltas = {
            name: Delta.full(self.materialise(name)) if delta.needs_weight else delta
            for name, delta in self.deltas.items()
        }
        return replace(
            self, deltas=deltas, weights={}, provenance={"operation": "resolved", "of": dict(self.provenance)}
        )

    @property
    def stored_bytes(self) -> int:
        """Size of the factors in memory and on disk."""
        return 4 * sum(delta.stored_numbers for delta in self.deltas.values())

    def __repr__(self) -> str:
        size = f"norm {self.norm():.4g}" if self.is_bound else "unbound"
        return (
            f"Direction({len(self.deltas)} parameters, layers {_span(self.layer_numbers)}, rank <= {self.rank}, "
            f"{size}, base {self.base[:8]})"
        )

    # ---------------------------------------------------------------- files

    @cached_property
    def content_key(self) -> str:
        """Digest of the base and all stored numbers, without the provenance."""
        return content_key("direction", self.base, tensors_key(self._tensors()))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; equal directions give equal bytes."""
        header = {
            "format": FORMAT,
            "base": self.base,
            "layers": dict(self.layers),
            "provenance": dict(self.provenance),
        }
        with atomic_file(Path(path)) as temporary:
            # only one key: several would be written in random order, and equal directions must give equal bytes
            save_file(self._tensors(), temporary, metadata={HEADER_KEY: canonical_json(header)})

    def push_to_hub(
        self, repo: str, *, private: bool = False, token: str | None = None, endpoint: str | None = None
    ) -> str:
        """Upload the direction with a model card to a repository of the Hugging Face hub; returns the commit's address.

        The repository is made if it does not exist. token, endpoint: huggingface_hub's own defaults if None.
        """
        facts = {"parameters": str(len(self.deltas)), "layers": _span(self.layer_numbers), "rank": f"<= {self.rank}"}
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / hub.FILE)
            (Path(folder) / "README.md").write_text(hub.card(self.provenance, self.base, facts), encoding="utf-8")
            return hub.upload(Path(folder), repo, private=private, token=token, endpoint=endpoint)

    @classmethod
    def from_pretrained(
        cls, place: str | Path, *, revision: str | None = None, token: str | None = None, endpoint: str | None = None
    ) -> Direction:
        """Load a direction from a repository of the hub, a folder that holds `direction.safetensors`, or a file."""
        return cls.load(hub.find(place, revision=revision, token=token, endpoint=endpoint))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All stored tensors by their names in the file."""
        tensors = {}
        for name, delta in self.deltas.items():
            tensors[f"{name}::left"] = delta.left.cpu().contiguous()
            tensors[f"{name}::right"] = delta.right.cpu().contiguous()
            if delta.dense is not None:
                tensors[f"{name}::dense"] = delta.dense.cpu().contiguous()
            for number, term in enumerate(delta.base_terms):
                for part, tensor in (("row", term.row), ("mix", term.mix)):
                    if tensor is not None:
                        tensors[f"{name}::{part}{number}"] = tensor.cpu().contiguous()
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read a file written by `save`; anything else is an error."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no direction file {path}", "Make one with ws replicate or ws diff.")
        try:
            with safe_open(path, framework="pt") as file:
                header = _read_header(file.metadata() or {}, path)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} cannot be read ({error})",
                "The file is damaged. Copy it again; ws report FOLDER makes the one of a run folder again.",
            ) from error
        deltas = {}
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("::")
            parts.setdefault(name, {})[part] = tensor
        for name in sorted(parts):
            read = _read_delta(parts[name])
            if read is None:
                raise UserError(
                    f"{path} is damaged: the factors of {name} have shapes that do not match",
                    "Make the direction again.",
                )
            deltas[name] = read
        broken = [name for name, delta in deltas.items() if not delta.is_finite()]
        if broken:
            raise UserError(f"{path} holds NaN or infinite values in {broken[0]}", "Make the direction again.")
        return cls(deltas, header["base"], header["layers"], header["provenance"])


def _read_header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The header of a direction file; raises if the file is of another kind or damaged."""
    if HEADER_KEY not in metadata:
        raise UserError(
            f"{path} is not a direction", "Give a direction.safetensors; ws diff makes one from two adapters."
        )
    try:
        header = json.loads(metadata[HEADER_KEY])
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: its header is not JSON", "Make the direction again.") from error
    kinds = {"format": str, "base": str, "layers": dict, "provenance": dict}
    if not isinstance(header, dict) or not all(isinstance(header.get(n), kind) for n, kind in kinds.items()):
        raise UserError(f"{path} is damaged: its header lacks an entry", "Make the direction again.")
    if not all(type(layer) is int for layer in header["layers"].values()):
        raise UserError(f"{path} is damaged: its layers are not whole numbers", "Make the direction again.")
    if header["format"] != FORMAT:
        raise UserError(f"{path} has format {header['format']!r}, but this version reads {FORMAT!r}", "Make it again.")
    return header


def as_matrix(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter in the shape that deltas use: a bias vector becomes a matrix of one column."""
    return parameter[:, None] if parameter.ndim == 1 else parameter


def _read_delta(parts: Mapping[str, torch.Tensor]) -> Delta | None:
    """A delta from its stored tensors; None if their shapes do not match."""
    left, right, dense = (parts.get(part) for part in ("left", "right", "dense"))
    numbers = sorted({int(part[3:]) for part in parts if part[:3] in ("row", "mix")})
    if left is None or right is None or not left.ndim == right.ndim >= 2:
        return None
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        return None
    try:
        thin = Delta.low_rank(left, right)
        terms = tuple(BaseTerm(parts.get(f"row{number}"), parts.get(f"mix{number}")) for number in numbers)
        for term in terms:
            term.require_shape(thin.shape)
    except UserError:
        return None
    if dense is not None and tuple(dense.shape) != thin.shape:
        return None
    return Delta(thin.left, thin.right, dense, terms)


def _span(numbers: list[int]) -> str:
    """`[1, 2, 3]` -> `1-3`; gaps are kept: `1-2, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans) or "none"
