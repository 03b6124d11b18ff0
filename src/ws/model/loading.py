"""Load a causal language model with its tokenizer from the package, a hub or a folder, and identify it.

`load("pocket")`, `load("Qwen/Qwen3-0.6B")`, `load("./folder")` and `load("file.gguf")` go through the same
`from_pretrained`; `sources` says which files are meant. A folder may carry `weight_steering.json` with recommended
settings (per adapter family and behaviour, for sampling); the embedded models do.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from ws.base import console, precision
from ws.base.errors import UserError
from ws.base.files import read_json
from ws.model import architecture, forward, gguf_file, sources, weight_files
from ws.model.attention import EAGER, register, use_grouped
from ws.model.chat import Chat, Thinking
from ws.model.fingerprint import fingerprint
from ws.model.forward import SplitForward
from ws.model.library import explain, refusals_told, without_weights
from ws.model.sources import Source, model_slug

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

CACHE_MEMORY = 2**30
"""Default limit, in bytes, of the hidden states that are kept for reuse."""
SMALL_MODEL = 200_000_000
"""Up to this many parameters `--dtype auto` means fp32 on every device."""


@dataclass(eq=False)
class ChatModel:
    """A causal LM, a `Chat` with its tokenizer, and its identity.

    `name`: as the user gave it. `settings`: recommended settings from the model folder (`recommended`). `cache_memory`:
    limit, in bytes, of the hidden states that are kept for reuse.
    """

    name: str
    network: Any
    chat: Chat
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    cache_memory: int = CACHE_MEMORY

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that comes from another process needs the attention function in this one."""
        register()
        self.__dict__.update(state)

    @property
    def settings_told(self) -> str:
        """Where the recommended settings are, for error messages."""
        return f"weight_steering.json of {self.name}"

    def recommended(self, part: str, behaviour: str = "") -> dict[str, Any]:
        """One part of the recommended settings (`PARTS`); what `<part>_for` holds for a behaviour goes over it."""
        of_behaviour = self.settings.get(f"{part}_for", {}).get(behaviour, {})
        return _over(self.settings.get(part, {}), of_behaviour)

    @property
    def device(self) -> torch.device:
        """Device of the embedding; token ids must be on it."""
        return self.network.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.network.get_input_embeddings().weight.dtype

    @property
    def slug(self) -> str:
        """Folder name for runs of this model."""
        return model_slug(self.name)

    @cached_property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(architecture.decoder_layers(self.network)[1])

    @cached_property
    def parameter_count(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @cached_property
    def split(self) -> SplitForward:
        """The forward pass as trunk and head, checked once against the whole forward pass."""
        return SplitForward(self.network)

    @property
    def fingerprint(self) -> str:
        """Digest of the unmodified weights; computed once per loaded model."""
        return fingerprint(self.network)

    def describe(self) -> dict[str, Any]:
        """The identity of the model, with dtype, device and rendering, for configs and provenance."""
        return {
            "name": self.name,
            "revision": self.revision,
            "architecture": type(self.network).__name__,
            "fingerprint": self.fingerprint,
            "parameters": self.parameter_count,
            "layers": self.layer_count,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "attention": self.network.config._attn_implementation,
            "thinking": self.chat.thinking,
            "rendering": self.chat.rendering_key,
            # no key for most models, so that what is stored under these keys stays valid
            **({} if self.chat.default_system is None else {"default_system": self.chat.default_system}),
        }


def load(
    name: str = "pocket",
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_memory: int = CACHE_MEMORY,
) -> ChatModel:
    """Load a model by the name of an embedded model, `smollm2`, a folder, a GGUF file, or a hub id.

    dtype "auto" is fp32 up to 200 M parameters and on a CPU that emulates bfloat16, else the dtype of the checkpoint.
    Device "auto" prefers CUDA, then MPS, then the CPU; attention "auto" is the grouped eager form on the CPU (faster
    there at these lengths) and SDPA elsewhere.
    Weights are read from safetensors, or dequantised from GGUF (to fp32, unless `dtype` names another). Raises
    `UserError` with a remedy if the model cannot be loaded.
    """
    if cache_memory < 0:
        raise UserError(f"--cache-memory is {cache_memory / 2**30:g} GiB; it cannot be negative", "Give 0 or more.")
    target_device = _choose_device(device)
    chosen_attention = _choose_attention(attention, target_device)
    source = sources.find(name, revision)
    choices = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "attn_implementation": chosen_attention}
    if source.gguf is None:
        remote = {"revision": revision, "trust_remote_code": trust_remote_code}
        config, tokenizer, network = _from_folder(name, source.place, choices, remote)
    else:
        config, tokenizer, network = _from_gguf(name, source.gguf, choices)
    slow = not precision.bfloat16_is_fast(target_device.type)
    if dtype == "auto" and (slow or sum(p.numel() for p in network.parameters()) <= SMALL_MODEL):
        network.to(torch.float32)
    elif slow and network.dtype == torch.bfloat16:
        console.warn("this CPU emulates bfloat16, which is slow: --dtype float32 is many times faster")
    with refusals_told(name, source.place, "first forward pass"):
        network.to(target_device).eval().requires_grad_(False)
        forward.check_causal(network, name)
    if attention == "auto" and network.config._attn_implementation == EAGER and not use_grouped(network):
        console.warn(f"{name}: grouped attention does not match this model; using the library's eager form")
    return ChatModel(
        name=name,
        network=network,
        chat=Chat(tokenizer, thinking, name, vocabulary=len(network.get_input_embeddings().weight), ends=ends(network)),
        revision=source.commit or getattr(config, "_commit_hash", None) or revision,
        settings=_recommended(source),
        cache_memory=cache_memory,
    )


