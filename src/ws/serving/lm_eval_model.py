"""A model for lm-evaluation-harness: its own command line runs tasks on a steered model.

    python -m ws.serving.lm_eval_model run --model ws --model_args run=out/pocket/sycophancy/lora/seed0,alpha=-1 \
        --tasks hellaswag --apply_chat_template

Everything after the module's name goes to `lm-eval`. In Python, importing this module registers the model `ws`.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ws.base import console
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.serving import mix as mixes
from ws.serving.shelf import open_shelf


@register_model("ws")
class SteeredLM(HFLM):
    """A base model under a mix of directions, for as long as the object lives.

    run: a run folder or a direction file. alpha: its strength; mix: an expression instead. Other arguments are those of
    the harness's `hf` model, except the ones that load a model.
    """

    def __init__(self, run: str = "", alpha: float | str | None = None, mix: str | None = None, **options: Any) -> None:
        if not run:
            raise UserError("no run is given", "Add run=FOLDER to --model_args.")
        if (alpha is None) == (mix is None):
            raise UserError("give the strength once", "Add alpha=1 or mix=EXPRESSION to --model_args.")
        if known := {"pretrained", "tokenizer", "peft", "dtype"} & options.keys():
            raise UserError(f"the run decides {min(known)}", "Leave it out of --model_args.")
        shelf = open_shelf([run])
        asked = {next(iter(shelf.directions)): _number(alpha)} if alpha is not None else mixes.parse(str(mix))
        strengths = shelf.strengths(asked, local=True)
        super().__init__(pretrained=shelf.model.network, tokenizer=shelf.model.chat.tokenizer, **options)
        self._steered = ExitStack()
        self._steered.enter_context(steer(shelf.model, strengths))


def _number(alpha: Any) -> float:
    try:
        return float(alpha)
    except (TypeError, ValueError):
        raise UserError(f"alpha is {alpha!r}, which is not a number", "Add alpha=1 to --model_args.") from None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        console.fail(str(error))
        sys.exit(2)
