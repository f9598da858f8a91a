"""Makes the top-level modules importable from any working directory, and the tests light on shared machines."""
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")                                   # before huggingface_hub is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked `full`, in 15-25 minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a long test, run only with `python -m pytest --all`")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="a long test: python -m pytest --all"))
