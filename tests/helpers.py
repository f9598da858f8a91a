"""What several files of tests share: train.py as its users run it, small models and data, and reading what it wrote."""
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
               "COLUMNS": "200", "NO_COLOR": "1"}
WALL_CLOCK = ("seconds", "tokens_per_second", "peak_memory_gib")
SIZES = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0)


def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags)]


def run(*flags, cwd, check=True):
    """train.py in a subprocess: for exit codes and streams."""
    result = subprocess.run(command(*flags), cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, timeout=300,
                            stdin=subprocess.DEVNULL)
    assert not check or result.returncode == 0, result.stderr
    return result


def run_here(*flags):
    """train.py in this process, which saves the seconds of its imports.

    It is read anew each time, so that it takes patched functions of the modules and of support/. Signal handlers,
    threads and sys.argv are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, argv = torch.get_num_threads(), sys.argv
    torch.set_num_threads(1)
    sys.argv = ["train.py", *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_functions():
    """{name: what train.py defines}, without running it."""
    return runpy.run_path(str(ROOT / "train.py"))


def error_of(*flags):
    """The message that train.py ends with: one line, for an exit code of 1."""
    with pytest.raises(SystemExit) as caught:
        run_here(*flags)
    message = caught.value.code
    assert isinstance(message, str), f"exit code {message}"                    # str: on stderr, with exit code 1
    assert message.startswith("error: ") and "\n" not in message and len(message) < 600, message
    return message


def not_json(constant):
    raise AssertionError(f"{constant} is not JSON")


def read_lines(path):
    return [json.loads(line, parse_constant=not_json) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(folder):
    return read_lines(folder / "metrics.jsonl")


def without_wall_clock(rows):
    return [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in rows]


def weights_of(folder):
    return load_file(folder / "checkpoint" / "model.safetensors")


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(folder, whole):
    """Two runs have the same logs, line by line but for the wall clock, and learned the same."""
    assert without_wall_clock(metrics_of(folder)) == without_wall_clock(metrics_of(whole))
    assert read_lines(folder / "samples.jsonl") == read_lines(whole / "samples.jsonl")
    assert same_weights(folder, whole)
    assert not list(folder.glob("*.tmp"))                                      # nothing half-written is left


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def tiny_rows(name, count):
    return [json.loads(line) for line in (ROOT / "tiny" / name).read_text().splitlines()[:count]]


def small_flags(folder, *flags):
    """Flags of the smallest run that still learns something: 24 problems, 8 a step, 8 responses each; then `flags`."""
    for name in ("train.jsonl", "test.jsonl"):
        write(folder / name, "".join(json.dumps(row) + "\n" for row in tiny_rows(name, 24)))
    return ["--data", folder / "train.jsonl", "--eval-data", folder / "test.jsonl", "--eval-size", 8,
            "--batch-size", 8, "--minibatch-size", 8, "--group-size", 8, "--max-new-tokens", 40, "--device", "cpu",
            "--dtype", "float32", *flags]


def save_random_model(config, folder):
    """A model of random weights as a folder, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.2)                   # some tokens likelier than others
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tiny").save_pretrained(folder)
    return folder


def wrong_endings(main, cases):
    """{flags: how main(flags) ended} of those `cases`, (flags, words), that did not end in one line with the words."""
    wrong = {}
    for flags, words in cases:
        try:
            main([str(flag) for flag in flags])
            ending = "no error"
        except SystemExit as stop:
            ending = stop.code
        one_line = isinstance(ending, str) and ending.startswith("error: ") and "\n" not in ending
        if not (one_line and words in ending):
            wrong[" ".join(map(str, flags))] = ending
    return wrong
