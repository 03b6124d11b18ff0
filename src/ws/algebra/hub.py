"""Direction files on the Hugging Face hub, through huggingface_hub's own calls: upload a folder, find a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ws.base.errors import UserError

FILE = "direction.safetensors"
"""Name of the direction in its repository, as in a run folder."""


def upload(folder: Path, repo: str, *, private: bool, token: str | None, endpoint: str | None) -> str:
    """Upload a folder to a model repository, which is made if it does not exist; returns the address of the commit."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - heavy import, late

    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A weight direction")
    except Exception as error:
        raise _explained(repo, "cannot be written", error) from error
    return str(commit.commit_url)


def find(place: str | Path, *, revision: str | None, token: str | None, endpoint: str | None) -> Path:
    """The direction file in a local folder, at a local path, or in a model repository (downloaded and cached)."""
    local = Path(place)
    if local.is_dir():
        return local / FILE
    if local.is_file() or local.suffix == ".safetensors":
        return local
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    try:
        return Path(hf_hub_download(str(place), FILE, revision=revision, token=token, endpoint=endpoint))
    except Exception as error:
        raise _explained(str(place), f"gives no {FILE}", error) from error


def _explained(repo: str, problem: str, error: Exception) -> Exception:
    """A failure of the hub as a user error; any other error as it is."""
    from huggingface_hub import errors  # noqa: PLC0415

    known = (errors.HfHubHTTPError, errors.HFValidationError, errors.EntryNotFoundError, OSError)
    connection = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests")
    if not isinstance(error, known) and not connection:
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{repo} {problem} on the hub ({reason})",
        "Give an existing repository and a token that may use it, or a local folder.",
    )


def card(provenance: Mapping[str, Any], base: str, facts: Mapping[str, str]) -> str:
    """A model card: what the direction is, and how to load it. base: fingerprint of its base model."""
    model = provenance.get("base", {}).get("name") if isinstance(provenance.get("base"), dict) else None
    behaviour = provenance.get("behaviour") if isinstance(provenance.get("behaviour"), dict) else {}
    name = behaviour.get("name", "a weight direction") if behaviour else "a weight direction"
    means = behaviour.get("positive_means") if behaviour else None
    known = model or "the model with this fingerprint"
    return "\n".join([
        "---", *([f"base_model: {model}"] if model and "/" in model else []), "tags: [weight-steering]", "---", "",
        f"# {name}", "",
        f"A weight direction `dW = theta_pos - theta_neg` of {known} (fingerprint `{base}`). Adding `alpha * dW` to "
        "the weights turns a behaviour up or down." + (f" Positive alpha: the model {means}." if means else ""), "",
        "| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in facts.items()), "",
        "```python", "import ws", "", f'model = ws.load("{model or "BASE_MODEL"}")',
        'direction = ws.Direction.from_pretrained("THIS_REPOSITORY")',
        "with ws.steer(model, direction, alpha=1.0):", "    ...", "```", "",
        "Measure it before you rely on it: `ws eval`, `ws compare`.", "",
    ])  # fmt: skip
