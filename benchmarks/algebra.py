"""The exact difference of two LoRA adapters, as factors and dense, against merging twice and subtracting.

And the same as a checkpoint `W + dW` on disk, against task arithmetic of mergekit, which reads the same base and
adapters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flops
import peft
import spending
import torch
import traffic
from comparison import Comparison
from limits import Need
from safetensors.torch import load_file
from spending import Spending
from timing import Row, Way, in_turn
from torch import Tensor

from ws.adapters import diff
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UserError
from ws.base.files import read_json
from ws.export import write_merged
from ws.model import sources

TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 1.0}
"""Share of the norm by which merging and subtracting may miss the exact difference: bf16 rounds it like the weights."""


class Missed(NamedTuple):
    """Distance of a difference from the exact one, relative to its norm, and the cosine of the two."""

    relative: float
    cosine: float


class Algebra(Comparison):
    """Three lines; the first two start from a loaded base and the inputs' two adapter folders, the last from disk."""

    name = "algebra"

    def ways(self) -> list[Way]:
        """Ours as factors, ours dense and as a checkpoint; PEFT's merge; mergekit's checkpoint."""
        return [
            Way("factors", self.factors), Way("dense", self.dense),
            Way("merged", self.merged), Way("checkpoint", self.checkpoint), Way("mergekit", self.mergekit),
        ]  # fmt: skip

    def spending(self) -> list[Spending]:
        """The dense difference."""
        return [spending.measure(self.dense, self.name, self.inputs.size)]

    def rows(self) -> list[Row]:
        """Three lines."""
        missed = self._peer_error()
        lost = self._checkpoint_error(self.checkpoint), self._checkpoint_error(self.mergekit)
        times = in_turn(self.ways(), self.workload.repeats, warm_up=0)  # all of them have run above
        peaks = self.peaks_of([way.name for way in self.ways()] if self.workload.has_aims else [])
        rank = diff.task_vector(self.model, self._folders[0]).rank
        work, peer = f"exact dW of two rank-{rank} LoRAs", "PEFT: merge twice, subtract"
        dtype = str(self.model.dtype).removeprefix("torch.")
        said = f"the peer's, in {dtype}: error {missed.relative:.2g} of the norm, cosine {missed.cosine:.4f}"
        lines = [
            (f"{work}, as factors", peer, "factors", "merged", said),
            (f"{work}, dense", peer, "dense", "merged", said),
            ("the checkpoint W + dW", "mergekit task arithmetic", "checkpoint", "mergekit",
             f"error {lost[0]:.1e} of the norm of W + dW against {lost[1]:.1e}"),
        ]  # fmt: skip
        needs = self._needs()
        return [
            self.line(text, other, times[ours], times[theirs], aim=ours, need=needs[ours],
                      memory=(peaks.get(ours), peaks.get(theirs)), note=note)
            for text, other, ours, theirs, note in lines
        ]  # fmt: skip

    def factors(self) -> object:
        """Two thin factors per matrix."""
        return self._direction()

    def dense(self) -> dict[str, Tensor]:
        """Every matrix in full."""
        direction = self._direction()
        return {parameter: direction.materialise(parameter) for parameter in direction.deltas}

    def merged(self) -> dict[str, Tensor]:
        """Both adapters merged into the base in turn, and the difference of what results."""
        sides = []
        for folder in self._folders:
            wrapped = peft.PeftModel.from_pretrained(self.model.network, str(folder))
            wrapped.merge_adapter()
            sides.append({n: p.detach().clone() for n, p in wrapped.named_parameters() if "base_layer.weight" in n})
            wrapped.unmerge_adapter()
            wrapped.unload()
        return {name: sides[0][name] - sides[1][name] for name in sides[0]}

    def checkpoint(self, folder: Path | None = None) -> None:
        """The difference baked into a copy of the base, one parameter at a time."""
        with tempfile.TemporaryDirectory() as scratch:
            write_merged({self._direction(): 1.0}, self._base, folder or Path(scratch) / "merged")

    def mergekit(self, folder: Path | None = None) -> None:
        """base + 1 x (base with one adapter - base) - 1 x (base with the other - base), in fp32, by mergekit."""
        from mergekit.config import MergeConfiguration  # noqa: PLC0415 - only this way needs it
        from mergekit.merge import run_merge  # noqa: PLC0415
        from mergekit.options import MergeOptions  # noqa: PLC0415

        signed = zip(self._folders, (1.0, -1.0), strict=True)
        with tempfile.TemporaryDirectory() as scratch, console.library_noise_muted():
            configuration = MergeConfiguration.model_validate({
                "merge_method": "task_arithmetic", "base_model": str(self._base), "dtype": "float32",
                "out_dtype": self._stored_dtype,  # like ours
                "models": [
                    {"model": f"{self._base}+{side}", "parameters": {"weight": weight}} for side, weight in signed
                ],
            })  # fmt: skip
            run_merge(configuration, str(folder or f"{scratch}/merged"), MergeOptions(
                lora_merge_cache=f"{scratch}/cache", lora_merge_dtype="float32", quiet=True, write_model_card=False,
            ))  # fmt: skip

    def _direction(self) -> Direction:
        pos, neg = (diff.task_vector(self.model, folder) for folder in self._folders)
        return pos - neg

    def _needs(self) -> dict[str, Need]:
        """What our three ways need, by name."""
        direction, folders = self._direction(), self._folders
        entries = sum(direction.materialise(parameter).numel() for parameter in direction.deltas)
        stored = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
        base = sum(file.stat().st_size for file in self._base.glob("*.safetensors"))
        products = flops.dense_difference(entries, direction.rank)
        return {
            "factors": Need(bytes=traffic.factors(stored)),
            "dense": Need(products, traffic.dense(stored, entries)),
            "checkpoint": Need(products, traffic.checkpoint(base)),
        }

    def _checkpoint_error(self, write: Callable[[Path], None]) -> float:
        """Distance of a checkpoint's changed matrices from W + dW, relative to their norm."""
        missed = whole = 0.0
        parameters = dict(self.model.network.named_parameters())
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch) / "merged")
            found = _tensors(Path(scratch) / "merged")
        direction = self._direction()
        for name in direction.deltas:
            wanted = parameters[name].double().cpu() + direction.materialise(name).double().cpu()
            missed += float((found[name].double() - wanted).square().sum())
            whole += float(wanted.square().sum())
        return float((missed / whole) ** 0.5)

    @property
    def _base(self) -> Path:
        folder = Path(sources.find(self.inputs.model).place)
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"mergekit cannot read {folder}", "Convert the model to a folder of safetensors.")
        return folder

    @property
    def _stored_dtype(self) -> str:
        stored = read_json(self._base / "config.json")
        return str(stored.get("dtype") or stored["torch_dtype"])

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self.inputs.folder / "pos", self.inputs.folder / "neg"

    def _peer_error(self) -> Missed:
        """How far the peer's difference is from the exact one; raise where they are not the same work."""
        direction, rough = self._direction(), self.merged()
        names = {name: f"base_model.model.{name}".replace(".weight", ".base_layer.weight") for name in direction.deltas}
        if set(names.values()) != rough.keys():
            raise AssertionError("the ways touch different matrices")
        gap = exact = theirs = together = 0.0
        for name, other in names.items():
            wanted, found = direction.materialise(name).double(), rough[other].double()
            gap += float((found - wanted).square().sum())
            exact += float(wanted.square().sum())
            theirs += float(found.square().sum())
            together += float((found * wanted).sum())
        missed = Missed((gap / exact) ** 0.5, together / (exact * theirs) ** 0.5)
        if missed.relative > TOLERANCE[self.model.dtype]:
            raise AssertionError(f"the differences are {missed.relative:.2g} of their norm apart")
        return missed


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
