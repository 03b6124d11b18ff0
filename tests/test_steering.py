"""Steering: run time and baked agree, alpha 0 is the base model bit for bit, and everything is put back exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from making import (
    assert_one_line,
    dense,
    hook_count,
    in_fp64,
    logits,
    prompts,
    random_direction,
    relative_error,
    thin,
    weights_digest,
)
from ws.algebra.delta import Alpha, Delta
from ws.algebra.direction import Direction
from ws.base.errors import BaseMismatchError, UnsupportedFeatureError, UserError
from ws.edit.condition import PLAIN, Condition, Context, Edit
from ws.edit.steering import Mode, bake, network_of, require_strength, steer, under
from ws.model import loading
from ws.model.loading import ChatModel

AGREE = 1e-5
"""Relative difference of logits that the design allows between run time, baked and fp64."""

VISIBLE = 1e-2
"""Relative change of logits that a test direction must cause, so that agreement says something."""

MODES: list[Mode] = ["runtime", "baked"]


@pytest.fixture(autouse=True)
def untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file leaves weights and hooks of the shared model as they were, bit for bit."""
    shared = [request.getfixturevalue(name) for name in ("any_model", "qwen") if name in request.fixturenames]
    before = [(weights_digest(model.network), hook_count(model.network)) for model in shared]
    yield
    assert [(weights_digest(model.network), hook_count(model.network)) for model in shared] == before


def steered(model: ChatModel, edits: Any, ids: Tensor, alpha: Alpha = 1.0, mode: Mode = "auto") -> Tensor:
    with steer(model, edits, alpha, mode=mode):
        return logits(model.network, ids)


def in_double(model: ChatModel, direction: Direction, alpha: float, ids: Tensor) -> Tensor:
    """The fp64 reference: a copy of the network with `W + alpha dW`."""
    network = copy.deepcopy(model.network).double()
    parameters = dict(network.named_parameters())
    for name, delta in direction.deltas.items():
        parameters[name].data += alpha * in_fp64(delta)
    return logits(network, ids)


# -------------------------------------------------------------------- what steering computes


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_alpha_zero_is_the_base_model_bit_for_bit(any_model: ChatModel, mode: Mode, zero: float) -> None:
    direction, ids = random_direction(any_model), prompts(any_model)
    assert torch.equal(steered(any_model, direction, ids, zero, mode), logits(any_model.network, ids))


@pytest.mark.parametrize("alpha", [1.0, -0.7, 3])
def test_run_time_baked_and_fp64_agree(any_model: ChatModel, alpha: float) -> None:
    direction, ids = random_direction(any_model, seed=1), prompts(any_model)
    reference = in_double(any_model, direction, alpha, ids)
    assert relative_error(logits(any_model.network, ids), reference) > VISIBLE
    runtime, baked = (steered(any_model, direction, ids, alpha, mode) for mode in MODES)
    assert relative_error(runtime, reference) < AGREE
    assert relative_error(baked, reference) < AGREE
    assert relative_error(runtime, baked) < AGREE


@pytest.mark.parametrize("mode", MODES)
def test_dense_deltas_are_applied_too(any_model: ChatModel, mode: Mode) -> None:
    parts = random_direction(any_model, seed=2)
    deltas = {
        name: delta + dense(*delta.shape, seed=number, scale=0.02)
        for number, (name, delta) in enumerate(parts.deltas.items())
    }
    direction, ids = Direction(deltas, parts.base, parts.layers), prompts(any_model)
    assert relative_error(steered(any_model, parts, ids), steered(any_model, direction, ids)) > VISIBLE
    reference = in_double(any_model, direction, 1.0, ids)
    assert relative_error(steered(any_model, direction, ids, 1.0, mode), reference) < AGREE


UNUSABLE = [float("nan"), float("inf"), 1e30, 10**400, 1j, "1", [1.0], None, torch.tensor([0.5, float("nan")]),
            torch.tensor(1e30), torch.tensor([1j])]  # fmt: skip


@pytest.mark.parametrize("alpha", UNUSABLE, ids=lambda alpha: f"{alpha!r:.30}")
def test_a_strength_that_no_model_can_have_is_refused(alpha: Any) -> None:
    with pytest.raises(UserError) as caught:
        require_strength(alpha)
    assert_one_line(caught.value, "alpha is", "Give a number from -100000 to 100000")


