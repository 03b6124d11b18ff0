"""Both signs of a rank-r LoRA on the same tokens with the same loss: ours against TRL's SFTTrainer with PEFT.

The peer is set as its documentation allows for a CPU: no checkpointing, no bf16, no packing, rows of similar length
together, completion-only loss, pre-tokenised rows, nothing logged or saved.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import polars as pl
from timing import Row, in_turn, row

from ws import architecture, console, models, train
from ws.chat import SupervisedTokens

SIGNS = ("pos", "neg")


def compare(name: str, pairs: pl.DataFrame, repeats: int) -> list[Row]:
    """One line; `pairs` as in a run's `pairs.parquet`."""
    from datasets import Dataset  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    model = models.load(name)
    chosen = train.resolve_settings(model, "lora", {"validation": 0.0})
    examples = {sign: train.examples(model, pairs, sign, chosen, 0).train for sign in SIGNS}

    def ours() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            for sign in SIGNS:
                train.fit(model, pairs, sign, chosen, seed=0, data_seed=0, folder=Path(scratch) / sign)

    datasets = {sign: Dataset.from_list([_as_record(one) for one in rows]) for sign, rows in examples.items()}

    def theirs() -> None:
        for sign in SIGNS:
            network = models.load(name).network
            with tempfile.TemporaryDirectory() as scratch, console.library_noise_muted():
                trainer = SFTTrainer(
                    network,
                    args=SFTConfig(
                        output_dir=scratch, per_device_train_batch_size=chosen.batch_size,
                        num_train_epochs=chosen.epochs, learning_rate=chosen.lr, weight_decay=chosen.weight_decay,
                        warmup_steps=chosen.warmup_steps, lr_scheduler_type="linear", max_length=chosen.max_length,
                        gradient_checkpointing=False, bf16=False, use_cpu=True, packing=False,
                        completion_only_loss=True, report_to="none", save_strategy="no", logging_strategy="no",
                        disable_tqdm=True, dataloader_pin_memory=False, seed=0,
                        train_sampling_strategy="group_by_length",
                    ),
                    train_dataset=datasets[sign], processing_class=model.chat.tokenizer,
                    peft_config=_lora(network, chosen),
                )  # fmt: skip
                trainer.train()

    times = in_turn({"ours": ours, "trl": theirs}, repeats)
    count = sum(map(len, examples.values()))
    work = f"pos + neg LoRA, rank {chosen.adapter.rank}, {count} rows, {chosen.epochs} epochs"
    return [row(work, "TRL SFTTrainer + PEFT", name, times["ours"], times["trl"])]


def _lora(network: Any, chosen: train.TrainSettings) -> peft.LoraConfig:
    layers = architecture.layer_slice(network.config.num_hidden_layers, *chosen.adapter.layers)
    return peft.LoraConfig(
        r=chosen.adapter.rank, lora_alpha=chosen.adapter.lora_alpha, task_type="CAUSAL_LM",
        target_modules=sorted({site.kind for site in architecture.sites(network, layers)}),
        layers_to_transform=list(layers), layers_pattern="layers",
    )  # fmt: skip


def _as_record(example: SupervisedTokens) -> dict[str, list[int]]:
    ids, prompt = example
    return {"input_ids": ids, "completion_mask": [0] * prompt + [1] * (len(ids) - prompt)}
