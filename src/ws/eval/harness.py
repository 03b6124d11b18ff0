"""Tasks of EleutherAI's lm-evaluation-harness on a steered model, without writing a merged checkpoint.

The harness runs on the loaded network, and each Condition is applied during the run, so it measures the same model as
the probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ws.base import console, extras
from ws.base.errors import UserError
from ws.edit.condition import Condition
from ws.edit.steering import under
from ws.model.loading import ChatModel

PREFIX = "lm-eval:"


def evaluate(
    model: ChatModel,
    task: str,
    conditions: Sequence[Condition],
    *,
    limit: int | None = None,
    task_folder: Path | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Records of each Condition in turn, one per numeric metric: its key, task, metric, value, stderr (or None).

    `task_folder` holds the user's own task files; `limit` keeps only the first documents. The chat template is used
    if the tokenizer has one. Raises `UserError` for an unknown task or without the optional dependency.
    """
    try:
        import lm_eval  # noqa: PLC0415 - optional extra, late
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise _not_installed() from error
    with console.library_noise_muted():
        known = TaskManager(include_path=None if task_folder is None else str(task_folder))
        if not known.match_tasks([task]):
            raise UserError(f"lm-evaluation-harness has no task {task!r}", "List them with: lm-eval ls tasks.")
        wrapped = HFLM(pretrained=model.network, tokenizer=model.chat.tokenizer, batch_size=batch_size)
    for condition in conditions:
        with under(model, condition), console.library_noise_muted():
            found = _run(lm_eval, wrapped, task, known, limit, seed, model.chat.has_own_template)
        records: list[dict[str, Any]] = []
        for name, metrics in found["results"].items():
            for label, value in metrics.items():
                metric, _, variant = label.partition(",")
                if isinstance(value, int | float) and not metric.endswith("_stderr") and metric != "sample_len":
                    spread = metrics.get(f"{metric}_stderr,{variant}")
                    records.append({
                        **condition.key(), "task": name, "metric": metric, "value": float(value),
                        "stderr": float(spread) if isinstance(spread, int | float) else None,
                    })  # fmt: skip
        yield records


def version() -> str:
    """Version of the harness, which decides what it measures."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError as error:
        raise _not_installed() from error


def _not_installed() -> UserError:
    return extras.missing("lm-evaluation-harness", "lm-eval")


def _run(
    harness: Any, wrapped: Any, task: str, known: Any, limit: int | None, seed: int, with_template: bool
) -> dict[str, Any]:
    try:
        found = harness.simple_evaluate(
            model=wrapped, tasks=[task], task_manager=known, limit=limit, apply_chat_template=with_template,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # missing data, or a broken task file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the task {task!r} cannot be run ({reason})", "Check the network or the task file.") from error
    return dict(found)
