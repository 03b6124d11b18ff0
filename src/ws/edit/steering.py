"""Put edits on a model (at run time, per row, or baked into the weights) and remove them again.

    run time   y = W x + alpha * dW x             side path, added in fp32 and rounded once; alpha may differ per row
    baked      W' = round(W_fp32 + alpha * dW)    one rounding, whatever the dtype of the weights

Guarantees: alpha = 0 is the base model bit for bit. Leaving a `steer` block restores every weight bit for bit, also
after an exception or an incomplete entry. An edit of a different base is refused unless it is allowed. Several
directions add up, and blocks nest: functions of the base weights always use the unedited weights.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ws.algebra.delta import Alpha, Delta, per_row
from ws.algebra.direction import Direction, as_matrix, told_base
from ws.base import console
from ws.base.errors import BaseMismatchError, UnsupportedFeatureError, UserError
from ws.edit.condition import BaseMismatch, Condition, Effect
from ws.model import architecture
from ws.model.fingerprint import fingerprint, forget_fingerprint
from ws.model.loading import ChatModel

Mode = Literal["auto", "runtime", "baked"]
Edits = Direction | Effect | Mapping[Any, Alpha]
Parts = dict[str, list[tuple[Delta, Alpha]]]
Strength = tuple[Direction | Effect, Alpha, BaseMismatch]
"""An edit, its strength, and whether it may be put on a different base than its own."""
STRONGEST = 1e5
"""Largest strength: more than a calibration ever tries, and far from the limits of fp32."""


@contextmanager
def steer(
    model: ChatModel | nn.Module,
    edits: Edits,
    alpha: Alpha = 1.0,
    *,
    mode: Mode = "auto",
    base_mismatch: BaseMismatch = "refuse",
) -> Iterator[None]:
    """Run the block with the model at `W + alpha * dW`.

    edits: one Direction (or other Effect) with `alpha`, or a mapping {direction: alpha}. alpha: a number, or a tensor
    with one strength per row of the batch (run time only).
    mode: "baked" changes the weights and restores them; "runtime" adds a side path instead; "auto" bakes
    fp32 weights with scalar strengths and uses the side path otherwise. Parameters outside linear maps can only be
    baked, so per-row strengths on them are an error.

    >>> with ws.steer(model, direction, 0.5):                      # doctest: +SKIP
    ...     model.network.generate(...)
    """
    network = network_of(model)
    if isinstance(model, ChatModel):
        _ = model.split  # its check must run on the unedited model
    strengths = list(edits.items()) if isinstance(edits, Mapping) else [(edits, alpha)]
    with _applied(network, [(edit, strength, base_mismatch) for edit, strength in strengths], mode):
        yield


@contextmanager
def under(model: ChatModel, condition: Condition, *, mode: Mode = "auto") -> Iterator[None]:
    """Run the block under a Condition's edits. (Its Context is applied when prompts are rendered.)"""
    strengths: list[Strength] = [(edit.effect, alpha, edit.base_mismatch) for edit, alpha in condition.active]
    with _applied(model.network, strengths, mode):
        yield


def can_share_a_pass(model: ChatModel, condition: Condition) -> bool:
    """Whether `under_each` accepts this Condition: one Direction, with only low-rank updates of linear maps."""
    if len(condition.active) != 1 or not isinstance(direction := condition.active[0][0].effect, Direction):
        return False
    modules = dict(model.network.named_modules())
    maps = {f"{name}.weight" for name, module in modules.items()
            if architecture.is_linear_map(module) and not architecture.is_conv1d(module)}  # fmt: skip
    return direction.deltas.keys() <= maps and all(delta.is_thin for delta in direction.deltas.values())


