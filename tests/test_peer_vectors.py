"""Vectors of repeng and steering-vectors: read as they were written, applied as they are applied there, compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peer_vectors as training
import polars as pl
import pytest
import torch
import workload
from activations import Activations
from inputs import Inputs
from peers import library_forms
from torch import Tensor

import ws
from making import assert_one_line, gaussian, logits, prompts, random_direction
from ws.adapters.diff import Geometry
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.base.files import digest, read_json, write_json
from ws.base.store import RunFolder
from ws.baselines import repe
from ws.baselines.peer_vectors import PeerFile, parse_all
from ws.baselines.repe import ActivationDirection, RepeSettings
from ws.commands import cli
from ws.comparing import compare, dev_split, methods
from ws.comparing.compare import Plan
from ws.edit.condition import Edit
from ws.eval import sycophancy
from ws.fitting import behaviour
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.fitting.stages import FittedRun
from ws.fitting.train_settings import TrainSettings
from ws.model import architecture, loading
from ws.model.chat import ask
from ws.model.loading import ChatModel

SYCOPHANCY = behaviour.load("sycophancy")
LIBRARIES = {"repeng": training.import_repeng, "steering-vectors": training.import_steering_vectors}


def library(name: str) -> Any:
    """The library; the test skips where it is not installed."""
    try:
        return LIBRARIES[name]()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> Iterator[ChatModel]:
    """A random model of four layers with the library's own attention."""
    loaded = loading.load(str(tiny_folders[request.param]))
    with library_forms(loaded.network):
        yield loaded


def width(model: ChatModel) -> int:
    return int(architecture.text_config(model.network).hidden_size)


