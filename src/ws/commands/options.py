"""Options that several commands share, and their conversion to settings. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import OmitArgPrefixes

if TYPE_CHECKING:
    from ws.fitting.run_settings import Settings
    from ws.model.loading import ChatModel
    from ws.runs.cells import Workplace
    from ws.runs.replicate import Replication

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "eager", "sdpa"]
Judge = Literal["auto", "none", "persona", "local-logit", "http"]
Engine = Literal["local", "openai"]
Tracker = Literal["trackio", "wandb", "tensorboard", "mlflow"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model to use, and how to load it."""

    model: str = "pocket"
    """Name of an embedded model (pocket, pocket-gemma), smollm2, a hub id, a model folder, or a GGUF file."""
    dtype: Dtype = "auto"
    """Number format of the weights. auto: float32 up to 200 M parameters or if bfloat16 is slow, else the file's."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda or mps."""
    attention: Attention = "auto"
    """How attention is computed. auto means eager on a CPU and sdpa elsewhere."""
    thinking: Literal["off", "on"] = "off"
    """Whether a thinking model thinks before it responds."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. It holds for this command only and is never stored."""
    cache_memory: float = 1.0
    """Memory in GiB for hidden states that are reused; 0 recomputes them. It has no effect on results."""

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
    """Which run: model, behaviour, adapter family and seeds decide the run folder."""

    behaviour: str = "sycophancy"
    """Name of a shipped behaviour, or a .toml file."""
    adapter: str = "lora"
    """Adapter family: lora, rslora, dora, pissa, delora, oft, boft or ia3."""
    recipe: Literal["own", "original"] = "own"
    """own: what the model recommends for itself. original: the settings of the replicated work, for any model."""
    seed: int = 0
    """Training seed: decides the initial adapter weights and the order of the rows."""
    data_seed: int = 0
    """Data seed: decides which responses are sampled."""
    out: Path = Path("out")
    """Folder that holds the run folders."""
    json: bool = False
    """Print the result as JSON and nothing else."""

    def replication(self, fit: FitOptions | None = None) -> Replication:
        """The run that the options name. Options that are left out come from the existing run, if there is one."""
        from ws.fitting import behaviour  # noqa: PLC0415
        from ws.fitting.run_settings import restore_settings, run_path, stored_in  # noqa: PLC0415
        from ws.runs.replicate import Replication  # noqa: PLC0415

        settings = run_settings(self, fit or FitOptions(), EvalOptions())
        folder = run_path(settings, behaviour.load(self.behaviour))
        if (folder / "config.json").is_file():
            settings = restore_settings(stored_in(folder), settings, folder / "config.json")
        return Replication(settings)


