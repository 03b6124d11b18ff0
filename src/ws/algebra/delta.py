"""The exact, factored update of one weight matrix.

    dW = sum_i diag(row_i) W mix_i  +  B A  (+ dense)     B: out x k,  A: k x in,  mix_i (block-)diagonal

This form covers every adapter family, and it is closed under sums, differences and multiples: updates are added and
subtracted without merging them into weights. Everything is stored as a *difference* from the base, so an untrained
adapter is a zero update. (Task vectors: Ilharco et al. 2212.04089; low-rank adapters: Hu et al.
2106.09685; orthogonal ones: Qiu et al. 2306.07280; scaling ones: Liu et al. 2205.05638.)

The first kind of term is a function of the base weight `W`. A delta with such terms needs `W` to compute the update
(`materialise`, `apply`, norms); without `W` these raise an error. Stacked experts have a leading axis in `left`,
`right` and `dense`. A bias vector is a matrix of one column. Left is the output side, right the input side.

Numeric traps. Two fine-tunes of one base share most of their change, so `tau_pos - tau_neg` cancels. The difference of
equal-rank products is stored as `[B_p - B_n, B_n] [A_p; A_p - A_n]`: small differences of fp32 numbers, rounded once,
never a difference of weights merged in half precision. `tau_pos + (-tau_neg)` is stored as the same numbers. Sums that
still cancel (of unequal ranks, or of more than two terms) are converted to an orthogonal form in fp64. `apply`
multiplies half-precision inputs in fp32 and rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ws.base.errors import UnsupportedFeatureError, UserError

Alpha = float | Tensor
"""Signed strength: one number, or one number per row (per token in packed batches)."""


@dataclass(frozen=True, eq=False)
class BaseTerm:
    """`diag(row) W mix`: the part of an update that is a function of the base weight.

    row: (out,), or None for ones. mix: None for the identity, (in,) for a diagonal matrix, (blocks, size, size) for a
    block-diagonal one. At least one is given; both are fp32.
    """

    row: Tensor | None = None
    mix: Tensor | None = None

    def __post_init__(self) -> None:
        if self.row is None and self.mix is None:
            raise UserError("a BaseTerm has neither row nor mix; give at least one")
        if self.mix is not None and self.mix.ndim not in (1, 3):
            raise UserError(f"mix has shape {tuple(self.mix.shape)}; it must be (in,) or (blocks, size, size)")

    @property
    def is_block_diagonal(self) -> bool:
        """Whether input channels are mixed, not only scaled."""
        return self.mix is not None and self.mix.ndim == 3

    @property
    def parts(self) -> list[Tensor]:
        """The stored tensors."""
        return [part for part in (self.row, self.mix) if part is not None]

    def require_shape(self, shape: tuple[int, ...]) -> None:
        """Raise unless the term fits a weight of this shape."""
        rows = None if self.row is None else self.row.shape[0]
        size = self.mix.shape[1] if self.mix is not None and self.is_block_diagonal else 1
        columns = None if self.mix is None else self.mix.shape[0] * size
        if len(shape) != 2 or rows not in (None, shape[0]) or columns not in (None, shape[1]):
            raise UserError(f"a term of {rows} rows and {columns} columns does not fit a weight of shape {shape}")

    def times(self, factor: float) -> BaseTerm:
        """The term multiplied by a factor, in `row` if there is one, else in `mix`."""
        if self.row is not None:
            return BaseTerm(self.row * factor, self.mix)
        assert self.mix is not None
        return BaseTerm(None, self.mix * factor)

    def to(self, device: torch.device | str) -> BaseTerm:
        """The same term on another device."""
        return BaseTerm(*(None if part is None else part.to(device) for part in (self.row, self.mix)))

    @property
    def T(self) -> BaseTerm:  # noqa: N802 - the name that tensors use
        """The term of the transposed weight: `row` and the diagonal `mix` swap."""
        if self.is_block_diagonal:
            raise UnsupportedFeatureError("a block-diagonal mix has no exact form on a transposed weight")
        return BaseTerm(self.mix, self.row)

    # ---------------------------------------------------------------- products

    def of(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The dense term, in the dtype of `weight`."""
        product = self.mixed(weight)
        return product if self.row is None else product * self.row.to(weight.dtype)[:, None]

    def mixed(self, matrix: Float[Tensor, "m in"]) -> Float[Tensor, "m in"]:
        """`matrix mix`, in the dtype of `matrix`."""
        if self.mix is None:
            return matrix
        mix = self.mix.to(matrix.dtype)
        if not self.is_block_diagonal:
            return matrix * mix
        blocks = matrix.reshape(matrix.shape[0], mix.shape[0], mix.shape[1])
        return torch.einsum("mni,nij->mnj", blocks, mix).reshape(matrix.shape)

    def turned(self, inputs: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        """`inputs mix^T`: the inputs that the weight gets at run time."""
        if self.mix is None:
            return inputs
        mix = self.mix.to(inputs.dtype)
        if not self.is_block_diagonal:
            return inputs * mix
        blocks = inputs.reshape(*inputs.shape[:-1], mix.shape[0], mix.shape[1])
        return torch.einsum("...nj,nij->...ni", blocks, mix).reshape(inputs.shape)


@dataclass(frozen=True, eq=False)
class Delta:
    """`sum of base terms + left @ right + dense`, all in fp32.

    `left` is (experts,) out x k and `right` (experts,) k x in; k may be 0.
    Build with `Delta.low_rank`, `Delta.full`, `Delta.scaling` or `Delta.zero`; these check the shapes.
    """

    left: Tensor
    right: Tensor
    dense: Tensor | None = None
    base_terms: tuple[BaseTerm, ...] = ()

    # ---------------------------------------------------------------- construction

    @classmethod
    def low_rank(cls, left: Float[Tensor, "*experts out k"], right: Float[Tensor, "*experts k in"]) -> Delta:
        """The product of two thin factors, kept as given (converted to fp32)."""
        stacked_alike = left.ndim == right.ndim >= 2 and left.shape[:-2] == right.shape[:-2]
        if not stacked_alike or left.shape[-1] != right.shape[-2]:
            raise UserError(
                f"a low-rank delta needs factors of shapes (out, k) and (k, in), "
                f"but got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        return cls(left.to(torch.float32).contiguous(), right.to(torch.float32).contiguous())

    @classmethod
    def full(cls, dense: Float[Tensor, "*experts out in"]) -> Delta:
        """A dense update, for changes that have no low-rank form."""
        *experts, rows, columns = dense.shape
        return cls(dense.new_zeros(*experts, rows, 0, dtype=torch.float32),
                   dense.new_zeros(*experts, 0, columns, dtype=torch.float32),
                   dense.to(torch.float32).contiguous())  # fmt: skip

    @classmethod
    def scaling(
        cls,
        shape: tuple[int, ...],
        row: Float[Tensor, " out"] | None = None,
        mix: Float[Tensor, " in"] | Float[Tensor, "blocks size size"] | None = None,
    ) -> Delta:
        """`diag(row) W mix`. Differences such as `scale - 1` or `R - I` are given, as everywhere in a Delta."""
        term = BaseTerm(*(None if part is None else part.to(torch.float32).contiguous() for part in (row, mix)))
        term.require_shape(shape)
        zero = cls.zero(shape, term.parts[0].device)
        return cls(zero.left, zero.right, None, (term,))

    @classmethod
    def zero(cls, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Delta:
        """A zero update, of rank 0."""
        *experts, rows, columns = shape
        return cls(torch.zeros(*experts, rows, 0, device=device), torch.zeros(*experts, 0, columns, device=device))

    # ---------------------------------------------------------------- properties

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the parameter, or (experts, out, in)."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """Number of stored rank-one terms (an upper bound of the rank of `left @ right`)."""
        return self.left.shape[-1]

    @property
    def needs_weight(self) -> bool:
        """Whether the update is a function of the base weight."""
        return bool(self.base_terms)

    @property
    def is_thin(self) -> bool:
        """Whether the update is `left @ right` alone."""
        return self.dense is None and not self.base_terms

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.left.device

    @property
    def stored_numbers(self) -> int:
        """Number of fp32 numbers that are stored."""
        return sum(part.numel() for part in self._parts())

    def is_finite(self) -> bool:
        """Whether no stored number is NaN or infinite."""
        return all(all_finite(part) for part in self._parts())

    def _parts(self) -> list[Tensor]:
        terms = [part for term in self.base_terms for part in term.parts]
        return [self.left, self.right, *terms] + ([] if self.dense is None else [self.dense])

    # ---------------------------------------------------------------- algebra

    def __add__(self, other: Delta) -> Delta:
        self.require_same_shape(other)
        if self.dense is None or other.dense is None:
            dense = other.dense if self.dense is None else self.dense
        else:
            dense = self.dense + other.dense
        left, right = _sum_of_products(self.left, self.right, other.left, other.right)
        return Delta(*_compressed(left, right), dense, _merged([*self.base_terms, *other.base_terms]))

    def __sub__(self, other: Delta) -> Delta:
        return self + -other

    def __mul__(self, factor: float) -> Delta:
        terms = tuple(term.times(factor) for term in self.base_terms)
        return Delta(self.left * factor, self.right, None if self.dense is None else self.dense * factor, terms)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Delta:
        terms = tuple(term.times(1.0 / divisor) for term in self.base_terms)
        return Delta(self.left / divisor, self.right, None if self.dense is None else self.dense / divisor, terms)

    def __neg__(self) -> Delta:
        return self * -1.0

    @property
    def T(self) -> Delta:  # noqa: N802 - the name that tensors use
        """The update of the transposed parameter (GPT-2 stores its weights as in x out)."""
        return Delta(
            self.right.mT.contiguous(),
            self.left.mT.contiguous(),
            None if self.dense is None else self.dense.mT.contiguous(),
            tuple(term.T for term in self.base_terms),
        )

    def to(self, device: torch.device | str) -> Delta:
        """The same update on another device, still fp32."""
        return Delta(
            self.left.to(device),
            self.right.to(device),
            None if self.dense is None else self.dense.to(device),
            tuple(term.to(device) for term in self.base_terms),
        )

    def require_same_shape(self, other: Delta) -> None:
        """Raise unless both belong to parameters of the same shape."""
        if self.shape != other.shape:
            raise UserError(f"deltas of shapes {self.shape} and {other.shape} belong to different parameters")

    # ---------------------------------------------------------------- use

    def materialise(self, weight: Float[Tensor, "*experts out in"] | None = None) -> Float[Tensor, "*experts out in"]:
        """The dense update, fp32. `weight` is the base weight, needed by deltas that are functions of it."""
        product = self.left @ self.right
        if self.dense is not None:
            product = product + self.dense
        for term in self.base_terms:
            product = product + term.of(self.base_weight(weight).to(torch.float32))
        return product

    def apply(
        self, inputs: Float[Tensor, "*rows in"], alpha: Alpha = 1.0, weight: Float[Tensor, "out in"] | None = None
    ) -> Float[Tensor, "*rows out"]:
        """`alpha * inputs @ dW.T` in fp32: the change of a linear layer's output.

        `alpha` is a number or a tensor of the leading shape of `inputs` (one strength per row or per token). With a
        half-precision base weight, base terms are multiplied in half precision; only the term is rounded, not `W x`.
        """
        inputs = inputs.to(torch.float32)
        outputs = (inputs @ self.right.mT) @ self.left.mT
        if self.dense is not None:
            outputs = outputs + inputs @ self.dense.mT
        for term in self.base_terms:
            base = self.base_weight(weight)
            product = (term.turned(inputs).to(base.dtype) @ base.mT).to(torch.float32)
            outputs = outputs + (product if term.row is None else product * term.row)
        return outputs * per_row(alpha, outputs)

    def left_product(
        self, basis: Float[Tensor, "out r"], weight: Float[Tensor, "out in"] | None = None
    ) -> Float[Tensor, "r in"]:
        """`basis^T dW` without forming dW, in the dtype of `basis`."""
        kind = basis.dtype
        result = (basis.mT @ self.left.to(kind)) @ self.right.to(kind)
        if self.dense is not None:
            result = result + basis.mT @ self.dense.to(kind)
        for term in self.base_terms:
            scaled = basis if term.row is None else basis * term.row.to(kind)[:, None]
            result = result + term.mixed(scaled.mT @ self.base_weight(weight).to(kind))
        return result

    def right_product(
        self, basis: Float[Tensor, "in r"], weight: Float[Tensor, "out in"] | None = None
    ) -> Float[Tensor, "out r"]:
        """`dW basis` without forming dW, in the dtype of `basis`."""
        kind = basis.dtype
        result = self.left.to(kind) @ (self.right.to(kind) @ basis)
        if self.dense is not None:
            result = result + self.dense.to(kind) @ basis
        for term in self.base_terms:
            product = self.base_weight(weight).to(kind) @ term.turned(basis.mT).mT
            result = result + (product if term.row is None else product * term.row.to(kind)[:, None])
        return result

    def base_weight(self, weight: Tensor | None) -> Tensor:
        """The checked base weight, for terms that are functions of it; raises if it is missing."""
        if weight is None:
            raise UserError(
                f"this update of a parameter of shape {self.shape} is a function of the base weights",
                "Bind the direction to its base first: direction.bind(model).",
            )
        if tuple(weight.shape) != self.shape:
            raise UserError(
                f"a base weight of shape {tuple(weight.shape)} does not fit an update of shape {self.shape}"
            )
        return weight


def per_row(alpha: Alpha, outputs: Float[Tensor, "*rows out"]) -> Alpha:
    """Shape `alpha` so that it multiplies the rows of `outputs`; scalars pass unchanged."""
    if not isinstance(alpha, Tensor) or alpha.ndim == 0:
        return alpha
    if tuple(alpha.shape) != tuple(outputs.shape[: alpha.ndim]):
        raise UserError(
            f"alpha of shape {tuple(alpha.shape)} does not match the leading dimensions of a batch of shape "
            f"{tuple(outputs.shape)}",
            "Give one alpha per row, or a single number.",
        )
    return alpha.to(outputs.device, torch.float32).reshape(*alpha.shape, *(1,) * (outputs.ndim - alpha.ndim))


def _merged(terms: Iterable[BaseTerm]) -> tuple[BaseTerm, ...]:
    """Add up terms that have only a row, or only a mix, of one shape; `_append` the terms that have both."""
    single: dict[tuple[str, tuple[int, ...]], BaseTerm] = {}
    others: list[BaseTerm] = []
    for term in terms:
        if term.row is not None and term.mix is not None:
            _append(others, term.row, term.mix)
            continue
        kind = ("row" if term.mix is None else "mix", tuple(term.parts[0].shape))
        if kind in single:
            total = single[kind].parts[0] + term.parts[0]
            single[kind] = BaseTerm(total, None) if kind[0] == "row" else BaseTerm(None, total)
        else:
            single[kind] = term
    return (*single.values(), *others)


def _append(terms: list[BaseTerm], row: Tensor, mix: Tensor) -> None:
    """Append `diag(row) W mix`. If it cancels an earlier term, both are rewritten as differences.

    `diag(r) W M + diag(s) W N = diag(r + s) W M - diag(s) W (M - N)`, as in `_sum_of_products`.
    """
    for number, term in enumerate(terms):
        if term.row is None or term.mix is None or term.mix.shape != mix.shape:
            continue
        row_gap, mix_gap = term.row + row, term.mix - mix
        split = row_gap.norm() * term.mix.norm() + row.norm() * mix_gap.norm()
        if split < term.row.norm() * term.mix.norm() + row.norm() * mix.norm():
            terms[number] = BaseTerm(row_gap, term.mix)
            row, mix = -row, mix_gap
            break
    terms.append(BaseTerm(row, mix))


def _compressed(
    left: Float[Tensor, "*experts out k"], right: Float[Tensor, "*experts k in"]
) -> tuple[Float[Tensor, "*experts out m"], Float[Tensor, "*experts m in"]]:
    """The same product, in orthogonal form if it has more than min(out, in) terms, or terms that cancel.

    One factor is orthonormal (QR in fp64). The other one is as large as the product and is rounded once.
    """
    rows, columns, rank = left.shape[-2], right.shape[-1], left.shape[-1]
    if rank <= min(rows, columns) and not _cancels(left, right):
        return left, right
    if rows <= columns:
        orthogonal, triangle = torch.linalg.qr(left.double())
        return orthogonal.float(), (triangle @ right.double()).float()
    orthogonal, triangle = torch.linalg.qr(right.double().mT)
    return (left.double() @ triangle.mT).float(), orthogonal.mT.float().contiguous()


LARGEST_CANCELLATION = 10.0
"""Largest allowed root of the sum of squares of the terms of a stored product, relative to the norm of their sum."""


def _cancels(left: Float[Tensor, "*experts out k"], right: Float[Tensor, "*experts k in"]) -> bool:
    """Whether the terms of a product are so much larger than their sum that each use would lose a digit."""
    inner = (left.mT @ left) * (right @ right.mT)  # inner products of all pairs of terms
    terms = inner.diagonal(dim1=-2, dim2=-1).sum()
    return bool(terms > LARGEST_CANCELLATION**2 * inner.sum().clamp(min=0))


def _sum_of_products(
    left: Float[Tensor, "*experts out k"],
    right: Float[Tensor, "*experts k in"],
    other_left: Float[Tensor, "*experts out j"],
    other_right: Float[Tensor, "*experts j in"],
) -> tuple[Float[Tensor, "*experts out m"], Float[Tensor, "*experts m in"]]:
    """`left @ right + other_left @ other_right` as one product with little cancellation.

    For equal ranks `B A + C D = (B + C) A - C (A - D)`. A difference is a sum with C negated. If its two products are
    nearly equal, `B + C` and `A - D` are small and this form loses nothing, while `[B, C] [A; D]` adds large terms of
    opposite sign at every use. The form with the smaller sum of term norms is kept. It is the same for `p - n` and
    `p + (-n)`.
    """
    if left.shape[-1] == other_left.shape[-1]:
        left_gap, right_gap = left + other_left, right - other_right
        split = _term_norms(left_gap, right) + _term_norms(other_left, right_gap)
        if split < _term_norms(left, right) + _term_norms(other_left, other_right):
            return torch.cat([left_gap, -other_left], dim=-1), torch.cat([right, right_gap], dim=-2)
    return torch.cat([left, other_left], dim=-1), torch.cat([right, other_right], dim=-2)


def _term_norms(left: Tensor, right: Tensor) -> float:
    """Sum of the norms of the rank-one terms: the scale of the rounding error of the product."""
    return float((left.square().sum(-2) * right.square().sum(-1)).sqrt().sum())


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass without a mask (several times faster than `isfinite`)."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))
