"""Set the interpreter mode before Triton is imported; seeds; fixtures that all tests may use."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

import random
import signal
from collections.abc import Iterator
from pathlib import Path

from data import outputs

import numpy as np
import pytest

from tests.crash import STAGES, Server
from tests.tiny import Tiny, make_tiny

torch.set_num_threads(1)  # as the processes of tests/crash.py: bits depend on it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords also hold the folder's name
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def fixed_state() -> Iterator[None]:
    """Every test starts from the same random state; its signals and claims are undone."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    outputs.release()
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder of raw public data sets: $REAL_DATA, else ../shared/data beside the checkout."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("REAL_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set REAL_DATA to a folder of raw data sets")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tokenizer, small random models and a few records of every kind, as files. Do not modify."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def whole(
    server: Server, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, int]]:
    """An uninterrupted run of each stage, and the number of its file operations."""
    runs = {}
    for stage in STAGES:
        out = tmp_path_factory.mktemp("whole") / stage
        run = server.run(stage, tiny.args(stage, out))
        assert run.code == 0, run.stderr
        runs[stage] = out, run.operations
    return runs
