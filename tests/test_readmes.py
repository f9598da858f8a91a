"""Every command of the READMEs, as bash reads it, run at a small size in a copy; and what --help of a script prints."""
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import ENVIRONMENT, ROOT

Figure = pytest.importorskip("matplotlib.figure").Figure
pytestmark = [pytest.mark.full, pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork has torch imported")]
READMES = ("README.md", "examples/README.md", "experiments/README.md", "support/README.md")
SIZES = {   # later flags win
    "train.py": "--batch-size=2 --minibatch-size=2 --max-new-tokens=8 --eval-size=2",
    "lld.py": "--questions=1 --max-sequences=32 --sweep", "tokens.py": "--questions=1 --max-sequences=32",
    "ablations.py": "--seeds=1 --steps=1"}
# Their own tests run these; here their --help must know the flags
ELSEWHERE = ("overhead.py", "trl_nthr.py", "make_tiny.py", "make_stack.py", "smollm2.py")
STAND_INS = ("my/folder", "models/smollm2-135m-instruct", "Qwen/Qwen2.5-0.5B-Instruct", "runs/at-15", "runs/tiny-trl",
             "runs/two")                                                       # models that a reader has by then


def commands(readme):
    """[[program, argument, ...]] of the bash blocks of a README, in the order in which bash would run them."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", (ROOT / readme).read_text(encoding="utf-8"), re.S | re.M)
    record = "".join(f'{name}() {{ printf "%s\\x1f" {name} "$@"; printf "\\x1e"; }}\n'
                     for name in ("python", "pip", "torchrun", "accelerate"))
    script = subprocess.run(["bash", "-euc", record + "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    return [line.split("\x1f")[:-1] for line in script.stdout.split("\x1e")[:-1]]


def small(script, arguments):
    """The arguments with those of a small size behind them, and with data that is here."""
    arguments = ["my.jsonl" if value == "gsm8k" else value for value in arguments]
    arguments = [path for value in arguments for path in (sorted(glob(value)) if "*" in value else [value])]
    sizes = SIZES.get(script.name, "").split() + ["--layer=0"] * ("--layer" in arguments)
    if script.name == "train.py":
        evaluates = "--eval-only" in arguments
        sizes = [size for size in sizes if not (evaluates and "batch" in size)]
        sizes += ["--steps=2"] * (not evaluates and "--keep-checkpoints 25" not in " ".join(arguments))
        sizes += ["--data=my.jsonl"] * any("Qwen" in argument for argument in arguments)
    return [*arguments, *sizes]


class Finished:
    """Stands in for a training run of ablations.py: it has ended when it starts, with invented metrics."""
    returncode = 0

    def __init__(self, command, **_):
        folder = Path(command[-1].partition("=")[2])
        lines = [{"step": 0, "eval_accuracy": 0.5}, {
            "step": 1, "eval_accuracy": 0.6, **dict.fromkeys(("success_rate", "delta_mean", "delta_nonpositive_share",
                                                              "selected_share", "clip_share"), 0.1)}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.json").write_text(json.dumps({"method": folder.name}))

    def poll(self):
        return 0

    terminate = wait = kill = poll


def run(tree, script, arguments, output):
    """The script, with the modules of the tree, in this process, which has imported torch already."""
    sys.stdout = sys.stderr = open(output, "w", encoding="utf-8")
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(str(ROOT)) and name != __name__:
            del sys.modules[name]
    others = (path for path in sys.path if not path.startswith(str(ROOT)))
    sys.path[:] = [str((tree / script).parent), str(tree), *others]
    sys.argv = [str(script), *arguments]
    torch.set_num_threads(1)
    if script.name == "ablations.py":
        subprocess.Popen = Finished
    Figure.savefig = lambda figure, path, **_: Path(path).touch()              # drawing takes most of the time
    runpy.run_path(str(tree / script), run_name="__main__")


def run_in_a_fork(*arguments):
    """The exit code."""
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    process.join(300)
    process.kill()
    return process.exitcode


@cache
def help_of(script):
    """What it prints for --help in 80 columns, started from another folder; no package may warn of a change to come."""
    result = subprocess.run([sys.executable, "-W", "error::FutureWarning", ROOT / script, "--help"],
                            cwd=tempfile.gettempdir(), env={**ENVIRONMENT, "COLUMNS": "80"}, text=True,
                            capture_output=True, timeout=120, encoding="utf-8")
    assert result.returncode == 0, (script, result.stderr)
    return result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository with what its READMEs leave to the reader: models, data, a reward and a rule."""
    folder = tmp_path_factory.mktemp("readmes") / "repository"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "models", "results"))
    (folder / "experiments" / "results").mkdir()
    (folder / "check.py").write_text("def is_right(response, answer):\n    return len(response) % 2\n")
    (folder / "ar.py").write_text("def ar(advantages, *_):\n    return advantages\n")
    for model in STAND_INS:
        shutil.copytree(ROOT / "tiny", folder / model)
    for name in ("my.jsonl", "test.jsonl"):
        shutil.copy(ROOT / "tiny" / "test.jsonl", folder / name)
    torch.optim.AdamW(AutoModelForCausalLM.from_pretrained(folder / "tiny").parameters())      # imports for every fork
    return folder


@pytest.mark.parametrize("readme", READMES)
def test_every_command_of_the_readme_runs(readme, tree, monkeypatch):
    monkeypatch.chdir(tree)
    for program, *arguments in commands(readme):
        line = " ".join([program, *arguments])
        if program == "pip":
            assert all((tree / arguments[i + 1]).is_file() for i, flag in enumerate(arguments) if flag == "-r"), line
            continue
        script = next((Path(argument) for argument in arguments if argument.endswith(".py")), None)
        assert script is None or (tree / script).is_file(), line               # None: python -m pytest
        if script is None or script.name == "trl_nthr.py" and not find_spec("trl"):
            continue
        given = arguments[arguments.index(str(script)) + 1:]
        if script.name in ELSEWHERE:
            known = help_of(script)
            assert not [flag for flag in given if flag.startswith("--") and not re.search(rf"{flag}\b", known)], line
        else:
            output = tree / "output.txt"
            code = run_in_a_fork(tree, script, small(script, given), output)
            assert code == 0, f"{line}:\n{output.read_text(encoding='utf-8')[-2000:]}"


def test_every_script_starts_from_another_folder_and_its_help_fits_80_columns():
    shared = {ROOT / "experiments" / name for name in ("multipliers.py", "common.py", "files.py")}       # no scripts
    scripts = {ROOT / "train.py", *(ROOT / "experiments").glob("*.py"), *(ROOT / "tiny").glob("make_*.py")} - shared
    assert len(scripts) == 10
    for script in scripts:
        text = help_of(script.relative_to(ROOT))
        assert "--out" in text and not [row for row in text.splitlines() if len(row) > 80], (script, text)
