"""The peers that several comparisons use: TRL's SFTTrainer over PEFT, and PEFT's LoRA side path for scoring.

They are set as their documentation allows: no checkpointing, bf16 where the model is, no packing, rows of similar
length together, completion-only loss, pre-tokenised rows, nothing logged; scoring in sorted batches with one logit row.
All run the library's norms and its eager attention, which is faster than its SDPA on a CPU at these lengths.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from ws.base import console
from ws.fitting.train_settings import TrainSettings
from ws.model import architecture, attention
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel


@contextmanager
def library_forms(network: Any, attend: str | None = None) -> Iterator[None]:
    """Within the block the network runs the library's own attention instead of ours.

    `attend`: which of its forms of attention (None: eager where ours runs otherwise, else the network's own).
    """
    own = network.config._attn_implementation
    network.set_attn_implementation(attend or (attention.EAGER if own == attention.GROUPED else own))
    try:
        yield
    finally:
        network.set_attn_implementation(own)


@contextmanager
def contiguous_head(network: Any) -> Iterator[None]:
    """Within the block the head is given a contiguous matrix.

    With the slice that `logits_to_keep` makes (`generate` does so for every prompt), a CPU copies the whole head once
    per row, and a peer looks far slower, and larger, than it needs to be.
    """
    head = network.get_output_embeddings()
    own = head.forward

    def forward(states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1]).contiguous()
        return nn.functional.linear(flat, head.weight, head.bias).view(*states.shape[:-1], -1)

    head.forward = forward
    try:
        yield
    finally:
        head.forward = own


class SftPeer:
    """Fits adapters on one loaded model, any number of times."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model

    def fit(self, examples: Sequence[SupervisedTokens], chosen: TrainSettings, seed: int, folder: Path) -> float:
        """Fit one adapter, save it, take it off again; the mean training loss."""
        from datasets import Dataset, disable_progress_bars  # noqa: PLC0415 - heavy imports, late
        from transformers import PrinterCallback  # noqa: PLC0415
        from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

        disable_progress_bars()

        # PiSSA changes the base weights, all others leave them
        network = copy.deepcopy(self.model.network) if chosen.adapter.family == "pissa" else self.model.network
        with tempfile.TemporaryDirectory() as scratch, console.library_noise_muted(), library_forms(network):
            trainer = SFTTrainer(
                network,
                args=SFTConfig(
                    output_dir=scratch, per_device_train_batch_size=chosen.batch_size, num_train_epochs=chosen.epochs,
                    learning_rate=chosen.lr, weight_decay=chosen.weight_decay, warmup_steps=chosen.warmup_steps,
                    lr_scheduler_type="linear", max_grad_norm=chosen.clip_norm, max_length=chosen.max_length,
                    gradient_checkpointing=False, bf16=self.model.dtype == torch.bfloat16,
                    use_cpu=self.model.device.type == "cpu", packing=False, completion_only_loss=True,
                    report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                    dataloader_pin_memory=False, seed=seed, train_sampling_strategy="group_by_length",
                ),
                train_dataset=Dataset.from_list([_as_record(one) for one in examples]),
                processing_class=self.model.chat.tokenizer,
                peft_config=peft_config(network, chosen),
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            loss = float(trainer.train().training_loss)
            trainer.model.save_pretrained(str(folder))
            trainer.model.unload()
        return loss


def peft_config(network: Any, chosen: TrainSettings) -> peft.PeftConfig:
    """PEFT's configuration of a family on the layers and modules that ours has."""
    adapter = chosen.adapter
    prefix, blocks = architecture.decoder_layers(network)
    layers = architecture.layer_slice(len(blocks), *adapter.layers)
    sites = architecture.sites(network, layers)
    common = {
        "task_type": "CAUSAL_LM", "target_modules": sorted({site.kind for site in sites}),
        "layers_to_transform": list(layers), "layers_pattern": prefix.rsplit(".", 1)[-1],
    }  # fmt: skip
    low_rank = {"r": adapter.rank, "lora_alpha": adapter.lora_alpha}
    match adapter.family:
        case "lora":
            return peft.LoraConfig(**common, **low_rank)
        case "dora":
            return peft.LoraConfig(**common, **low_rank, use_dora=True)
        case "pissa":
            return peft.LoraConfig(**common, **low_rank, init_lora_weights="pissa")
        case "delora":
            return peft.DeloraConfig(**common, r=adapter.rank, delora_lambda=adapter.delora_lambda)
        case "oft":
            return peft.OFTConfig(**common, r=0, oft_block_size=adapter.block_size)
        case "ia3":  # has no layer slice: modules are named in full
            scaled = [site.module for site in sites if set(site.roles) & {"k", "v", "down"}]
            fed = [site.module for site in sites if "down" in site.roles]
            return peft.IA3Config(task_type="CAUSAL_LM", target_modules=scaled, feedforward_modules=fed)
    raise ValueError(f"no peer for the family {adapter.family}")


def _as_record(example: SupervisedTokens) -> dict[str, list[int]]:
    ids, prompt = example
    return {"input_ids": ids, "completion_mask": [0] * prompt + [1] * (len(ids) - prompt)}


class PeftScorer:
    """Choices under a LoRA adapter whose scale is set per strength; rows sorted by length, logits of the last position.

    At strength 0 the adapter is off; `repaired`: within `contiguous_head`.
    """

    def __init__(self, network: peft.PeftModel) -> None:
        self.network = network.eval()
        self._layers = [module for module in network.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        self._scales = [dict(module.scaling) for module in self._layers]

    @torch.no_grad()
    def score(
        self, tokens: Sequence[list[int]], answers: Sequence[list[int]], alphas: Sequence[float], batch: int,
        repaired: bool = True,
    ) -> dict[float, Tensor]:  # fmt: skip
        """Log-ratio of the two groups of answer tokens after every row, by strength."""
        network = self.network.get_base_model()
        with library_forms(network), contiguous_head(network) if repaired else nullcontext():
            return {alpha: self._under(alpha, tokens, answers, batch) for alpha in alphas}

    def _under(self, alpha: float, tokens: Sequence[list[int]], answers: Sequence[list[int]], batch: int) -> Tensor:
        for module, scales in zip(self._layers, self._scales, strict=True):
            module.scaling = {name: alpha * value for name, value in scales.items()}
        order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
        values = torch.empty(len(tokens))
        with nullcontext() if alpha else self.network.disable_adapter():
            for at in range(0, len(order), batch):
                chosen = order[at : at + batch]
                inputs = left_padded([tokens[i] for i in chosen], self.network.device)
                logits = self.network(**inputs, use_cache=False, logits_to_keep=1).logits
                values[chosen] = log_ratios(logits.reshape(len(chosen), -1), answers).cpu()
        return values


def log_ratios(logits: Tensor, answers: Sequence[list[int]]) -> Tensor:
    """Log p(first answer) - log p(second) of logits (rows x vocabulary), fp32; answers are single tokens."""
    logp = logits.float().log_softmax(-1)
    return logp[:, answers[0]].logsumexp(-1) - logp[:, answers[1]].logsumexp(-1)


def left_padded(rows: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Ids, mask and positions of a batch whose rows end together."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
