"""`ws export`: export a run folder, a direction file or a model, measure the export, and write its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.edit.steering import require_strength
from ws.export.card import write_card
from ws.export.gguf_lora import write_gguf
from ws.export.lora import logit_error, write_peft
from ws.export.merged import write_merged
from ws.export.target import CARD_FILE, card_of, require_free_file, write_record
from ws.model import convert, loading, sources
from ws.model.library import POCKET_MODELS, SMOLLM2
from ws.model.weight_files import CONFIG
from ws.report.findings import SUMMARY_FILE, Summary, read_summary

Format = Literal["peft", "merged", "gguf-lora", "gguf"]
GgufType = Literal["f16", "f32"]
DIRECTION_FILE = "direction.safetensors"
"""The direction of a run, in its folder."""


def export(
    source: Path,
    kind: Format,
    *,
    alpha: float = 1.0,
    rank: int | None = None,
    fold: bool = True,
    gguf_type: GgufType = "f16",
    model: str | None = None,
    out: Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Export the direction of a run folder or file; returns the record and the place of the export.

    A merged checkpoint and a whole GGUF are made from the base's files without loading the model. The other formats
    load the model, to compute deltas that are functions of its weights and to measure the exported adapter. For a whole
    GGUF the source may also be a model, which is then written unchanged and without a card.
    """
    require_strength(alpha)
    if kind == "gguf" and _is_model(source):
        return _export_model(source, gguf_type, out)
    file, summary = _find(source)
    direction = Direction.load(file)
    base = model or (summary and summary.model) or direction.provenance.get("base", {}).get("name")
    if not base:
        raise UserError(f"{file} does not say which model it belongs to", "Give the model with --model NAME.")
    name = f"{source.stem if source.is_file() else source.name}-{kind}-alpha{alpha:g}"
    target = out or source.parent / (f"{name}.gguf" if kind in ("gguf-lora", "gguf") else name)
    if kind in ("gguf-lora", "gguf"):
        require_free_file(target, with_card=True)
    if kind == "merged":
        with convert.as_folder(base) as folder:
            record = write_merged({direction: alpha}, folder, target) | {"alpha": alpha, "exact": True}
    elif kind == "gguf":
        from ws.export.gguf_model import write_gguf_model  # noqa: PLC0415 - heavy, late

        with convert.as_folder(base) as folder:
            written = write_gguf_model({direction: alpha}, folder, target, number_format=gguf_type, name=name)
        record = written | {"alpha": alpha, "exact": True}
    else:
        loaded = loading.load(base)
        direction = direction.bind(loaded)
        if kind == "peft":
            record = write_peft(direction, loaded.network, target, alpha=alpha, rank=rank, fold=fold, base_name=base)
            record |= {"logit_error": logit_error(loaded, direction, alpha, target)}
        else:
            record = write_gguf(direction, loaded.network, target, alpha=alpha, rank=rank, name=name)
    card = target / CARD_FILE if target.is_dir() else card_of(target)
    base_file = sources.find(base).gguf
    write_card(card, direction, record, base=base, place=target.name, base_file=base_file, summary=summary)
    if target.is_dir():
        write_record(target, record)
    return record, target


def _is_model(source: Path) -> bool:
    """Whether the source is an embedded model or a model folder, not a run folder or a file."""
    if source.is_dir():
        return not (source / DIRECTION_FILE).is_file() and (source / CONFIG).is_file()
    return str(source) in (*POCKET_MODELS, SMOLLM2)


def _export_model(source: Path, gguf_type: GgufType, out: Path | None) -> tuple[dict[str, Any], Path]:
    from ws.export.gguf_model import write_gguf_model  # noqa: PLC0415 - needs an extra

    name = sources.model_slug(str(source))
    target = out or (source.resolve().parent if source.is_dir() else Path()) / f"{name}-{gguf_type}.gguf"
    require_free_file(target)
    with convert.as_folder(str(source)) as folder:
        record = write_gguf_model({}, folder, target, number_format=gguf_type, name=name)
    return record | {"alpha": 0.0, "exact": True}, target


def _find(source: Path) -> tuple[Path, Summary | None]:
    """The direction file, and the summary of its run, if there is one."""
    if source.is_dir():
        file = source / DIRECTION_FILE
        if not file.is_file():
            raise UserError(f"{source} holds no {DIRECTION_FILE}", "Give a run folder or a direction file.")
        return file, read_summary(source) if (source / SUMMARY_FILE).is_file() else None
    return source, None
