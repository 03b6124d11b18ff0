"""Shared fixtures: tiny random models of several architectures, made once per session; shapes are checked."""

import os

os.environ.setdefault("BEARTYPE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: threads would only fight
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

from ws.model import loading
from ws.model.loading import ChatModel
from ws.pocket import tiny

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
"""Public data sets that some loaders are tested on; tests skip where the folder is absent."""


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved random model with tokenizer per architecture, four layers each."""
    root = tmp_path_factory.mktemp("models")
    for architecture in tiny.ARCHITECTURES:
        tiny.make(architecture, root / f"tiny-{architecture}", layers=4)
    return {architecture: root / f"tiny-{architecture}" for architecture in tiny.ARCHITECTURES}


@pytest.fixture(scope="session", params=list(tiny.ARCHITECTURES))
def any_model(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> ChatModel:
    """The random model of each architecture in turn; tests must leave it as they found it."""
    return loading.load(str(tiny_folders[request.param]))


@pytest.fixture(scope="session")
def qwen(tiny_folders: dict[str, Path]) -> ChatModel:
    """The random Qwen3 model; tests must leave it as they found it."""
    return loading.load(str(tiny_folders["qwen3"]))