@contextmanager
def under_each(model: ChatModel, conditions: Sequence[Condition]) -> Iterator[None]:
    """Run the block with every batch split into equal blocks of rows, one block per Condition.

    Side paths in the dtype of the weights, summed in fp32 and rounded once. Every Condition must pass
    `can_share_a_pass`.
    """
    terms: dict[str, dict[int, tuple[Delta, float]]] = defaultdict(dict)
    for block, condition in enumerate(conditions):
        ((edit, alpha),) = condition.active
        _require_base(edit.effect, model.network, edit.base_mismatch)
        require_strength(alpha)
        assert isinstance(edit.effect, Direction)
        for name, delta in edit.effect.deltas.items():
            terms[name][block] = delta, alpha
    _require_parameters({name: list(by_block.values()) for name, by_block in terms.items()}, model.network)
    modules = dict(model.network.named_modules())
    with ExitStack() as stack:
        for name, by_block in terms.items():
            module = modules[name.removesuffix(".weight")]
            hook = _block_path(by_block, len(conditions), model.network.get_parameter(name))
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def _applied(network: nn.Module, strengths: Sequence[Strength], mode: Mode) -> Iterator[None]:
    checked = [(edit, require_strength(strength), base_mismatch) for edit, strength, base_mismatch in strengths]
    with ExitStack() as stack:
        directions = []
        for edit, strength, base_mismatch in checked:
            on_another_base = _require_base(edit, network, base_mismatch)
            if isinstance(edit, Direction):
                directions.append((_transplanted(edit) if on_another_base else edit, strength))
            elif not _is_zero(strength):
                stack.callback(edit.attach(network, strength))
        parts = _parts_by_parameter(directions)
        _require_parameters(parts, network)
        if _bakes(mode, parts, network):
            _bake_parts(parts, network, stack)
        else:
            _hook_parts(parts, network, stack)
        yield


def bake(model: ChatModel | nn.Module, edits: Mapping[Direction, float]) -> None:
    """Add directions to the weights for good: `W <- round(W_fp32 + sum alpha * dW)`.

    The model then has a new fingerprint. Use `steer` for a temporary change.
    """
    network = network_of(model)
    if _pristine.get(network):
        raise UserError("cannot bake while the model is being steered", "Leave the steer block first.")
    for direction in edits:
        _require_base(direction, network, "refuse")
    parts = _parts_by_parameter([(direction, require_strength(alpha)) for direction, alpha in edits.items()])
    _require_parameters(parts, network)
    with ExitStack() as stack:
        _bake_parts(parts, network, stack)
        stack.pop_all()  # success: the backups are not needed
    _pristine.pop(network, None)
    forget_fingerprint(network)


def network_of(model: ChatModel | nn.Module) -> nn.Module:
    """The transformers module inside a ChatModel, or the module itself."""
    return model.network if isinstance(model, ChatModel) else model


# -------------------------------------------------------------------- checks


def require_strength(alpha: Any) -> Alpha:
    """The strength as a number of Python, or the tensor itself; raises for one that no model can be steered at."""
    if isinstance(alpha, Tensor):  # one look when a block is entered, none per token
        usable = not alpha.is_complex() and bool((alpha.detach().float().abs() <= STRONGEST).all())
    else:
        usable = isinstance(alpha, Real) and bool(abs(alpha) <= STRONGEST)  # type: ignore[operator]
    if not usable:
        limits = f"from {-STRONGEST:.0f} to {STRONGEST:.0f}"
        raise UserError(f"alpha is {alpha!r:.60}", f"Give a number {limits}, or a tensor with one per row.")
    return alpha if isinstance(alpha, Tensor | int) else float(alpha)


def require_fits(network: nn.Module, direction: Direction) -> None:
    """Raise unless the direction belongs to this base and its shapes are those of the parameters."""
    _require_base(direction, network, "refuse")
    _require_parameters({name: [(delta, 1.0)] for name, delta in direction.deltas.items()}, network)


_pristine: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()
"""Base values of the parameters that are currently edited, by network and name."""


def _base_values(network: nn.Module, name: str) -> Tensor:
    """The unedited value of a parameter, also while it is edited."""
    edited_now = _pristine.get(network, {})
    return edited_now[name] if name in edited_now else network.get_parameter(name).data


