"""The exact, factored update of one weight matrix.

    dW = B A (+ dense)          B: out x k,  A: k x in,  dense: out x in

A `Delta` has the shape of the parameter it belongs to and never needs that parameter to be merged: sums,
differences and multiples stay factored. (Arithmetic on adapters: task vectors, Ilharco et al. 2212.04089;
low-rank adapters: Hu et al. 2106.09685.)

Numeric traps. Two fine-tunes of one base share most of their movement, so `tau_pos - tau_neg` cancels: the
difference of equal-rank products is stored as `[B_p - B_n, B_n] [A_p; A_p - A_n]` with the small differences formed
in fp64, and never as a merge in half precision. Half-precision inputs of `apply` are multiplied in fp32 and
rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ws.errors import UserError

Alpha = float | Tensor
"""Signed strength: one number, or one number per row (per token in packed batches)."""


@dataclass(frozen=True, eq=False)
class Delta:
    """`left @ right + dense`, all in fp32; `left` is out x k, `right` is k x in, k may be 0.

    Build with `Delta.low_rank`, `Delta.full` or `Delta.zero`; the shapes are checked there.
    """

    left: Tensor
    right: Tensor
    dense: Tensor | None = None

    # ---------------------------------------------------------------- construction

    @classmethod
    def low_rank(cls, left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]) -> Delta:
        """The product of two thin factors, kept as given (converted to fp32)."""
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise UserError(
                f"a low-rank delta needs factors of shapes (out, k) and (k, in), "
                f"got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        return cls(left.to(torch.float32).contiguous(), right.to(torch.float32).contiguous())

    @classmethod
    def full(cls, dense: Float[Tensor, "out in"]) -> Delta:
        """A dense update, for changes that have no thin form."""
        rows, columns = dense.shape
        return cls(dense.new_zeros(rows, 0, dtype=torch.float32),
                   dense.new_zeros(0, columns, dtype=torch.float32),
                   dense.to(torch.float32).contiguous())  # fmt: skip

    @classmethod
    def zero(cls, shape: tuple[int, int], device: torch.device | str = "cpu") -> Delta:
        """No update at all, of rank 0."""
        rows, columns = shape
        return cls(torch.zeros(rows, 0, device=device), torch.zeros(0, columns, device=device))

    # ---------------------------------------------------------------- properties

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the parameter."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Number of stored rank-one terms (an upper bound of the rank of the thin part)."""
        return self.left.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the factors live."""
        return self.left.device

    @property
    def stored_numbers(self) -> int:
        """How many fp32 numbers this form stores."""
        return self.left.numel() + self.right.numel() + (0 if self.dense is None else self.dense.numel())

    def is_finite(self) -> bool:
        """Whether no stored number is NaN or infinite."""
        return all(bool(torch.isfinite(part).all()) for part in self._parts())

    def _parts(self) -> list[Tensor]:
        return [self.left, self.right] + ([] if self.dense is None else [self.dense])

    # ---------------------------------------------------------------- algebra

    def __add__(self, other: Delta) -> Delta:
        self._require_same_shape(other)
        if self.dense is None or other.dense is None:
            dense = other.dense if self.dense is None else self.dense
        else:
            dense = self.dense + other.dense
        return Delta(
            torch.cat([self.left, other.left], dim=1),
            torch.cat([self.right, other.right], dim=0),
            dense,
        )

    def __sub__(self, other: Delta) -> Delta:
        self._require_same_shape(other)
        left, right = _difference_of_products(self.left, self.right, other.left, other.right)
        if other.dense is None:
            dense = self.dense
        elif self.dense is None:
            dense = -other.dense
        else:
            dense = self.dense - other.dense
        return Delta(left, right, dense)

    def __mul__(self, factor: float) -> Delta:
        return Delta(self.left * factor, self.right, None if self.dense is None else self.dense * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Delta:
        return Delta(self.left / divisor, self.right, None if self.dense is None else self.dense / divisor)

    def __neg__(self) -> Delta:
        return self * -1.0

    @property
    def T(self) -> Delta:  # noqa: N802 - the name that tensors use
        """The update of the transposed parameter (GPT-2 stores its weights as in x out)."""
        return Delta(
            self.right.T.contiguous(),
            self.left.T.contiguous(),
            None if self.dense is None else self.dense.T.contiguous(),
        )

    def to(self, device: torch.device | str) -> Delta:
        """The same update on another device, still fp32."""
        return Delta(
            self.left.to(device),
            self.right.to(device),
            None if self.dense is None else self.dense.to(device),
        )

    def _require_same_shape(self, other: Delta) -> None:
        if self.shape != other.shape:
            raise UserError(f"deltas of shapes {self.shape} and {other.shape} belong to different parameters")

    # ---------------------------------------------------------------- use

    def materialise(self) -> Float[Tensor, "out in"]:
        """The dense update, fp32."""
        product = self.left @ self.right
        return product if self.dense is None else product + self.dense

    def apply(self, inputs: Float[Tensor, "*rows in"], alpha: Alpha = 1.0) -> Float[Tensor, "*rows out"]:
        """`alpha * inputs @ dW.T` in fp32: what a linear layer's output changes by.

        `alpha` is a number or a tensor of the leading shape of `inputs` (one strength per row or per token).
        """
        inputs = inputs.to(torch.float32)
        outputs = (inputs @ self.right.T) @ self.left.T
        if self.dense is not None:
            outputs = outputs + inputs @ self.dense.T
        return outputs * per_row(alpha, outputs)


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


def _difference_of_products(
    left: Float[Tensor, "out k"],
    right: Float[Tensor, "k in"],
    other_left: Float[Tensor, "out j"],
    other_right: Float[Tensor, "j in"],
) -> tuple[Float[Tensor, "out m"], Float[Tensor, "m in"]]:
    """`left @ right - other_left @ other_right` as one product with the least cancellation.

    For equal ranks `B A - C D = (B - C) A + C (A - D)`; where the two products share most of their movement the
    differences are small and the identity loses nothing, while `[B, -C] [A; D]` subtracts large terms at every use.
    The form with the smaller sum of term norms is kept.
    """
    plain = torch.cat([left, -other_left], dim=1), torch.cat([right, other_right], dim=0)
    if left.shape[1] != other_left.shape[1]:
        return plain
    left_gap = (left.double() - other_left.double()).float()
    right_gap = (right.double() - other_right.double()).float()
    split = torch.cat([left_gap, other_left], dim=1), torch.cat([right, right_gap], dim=0)
    return min(plain, split, key=_term_norms)


def _term_norms(factors: tuple[Tensor, Tensor]) -> float:
    """Sum over rank-one terms of their norms: the scale of the rounding error of the product."""
    left, right = factors
    return float((left.norm(dim=0) * right.norm(dim=1)).sum())