def write_gguf(path: Path, vectors: dict[str, Tensor], kind: str = "controlvector", hint: str | None = "qwen3") -> Path:
    """A file of repeng's form, written without repeng."""
    gguf = pytest.importorskip("gguf", reason="repeng's files are GGUF")
    writer = gguf.GGUFWriter(path, kind)
    if hint:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for name, vector in vectors.items():
        writer.add_tensor(name, vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_steering_vector(path: Path, vectors: dict[int, Tensor], layer_type: str = "decoder_block") -> Path:
    """The fields of a SteeringVector, as `dataclasses.asdict` has them."""
    torch.save({"layer_activations": vectors, "layer_type": layer_type}, path)
    return path


# -------------------------------------------------------------------- the same as in the library


@contextmanager
def controlled(model: ChatModel, vector: Any, coefficient: float, **options: Any) -> Iterator[Any]:
    """A copy of the network under repeng's own control, on all layers of the vector."""
    repeng = library("repeng")
    wrapped = repeng.ControlModel(copy.deepcopy(model.network), sorted(vector.directions))
    wrapped.set_control(vector, coefficient, **options)
    yield wrapped


@pytest.mark.parametrize("coefficient", [2.0, -3.5])
def test_a_vector_of_repeng_does_here_what_it_does_there(model: ChatModel, tmp_path: Path, coefficient: float) -> None:
    repeng, size = library("repeng"), width(model)
    directions = {layer: gaussian(size, seed=layer).numpy() for layer in (1, 3)}
    vector = repeng.ControlVector(model.network.config.model_type, directions)
    vector.export_gguf(str(tmp_path / "v.gguf"))
    read = PeerFile.parse(f"repeng:{tmp_path / 'v.gguf'}").read(model)
    ids, plain = prompts(model, rows=1), logits(model.network, prompts(model, rows=1))
    with controlled(model, vector, coefficient) as there:
        wanted = logits(there, ids)
    with ws.steer(model, read, coefficient):
        found = logits(model.network, ids)
    assert torch.allclose(found, wanted, atol=1e-5) and (found - plain).abs().max() > 0.1


def test_repeng_leaves_left_padding_alone_and_so_may_we(model: ChatModel, tmp_path: Path) -> None:
    """It edits the tokens from position 0 on; padding before them is masked, so editing it changes nothing."""
    repeng = library("repeng")
    vector = repeng.ControlVector(model.network.config.model_type, {1: gaussian(width(model), seed=1).numpy()})
    vector.export_gguf(str(tmp_path / "v.gguf"))
    ids = prompts(model, rows=2, tokens=6)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        with controlled(model, vector, 2.0) as there:
            wanted = there(**inputs).logits
        with ws.steer(model, PeerFile.parse(f"repeng:{tmp_path / 'v.gguf'}").read(model), 2.0):
            found = model.network(**inputs).logits
    assert torch.allclose(found[mask == 1], wanted[mask == 1], atol=1e-5)


def test_the_normalisation_of_repeng_is_not_in_its_file(model: ChatModel, tmp_path: Path) -> None:
    """`normalize=True` is an option of its application, and another edit than the plain sum that we read."""
    repeng = library("repeng")
    vector = repeng.ControlVector(model.network.config.model_type, {1: gaussian(width(model), seed=1).numpy()})
    vector.export_gguf(str(tmp_path / "v.gguf"))
    ids = prompts(model, rows=1)
    with controlled(model, vector, 2.0, normalize=True) as there:
        rescaled = logits(there, ids)
    with ws.steer(model, PeerFile.parse(f"repeng:{tmp_path / 'v.gguf'}").read(model), 2.0):
        assert (logits(model.network, ids) - rescaled).abs().max() > 1e-2


@pytest.mark.parametrize("multiplier", [2.0, -3.5])
def test_a_steering_vector_does_here_what_it_does_there(model: ChatModel, tmp_path: Path, multiplier: float) -> None:
    steering_vectors = library("steering-vectors")
    vector = steering_vectors.SteeringVector({layer: gaussian(width(model), seed=layer) for layer in (0, 2, 3)})
    torch.save(vector, tmp_path / "v.pt")
    read = PeerFile.parse(f"steering-vectors:{tmp_path / 'v.pt'}").read(model)
    ids, plain = prompts(model), logits(model.network, prompts(model))
    with torch.no_grad(), vector.apply(model.network, multiplier=multiplier):
        wanted = logits(model.network, ids)
    with ws.steer(model, read, multiplier):
        found = logits(model.network, ids)
    assert torch.allclose(found, wanted, atol=1e-5) and (found - plain).abs().max() > 0.1


def test_negative_layers_count_from_the_end_in_both(model: ChatModel, tmp_path: Path) -> None:
    vector, size = gaussian(width(model), seed=4), model.layer_count
    kind = model.network.config.model_type
    files = [
        f"repeng:{write_gguf(tmp_path / 'v.gguf', {'direction.-2': vector}, hint=kind)}",
        f"steering-vectors:{write_steering_vector(tmp_path / 'v.pt', {-2: vector})}",
    ]
    for file in files:
        read = PeerFile.parse(file).read(model)
        assert list(read.vectors) == [size - 2] and torch.equal(read.vectors[size - 2], vector)
    steering_vectors, ids = library("steering-vectors"), prompts(model)
    with torch.no_grad(), steering_vectors.SteeringVector({-2: vector}).apply(model.network):
        wanted = logits(model.network, ids)
    with ws.steer(model, read):
        assert torch.allclose(logits(model.network, ids), wanted, atol=1e-5)


# -------------------------------------------------------------------- training on the same rows


def test_a_steering_vector_trained_on_the_same_rows_is_our_mean_difference(qwen: ChatModel) -> None:
    library("steering-vectors")
    vector = training.train_steering_vectors(qwen, training.rendered_pairs(qwen, SYCOPHANCY))
    ours = repe.fit(qwen, SYCOPHANCY, RepeSettings(slice=(0.0, 1.0)))
    assert sorted(vector.layer_activations) == sorted(ours.vectors) == [0, 1, 2, 3]
    for layer, wanted in ours.vectors.items():
        assert torch.allclose(vector.layer_activations[layer], wanted, atol=1e-4)


def test_repeng_s_components_on_the_same_rows_are_ours(qwen: ChatModel) -> None:
    """Around the midpoint of every pair; its default centres the differences, which takes their mean out."""
    library("repeng")
    pairs = training.rendered_pairs(qwen, SYCOPHANCY)
    vector = training.train_repeng(qwen, pairs, method="pca_center")
    settings = RepeSettings(estimator="pca_center", unit="one", slice=(0.0, 1.0))
    found = training.cosines(vector.directions, dict(repe.fit(qwen, SYCOPHANCY, settings).vectors))
    assert sorted(found) == [1, 2, 3] == sorted(training.train_repeng(qwen, pairs).directions)
    assert found[1] > 0.999 and found[2] > 0.999
    assert abs(found[3]) < 0.99, "repeng reads the last layer after the final norm"


def test_the_rendered_pairs_are_the_rows_of_our_capture(qwen: ChatModel) -> None:
    pairs, encode = training.rendered_pairs(qwen, SYCOPHANCY), training.RenderedTokenizer(qwen.chat)
    assert len(pairs) == len(SYCOPHANCY.train) * len(SYCOPHANCY.personas.pos)
    padded = encode([pairs[0][0], pairs[3][1]], padding=True, return_tensors="pt")
    short = padded["attention_mask"].sum(dim=1).tolist()
    rows = [ids[:length] for ids, length in zip(padded["input_ids"].tolist(), short, strict=True)]
    wanted = ((SYCOPHANCY.personas.pos[0], SYCOPHANCY.train[0]), (SYCOPHANCY.personas.neg[0], SYCOPHANCY.train[3]))
    assert rows == [qwen.chat.prompt(ask(topic.text, persona)) for persona, topic in wanted]


def test_the_script_writes_what_the_comparison_reads(qwen: ChatModel, tmp_path: Path) -> None:
    library("repeng"), library("steering-vectors")
    run = tmp_path / "run"
    run.mkdir()
    stored = {"model": qwen.name, "behaviour": "sycophancy", "dtype": "auto", "device": "auto", "thinking": "off",
              "attention": "auto", "revision": None}  # fmt: skip
    write_json(run / "config.json", {"settings": stored})
    write_json(run / "identity.json", {"fingerprint": qwen.fingerprint})
    record = training.write(run, tmp_path / "out")
    assert read_json(tmp_path / "out" / "peer_vectors.json")["pairs"] == record["pairs"] == 100
    found = record["cosine_with_our_mean_difference"]
    assert list(found) == ["repeng", "repeng-pca_center", "steering-vectors"]
    assert min(found["steering-vectors"].values()) > 0.999
    assert parse_all([f"repeng:{tmp_path / 'out' / 'repeng-pca_center.gguf'}"])[0].read(qwen).unit == "one"
    files = parse_all([
        f"repeng:{tmp_path / 'out' / 'repeng.gguf'}", f"steering-vectors:{tmp_path / 'out' / 'steering-vectors.pt'}",
    ])  # fmt: skip
    control, steering = (file.read(qwen) for file in files)
    assert (sorted(control.vectors), control.unit) == ([1, 2, 3], "one")
    assert (sorted(steering.vectors), steering.unit) == ([0, 1, 2, 3], "difference")
    write_json(run / "identity.json", {"fingerprint": "other"})
    with pytest.raises(UserError, match="made on another model"):
        training.write(run, tmp_path / "out")


def test_the_benchmark_finds_the_same_vectors_in_every_way(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library("repeng"), library("steering-vectors")
    few = replace(workload.SHAPE, repeats=1, has_aims=False)
    bench = Activations(Inputs("tiny", str(tiny_folders["qwen3"]), few, tmp_path))
    rows = bench.rows()
    assert [row.peer for row in rows] == ["steering-vectors", "repeng, pca_center"]
    assert {row.note for row in rows} == {"least cosine of the two 1.00000"}
    monkeypatch.setattr(bench, "repeng", lambda: {layer: -v for layer, v in bench.ours("pca_center").items()})
    with pytest.raises(AssertionError, match="the vectors of a layer have the cosine -1"):
        bench.rows()


# -------------------------------------------------------------------- in a comparison


@pytest.fixture
def sources(qwen: ChatModel, tmp_path: Path) -> methods.Sources:
    """A run that was never trained, on the middle layers 1 and 2."""
    adapter = replace(TrainSettings().adapter, layers=(0.25, 0.75))
    run = FittedRun(
        tmp_path, SYCOPHANCY, random_direction(qwen), Geometry(*[0.0] * 8), pl.DataFrame(), {},
        replace(TrainSettings(), adapter=adapter), {},
    )  # fmt: skip
    own = sycophancy.headline_probe(SYCOPHANCY)
    return methods.Sources(qwen, qwen, {("lora", 0, 0): run}, own, RunFolder(tmp_path / "compare", {}))


@pytest.mark.parametrize("norm", [1.0, 3.0])
def test_layers_and_strength_of_a_file_are_chosen_on_dev_rows(
    sources: methods.Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: float
) -> None:
    """Vectors of norm 1 are tried in residual norms, with one coefficient for all layers; others as they are."""
    model = sources.model
    vectors = {n: norm * torch.nn.functional.normalize(gaussian(64, seed=n), dim=0) for n in (1, 2, 3)}
    path = write_gguf(tmp_path / "v.gguf", {f"direction.{n}": vector for n, vector in vectors.items()})
    file = PeerFile.parse(f"repeng:{path}")
    asked: dict[Any, ActivationDirection] = {}

    def choose(_model: Any, _own: Any, name: str, fitted: Any, *_: Any) -> dev_split.Chosen[Any]:
        assert name == "repeng v.gguf"
        asked.update(fitted)
        return dev_split.Chosen((1, 2), 0.5, "the largest tried")

    monkeypatch.setattr(dev_split, "best_strength", choose)
    (method,) = methods.peer_vectors(sources, {file: file.read(model)})
    assert {layers: sorted(one.vectors) for layers, one in asked.items()} == {(1, 2, 3): [1, 2, 3], (1, 2): [1, 2]}
    settings = RepeSettings(unit="residual", slice=(0.25, 0.75))
    own = repe.fit(model, SYCOPHANCY, settings).vectors
    unit = sum(float(own[layer].norm()) for layer in (1, 2)) / 2 if norm == 1 else 1.0
    assert {one.unit for one in asked.values()} == {"residual" if norm == 1 else "difference"}
    effect = method.edits[0].effect
    assert isinstance(effect, ActivationDirection) and sorted(effect.vectors) == [1, 2]
    for layer, vector in effect.vectors.items():
        assert torch.allclose(vector, 0.5 * unit * vectors[layer], rtol=1e-4)
    assert method.kind == "activations" and method.name == "repeng v.gguf"
    said = f"file {digest(path)[:12]}, 2 layers, 1 to 2, coefficient {0.5 * unit:.3g}, the largest tried"
    assert method.note == said


@pytest.mark.slow
def test_a_peer_is_a_row_of_both_tables(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_steering_vector(tmp_path / "v.pt", {n: gaussian(64, seed=n) / 10 for n in (1, 2)})
    settings = Settings(
        model=str(tiny_folders["qwen3"]), out=tmp_path / "runs", grid=Grid(topics=3, personas=2, samples=2),
        train={"rank": 2, "lora_alpha": 4, "lr": 5e-3, "batch_size": 8, "layers": (0.25, 0.75)},
        sampling={"max_new_tokens": 6}, samples=1, rows=40,
    )  # fmt: skip
    plan = Plan(families=("lora",), activations=("mean",), peers=(f"steering-vectors:{path}",), draws=2,
                steps=(), permutations=0, shuffles=0, budgets=(0.005,), calibration_prompts=2,
                calibration_tokens=4)  # fmt: skip
    result = compare.run(settings, plan)
    for measured in (result.found.own_strength, *result.found.equal_kl.values()):
        entry = measured.entry("steering-vectors v.pt")
        assert entry is not None and entry.kind == "activations" and set(entry.sides) == {"+", "-"}
        assert entry.note.startswith(f"file {digest(path)[:12]}, 2 layers, 1 to 2, coefficient ")
    text = (result.folder / "comparison.md").read_text(encoding="utf-8")
    assert text.count(f"steering-vectors v.pt + (file {digest(path)[:12]}") >= 4, "effects and costs of both tables"


def test_no_two_random_draws_of_a_comparison_are_the_same(sources: methods.Sources) -> None:
    """Ten draws that repeat two bases would make a band of two draws."""
    direction = sources.reference.direction
    edits = [Edit("one", direction, seed) for seed in range(3)]
    found = [methods._of_weights(sources, name, "weights", edits) for name in ("one", "two")]
    draws = [draw for method in found if method.control for draw in method.control.edits]
    assert [draw.seed for draw in draws] == [*range(10), *range(10)]
    assert len({draw.effect.content_key for draw in draws}) == 20
    again = methods._of_weights(sources, "one", "weights", edits).control
    assert again is not None and again.edits[3].effect.content_key == draws[3].effect.content_key


def test_a_file_on_steered_layers_alone_is_one_candidate(qwen: ChatModel, tmp_path: Path) -> None:
    direction = PeerFile.parse(
        f"steering-vectors:{write_steering_vector(tmp_path / 'v.pt', {1: gaussian(64, seed=1)})}"
    ).read(qwen)
    assert direction.on_layers(range(1, 3)).content_key == direction.content_key
    assert direction.times(2.0).content_key != direction.content_key
    assert Edit("peer", direction).effect.content_key == replace(direction, provenance={}).content_key


def test_the_option_is_repeatable_and_checked_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_steering_vector(tmp_path / "v.pt", {1: gaussian(64, seed=1)})
    assert [file.label for file in parse_all([f"steering-vectors:{path}"])] == ["steering-vectors v.pt"]
    for given, said in (
        (["--with", f"steering-vectors:{path}", "--with", f"repeng:{tmp_path}/no.gguf"], "there is no vector file"),
        (["--with", f"steering-vectors:{path}", "--with", f"steering-vectors:{path}"], "two vectors have the name"),
        (["--with", str(path)], "names no vector of a known library"),
        (["--with", f"steering-vectors:{path}", "--behaviours", "sycophancy", "honesty"], "one behaviour"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["compare", *given])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert Plan(peers=(f"steering-vectors:{path}",)).peers


# -------------------------------------------------------------------- files that do not fit


def _not_finite() -> Tensor:
    vector = gaussian(64, seed=1)
    vector[3] = float("nan")
    return vector


_GOOD = gaussian(64, seed=1)
WRONG_GGUF: dict[str, tuple[Callable[[Path], object], str]] = {
    "another hidden size": (lambda p: write_gguf(p, {"direction.1": gaussian(32, seed=1)}), "hidden size of"),
    "a layer too far": (lambda p: write_gguf(p, {"direction.4": _GOOD}), "layers 0 to 3"),
    "a layer too far from the end": (lambda p: write_gguf(p, {"direction.-5": _GOOD}), "layers 0 to 3"),
    "a layer twice": (lambda p: write_gguf(p, {"direction.3": _GOOD, "direction.-1": _GOOD}), "two vectors for layer"),
    "not finite": (lambda p: write_gguf(p, {"direction.1": _not_finite()}), "not finite"),
    "no vectors": (lambda p: write_gguf(p, {"other": _GOOD}), "has no vectors"),
    "no layer": (lambda p: write_gguf(p, {"direction.last": _GOOD}), "names no layer"),
    "another model type": (lambda p: write_gguf(p, {"direction.1": _GOOD}, hint="mistral"), "on a mistral model"),
    "a model": (lambda p: write_gguf(p, {"direction.1": _GOOD}, kind="llama"), "not a control vector"),
    "text": (lambda p: p.write_text("hello"), "not a readable GGUF file"),
    "truncated": (lambda p: p.write_bytes(write_gguf(p, {"direction.1": _GOOD}).read_bytes()[:-100]), "not a readable"),
    "empty": (lambda p: p.write_bytes(b""), "not a readable GGUF file"),
}


@pytest.mark.parametrize("case", WRONG_GGUF)
def test_a_wrong_file_of_repeng_is_one_line(case: str, qwen: ChatModel, tmp_path: Path) -> None:
    make, said = WRONG_GGUF[case]
    path = tmp_path / "v.gguf"
    make(path)
    with pytest.raises(UserError) as raised:
        PeerFile.parse(f"repeng:{path}").read(qwen)
    assert_one_line(raised.value, str(path), said)


def test_a_control_vector_without_a_model_type_is_taken(qwen: ChatModel, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", {"direction.1": _GOOD}, hint=None)
    assert torch.equal(PeerFile.parse(f"repeng:{path}").read(qwen).vectors[1], _GOOD)


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran-code"),)


WRONG_PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another hidden size": (lambda p: write_steering_vector(p, {1: gaussian(32, seed=1)}), "hidden size of"),
    "a layer too far": (lambda p: write_steering_vector(p, {9: _GOOD}), "layers 0 to 3"),
    "not finite": (lambda p: write_steering_vector(p, {1: _not_finite()}), "not finite"),
    "no vectors": (lambda p: write_steering_vector(p, {}), "has no vectors"),
    "tensors alone": (lambda p: torch.save(_GOOD, p), "holds no steering vector"),
    "code": (lambda p: torch.save(_Evil(), p), "not a readable steering vector"),
    "text": (lambda p: p.write_text("hello"), "not a readable steering vector"),
    "truncated": (
        lambda p: p.write_bytes(write_steering_vector(p, {1: _GOOD}).read_bytes()[:-200]), "not a readable",
    ),
    "empty": (lambda p: p.write_bytes(b""), "not a readable steering vector"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_PICKLES)
def test_a_wrong_steering_vector_is_one_line(
    case: str, qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = WRONG_PICKLES[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "v.pt"
    make(path)
    with pytest.raises(UserError) as raised:
        PeerFile.parse(f"steering-vectors:{path}").read(qwen)
    assert_one_line(raised.value, str(path), said)
    assert not Path("ran-code").exists()


def test_vectors_inside_a_layer_are_refused(qwen: ChatModel, tmp_path: Path) -> None:
    path = write_steering_vector(tmp_path / "v.pt", {1: _GOOD}, "mlp")
    with pytest.raises(UnsupportedFeatureError, match="layer type 'mlp'"):
        PeerFile.parse(f"steering-vectors:{path}").read(qwen)