@pytest.mark.parametrize("alpha", [float("nan"), -1e30, torch.tensor([0.5, float("inf")])])
def test_no_way_to_steer_takes_such_a_strength(qwen: ChatModel, alpha: Any) -> None:
    direction = random_direction(qwen)
    for edits in (direction, {direction: alpha}):
        with pytest.raises(UserError, match="alpha is"), steer(qwen, edits, alpha):
            pass
    if isinstance(alpha, float):
        with pytest.raises(UserError, match="alpha is"):
            bake(qwen, {direction: alpha})


@pytest.mark.parametrize("alpha", [np.float32(0.5), np.float64(0.5), 0.5])
def test_a_strength_may_be_a_number_of_any_library(alpha: Any) -> None:
    assert require_strength(alpha) == 0.5 and type(require_strength(alpha)) in (float, np.float64)


def test_a_strength_may_be_a_tensor_of_numbers(qwen: ChatModel) -> None:
    direction, ids = random_direction(qwen, seed=1), prompts(qwen)
    for alpha in (torch.tensor(0.5), torch.full((len(ids),), 0.5)):
        assert relative_error(steered(qwen, direction, ids, alpha), steered(qwen, direction, ids, 0.5)) < AGREE


@pytest.mark.parametrize("mode", MODES)
def test_alpha_and_direction_share_one_sign(any_model: ChatModel, mode: Mode) -> None:
    direction, ids = random_direction(any_model, seed=3), prompts(any_model)
    positive, negative = (steered(any_model, direction, ids, sign * 0.8, mode) for sign in (1, -1))
    assert torch.equal(negative, steered(any_model, -direction, ids, 0.8, mode))
    assert torch.equal(positive, steered(any_model, -direction, ids, -0.8, mode))
    assert relative_error(positive, negative) > VISIBLE


def test_baked_weights_are_symmetric_around_the_base(any_model: ChatModel) -> None:
    direction = random_direction(any_model, seed=4)
    parameters = dict(any_model.network.named_parameters())
    found = {}
    for alpha in (-1.5, 0.0, 1.5):
        with steer(any_model, direction, alpha, mode="baked"):
            found[alpha] = {name: parameters[name].detach().double().clone() for name in direction.deltas}
    for name in direction.deltas:
        assert relative_error(found[1.5][name] + found[-1.5][name], 2 * found[0.0][name]) < 1e-6
        change = 1.5 * in_fp64(direction.deltas[name])
        assert relative_error(found[1.5][name] - found[0.0][name], change) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_several_directions_add_up(any_model: ChatModel, mode: Mode) -> None:
    a, b = random_direction(any_model, seed=5), random_direction(any_model, seed=6, layers=[2, 3])
    ids = prompts(any_model)
    together = steered(any_model, {a: 0.5, b: -1.25}, ids, mode=mode)
    assert relative_error(together, steered(any_model, 0.5 * a - 1.25 * b, ids, 1.0, mode)) < AGREE
    for alone in (a, b):
        assert relative_error(together, steered(any_model, alone, ids)) > VISIBLE


def test_auto_bakes_fp32_weights_and_hooks_what_cannot_be_baked(qwen: ChatModel) -> None:
    direction, before = random_direction(qwen), weights_digest(qwen.network)
    with steer(qwen, direction, 1.0):
        assert weights_digest(qwen.network) != before and hook_count(qwen.network) == 0
    with steer(qwen, direction, torch.ones(4)):
        assert weights_digest(qwen.network) == before and hook_count(qwen.network) == len(direction.deltas)


def test_run_time_leaves_the_weights_alone(any_model: ChatModel) -> None:
    before = weights_digest(any_model.network)
    with steer(any_model, random_direction(any_model), 1.0, mode="runtime"):
        assert weights_digest(any_model.network) == before


def test_the_bare_network_can_be_steered_too(qwen: ChatModel) -> None:
    direction, ids = random_direction(qwen), prompts(qwen)
    assert network_of(qwen) is qwen.network and network_of(qwen.network) is qwen.network
    with steer(qwen.network, direction, 0.5):
        bare = logits(qwen.network, ids)
    assert torch.equal(bare, steered(qwen, direction, ids, 0.5))


# -------------------------------------------------------------------- one strength per row


ALPHAS = [0.0, 1.0, -0.5, 0.0, 2.5]


