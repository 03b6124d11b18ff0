"""GGUF files as models: transformers dequantises them; what it cannot read becomes one line with a remedy.

transformers takes the configuration, the tokenizer with its template, and the weights from the file. The network that
comes out is an ordinary one in fp32 (or in the dtype asked for); nothing remembers that the file was quantised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ws.base.errors import UserError
from ws.model.library import explain

ORIGINAL = "Give the original model instead (a folder with safetensors, or its hub id)."
"""What to do about a GGUF file that cannot be used: nobody can correct what is inside."""
_MAGIC = b"GGUF"


@contextmanager
def read_once() -> Iterator[None]:
    """Parse a file, and the table of tensor names, once while the block runs.

    transformers asks the `gguf` library for both again and again (the table for every module of the network), which
    took half of the time to load. Only the answers of the library are kept; a release that does not ask gains nothing.
    """
    import gguf  # noqa: PLC0415 - heavy import, late

    kept: dict[str, Callable[..., Any]] = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in kept.items():
        setattr(gguf, name, cache(original))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(gguf, name, original)


def library(purpose: str) -> Any:
    """The package `gguf`; a missing one is a `UserError` that names the purpose."""
    try:
        import gguf  # noqa: PLC0415 - heavy import, late
    except ImportError as error:
        raise UserError(f"{purpose} needs the package gguf, which is not installed", "pip install gguf") from error
    return gguf


def require_readable(path: Path) -> None:
    """Raise for a file that is not GGUF, is cut short, is one part of several, or has no tokenizer.

    Also for weights in a form that the `gguf` library cannot turn into numbers. Call it inside `read_once`.
    """
    import gguf  # noqa: PLC0415 - heavy import, late

    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{path} is not a GGUF file", "Give a file that llama.cpp can load.")
    try:
        reader = _reader(path)
    except Exception as error:  # the parser runs beyond the end of the file, or into types that it does not know
        if "GGMLQuantizationType" in str(error):
            raise UserError(f"{path} holds weights of an unknown type ({error})", f"Update gguf. {ORIGINAL}") from error
        raise UserError(
            f"{path} is cut short or damaged ({type(error).__name__}: {error})", "Copy or download it again."
        ) from error
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise UserError(f"{path} is one part of a split model", "Join the parts with: llama-gguf-split --merge")
    if "general.architecture" not in reader.fields:
        raise UserError(f"{path} does not say which architecture it is", ORIGINAL)
    if not {"tokenizer.ggml.model", "tokenizer.ggml.tokens"} <= reader.fields.keys():
        raise UserError(f"{path} holds no tokenizer", ORIGINAL)
    for kind, tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.items():
        try:
            gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise UserError(
                f"{path} holds {tensor.name} quantised as {kind.name}, which cannot be dequantised", ORIGINAL
            ) from error


def refusal(path: Path, error: Exception) -> UserError:
    """One line for what transformers raised about the file: usually an architecture that it does not read."""
    from transformers import __version__  # noqa: PLC0415 - heavy import, late

    if isinstance(error, MemoryError | ImportError | torch.OutOfMemoryError):
        return explain(str(path), str(path), "weights", error)
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"transformers {__version__} cannot read the model in {path} ({reason[:300]})", ORIGINAL)


def contradiction(path: Path, error: UserError) -> UserError:
    """One line for weights that do not fit the metadata beside them; nobody can correct a file inside a GGUF."""
    reason = error.problem.replace("config.json", "its metadata")
    return UserError(f"{path} contradicts itself ({reason})", f"Download it again. {ORIGINAL}")


def complete(config: Any, path: Path) -> None:
    """Add to the configuration what transformers leaves at its default although the file says it: the head width."""
    width = _field(path, "attention.key_length")
    if width is not None and hasattr(config, "head_dim"):
        config.head_dim = int(width)


def require_all_used(path: Path, network: Any) -> None:
    """Raise if the network lacks tensors or a scaling of positions that the file has: transformers drops them silently.

    Call it inside `read_once`.
    """
    reader = _reader(path)
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    used = sum({tensor.data_ptr(): tensor.numel() for tensor in network.state_dict().values()}.values())
    if held != used:
        factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
        example = f", for example {factors[0]}" if factors else ""
        raise UserError(
            f"{path} holds {held:,} numbers, but the model that transformers makes of it uses {used:,}{example}",
            ORIGINAL,
        )
    factor = _field(path, "rope.scaling.factor")
    rotation = json.dumps(network.config.to_dict().get("rope_parameters"))
    if factor not in (None, 1.0) and '"factor"' not in rotation:
        raise UserError(
            f"{path} scales its positions by {factor:g}, which transformers does not read from GGUF", ORIGINAL
        )


def _reader(path: Path) -> Any:
    import gguf  # noqa: PLC0415 - heavy import, late

    return gguf.GGUFReader(str(path))


def _field(path: Path, name: str) -> Any:
    """A value that the file holds for its architecture; None if there is none."""
    fields = _reader(path).fields
    found = fields.get(f"{fields['general.architecture'].contents()}.{name}")
    return None if found is None else found.contents()


def loading_choices() -> dict[str, Any]:
    """Arguments of `from_pretrained` that give plain weights also where kernels for quantised ones are installed."""
    import transformers  # noqa: PLC0415 - heavy import, late

    packed_or_plain = getattr(transformers, "GgufConfig", None)  # releases before it only know plain weights
    return {} if packed_or_plain is None else {"quantization_config": packed_or_plain(dequantize=True)}


def forget_quantisation(network: Any) -> None:
    """Make the network an ordinary one, which can be saved and trained."""
    network.config.__dict__.pop("quantization_config", None)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        network.__dict__.pop(mark, None)
