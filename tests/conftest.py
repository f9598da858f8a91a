"""Makes the top-level modules importable from any working directory, and the tests light on shared machines."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: a run of several minutes, skipped unless `-m soak` asks for it")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("soak") and "soak" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="takes several minutes: python -m pytest -m soak"))
