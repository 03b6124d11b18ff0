"""Every adapter family to exact deltas: against the formulas in fp64, against PEFT's merge, through all that is done
with a direction, on several architectures."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, Made, make, support_matrix, supported
from making import logits, merged_by_peft, prompts, relative_error, weights_digest
from ws import adapters
from ws.adapters import diff
from ws.algebra import spectrum
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction, as_matrix
from ws.base.errors import BaseMismatchError, UserError
from ws.edit.condition import Condition, Edit
from ws.edit.steering import bake, steer
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model import loading
from ws.model.chat import ask
from ws.model.fingerprint import forget_fingerprint
from ws.model.loading import ChatModel
from ws.pocket import tiny

SIZES = (3e-2, 1e-3)
"""Size of the updates relative to the weights; naive fp32 forms fail by 1e-4 at the smaller one."""
BASES = ("float32", "bfloat16", "biases")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatModel]:
    """A small Qwen3 in fp32, in bf16, and with biases everywhere in attention."""
    root = tmp_path_factory.mktemp("bases")
    tiny.make("qwen3", root / "plain", layers=4)
    tiny.make("qwen3-biases", root / "biases", layers=4)
    return {
        "float32": loading.load(str(root / "plain"), dtype="float32"),
        "bfloat16": loading.load(str(root / "plain"), dtype="bfloat16"),
        "biases": loading.load(str(root / "biases"), dtype="float32"),
    }


def read(model: ChatModel, made: Made) -> dict[str, Delta]:
    return adapters.deltas(adapters.read(made.folder), model.network)


def base_of(model: ChatModel, name: str) -> Tensor:
    return as_matrix(model.network.get_parameter(name).data)


def assert_exact(
    model: ChatModel, deltas: dict[str, Delta], meaning: dict[str, Tensor], tolerance: float = 1e-6
) -> None:
    """Every delta is the update of the formula, in fp64 and in the fp32 that is used."""
    assert deltas.keys() == meaning.keys()
    for name, delta in deltas.items():
        wanted, weight = as_matrix(meaning[name]), base_of(model, name)
        assert float(wanted.norm()) > 0, name
        assert relative_error(spectrum.dense(delta, weight), wanted) < 1e-6, name
        assert relative_error(delta.materialise(weight), wanted) < 1e-6, name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_are_the_formula(
    bases: dict[str, ChatModel], tmp_path: Path, family: str, base: str, size: float
) -> None:
    model = bases[base]
    before = weights_digest(model.network)
    made = make(model.network, family, tmp_path / "a", seed=1, size=size)
    assert weights_digest(model.network) == before, "attaching and detaching leaves the base alone"
    assert_exact(model, read(model, made), made.meaning)
    largest = max(float(change.norm() / base_of(model, name).double().norm()) for name, change in made.meaning.items())
    assert size / 30 < largest < 30 * size


@pytest.mark.parametrize("base", ["float32", "biases"])
@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_are_what_plain_peft_merges(bases: dict[str, ChatModel], tmp_path: Path, family: str, base: str) -> None:
    model = bases[base]
    made = make(model.network, family, tmp_path / "a", seed=1, size=3e-2)
    merged = merged_by_peft(Path(model.name), made.folder)
    deltas = read(model, made)
    assert {name for name, change in merged.items() if change.norm() > 0} == deltas.keys()
    for name, delta in deltas.items():
        weight = base_of(model, name)
        error = spectrum.dense(delta, weight) - as_matrix(merged[name])
        assert float(error.norm()) <= 1e-6 * float(weight.double().norm()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_pos_plus_minus_neg_is_as_exact_as_pos_minus_neg_for_every_family(
    bases: dict[str, ChatModel], tmp_path: Path, family: str
) -> None:
    model = bases["float32"]
    pos, neg = (
        diff.task_vector(model, make(model.network, family, tmp_path / str(s), seed=s, size=1e-4, drift=0.1).folder)
        for s in (1, 2)
    )
    assert (pos - neg).norm() < 2e-3 * pos.norm(), "the two sides share almost all of their movement"
    for found in (pos - neg, pos + -neg, -neg + pos, pos + -1.0 * neg, -2 * (neg / 2 - pos / 2)):
        for name, delta in found.deltas.items():
            weight = base_of(model, name)
            wanted = spectrum.dense(pos.deltas[name], weight) - spectrum.dense(neg.deltas[name], weight)
            assert relative_error(delta.materialise(weight), wanted) < 1e-6, name
    inputs = prompts(model)
    with steer(model, {pos: 1.0, neg: -1.0}, mode="runtime"):
        summed = logits(model.network, inputs)
    with steer(model, pos - neg, mode="runtime"):
        assert torch.equal(summed, logits(model.network, inputs)), "strengths of opposite sign are folded alike"


@pytest.mark.parametrize("drift", [0.0, 1e-2])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pos_minus_neg_is_exact_for_every_family(
    bases: dict[str, ChatModel], tmp_path: Path, family: str, base: str, drift: float
) -> None:
    model = bases[base]
    pos, neg = (make(model.network, family, tmp_path / str(s), seed=s, size=1e-3, drift=drift) for s in (1, 2))
    direction, geometry = diff.direction(model, pos.folder, neg.folder)
    meaning = {name: pos.meaning[name] - neg.meaning[name] for name in pos.meaning}
    assert_exact(model, dict(direction.deltas), meaning)
    total = math.sqrt(sum(float(change.norm()) ** 2 for change in meaning.values()))
    assert direction.norm() == pytest.approx(total, rel=1e-6) == geometry.norm_dw
    assert not any(delta.dense is not None for delta in direction.deltas.values()), "nothing was densified"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_multiples_sums_and_files_keep_it_exact(
    bases: dict[str, ChatModel], tmp_path: Path, family: str, base: str
) -> None:
    model = bases[base]
    other_family = FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]
    one = make(model.network, family, tmp_path / "1", seed=1, size=1e-3)
    two = make(model.network, other_family, tmp_path / "2", seed=2, size=1e-3)
    first, second = (diff.task_vector(model, made.folder) for made in (one, two))
    combined = -2.5 * first + second / 4
    zero = torch.zeros(1, dtype=torch.float64)
    names = one.meaning.keys() | two.meaning.keys()
    meaning = {name: -2.5 * one.meaning.get(name, zero) + two.meaning.get(name, zero) / 4 for name in names}
    assert_exact(model, dict(combined.deltas), meaning)
    combined.save(tmp_path / "d.safetensors")
    loaded = Direction.load(tmp_path / "d.safetensors").bind(model)
    assert_exact(model, dict(loaded.deltas), meaning)
    assert loaded.norm() == combined.norm() and loaded.cosine(combined) == pytest.approx(1.0)
    kept = loaded.keep(layers=[1]) + loaded.drop(layers=[1])
    assert_exact(model, dict(kept.deltas), meaning)


@pytest.mark.parametrize("base", ["float32", "biases"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steered_and_baked_logits_agree(bases: dict[str, ChatModel], tmp_path: Path, family: str, base: str) -> None:
    model = bases[base]
    made = make(model.network, family, tmp_path / "1", seed=1, size=3e-2)
    direction = diff.task_vector(model, made.folder)
    ids = prompts(model)
    before = weights_digest(model.network)
    plain = logits(model.network, ids)
    found = {}
    for mode in ("runtime", "baked"):
        with steer(model, direction, -1.5, mode=mode):  # type: ignore[arg-type]
            found[mode] = logits(model.network, ids)
        assert weights_digest(model.network) == before
        assert torch.equal(logits(model.network, ids), plain)
    oracle = copy.deepcopy(model.network).double()
    for name, change in made.meaning.items():
        oracle.get_parameter(name).data += -1.5 * change
    wanted = logits(oracle, ids)
    assert relative_error(plain, wanted) > 1e-4, "the adapter does something"
    for mode, value in found.items():
        assert relative_error(value, wanted) < 1e-5, mode
    assert relative_error(found["runtime"], found["baked"]) < 1e-5
    rows = torch.tensor([-1.5, 0.0, 0.0, 1.0])
    with steer(model, direction, rows):
        by_row = logits(model.network, ids)
    assert relative_error(by_row[0], found["runtime"][0]) < 1e-5
    assert torch.equal(by_row[1:3], plain[1:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_within_its_own_error(bases: dict[str, ChatModel], tmp_path: Path, family: str) -> None:
    model = bases["bfloat16"]
    made = make(model.network, family, tmp_path / "1", seed=1, size=3e-2)
    direction = diff.task_vector(model, made.folder)
    ids = prompts(model)
    exact = copy.deepcopy(model.network).float()
    own_error = relative_error(logits(model.network, ids), logits(exact, ids))
    for name, change in made.meaning.items():
        exact.get_parameter(name).data += change.float()
    for mode in ("runtime", "baked"):
        with steer(model, direction, 1.0, mode=mode):  # type: ignore[arg-type]
            steered = logits(model.network, ids)
        assert relative_error(steered, logits(exact, ids)) < 2.5 * own_error, mode


@pytest.mark.parametrize("family", FAMILIES)
def test_nested_blocks_use_the_pristine_base(bases: dict[str, ChatModel], tmp_path: Path, family: str) -> None:
    model = bases["float32"]
    one, two = (make(model.network, family, tmp_path / str(s), seed=s, size=3e-2) for s in (1, 2))
    first, second = (diff.task_vector(model, made.folder) for made in (one, two))
    ids, before = prompts(model), weights_digest(model.network)
    with steer(model, {first: 1.0, second: -0.5}):
        together = logits(model.network, ids)
    with steer(model, first, 1.0), steer(model, second, -0.5):
        nested = logits(model.network, ids)
    assert relative_error(nested, together) < 1e-5
    with pytest.raises(RuntimeError, match="inside"), steer(model, first, 1.0), steer(model, second, -0.5):
        raise RuntimeError("inside")
    assert weights_digest(model.network) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_needs_the_base_says_so_unbound(bases: dict[str, ChatModel], tmp_path: Path, family: str) -> None:
    model = bases["float32"]
    made = make(model.network, family, tmp_path / "1", seed=1, size=1e-2)
    diff.task_vector(model, made.folder).save(tmp_path / "d.safetensors")
    unbound = Direction.load(tmp_path / "d.safetensors")
    assert unbound.needs_weights == (family in ("dora", "oft", "boft", "ia3"))
    if not unbound.needs_weights:
        assert unbound.is_bound and unbound.norm() > 0
        return
    assert "unbound" in repr(unbound)
    with pytest.raises(UserError, match="Bind the direction"):
        unbound.norm()
    other = loading.load(model.name)
    other.network.get_parameter("model.norm.weight").data.add_(1.0)
    with pytest.raises(UserError, match="belongs to the base model"):
        unbound.bind(other)
    with steer(model, unbound, 1.0):  # steering needs no binding
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_direction_can_be_moved_to_another_base_as_the_update_that_it_is(
    bases: dict[str, ChatModel], tmp_path: Path, family: str
) -> None:
    model = bases["float32"]
    made = make(model.network, family, tmp_path / "1", seed=1, size=1e-2)
    direction = diff.task_vector(model, made.folder)
    other = loading.load(model.name)
    for parameter in other.network.parameters():
        parameter.data.mul_(1.5)
    forget_fingerprint(other.network)
    start = {name: other.network.get_parameter(name).data.double().clone() for name in made.meaning}
    with steer(other, direction, 1.0, base_mismatch="allow", mode="baked"):
        for name, change in made.meaning.items():
            moved = other.network.get_parameter(name).data.double() - start[name]
            assert relative_error(moved, change) < 1e-3, name
    if direction.needs_weights:
        unbound = Direction(direction.deltas, direction.base, direction.layers)
        with pytest.raises(UserError, match="and bind it"), steer(other, unbound, 1.0, base_mismatch="allow"):
            pass


@pytest.mark.parametrize("family", ["lora", "dora"])
def test_a_direction_is_scored_on_a_fine_tune_of_its_base_where_that_is_allowed(
    bases: dict[str, ChatModel], tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tuned = bases["float32"], loading.load(bases["float32"].name)
    direction = diff.task_vector(model, make(model.network, family, tmp_path / "1", seed=1, size=0.1).folder)
    for parameter in tuned.network.parameters():
        parameter.data.mul_(1.1)
    forget_fingerprint(tuned.network)
    probe = Probe("own", "choice", (ProbeRow("0", tuple(ask("Do cats like milk?")), "My answer: **"),))
    as_update = Direction(direction.resolved().deltas, tuned.fingerprint, direction.layers)
    wanted = score(tuned, [probe], [Condition.of(Edit("d", as_update), alpha) for alpha in (-1.0, 1.0)])
    capsys.readouterr()
    edit = Edit("d", direction, base_mismatch="allow")
    assert score(tuned, [probe], [Condition.of(edit, alpha) for alpha in (-1.0, 1.0)]).equals(wanted)
    assert capsys.readouterr().err.count("on the base model") == 1, "said once, whatever the number of strengths"
    with pytest.raises(BaseMismatchError):
        score(tuned, [probe], [Condition.of(Edit("d", direction), 1.0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_baked_for_good_is_a_new_model(bases: dict[str, ChatModel], tmp_path: Path, family: str) -> None:
    model = loading.load(bases["float32"].name)
    made = make(model.network, family, tmp_path / "1", seed=1, size=1e-2)
    direction = diff.task_vector(model, made.folder)
    old = model.fingerprint
    start = {name: model.network.get_parameter(name).data.double().clone() for name in made.meaning}
    with pytest.raises(UserError, match="being steered"), steer(model, direction, 1.0):
        bake(model, {direction: 1.0})
    bake(model, {direction: 2.0})
    assert model.fingerprint != old
    for name, change in made.meaning.items():
        moved = model.network.get_parameter(name).data.double() - start[name]
        assert relative_error(moved, 2 * change) < 1e-4, name


def test_an_untrained_adapter_of_any_family_is_no_update(bases: dict[str, ChatModel], tmp_path: Path) -> None:
    for base in ("float32", "bfloat16"):
        model = bases[base]
        for family in FAMILIES:
            made = make(model.network, family, tmp_path / f"{base}-{family}", seed=1, size=0.0)
            for name, delta in read(model, made).items():
                weight = base_of(model, name)
                assert float(spectrum.dense(delta, weight).norm()) < 1e-7 * float(weight.double().norm()), family


# -------------------------------------------------------------------- architectures

MORE = ("mistral", "phi3", "gpt-neox", "qwen3-moe")
EXPECTED_BLOCKED = {
    *(("gpt2", family) for family in ("delora", "oft", "boft", "ia3")),
    *((name, "ia3") for name in ("phi3", "gpt-neox")),
}
"""Why, the errors say: PEFT has no such layer for transposed weights; IA3 cannot scale k and v of a fused matrix."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatModel]:
    root = tmp_path_factory.mktemp("zoo")
    for name in (*tiny.ARCHITECTURES, *MORE):
        tiny.make(name, root / name, layers=4)
    return {name: loading.load(str(root / name), dtype="float32") for name in (*tiny.ARCHITECTURES, *MORE)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *MORE])
