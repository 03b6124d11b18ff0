"""A head that is tied to the embeddings is no matrix of its own: what an update of it may be, and who says no."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from making import assert_one_line, logits, prompts, relative_error, save_lora, thin
from ws.adapters import diff
from ws.algebra.direction import Direction
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.edit.steering import steer
from ws.export import write_merged, write_peft
from ws.export.gguf_lora import write_gguf
from ws.model import loading
from ws.model.loading import ChatModel
from ws.pocket import tiny


def tied_and_untied(root: Path, *, tied: bool) -> ChatModel:
    tiny.make("qwen3" if tied else "llama", root / "base", layers=4)
    return loading.load(str(root / "base"))


@pytest.mark.parametrize("save", [{}, {"save_embedding_layers": False}], ids=["default save", "no embeddings saved"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_on_the_head_is_exact_where_the_head_is_its_own_matrix_and_refused_where_it_is_tied(
    tmp_path: Path, tied: bool, options: dict[str, Any], save: dict[str, Any]
) -> None:
    model = tied_and_untied(tmp_path, tied=tied)
    sides = [
        save_lora(Path(model.name), tmp_path / str(seed), seed, 0.05, save=save, target_modules=["q_proj", "lm_head"],
                  layers_to_transform=None, layers_pattern=None, **options)
        for seed in (1, 2)
    ]  # fmt: skip
    if tied:
        with pytest.raises(UnsupportedFeatureError) as caught:
            diff.direction(model, *sides)
        assert_one_line(caught.value, str(sides[0]), "lm_head", "ties to model.embed_tokens.weight")
        return
    ids = prompts(model)
    with steer(model, diff.task_vector(model, sides[0]), 1.0):
        steered = logits(model.network, ids)
    wrapped = peft.PeftModel.from_pretrained(loading.load(model.name).network, str(sides[0])).eval()
    assert relative_error(steered, logits(wrapped, ids)) < 1e-5
    assert relative_error(steered, logits(model.network, ids)) > 1e-2


def test_a_direction_on_a_tied_head_is_refused_by_whatever_uses_it(qwen: ChatModel, tmp_path: Path) -> None:
    """A file that another program, or an older version, wrote."""
    rows, columns = qwen.network.get_input_embeddings().weight.shape
    direction = Direction({"lm_head.weight": thin(rows, columns, 2, seed=1)}, qwen.fingerprint)
    uses: dict[str, Callable[[], object]] = {
        "steer": lambda: steer(qwen, direction, 1.0).__enter__(),
        "bind": lambda: direction.bind(qwen),
        "peft": lambda: write_peft(direction, qwen.network, tmp_path / "peft"),
        "gguf": lambda: write_gguf(direction, qwen.network, tmp_path / "x.gguf"),
        "merged": lambda: write_merged({direction: 1.0}, Path(qwen.name), tmp_path / "merged"),
    }
    for name, use in uses.items():
        with pytest.raises(UserError) as caught:
            use()
        assert_one_line(caught.value, "lm_head.weight", "ties to model.embed_tokens.weight"), name
    assert not list(tmp_path.iterdir())