_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""By network, the fingerprints of different bases whose edits were allowed: each gives one warning."""


def _require_base(edit: Direction | Effect, network: nn.Module, base_mismatch: BaseMismatch) -> bool:
    """Whether the edit was made on a different base; raises unless that is allowed."""
    own = fingerprint(network)
    if edit.base == own:
        return False
    made_on = told_base(edit.base, getattr(edit, "provenance", {}))
    problem = f"the direction was made on {made_on}, but this model is {own}"
    if base_mismatch != "allow":
        raise BaseMismatchError(
            problem,
            "Load that model (in commands: --model NAME, or leave --model out). Python applies it anyway with "
            "base_mismatch='allow'.",
        )
    told = _told.setdefault(network, set())
    if edit.base not in told:
        console.warn(problem + "; it is applied, because base_mismatch is 'allow'")
        told.add(edit.base)
    return True


def _transplanted(direction: Direction) -> Direction:
    """The update that the direction has on its own base. On other weights its factors would give a different update."""
    if not direction.is_bound:
        raise BaseMismatchError(
            "this direction is a function of its base weights, so it must be bound before it is put on another base",
            "Load its own base and bind it: direction.bind(own_base).",
        )
    return direction.resolved()


def _parts_by_parameter(directions: Sequence[tuple[Direction, Alpha]]) -> Parts:
    parts: Parts = defaultdict(list)
    for direction, strength in directions:
        if not _is_zero(strength):
            for name, delta in direction.deltas.items():
                parts[name].append((delta, strength))
    return dict(parts)


def _is_zero(strength: Alpha) -> bool:
    return not isinstance(strength, Tensor) and strength == 0


def _require_parameters(parts: Parts, network: nn.Module) -> None:
    parameters = dict(network.named_parameters())
    for name, terms in parts.items():
        if name not in parameters:
            raise architecture.no_own_parameter(network, name)
        for delta, _ in terms:
            wanted = tuple(as_matrix(parameters[name]).shape)
            if delta.shape != wanted:
                raise UserError(
                    f"the direction has shape {delta.shape} for {name}, but the model has {wanted}",
                    "Load the base model of the direction.",
                )


def _bakes(mode: Mode, parts: Parts, network: nn.Module) -> bool:
    scalar = all(not isinstance(strength, Tensor) for terms in parts.values() for _, strength in terms)
    if mode == "baked" and not scalar:
        raise UserError("strengths per row cannot be baked into weights", "Use mode='runtime'.")
    if mode not in get_args(Mode):
        raise UserError(f"there is no mode {mode!r}", f"Choose {', '.join(get_args(Mode))}.")
    if mode != "auto":
        return mode == "baked"
    parameters = dict(network.named_parameters())
    return scalar and all(parameters[name].dtype == torch.float32 for name in parts)


# -------------------------------------------------------------------- baked


def _bake_parts(parts: Parts, network: nn.Module, stack: ExitStack) -> None:
    parameters = dict(network.named_parameters())
    originals = _pristine.setdefault(network, {})
    for name, terms in parts.items():
        parameter = parameters[name]
        backup = parameter.data.clone()
        if name not in originals:
            originals[name] = backup
            stack.callback(originals.pop, name)
        stack.callback(_restorer(parameter, backup))
        parameter.data.copy_(edited(parameter.data, terms, originals[name]))


def edited(current: Tensor, terms: Sequence[tuple[Delta, Alpha]], base: Tensor) -> Tensor:
    """`W + sum alpha * dW` in fp32, in the shape of `current`. `base`: the weight that dW may be a function of."""
    weight = current.to(torch.float32)
    for delta, strength in terms:
        change = delta.to(current.device).materialise(as_matrix(base) if delta.needs_weight else None)
        weight = weight + strength * change.reshape(current.shape)
    return weight


def _restorer(parameter: nn.Parameter, backup: Tensor) -> Callable[[], None]:
    def restore() -> None:
        parameter.data.copy_(backup)

    return restore


# -------------------------------------------------------------------- run time


def _hook_parts(parts: Parts, network: nn.Module, stack: ExitStack) -> None:
    modules = dict(network.named_modules())
    for name, terms in parts.items():
        module_name, _, leaf = name.rpartition(".")
        module = modules[module_name]
        if leaf not in ("weight", "bias") or not architecture.is_linear_map(module):
            raise UnsupportedFeatureError(
                f"{name} does not belong to a linear map, so it has no run-time side path",
                "Use mode='baked'.",
            )
        base = _base_values(network, name)
        placed = [(delta.to(base.device), strength) for delta, strength in terms]
        if leaf == "bias":
            hook = _bias_path([(delta.materialise(base[:, None])[:, 0], strength) for delta, strength in placed])
        elif architecture.is_conv1d(module):
            hook = _side_path([(delta.T, strength) for delta, strength in placed], base.T)
        else:
            hook = _side_path(placed, base)
        stack.callback(module.register_forward_hook(hook).remove)


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def _bias_path(terms: list[tuple[Tensor, Alpha]]) -> Hook:
    """Adds `alpha * db` to every output."""

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.to(torch.float32)
        for change, strength in terms:
            by_row = torch.as_tensor(per_row(strength, output))
            changed = torch.where(by_row != 0, changed + change * by_row, changed)
        return changed.to(output.dtype)

    return hook


def _side_path(terms: list[tuple[Delta, Alpha]], base: Tensor) -> Hook:
    """Adds `alpha * dW x` to the output `W x`; `base` is W as out x in."""
    # scalar strengths are folded into one pair of factors: any number of directions costs two products
    scalar = [delta * strength for delta, strength in terms if not isinstance(strength, Tensor)]
    folded = None
    for delta in scalar:
        folded = delta if folded is None else folded + delta
    by_row = [(delta, strength) for delta, strength in terms if isinstance(strength, Tensor)]

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.to(torch.float32)
        if folded is not None:
            changed = changed + folded.apply(inputs[0], weight=base)
        for delta, strength in by_row:
            side = delta.apply(inputs[0], strength, base)
            # rows at strength 0 keep their exact bits (adding +0.0 would turn -0.0 into +0.0)
            changed = torch.where(torch.as_tensor(per_row(strength, output)) != 0, changed + side, changed)
        return changed.to(output.dtype)

    return hook


def _block_path(by_block: Mapping[int, tuple[Delta, float]], blocks: int, weight: Tensor) -> Hook:
    """`y_b + left_b (alpha_b right_b x_b)` for the blocks of rows that have an update.

    Neighbouring blocks with the same update, at different strengths, share their products.
    """
    runs: list[_Run] = []
    for block, (delta, alpha) in sorted(by_block.items()):
        if not runs or runs[-1].delta is not delta or runs[-1].stop != block:
            runs.append(_Run(delta, block, []))
        runs[-1].alphas.append(alpha)
    placed = [
        (run, run.delta.left.to(weight), run.delta.right.to(weight),
         torch.tensor(run.alphas, device=weight.device)[:, None, None])
        for run in runs
    ]  # fmt: skip

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        size, rest = divmod(len(output), blocks)
        if rest:
            raise UnsupportedFeatureError(
                f"a linear map gets {len(output)} rows, which {blocks} conditions in one pass cannot share evenly",
                "Score one condition per pass: score(..., per_pass=1).",
            )
        changed = output.contiguous()  # sums are added in place, which needs a contiguous view
        for run, left, right, alphas in placed:
            rows = slice(run.start * size, run.stop * size)
            thin = nn.functional.linear(inputs[0][rows], right).flatten(0, -2)
            scaled = thin.unflatten(0, (len(alphas), len(thin) // len(alphas))) * alphas  # in fp32, not rounded
            changed[rows].view(-1, changed.shape[-1]).addmm_(scaled.flatten(0, 1).to(thin), left.mT)
        return changed

    return hook


class _Run(NamedTuple):
    """Neighbouring blocks of rows with the same update, each at its own strength."""

    delta: Delta
    start: int
    alphas: list[float]

    @property
    def stop(self) -> int:
        return self.start + len(self.alphas)