def test_every_family_is_exact_on_every_architecture_or_says_why_not(
    zoo: dict[str, ChatModel], tmp_path: Path, name: str, family: str
) -> None:
    model = zoo[name]
    if reason := supported(model.network, family):
        assert (name, family) in EXPECTED_BLOCKED and family in reason
        return
    assert (name, family) not in EXPECTED_BLOCKED
    pos, neg = (make(model.network, family, tmp_path / str(s), seed=s, size=1e-3) for s in (1, 2))
    direction, _ = diff.direction(model, pos.folder, neg.folder)
    assert_exact(model, dict(direction.deltas), {n: pos.meaning[n] - neg.meaning[n] for n in pos.meaning})
    ids, before = prompts(model), weights_digest(model.network)
    found = []
    for mode in ("runtime", "baked"):
        with steer(model, direction, 20.0, mode=mode):  # type: ignore[arg-type]
            found.append(logits(model.network, ids))
    assert weights_digest(model.network) == before
    assert relative_error(found[0], found[1]) < 1e-5
    assert relative_error(found[0], logits(model.network, ids)) > 1e-5


def test_the_support_matrix_of_the_documentation_is_what_was_tested(zoo: dict[str, ChatModel]) -> None:
    """`python docs/update.py` writes it anew."""
    text = (Path(__file__).parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
    assert support_matrix({name: model.network for name, model in zoo.items()}) in text


def test_experts_are_left_alone_and_that_is_said(zoo: dict[str, ChatModel], capsys: pytest.CaptureFixture[str]) -> None:
    assert supported(zoo["qwen3-moe"].network, "lora") == ""
    assert "experts" in capsys.readouterr().err


@pytest.mark.parametrize("everywhere", [False, True])
def test_ia3_honours_the_slice_unless_all_layers_are_asked_for(bases: dict[str, ChatModel], everywhere: bool) -> None:
    network: nn.Module = bases["float32"].network
    attached = adapters.attach(network, adapters.AdapterSettings("ia3", ia3_all_layers=everywhere), "the-base")
    layers = {
        int(name.split("layers.")[1].split(".")[0])
        for name, p in attached.wrapped.named_parameters()
        if p.requires_grad
    }
    attached.detach()
    assert layers == ({0, 1, 2, 3} if everywhere else {1, 2})
