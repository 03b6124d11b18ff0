"""A Direction in formats that other programs load: a PEFT LoRA, a merged checkpoint, a GGUF LoRA, and its card."""

from ws.export.lora import LowRankForm, logit_error, low_rank_form, write_peft
from ws.export.merged import write_merged

__all__ = ["LowRankForm", "logit_error", "low_rank_form", "write_merged", "write_peft"]
