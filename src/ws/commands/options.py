"""Options that several commands share, and the settings that they amount to. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import OmitArgPrefixes

if TYPE_CHECKING:
    from ws.fitting.run_settings import Settings
    from ws.model.loading import ChatModel
    from ws.runs.replicate import Replication

Sign = Literal["pos", "neg"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "eager", "sdpa"]
Judge = Literal["auto", "none", "persona", "local-logit", "http"]
Engine = Literal["local", "openai"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: str = "pocket"
    """Embedded model, hub id, or folder."""
    dtype: Dtype = "auto"
    """auto: float32 up to 200 M parameters and where bfloat16 is emulated, else the checkpoint's own."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    attention: Attention = "auto"
    """Attention implementation; auto: eager on the CPU, with grouped keys where the model allows, sdpa elsewhere."""
    thinking: Literal["off", "on"] = "off"
    """Whether a thinking model may think before it responds."""
    revision: str | None = None
    """Revision of a hub model."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model."""
    cache_memory: float = 1.0
    """GiB for hidden states that are needed again; 0 computes everything anew. No effect on results."""

    def load(self) -> ChatModel:
        """Load the model."""
        from ws.model import loading  # noqa: PLC0415

        return loading.load(
            self.model, dtype=self.dtype, device=self.device, attention=self.attention, thinking=self.thinking,
            revision=self.revision, trust_remote_code=self.trust_remote_code,
            cache_memory=round(self.cache_memory * 2**30),
        )  # fmt: skip


@dataclass(frozen=True)
class RunOptions(ModelOptions):
    """Which run: model, behaviour, adapter family and seeds name the run folder."""

    behaviour: str = "sycophancy"
    """Shipped behaviour, or a .toml file."""
    adapter: str = "lora"
    """Adapter family."""
    seed: int = 0
    """Training seed: initialisation and order."""
    data_seed: int = 0
    """Data seed: which responses are sampled."""
    out: Path = Path("out")
    """Where run folders lie."""
    json: bool = False
    """Print the result as JSON and nothing else."""

    def replication(self, fit: FitOptions | None = None) -> Replication:
        """The run that the options name. What they leave open is as an existing run was made."""
        from ws.fitting import behaviour  # noqa: PLC0415
        from ws.fitting.run_settings import restore_settings, run_path, stored_in  # noqa: PLC0415
        from ws.runs.replicate import Replication  # noqa: PLC0415

        settings = run_settings(self, fit or FitOptions(), EvalOptions())
        folder = run_path(settings, behaviour.load(self.behaviour))
        if (folder / "config.json").is_file():
            settings = restore_settings(stored_in(folder), settings)
        return Replication(settings)


@dataclass(frozen=True)
class FitOptions:
    """How pairs are made and adapters are trained; what is not given comes from the model folder or the defaults."""

    topics: int | None = None
    """Training prompts used (default all)."""
    personas: int | None = None
    """Persona pairs used (default all)."""
    samples: int = 10
    """Samples per prompt and persona."""
    pairs: Path | None = None
    """Your own pairs: JSONL with prompt, response_pos, response_neg."""
    max_new_tokens: int | None = None
    """Length limit of sampled responses."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy."""
    top_p: float | None = None
    """Nucleus of the sampling distribution."""
    engine: Engine = "local"
    """Who writes the responses: the sampler here, or an OpenAI-compatible endpoint (vLLM, transformers serve, ...)."""
    engine_url: str = ""
    """Endpoint of the openai engine, up to and including /v1."""
    engine_model: str = ""
    """Model name at that endpoint. Serve the same model as --model: responses of another one make it distillation."""
    judge: Judge = "auto"
    """Judge responses with this backend and keep the clear ones; persona: the model's own likelihoods under both sides;
    auto: what the model folder recommends, else none."""
    judge_threshold: float = 0.5
    """Judged probability from which a response counts as positive."""
    judge_url: str = ""
    """Endpoint of the http judge (OpenAI-compatible)."""
    judge_model: str = ""
    """Model name for the http judge."""
    rank: int | None = None
    """Adapter rank."""
    lora_alpha: float | None = None
    """Adapter scale: alpha / rank multiplies the product."""
    layers: tuple[float, float] | None = None
    """Slice of the depth that is adapted, as fractions (default 0.3 0.8)."""
    roles: tuple[str, ...] | None = None
    """Roles that are adapted, of q k v o gate up down (default all)."""
    delora_lambda: float | None = None
    """Bound of a DeLoRA update's norm at the start."""
    block_size: int | None = None
    """Size of the rotated blocks of OFT and BOFT."""
    ia3_all_layers: bool = False
    """Give IA3 every layer, as PEFT does, instead of the slice."""
    lr: float | Literal["auto"] | None = None
    """Peak learning rate; auto: try a few and keep the one with the lowest validation loss."""
    epochs: int | None = None
    """Passes over the data."""
    batch_size: int | None = None
    """Rows per optimiser step."""
    max_length: int | None = None
    """Longest training row, in tokens."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    weight_decay: float | None = None
    """Decoupled weight decay."""


@dataclass(frozen=True)
class EvalOptions:
    """What is measured."""

    alphas: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """Strengths; 0 is always included."""
    control_seeds: int = 10
    """Norm-matched random directions at -1 and +1."""
    dilemmas: str = "own"
    """own, a CSV/JSONL/parquet file, or a hub id."""
    rows: int | None = None
    """Use only the first rows of every probe (for quick looks)."""
    shown: int = 6
    """Prompts sampled for the report."""


def run_settings(run: RunOptions, fit: FitOptions, evaluation: EvalOptions) -> Settings:
    """What the options amount to."""
    from ws.fitting.data import Grid  # noqa: PLC0415
    from ws.fitting.judge import JudgeSettings  # noqa: PLC0415
    from ws.fitting.responses import EngineSettings  # noqa: PLC0415
    from ws.fitting.run_settings import Settings  # noqa: PLC0415

    training = ("rank", "lora_alpha", "delora_lambda", "block_size", "layers", "roles", "lr", "epochs", "batch_size",
                "max_length", "warmup_steps", "weight_decay")  # fmt: skip
    sampling = ("max_new_tokens", "temperature", "top_p")
    return Settings(
        model=run.model, behaviour=run.behaviour, adapter=run.adapter, seed=run.seed, data_seed=run.data_seed,
        out=run.out, dtype=run.dtype, device=run.device, thinking=run.thinking, attention=run.attention,
        revision=run.revision, trust_remote_code=run.trust_remote_code, cache_memory=run.cache_memory,
        grid=Grid(fit.topics, fit.personas, fit.samples),
        sampling={name: getattr(fit, name) for name in sampling if getattr(fit, name) is not None},
        train={
            **{name: getattr(fit, name) for name in training if getattr(fit, name) is not None},
            **({"ia3_all_layers": True} if fit.ia3_all_layers else {}),
        },
        judge=JudgeSettings(fit.judge, fit.judge_threshold, fit.judge_url, fit.judge_model),
        engine=EngineSettings(fit.engine, fit.engine_url, fit.engine_model),
        pairs=fit.pairs, alphas=tuple(evaluation.alphas), control_seeds=evaluation.control_seeds,
        dilemmas=evaluation.dilemmas, rows=evaluation.rows, samples=evaluation.shown,
    )  # fmt: skip


@dataclass(frozen=True)
class StageOptions(RunOptions):
    """A stage of a run; settings that are not given are those of the run, if it exists."""

    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)
