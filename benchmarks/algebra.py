"""The exact difference of two LoRA adapters, as factors and dense, against merging twice and subtracting.

And the same as a checkpoint `W + dW` on disk, against task arithmetic of mergekit, which reads the same base and
adapters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import peft
import torch
from comparison import Comparison
from safetensors.torch import load_file
from timing import Row, Way, in_turn, row
from torch import Tensor

from ws import console, diff, models
from ws.direction import Direction
from ws.export import write_merged
from ws.store import read_json

TOLERANCE = 2e-2
"""Share of the norm by which merging and subtracting may miss the exact difference; bf16 misses it by more."""


class Algebra(Comparison):
    """Three lines; the first two start from a loaded base and the inputs' two adapter folders, the last from disk."""

    name = "algebra"

    def ways(self) -> list[Way]:
        """Ours as factors, ours dense and as a checkpoint; PEFT's merge; mergekit's checkpoint."""
        return [
            Way("factors", self.factors), Way("dense", self.dense), Way("merged", self.merged),
            Way("checkpoint", self.checkpoint), Way("mergekit", self.mergekit),
        ]  # fmt: skip

    def rows(self) -> list[Row]:
        """Three lines."""
        self._require_agreement()
        lost = self._checkpoint_error(self.checkpoint()), self._checkpoint_error(self.mergekit())
        times = in_turn(self.ways(), self.workload.repeats)
        rank = diff.task_vector(self.model, self._folders[0]).rank
        work, peer = f"exact dW of two rank-{rank} LoRAs", "PEFT: merge twice, subtract (inexact)"
        return [
            row(f"{work}, as factors", peer, self.inputs.size, times["factors"], times["merged"]),
            row(f"{work}, dense", peer, self.inputs.size, times["dense"], times["merged"]),
            row("the checkpoint W + dW", "mergekit task arithmetic", self.inputs.size, times["checkpoint"],
                times["mergekit"], note=f"error {lost[0]:.1e} of |W| against {lost[1]:.1e}"),
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

    def checkpoint(self) -> dict[str, Tensor]:
        """The difference baked into a copy of the base, one parameter at a time."""
        with tempfile.TemporaryDirectory() as scratch:
            write_merged({self._direction(): 1.0}, self._base, Path(scratch) / "merged")
            return _tensors(Path(scratch) / "merged")

    def mergekit(self) -> dict[str, Tensor]:
        """base + 1 x (base with one adapter - base) - 1 x (base with the other - base), in fp32, by mergekit."""
        from mergekit.config import MergeConfiguration  # noqa: PLC0415 - only this way needs it
        from mergekit.merge import run_merge  # noqa: PLC0415
        from mergekit.options import MergeOptions  # noqa: PLC0415

        signed = zip(self._folders, (1.0, -1.0), strict=True)
        with tempfile.TemporaryDirectory() as scratch, console.library_noise_muted():
            configuration = MergeConfiguration.model_validate({
                "merge_method": "task_arithmetic", "base_model": str(self._base), "dtype": "float32",
                "out_dtype": read_json(self._base / "config.json")["dtype"],  # as it is stored, like ours
                "models": [
                    {"model": f"{self._base}+{folder}", "parameters": {"weight": weight}} for folder, weight in signed
                ],
            })  # fmt: skip
            run_merge(configuration, f"{scratch}/merged", MergeOptions(
                lora_merge_cache=f"{scratch}/cache", lora_merge_dtype="float32", quiet=True, write_model_card=False,
            ))  # fmt: skip
            return _tensors(Path(scratch) / "merged")

    def _direction(self) -> Direction:
        pos, neg = (diff.task_vector(self.model, folder) for folder in self._folders)
        return pos - neg

    def _checkpoint_error(self, found: dict[str, Tensor]) -> float:
        """Distance of a checkpoint's changed matrices from W + dW, relative to their norm."""
        missed = whole = 0.0
        parameters = dict(self.model.network.named_parameters())
        for name, change in self.dense().items():
            wanted = parameters[name].double() + change.double()
            missed += float((found[name].double() - wanted).square().sum())
            whole += float(wanted.square().sum())
        return float((missed / whole) ** 0.5)

    @property
    def _base(self) -> Path:
        return models.POCKET_MODELS.get(self.inputs.model, Path(self.inputs.model))

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self.inputs.folder / "pos", self.inputs.folder / "neg"

    def _require_agreement(self) -> None:
        exact = {
            f"base_model.model.{name}".replace(".weight", ".base_layer.weight"): m for name, m in self.dense().items()
        }
        rough = self.merged()
        if exact.keys() != rough.keys():
            raise AssertionError("the ways touch different matrices")
        if self.model.dtype == torch.float32:
            missed = sum(float((exact[name] - rough[name]).square().sum()) for name in exact)
            whole = sum(float(matrix.square().sum()) for matrix in exact.values())
            if missed > TOLERANCE**2 * whole:
                raise AssertionError(f"the differences are {(missed / whole) ** 0.5:.2g} of their norm apart")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
