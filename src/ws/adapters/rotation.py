"""OFT and BOFT folders as exact deltas: the input space of a weight is rotated in blocks.

    OFT   (Qiu et al., 2306.07280)     W' = W R^T            R = I + 2 Q + 2 Q^2 + ... + Q^k (k = 4 terms after I), or
                                                             R = (I - Q) (I + Q)^-1 with use_cayley_neumann = False
    BOFT  (Liu et al., 2311.06243)     W' = diag(s) W M^T    M a product of permuted block rotations
                                                             (I - K) (I + K)^-1 with K = (P - P^T) / 2

Q is skew-symmetric with the saved numbers above its diagonal. The truncated series is not orthogonal and rotates in the
opposite direction of the exact Cayley form. The form that the folder was trained with is used.

Numeric trap: `R - I` is small. It is formed in fp64 without ever forming R, as `2 Q + 2 Q^2 + ...` or
`-2 Q (I + Q)^-1`. A BOFT folder with more than one factor mixes all inputs and becomes a dense update.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ws.adapters.folder import AdaptedModule, AdapterFolder, adapted_modules
from ws.algebra.delta import Delta

_OFT = "oft_R.weight"
_BOFT_BLOCKS, _BOFT_SCALE = "boft_R", "boft_s"
_OFT_HARMLESS = frozenset({
    "r", "oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share", "use_cayley_neumann",
    "num_cayley_neumann_terms",
})  # fmt: skip
_BOFT_HARMLESS = frozenset({
    "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "init_weights",
})  # fmt: skip
_FIRST_VERSION = (0, 18)
"""This version of PEFT changed the meaning of the numbers in an OFT folder."""


def oft_deltas(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    """The updates of a folder of type OFT."""
    folder.refuse_options(_OFT_HARMLESS)
    _require_version(folder)
    result = {}
    for adapted in adapted_modules(folder, network, (_OFT,)):
        (numbers,) = adapted.take(_OFT)
        gap = _oft_rotation_gap(adapted, numbers.double())
        result[adapted.parameter] = _rotated(adapted, gap.mT)
    return result


def _require_version(folder: AdapterFolder) -> None:
    written = str(folder.config.get("peft_version") or "")
    digits = written.split("@", maxsplit=1)[0].split(".")[:2]
    known = len(digits) == 2 and all(part.isdigit() for part in digits)
    if not known or tuple(map(int, digits)) < _FIRST_VERSION:
        folder.unsupported(
            f"an OFT adapter written by PEFT {written or 'of unknown version'}",
            "Train it with PEFT 0.18 or newer; older versions store different numbers.",
        )


def _oft_rotation_gap(adapted: AdaptedModule, numbers: Float[Tensor, "stored elements"]) -> Tensor:
    """`R - I` of every block, (blocks, size, size), fp64."""
    folder, columns = adapted.folder, adapted.weight.shape[1]
    size = round((1 + (1 + 8 * numbers.shape[1]) ** 0.5) / 2)
    if numbers.ndim != 2 or size * (size - 1) // 2 != numbers.shape[1] or columns % size:
        folder.fail(f"the rotation of {adapted.name} has shape {tuple(numbers.shape)}, which does not match "
                    f"its {columns} inputs")  # fmt: skip
    skew = _skew(numbers, size)
    if folder.config.get("coft"):
        skew = _near_identity(skew, folder.number("eps"))
    if folder.config.get("use_cayley_neumann", True):
        gap = _series_gap(skew, int(folder.config.get("num_cayley_neumann_terms") or 5))
    else:
        gap = _cayley_gap(skew)
    blocks = columns // size
    if folder.config.get("block_share"):
        gap = gap[:1].expand(blocks, size, size)
    if gap.shape[0] != blocks:
        folder.fail(f"{adapted.name} has {gap.shape[0]} rotations for {blocks} blocks of inputs")
    return gap


def boft_deltas(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    """The updates of a folder of type BOFT."""
    folder.refuse_options(_BOFT_HARMLESS)
    result = {}
    for adapted in adapted_modules(folder, network, (_BOFT_BLOCKS, _BOFT_SCALE)):
        numbers, scale = (tensor.double() for tensor in adapted.take(_BOFT_BLOCKS, _BOFT_SCALE))
        columns = adapted.weight.shape[1]
        if numbers.ndim != 4 or numbers.shape[1] * numbers.shape[2] != columns:
            folder.fail(f"the rotations of {adapted.name} have shape {tuple(numbers.shape)}, not {columns} inputs")
        gaps = _cayley_gap((numbers - numbers.mT) / 2)
        if gaps.shape[0] == 1:
            result[adapted.parameter] = _rotated(adapted, gaps[0].mT, scale.flatten())
        else:
            result[adapted.parameter] = _dense_butterfly(adapted, gaps, scale.flatten())
    return result


def _rotated(adapted: AdaptedModule, gap: Float[Tensor, "blocks size size"], scale: Tensor | None = None) -> Delta:
    """`diag(s) W (I + gap) - W` as `diag(s) W gap + diag(s - 1) W`."""
    if adapted.transposed:
        adapted.folder.unsupported(f"a rotation of the transposed weight of {adapted.name}")
    shape = tuple(adapted.weight.shape)
    delta = Delta.scaling(shape, row=scale, mix=gap)
    if scale is not None:
        delta = delta + Delta.scaling(shape, row=scale - 1)
    return adapted.as_stored(delta)


def _dense_butterfly(adapted: AdaptedModule, gaps: Float[Tensor, "factors blocks size size"], scale: Tensor) -> Delta:
    """`diag(s) W M^T - W` with `M = F_n ... F_1`, `F_i = P_i blockdiag_i P_i^T`; `F_i - I` is kept separate from I."""
    from peft.tuners.boft.layer import BOFTLayer  # noqa: PLC0415 - heavy import, late

    factors, blocks, size = gaps.shape[:3]
    columns = blocks * size
    total = torch.zeros(columns, columns, dtype=torch.float64)  # M - I
    for number in range(factors):
        order = BOFTLayer.block_butterfly_perm(None, columns, blocks // 2**number, size // 2, factors - 1)
        inside = torch.block_diag(*gaps[number])
        permutation = torch.zeros(columns, columns, dtype=torch.float64)
        permutation[torch.arange(columns), order] = 1.0
        factor = permutation @ inside @ permutation.T
        total = total + factor + factor @ total
    weight = adapted.weight.double()
    change = scale[:, None] * (weight @ total.T) + (scale - 1)[:, None] * weight
    return adapted.as_stored(Delta.full(change.float()))


# -------------------------------------------------------------------- rotations


def _skew(numbers: Float[Tensor, "stored elements"], size: int) -> Float[Tensor, "stored size size"]:
    """Skew-symmetric matrices from the numbers above their diagonals, row by row."""
    rows, columns = torch.triu_indices(size, size, 1)
    upper = numbers.new_zeros(numbers.shape[0], size, size)
    upper[:, rows, columns] = numbers
    return upper - upper.mT


def _near_identity(skew: Float[Tensor, "stored size size"], eps: float) -> Float[Tensor, "stored size size"]:
    """Constrained OFT: the Frobenius norm of every block is at most eps / sqrt(number of blocks)."""
    limit = eps / skew.shape[0] ** 0.5
    norms = skew.norm(dim=(1, 2), keepdim=True)
    return torch.where(norms <= limit, skew, limit * skew / norms)


def _series_gap(skew: Float[Tensor, "*n size size"], terms: int) -> Float[Tensor, "*n size size"]:
    """`2 Q + 2 Q^2 + ... + Q^(terms - 1)`: the truncated series of the Cayley transform, without the identity."""
    total = torch.zeros_like(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def _cayley_gap(skew: Float[Tensor, "*n size size"]) -> Float[Tensor, "*n size size"]:
    """`(I - Q) (I + Q)^-1 - I = -2 Q (I + Q)^-1`."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(identity + skew, -2 * skew, left=False)
