"""Makes the top-level modules importable from any working directory, and the tests light on shared machines."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