@dataclass(frozen=True)
class FitOptions:
    """How to make pairs and train adapters. Options that you leave out come from the model folder, or have a general
    default."""

    topics: int | None = None
    """How many training prompts to use; all if left out."""
    personas: int | None = None
    """How many persona pairs to use; all if left out."""
    samples: int = 10
    """Responses sampled per prompt and persona."""
    pairs: Path | None = None
    """Use your own pairs instead of sampling: a JSONL file with prompt, response_pos and response_neg."""
    max_new_tokens: int | None = None
    """Longest sampled response, in tokens."""
    temperature: float | None = None
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: float | None = None
    """Sample only from the most likely tokens that together have this probability."""
    responses: Engine = "local"
    """Source of the responses: the loaded model (local), or an OpenAI-compatible endpoint such as vLLM (openai)."""
    responses_url: str = ""
    """Address of the endpoint, up to and including /v1."""
    responses_model: str = ""
    """Model name at the endpoint. Serve the same model as --model: training on another model's responses is
    distillation."""
    judge: Judge = "auto"
    """How responses are rated; only those that show their persona are kept. none: no rating. auto: the model folder's
    choice, or none. persona: the model's likelihoods under both personas. local-logit: the model answers a rubric.
    http: a chat endpoint answers it."""
    judge_threshold: float = 0.5
    """Keep a positive response if its rated probability is above this value, a negative one if it is below 1 minus
    it."""
    judge_url: str = ""
    """Address of the http judge (OpenAI-compatible), up to and including /v1."""
    judge_model: str = ""
    """Model name at the http judge."""
    fit_dtype: Dtype = "auto"
    """Number format of the model that samples and trains. auto: the model folder's choice where this machine is fast in
    it, else as --dtype. Scores are always read in --dtype."""
    rank: int | None = None
    """Rank of the adapter."""
    lora_alpha: float | None = None
    """Scale of the adapter: its update is multiplied by lora_alpha / rank."""
    layers: tuple[float, float] | None = None
    """Which layers are adapted, as two fractions of the depth. The general default is 0.3 0.8."""
    roles: tuple[str, ...] | None = None
    """Which matrices are adapted: some of q k v o gate up down. All if left out."""
    delora_lambda: float | None = None
    """DeLoRA: limit on the norm of the update at the start."""
    block_size: int | None = None
    """OFT and BOFT: size of the rotated blocks."""
    ia3_all_layers: bool = False
    """IA3: adapt every layer, as PEFT does, and ignore --layers."""
    lr: float | Literal["auto"] | None = None
    """Peak learning rate. auto tries a few and takes the one with the lowest validation loss."""
    epochs: int | None = None
    """How many times training goes through the data."""
    batch_size: int | None = None
    """Rows per training step."""
    max_length: int | None = None
    """Longest training row, in tokens."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float | None = None
    """Decoupled weight decay."""


@dataclass(frozen=True)
class EvalOptions:
    """What to measure."""

    alphas: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """Strengths of the direction. 0, the unedited model, is always included."""
    control_seeds: int = 10
    """How many random directions of equal norm are measured for comparison: at -1 and +1, or at the outermost alphas if
    those are not asked for."""
    dilemmas: str = "own"
    """Where the dilemmas come from: own (shipped), a CSV, JSONL or parquet file, or a hub id."""
    rows: int | None = None
    """Use only the first rows of every probe, for a quick look."""
    shown: int = 6
    """How many prompts are sampled for the report."""
    judged: int = 24
    """How many held-out prompts get free replies that the model itself judges; 0 skips them."""


@dataclass(frozen=True)
class EngineOptions:
    """Where many runs are worked on. See docs/scale.md."""

    engine: Literal["local", "ray"] = "local"
    """local: one run after the other, on this machine. ray: on a Ray cluster (extra: ray)."""
    address: str = ""
    """A running Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Left out, Ray is started on this machine."""
    cpus_per_run: float = 1.0
    """Ray: CPUs, and so threads, of each run. A fraction shares one."""
    gpus_per_run: float = 0.0
    """Ray: GPUs of each run. A fraction shares one."""
    retries: int = 2
    """Ray: how often a run is tried again if it fails, or if its node is lost."""
    store: str = ""
    """Copy run folders to and from this folder or URL, such as s3://bucket/sweep. Left out, all nodes must share
    --out."""

    def workplace(self) -> Workplace:
        """The workplace that the options name."""
        from ws.engines import store_mirror  # noqa: PLC0415
        from ws.runs.cells import Workplace  # noqa: PLC0415

        store = store_mirror.absolute(self.store)
        return Workplace(self.engine, self.address, self.cpus_per_run, self.gpus_per_run, self.retries, store)


def run_settings(run: RunOptions, fit: FitOptions, evaluation: EvalOptions) -> Settings:
    """The settings that the options give."""
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
        engine=EngineSettings(fit.responses, fit.responses_url, fit.responses_model),
        fit_dtype=fit.fit_dtype, recipe=run.recipe, judged=evaluation.judged,
        pairs=fit.pairs, alphas=tuple(evaluation.alphas), control_seeds=evaluation.control_seeds,
        dilemmas=evaluation.dilemmas, rows=evaluation.rows, samples=evaluation.shown,
    )  # fmt: skip


@dataclass(frozen=True)
class StageOptions(RunOptions):
    """One stage of a run. Options that you leave out come from the existing run, if there is one. The options that load
    the model always apply as given in this command."""

    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)