def test_strengths_per_row_are_the_single_runs(any_model: ChatModel) -> None:
    direction, ids = random_direction(any_model, seed=7), prompts(any_model, rows=len(ALPHAS))
    base = logits(any_model.network, ids)
    together = steered(any_model, direction, ids, torch.tensor(ALPHAS))
    for row, alpha in enumerate(ALPHAS):
        if alpha == 0:
            assert torch.equal(together[row], base[row])
            continue
        assert relative_error(together[row], base[row]) > VISIBLE
        for mode in MODES:
            assert relative_error(together[row], steered(any_model, direction, ids, alpha, mode)[row]) < AGREE
            alone = steered(any_model, direction, ids[row : row + 1], alpha, mode)[0]
            assert relative_error(together[row], alone) < AGREE


def test_strengths_per_token_leave_earlier_tokens_alone(any_model: ChatModel) -> None:
    direction, ids = random_direction(any_model, seed=8), prompts(any_model, rows=2, tokens=10)
    alpha = torch.zeros(2, 10)
    alpha[0, 6:] = 1.0
    found, base = steered(any_model, direction, ids, alpha), logits(any_model.network, ids)
    assert torch.equal(found[0, :6], base[0, :6]) and torch.equal(found[1], base[1])
    assert relative_error(found[0, 6:], base[0, 6:]) > VISIBLE


def test_strengths_per_row_of_one_direction_mix_with_a_common_one_of_another(any_model: ChatModel) -> None:
    a, b = random_direction(any_model, seed=9), random_direction(any_model, seed=10)
    ids = prompts(any_model, rows=3)
    together = steered(any_model, {a: torch.tensor([0.0, 1.0, -1.0]), b: 0.5}, ids)
    for row, alpha in enumerate((0.0, 1.0, -1.0)):
        assert relative_error(together[row], steered(any_model, {a: alpha, b: 0.5}, ids)[row]) < AGREE


def test_equal_strengths_per_row_are_a_scalar(any_model: ChatModel) -> None:
    direction, ids = random_direction(any_model, seed=11), prompts(any_model, rows=3)
    scalar = steered(any_model, direction, ids, 0.6, "runtime")
    assert relative_error(steered(any_model, direction, ids, torch.full((3,), 0.6)), scalar) < AGREE
    assert relative_error(steered(any_model, direction, ids, torch.tensor(0.6)), scalar) < AGREE


def test_strengths_per_row_cannot_be_baked(qwen: ChatModel) -> None:
    with pytest.raises(UserError, match="strengths per row cannot be baked") as caught:
        steered(qwen, random_direction(qwen), prompts(qwen), torch.ones(4), "baked")
    assert_one_line(caught.value, "mode='runtime'")


@pytest.mark.parametrize("shape", [(3,), (5,), (1,), (4, 8), (9,)])
def test_a_wrong_number_of_strengths_is_an_error(any_model: ChatModel, shape: tuple[int, ...]) -> None:
    ids = prompts(any_model, rows=4, tokens=9)
    with pytest.raises(UserError, match="alpha of shape"):
        steered(any_model, random_direction(any_model), ids, torch.ones(shape))


# -------------------------------------------------------------------- putting everything back


def test_nested_blocks_with_shared_parameters_restore_bit_for_bit(any_model: ChatModel) -> None:
    a, b = random_direction(any_model, seed=12), random_direction(any_model, seed=13, layers=[0, 1, 2])
    assert a.deltas.keys() & b.deltas.keys()
    network, ids = any_model.network, prompts(any_model)
    before, base = weights_digest(network), logits(network, ids)
    for outer in MODES:
        for inner in MODES:
            with steer(any_model, a, 1.0, mode=outer):
                middle, middle_logits = weights_digest(network), logits(network, ids)
                with steer(any_model, b, -2.0, mode=inner):
                    both = logits(network, ids)
                assert weights_digest(network) == middle
                assert torch.equal(logits(network, ids), middle_logits)
            assert weights_digest(network) == before and hook_count(network) == 0
            assert torch.equal(logits(network, ids), base)
            assert relative_error(both, steered(any_model, a - 2 * b, ids)) < AGREE


def test_a_direction_can_be_nested_in_itself(qwen: ChatModel) -> None:
    a, ids = random_direction(qwen, seed=14), prompts(qwen)
    with steer(qwen, a, 0.5), steer(qwen, a, 0.25):
        found = logits(qwen.network, ids)
    assert relative_error(found, steered(qwen, a, ids, 0.75)) < AGREE


class BlockError(Exception):
    """What the tests raise inside a block."""


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_inside_the_block_restores_and_passes_through(any_model: ChatModel, mode: Mode) -> None:
    before = weights_digest(any_model.network)
    with pytest.raises(BlockError), steer(any_model, random_direction(any_model), 1.0, mode=mode):
        raise BlockError
    assert weights_digest(any_model.network) == before and hook_count(any_model.network) == 0