# -------------------------------------------------------------------- reading


def _from_folder(name: str, place: str, choices: dict[str, Any], remote: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Configuration, tokenizer and network of a folder or hub id, with all weights there and all of them used."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - heavy import, late

    with refusals_told(name, place, "configuration"):
        config = AutoConfig.from_pretrained(place, **remote)
    with refusals_told(name, place, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place, **remote)
    try:
        with console.library_noise_muted():
            network, loading = AutoModelForCausalLM.from_pretrained(
                place,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # raised below as an error that names the tensor
                **choices,
                **remote,
            )
    except Exception as error:  # a try without weights finds a bad configuration or choice
        without_weights(place, name, **remote)
        without_weights(place, name, part="attention", attn_implementation=choices["attn_implementation"], **remote)
        if isinstance(error, RuntimeError | SafetensorError) and Path(place).is_dir():
            # the library's report is muted; reading the files raises an error that names the file and the tensor
            weight_files.Checkpoint(Path(place)).fingerprint()
        raise explain(name, place, "weights", error) from error
    if getattr(network, "_hf_peft_config_loaded", False):
        raise UserError(f"{name} is an adapter, not a model", "Give its base model. To use adapters, see ws diff.")
    _require_complete(name, loading)
    if Path(place).is_dir():
        weight_files.require_floats(Path(place), [key for key, _ in network.named_parameters()])
    return config, tokenizer, network


def _from_gguf(name: str, path: Path, choices: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Configuration, tokenizer and dequantised network of a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415 - late

    # the whole path: the library would take a file of the same name in the current folder
    place, file = str(path.parent), {"gguf_file": str(path)}
    gguf_file.library(f"reading {name}")
    with console.library_noise_muted(), gguf_file.read_once(), redirect_stderr(io.StringIO()):  # has its own bar
        gguf_file.require_readable(path)
        try:
            config = AutoConfig.from_pretrained(place, **file)
            gguf_file.complete(config, path)
            # not AutoTokenizer, which reads the configuration once more; the tokenizer is the same
            tokenizer = PreTrainedTokenizerFast.from_pretrained(place, **file)
            network, loading = AutoModelForCausalLM.from_pretrained(
                place, config=config, output_loading_info=True, ignore_mismatched_sizes=True,
                **file, **gguf_file.loading_choices(), **choices,
            )  # fmt: skip
        except Exception as error:  # the library raises many types for what it does not know
            raise gguf_file.refusal(path, error) from error
        try:
            _require_complete(str(path), loading)
        except UserError as error:
            raise gguf_file.contradiction(path, error) from error
        gguf_file.require_all_used(path, network)
    gguf_file.forget_quantisation(network)
    return config, tokenizer, network


def _require_complete(place: str, loading: dict[str, Any]) -> None:
    for parameter, stored, described in sorted(loading["mismatched_keys"]):
        weight_files.require_shape(place, parameter, stored, described)
    weight_files.require_all_there(place, loading["missing_keys"])
    weight_files.require_all_used(place, loading["unexpected_keys"])


def _recommended(source: Source) -> dict[str, Any]:
    found = {} if source.settings is None else read_json(source.settings)
    is_right = isinstance(found, dict) and all(
        isinstance(found.get(part, {}), dict)
        and isinstance(of_behaviours := found.get(f"{part}_for", {}), dict)
        and all(isinstance(one, dict) for one in of_behaviours.values())
        for part in PARTS
    )
    if not is_right:
        raise UserError(f"{source.settings} does not hold settings by name", "Correct the file, or delete it.")
    known = [*PARTS, *(f"{part}_for" for part in PARTS), "fit_dtype"]
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
            raise UserError(f"{source.settings}: unknown part {name!r}", hint)
    return found


CORRECT = "Correct it there, or delete it."
"""What to do about a recommended setting that cannot be used."""
PARTS = ("train", "judge", "sampling", "run", "rows")
"""Parts of `weight_steering.json` that hold settings by name: of training by adapter family, of the judge, of sampling,
of a run, and the rows of each probe."""


def _over(general: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """`special` over `general`; a mapping in both is merged in the same way."""
    merged = {
        name: _over(general[name], value) if isinstance(value, Mapping) and isinstance(general.get(name), Mapping)
        else value
        for name, value in special.items()
    }  # fmt: skip
    return {**general, **merged}


# -------------------------------------------------------------------- choices


def ends(network: Any) -> tuple[int, ...]:
    """Token ids that end a text according to `generation_config.json`: none, one, or several."""
    found = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    ends = found if isinstance(found, list | tuple) else () if found is None else (found,)
    if not all(isinstance(end, int) for end in ends):
        raise UserError(
            f"eos_token_id in generation_config.json is {found!r}", "Write the id of a token, or a list of ids."
        )
    return tuple(ends)


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} is not available here", "Use --device cpu, cuda or mps.") from error
    return chosen


def _choose_attention(attention: str, device: torch.device) -> str:
    if attention != "auto":
        return attention
    return EAGER if device.type == "cpu" else "sdpa"
