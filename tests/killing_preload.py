"""What the server of `killing` imports before it forks commands."""

import importlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("BEARTYPE", None)  # as users run it, and quicker

for _name in ("torch", "transformers", "peft", "polars", "scipy.stats", "matplotlib.figure", "gguf",
              "ws.commands.cli", "ws.runs.sweep", "ws.runs.evaluate", "ws.comparing.compare", "ws.comparing.page",
              "transformers.models.qwen3.modeling_qwen3", "peft.tuners.lora"):  # fmt: skip
    importlib.import_module(_name)