def test_an_interrupt_inside_the_block_restores(qwen: ChatModel) -> None:
    before = weights_digest(qwen.network)
    with pytest.raises(KeyboardInterrupt), steer(qwen, random_direction(qwen), 1.0, mode="baked"):
        raise KeyboardInterrupt
    assert weights_digest(qwen.network) == before


@pytest.mark.parametrize("calls", [1, 3])
def test_a_failure_while_baking_restores(any_model: ChatModel, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    before, direction = weights_digest(any_model.network), random_direction(any_model)
    seen: list[str] = []
    real = Delta.materialise

    def failing(delta: Delta, weight: Tensor | None = None) -> Tensor:
        seen.append(weights_digest(any_model.network))
        if len(seen) == calls:
            raise MemoryError("no room")
        return real(delta, weight)

    monkeypatch.setattr(Delta, "materialise", failing)
    with pytest.raises(MemoryError, match="no room"), steer(any_model, direction, 1.0, mode="baked"):
        pytest.fail("the block must not run")
    assert len(seen) == calls
    assert len(set(seen)) == calls  # the failure came after some weights had been changed
    assert weights_digest(any_model.network) == before


def test_a_failure_while_hooking_takes_the_hooks_off_again(any_model: ChatModel) -> None:
    good = random_direction(any_model)
    embedding = next(name for name, p in any_model.network.named_parameters() if p.ndim == 2)
    assert "emb" in embedding or "wte" in embedding
    rows, columns = dict(any_model.network.named_parameters())[embedding].shape
    direction = Direction({**good.deltas, embedding: thin(rows, columns, rank=1, seed=1)}, good.base, good.layers)
    with (
        pytest.raises(UnsupportedFeatureError, match=embedding),
        steer(any_model, direction, 1.0, mode="runtime"),
    ):
        pytest.fail("the block must not run")
    assert hook_count(any_model.network) == 0
    ids = prompts(any_model)  # baked is the way that the message names
    assert relative_error(steered(any_model, direction, ids), in_double(any_model, direction, 1.0, ids)) < AGREE


# -------------------------------------------------------------------- bf16


@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_bf16_steering_stays_within_the_error_of_the_bf16_model(
    any_model: ChatModel, alpha: float, tmp_path: Path
) -> None:
    half = loading.load(any_model.name, dtype="bfloat16")
    direction, ids = random_direction(any_model, seed=15), prompts(any_model, rows=16, tokens=16)
    assert half.fingerprint == direction.base  # one checkpoint, one fingerprint
    # the error of computing in bf16, measured where nothing is steered at run time: the steered fp32 model as bf16
    with steer(any_model, direction, alpha, mode="baked"):
        exact = logits(any_model.network, ids)
        own = relative_error(logits(copy.deepcopy(any_model.network).bfloat16(), ids), exact)
    base_error = relative_error(logits(half.network, ids), logits(any_model.network, ids))
    effect = relative_error(logits(any_model.network, ids), exact)
    for mode in MODES:
        error = relative_error(steered(half, direction, ids, alpha, mode), exact)
        assert error < 1.5 * max(own, base_error)
        assert error < effect / 5
    before = weights_digest(half.network)
    with steer(half, direction, alpha, mode="baked"):
        assert weights_digest(half.network) != before
    assert weights_digest(half.network) == before


def test_bf16_weights_are_rounded_once_from_fp32(qwen: ChatModel) -> None:
    half = loading.load(qwen.name, dtype="bfloat16")
    a, b = random_direction(qwen, seed=16, relative_norm=0.003), random_direction(qwen, seed=17, relative_norm=0.003)
    parameters = dict(half.network.named_parameters())
    before = {name: parameters[name].detach().clone() for name in a.deltas}
    with steer(half, {a: 1.0, b: -1.0}, mode="baked"):
        for name, weight in before.items():
            exact = weight.float() + a.deltas[name].materialise() - b.deltas[name].materialise()
            assert torch.equal(parameters[name], exact.bfloat16())


def test_rows_at_strength_zero_keep_their_bits_in_bf16_too(any_model: ChatModel) -> None:
    half = loading.load(any_model.name, dtype="bfloat16")
    direction, ids = random_direction(any_model, seed=7), prompts(any_model, rows=3)
    base, found = logits(half.network, ids), steered(half, direction, ids, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(found[0], base[0]) and torch.equal(found[2], base[2])
    assert relative_error(found[1], base[1]) > VISIBLE


def test_auto_uses_the_side_path_on_bf16_weights(qwen: ChatModel) -> None:
    half = loading.load(qwen.name, dtype="bfloat16")
    before = weights_digest(half.network)
    direction = random_direction(qwen)
    with steer(half, direction, 1.0):
        assert weights_digest(half.network) == before
        assert hook_count(half.network) == len(direction.deltas)
        assert logits(half.network, prompts(qwen)).dtype == torch.bfloat16


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("mode", MODES)
def test_a_direction_of_another_base_is_refused(any_model: ChatModel, mode: Mode) -> None:
    mine = random_direction(any_model)
    foreign = Direction(mine.deltas, "f" * 24, mine.layers)
    with pytest.raises(BaseMismatchError) as caught, steer(any_model, foreign, 1.0, mode=mode):
        pytest.fail("the block must not run")
    assert_one_line(caught.value, "f" * 24, any_model.fingerprint, "base_mismatch='allow'")


def test_another_base_can_be_allowed_with_a_warning(any_model: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    mine, ids = random_direction(any_model), prompts(any_model)
    foreign = Direction(mine.deltas, "f" * 24, mine.layers)
    expected = steered(any_model, mine, ids)
    assert capsys.readouterr().err == ""
    with steer(any_model, foreign, base_mismatch="allow"):
        assert torch.equal(logits(any_model.network, ids), expected)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "on the base model" in warning and "f" * 24 in warning


@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_the_model_lacks_are_refused(qwen: ChatModel, mode: Mode) -> None:
    good = random_direction(qwen)
    name = "model.layers.99.self_attn.q_proj.weight"
    direction = Direction({**good.deltas, name: thin(64, 64, rank=1, seed=1)}, good.base)
    with pytest.raises(UserError) as caught:
        steered(qwen, direction, prompts(qwen), 1.0, mode)
    assert_one_line(caught.value, name)


@pytest.mark.parametrize("mode", MODES)
def test_wrong_shapes_are_refused(any_model: ChatModel, mode: Mode) -> None:
    good = random_direction(any_model)
    name, delta = next((name, delta) for name, delta in good.deltas.items() if delta.shape[0] != delta.shape[1])
    direction = Direction({**good.deltas, name: delta.T}, good.base)
    with pytest.raises(UserError) as caught:
        steered(any_model, direction, prompts(any_model), 1.0, mode)
    assert_one_line(caught.value, name, str(delta.shape), str(delta.T.shape))


def test_bake_refuses_what_steer_refuses(qwen: ChatModel) -> None:
    good = random_direction(qwen)
    for direction, error in (
        (Direction(good.deltas, "other"), BaseMismatchError),
        (Direction({**good.deltas, "nothing.weight": thin(2, 2, rank=1, seed=1)}, good.base), UserError),
    ):
        with pytest.raises(error):
            bake(qwen, {direction: 1.0})


# -------------------------------------------------------------------- bake


def test_bake_is_baked_steering_for_good(any_model: ChatModel) -> None:
    model = loading.load(any_model.name)
    a, b = random_direction(any_model, seed=18), random_direction(any_model, seed=19)
    ids, old = prompts(any_model), model.fingerprint
    assert old == any_model.fingerprint
    with steer(any_model, {a: 0.5, b: 1.0}, mode="baked"):
        expected, weights = logits(any_model.network, ids), weights_digest(any_model.network)
        assert any_model.fingerprint == old
    bake(model, {a: 0.5, b: 1.0})
    assert weights_digest(model.network) == weights
    assert torch.equal(logits(model.network, ids), expected)
    assert model.fingerprint != old
    with pytest.raises(BaseMismatchError), steer(model, a):
        pytest.fail("the model is another one now")


def test_baking_nothing_changes_nothing(qwen: ChatModel) -> None:
    model = loading.load(qwen.name)
    before = weights_digest(model.network)
    bake(model, {random_direction(qwen): 0.0})
    assert (weights_digest(model.network), model.fingerprint) == (before, qwen.fingerprint)


def test_a_failed_bake_changes_nothing(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loading.load(qwen.name)
    before, calls, real = weights_digest(model.network), [], Delta.materialise

    def failing(delta: Delta, weight: Tensor | None = None) -> Tensor:
        calls.append(delta)
        if len(calls) == 3:
            raise MemoryError("no room")
        return real(delta, weight)

    monkeypatch.setattr(Delta, "materialise", failing)
    with pytest.raises(MemoryError):
        bake(model, {random_direction(qwen): 1.0})
    assert weights_digest(model.network) == before


# -------------------------------------------------------------------- conditions and other effects


class Shift:
    """An effect that is not a Direction: adds `alpha` to the output of the first layer norm."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.content_key = f"shift on {base}"
        self.attached: list[Alpha] = []

    def attach(self, network: nn.Module, alpha: Alpha) -> Any:
        module = network.get_submodule("model.norm")
        self.attached.append(alpha)
        return module.register_forward_hook(lambda _module, _inputs, output: output + alpha).remove


def test_other_effects_are_attached_and_taken_off(qwen: ChatModel) -> None:
    shift, direction, ids = Shift(qwen.fingerprint), random_direction(qwen), prompts(qwen)
    base = logits(qwen.network, ids)
    both = steered(qwen, {shift: 0.5, direction: 1.0}, ids)
    assert shift.attached == [0.5] and hook_count(qwen.network) == 0
    shifted = steered(qwen, direction, ids) + 0.5 * qwen.network.get_output_embeddings().weight.sum(dim=1)
    assert relative_error(both, shifted) < AGREE
    assert relative_error(both, base) > VISIBLE


def test_other_effects_at_zero_are_not_even_attached(qwen: ChatModel) -> None:
    shift, ids = Shift(qwen.fingerprint), prompts(qwen)
    assert torch.equal(steered(qwen, {shift: 0.0}, ids), logits(qwen.network, ids))
    assert shift.attached == []


def test_other_effects_come_off_when_a_direction_is_refused(qwen: ChatModel) -> None:
    shift, good = Shift(qwen.fingerprint), random_direction(qwen)
    with pytest.raises(BaseMismatchError):
        steered(qwen, {shift: 1.0, Direction(good.deltas, "other"): 1.0}, prompts(qwen))
    assert shift.attached == [1.0] and hook_count(qwen.network) == 0


def test_other_effects_of_another_base_are_refused(qwen: ChatModel) -> None:
    with pytest.raises(BaseMismatchError):
        steered(qwen, Shift("other"), prompts(qwen))


@pytest.mark.parametrize("mode", MODES)
def test_under_a_condition_is_steering_by_its_edits(qwen: ChatModel, mode: Mode) -> None:
    a, b, ids = random_direction(qwen, seed=20), random_direction(qwen, seed=21), prompts(qwen)
    condition = Condition(PLAIN, ((Edit("a", a), 0.5), (Edit("b", b), -1.0), (Edit("off", -a), 0.0)))
    with under(qwen, condition, mode=mode):
        found = logits(qwen.network, ids)
    assert torch.equal(found, steered(qwen, {a: 0.5, b: -1.0}, ids, mode=mode))


@pytest.mark.parametrize("context", [PLAIN, Context("warm", "Be warm.")])
def test_a_condition_without_active_edits_is_the_base_model(qwen: ChatModel, context: Context) -> None:
    edit, ids = Edit("a", random_direction(qwen)), prompts(qwen)
    base = logits(qwen.network, ids)
    for condition in (Condition(context), Condition.of(edit, 0.0, context), Condition(context, ((edit, -0.0),))):
        assert condition.is_base
        with under(qwen, condition):
            assert torch.equal(logits(qwen.network, ids), base)
            assert hook_count(qwen.network) == 0
        assert condition.key() == {
            "context": context.name, "edit": "none", "alpha": 0.0, "seed": None, "data_seed": None,
        }  # fmt: skip


def test_the_same_direction_in_two_edits_counts_twice(qwen: ChatModel) -> None:
    a, ids = random_direction(qwen, seed=22), prompts(qwen)
    condition = Condition(PLAIN, ((Edit("a", a, seed=0), 0.5), (Edit("a again", a, seed=1), 0.25)))
    with under(qwen, condition):
        found = logits(qwen.network, ids)
    assert relative_error(found, steered(qwen, a, ids, 0.75)) < AGREE


def test_many_nested_blocks_leave_no_trace(qwen: ChatModel) -> None:
    before = weights_digest(qwen.network)
    with ExitStack() as stack:
        for seed in range(6):
            stack.enter_context(steer(qwen, random_direction(qwen, seed=seed), 1.0, mode=MODES[seed % 2]))
        assert weights_digest(qwen.network) != before
    assert weights_digest(qwen.network) == before and hook_count(qwen.network) == 0
