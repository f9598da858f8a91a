"""What happens to real runs and real files: each fault is injected, and what must be left is checked.

 1. kill -9                                  7. degenerate rollouts
 2. Ctrl-C and SIGTERM                       8. hostile data and responses
 3. full disks and write errors              9. properties of nthr.py
 4. damaged and forged checkpoints          10. a long run: python -m pytest -m soak -s tests/test_faults.py
 5. two processes on one folder             11. supply chain
 6. losses that are not finite

Runs are small ones of the embedded model, or of models that can say one thing only; the yardstick of 1 to 6 is the same
run without a fault. Out of memory is injected in test_real_models.py."""
import ast
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, Qwen2Config

import reward
import train
from nthr import nthr_advantages, nthr_scores, nthr_scores_pairwise, nthr_threshold
from reward import extract_answer, is_equivalent, math_reward
from test_nthr import eq7
from test_real_models import SIZES, TOKENIZER, save
from test_reward import DIFFERENT, EQUAL
from test_train import (ENVIRONMENT, METRICS, ROOT, SAMPLE_METRICS, UPDATE_METRICS, command, error_of, metrics_of,
                        read_lines, run, run_here, same_weights, tiny_rows, trainer_state, weights_of,
                        without_wall_clock, write)

sys.path.insert(0, str(ROOT / "experiments"))

import ablations  # noqa: E402
import curves  # noqa: E402

resource = pytest.importorskip("resource")                                     # Linux and macOS

STEPS = 5


# ------------------------------------------------------------------------------------------------------------ helpers

@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a run whose every step has several updates, and every second one an evaluation and a checkpoint."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("train.jsonl", "test.jsonl"):
        write(folder / name, "".join(json.dumps(row) + "\n" for row in tiny_rows(name, 24)))
    return ["--data", folder / "train.jsonl", "--eval-data", folder / "test.jsonl", "--eval-size", 6, "--steps", STEPS,
            "--batch-size", 8, "--minibatch-size", 4, "--group-size", 8, "--max-new-tokens", 40, "--eval-every", 2,
            "--save-every", 2, "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(*flags, "--out", folder)
    assert all(row["updates"] for row in metrics_of(folder)[1:])
    return folder


def assert_same(folder, whole):
    """The logs are those of the other run, line by line but for the wall clock, and so is what was learned."""
    assert [row["step"] for row in metrics_of(folder)] == list(range(STEPS + 1))
    assert without_wall_clock(metrics_of(folder)) == without_wall_clock(metrics_of(whole))
    assert read_lines(folder / "samples.jsonl") == read_lines(whole / "samples.jsonl")
    assert same_weights(folder, whole)
    assert not list(folder.glob("*.tmp"))                                      # nothing half-written is left


def stops(*flags):
    """(exit code or message, what was printed) of a run that ends early."""
    with pytest.raises(SystemExit) as caught:
        run_here(*flags)
    return caught.value.code


def continue_as_printed(text):
    """Runs the command that a message gives."""
    words = shlex.split(text[text.index("--resume"):])
    run_here(*words[:4 if "--reward" in words[:3] else 2])


def hook(monkeypatch, name, at_step, act):
    """Calls act() before train's function of this name, in this step only (of several calls, before the first)."""
    original, seeds, now = getattr(train, name), train.step_seed, [0]

    def follow(args, step, *rest):
        now[0] = max(now[0], step)
        return seeds(args, step, *rest)

    def hooked(*args, **kwargs):
        if now[0] == at_step:
            now[0] = math.inf
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "step_seed", follow)
    monkeypatch.setattr(train, name, hooked)


# --------------------------------------------------------------------------------------------------------- 1. kill -9

PHASES = ("generate", "update", "evaluate", "save_checkpoint")


def killed_run(flags, phase, visit, delay):
    """In a process of its own: a run that is killed so many seconds after it begins this phase for the visit-th time."""
    original, visits = getattr(train, phase), itertools.count(1)

    def kill():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(*args, **kwargs):
        if next(visits) == visit:
            threading.Thread(target=kill).start()                              # an exit would wait for it
        return original(*args, **kwargs)

    setattr(train, phase, watched)
    run_quietly(flags)


def run_quietly(flags):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.train(train.parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def processes():
    """Processes that start at once: copies of one that has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_faults"])
        yield context


def in_process(processes, function, *args):
    process = processes.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("chain", range(10))
def test_a_run_killed_three_times_at_random_moments_ends_like_any_other(chain, flags, whole, processes, tmp_path):
    """30 kills: each chain kills a run in three of the four phases, some milliseconds after it began one of them."""
    generator, folder = random.Random(chain), tmp_path / "run"
    for phase, visit in zip(generator.sample(PHASES, 3), (generator.choice((1, 2)), 1, 1)):
        resumed = (folder / "config.json").is_file()
        assert in_process(processes, killed_run, ["--resume", folder] if resumed else [*flags, "--out", folder], phase,
                          visit, generator.uniform(0, 0.05)) == -signal.SIGKILL
    assert in_process(processes, run_quietly, ["--resume", folder]) == 0
    assert_same(folder, whole)


def saving_that_dies(folder, operation, made):
    """In a process of its own: saves step 3 into the folder, and is killed before this file operation of it."""
    args = train.parse_args(["--out", "unused", "--keep-checkpoints", "2"])
    args.out, left = str(folder), [operation]
    model, tokenizer = (kind.from_pretrained(ROOT / "tiny") for kind in (AutoModelForCausalLM, AutoTokenizer))
    optimizer = torch.optim.AdamW(model.parameters())

    def dies(event, details):
        writes = event == "open" and str(folder) in str(details[0]) and details[1] not in ("r", "rb")
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            made.value += 1
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    for step in (1, 2, 3):
        if step == 3:
            sys.addaudithook(dies)
        train.save_checkpoint(model, tokenizer, optimizer, {**train.START, "step": step}, args)


def test_a_kill_before_any_file_operation_of_saving_leaves_a_whole_newest_checkpoint(processes, tmp_path):
    args = train.parse_args(["--out", "unused"])
    made, steps = processes.Value("i", 0), []
    assert in_process(processes, saving_that_dies, tmp_path / "0", 0, made) == 0
    for operation in range(1, made.value + 1):
        folder = args.out = tmp_path / str(operation)
        assert in_process(processes, saving_that_dies, folder, operation, processes.Value("i", 0)) == -signal.SIGKILL
        newest = train.find_checkpoint(args)                                   # ends with an error if it is not whole
        steps.append(torch.load(newest / "trainer.pt", weights_only=True)["state"]["step"])
        assert AutoModelForCausalLM.from_pretrained(newest) and AutoTokenizer.from_pretrained(newest)
        assert not any(train.fault(path, args) for path in train.checkpoints(folder))  # older ones, too
    assert made.value > 20 and steps == sorted(steps) and set(steps) == {2, 3}     # the old one, from a rename on the new


# ---------------------------------------------------------------------------------------------- 2. Ctrl-C and SIGTERM

CTRL_C, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize("number, name, step, times, reached", [
    (CTRL_C, "evaluate", 0, 1, 0), (TERM, "generate", 1, 1, 0), (CTRL_C, "generate", 3, 1, 2),
    (TERM, "old_policy_pass", 3, 1, 2), (CTRL_C, "nthr_advantages", 4, 1, 3), (TERM, "update", 4, 1, 3),
    (CTRL_C, "step_likelihood_change", 3, 1, 3), (TERM, "evaluate", 4, 1, 4), (CTRL_C, "save_checkpoint", 4, 1, 4),
    (TERM, "append", 3, 1, 3), (CTRL_C, "step_likelihood_change", 3, 2, 2), (TERM, "peak_memory", 3, 1, 3)])
def test_a_signal_in_any_phase_saves_what_is_whole_and_says_how_to_continue(number, name, step, times, reached, flags,
                                                                            whole, tmp_path, monkeypatch, capfd):
    """At once, unless the weights have moved: then after the step, or with a second signal at the last checkpoint."""
    hook(monkeypatch, name, step, lambda: [os.kill(os.getpid(), number) for _ in range(times)])
    assert stops(*flags, "--out", tmp_path / "run") == 128 + number
    printed, waits = capfd.readouterr()
    assert f"stopped after step {reached}; continue with: python train.py --resume {tmp_path / 'run'}" in printed
    assert ("finishing this step and saving it" in waits) == (reached == step > 0 or times == 2)
    assert trainer_state(tmp_path / "run")["state"]["step"] == reached
    monkeypatch.undo()
    continue_as_printed(printed)
    assert_same(tmp_path / "run", whole)


def lines_of_a_step(record):
    """A trace function that calls record(number) before each line of train.run in step 2, from 0."""
    seen = itertools.count()

    def trace(frame, event, _):
        if frame.f_code is train.run.__code__:
            if event == "line" and frame.f_locals.get("step") == 2:
                record(next(seen))
            return trace

    return trace


@pytest.mark.parametrize("line", range(0, 14))
def test_a_signal_before_any_line_that_keeps_the_books_leaves_the_weights_of_the_step(line, flags, tmp_path, capfd):
    sys.settrace(lines_of_a_step(lambda number: number == line and os.kill(os.getpid(), CTRL_C)))
    try:
        assert stops(*flags, "--save-every", 0, "--eval-every", 3, "--out", tmp_path / "run") == 130
    finally:
        sys.settrace(None)
    reached = trainer_state(tmp_path / "run")["state"]["step"]
    assert f"stopped after step {reached};" in capfd.readouterr().out and reached in (1, 2)
    assert (reached == 1) == (line < 2)                                        # the third line is after the update
    run_here(*flags, "--steps", reached, "--save-every", 0, "--eval-every", 3, "--out", tmp_path / "straight")
    assert same_weights(tmp_path / "run", tmp_path / "straight")


def test_signals_while_a_checkpoint_is_written_wait_until_it_is(flags, whole, tmp_path, monkeypatch, capfd):
    """torch.save would make an error of its own of an interrupt."""
    original, calls = torch.save, itertools.count()

    def save(content, file):
        class Interrupted:
            flush = file.flush

            def write(self, data):
                if interrupts:
                    os.kill(os.getpid(), interrupts.pop())
                return file.write(data)

        interrupts = [TERM, CTRL_C] if next(calls) == 2 else []                # of step 4, after 0 and 2
        original(content, Interrupted())

    monkeypatch.setattr(torch, "save", save)
    assert stops(*flags, "--out", tmp_path / "run") == 128 + CTRL_C            # the first that came
    assert "stopped after step 4" in capfd.readouterr().out
    monkeypatch.undo()
    run_here("--resume", tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("kind", ["signal", "fault"])
def test_what_ended_a_run_is_told_even_if_its_last_step_cannot_be_saved(kind, flags, tmp_path, monkeypatch, capfd):
    def full(*args):
        raise OSError(28, "No space left on device")

    def act():
        monkeypatch.setattr(torch, "save", full)
        os.kill(os.getpid(), TERM) if kind == "signal" else 1 // 0

    hook(monkeypatch, "update", 4, act)
    if kind == "fault":
        with pytest.raises(ZeroDivisionError) as caught:
            run_here(*flags, "--out", tmp_path / "run")
        assert "No space left on device" in str(caught.value.__context__)
        assert "this run broke" in capfd.readouterr().err
    else:
        message = error_of(*flags, "--out", tmp_path / "run", starts=True)
        assert "No space left on device" in message and "--resume" in message
    assert trainer_state(tmp_path / "run")["state"]["step"] == 2


def test_signals_mean_what_they_meant_when_a_run_is_over(flags, tmp_path):
    before = [signal.getsignal(number) for number in (CTRL_C, TERM)]
    train.train(train.parse_args([str(flag) for flag in (*flags, "--steps", 1, "--out", tmp_path / "run")]))
    assert [signal.getsignal(number) for number in (CTRL_C, TERM)] == before


def test_a_signal_before_the_first_step_leaves_nothing_behind(flags, tmp_path, monkeypatch):
    hook(monkeypatch, "load_model", 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run_here(*flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_signal_after_the_last_step_does_not_undo_it(flags, whole, tmp_path, monkeypatch):
    hook(monkeypatch, "evaluate", STEPS, lambda: os.kill(os.getpid(), signal.SIGINT))
    run_here(*flags, "--out", tmp_path / "run")                                # done: there is nothing to continue
    assert_same(tmp_path / "run", whole)


def test_a_fault_in_a_reward_of_the_users_own_shows_its_traceback_and_loses_nothing(flags, tmp_path, capsys):
    sound = "def right(response, answer):\n    return len(response) % 2\n"
    file = write(tmp_path / "mine.py", sound)
    flags = [*flags, "--reward", f"{file}:right"]
    run_here(*flags, "--out", tmp_path / "whole")
    calls = 6 + 2 * 64 + 6                                                     # evaluation, two steps, evaluation
    write(file, "calls = []\n\n\ndef right(response, answer):\n    calls.append(1)\n"
                f"    return 1 // (len(calls) != {calls + 5}) and len(response) % 2\n")
    train.run_file.cache_clear()
    with pytest.raises(ZeroDivisionError):
        run_here(*flags, "--save-every", 0, "--out", tmp_path / "run")
    printed = capsys.readouterr().err
    assert f"this run broke; python train.py --resume {tmp_path / 'run'} --reward {file}:right continues" in printed
    assert trainer_state(tmp_path / "run")["state"]["step"] == 2
    write(file, sound)
    train.run_file.cache_clear()
    continue_as_printed(printed)
    assert_same(tmp_path / "run", tmp_path / "whole")


# ------------------------------------------------------------------------------------- 3. full disks and write errors

@contextmanager
def files_of_at_most(size):
    """Writing more to any file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size() if callable(size) else size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name, step, size, file, reached", [
    ("save_checkpoint", 4, 10 ** 6, "checkpoint", 2), ("save_checkpoint", 4, 3 * 10 ** 6, "checkpoint", 2),
    ("save_checkpoint", 4, 10, "checkpoint", 2), ("save_checkpoint", 0, 10 ** 6, "checkpoint", None),
    ("append", 3, "metrics.jsonl", "metrics.jsonl", 2), ("append", 4, "samples.jsonl", "samples.jsonl", 2)])
def test_a_file_that_cannot_be_written_is_named_and_the_last_checkpoint_stays(name, step, size, file, reached, flags,
                                                                              whole, tmp_path, monkeypatch, capsys):
    """The weights need 2 MB, the optimizer 4 MB; of a line of a log, half comes to the disk."""
    folder = tmp_path / "run"
    with files_of_at_most(size if isinstance(size, int) else lambda: (folder / size).stat().st_size + 60) as limit:
        hook(monkeypatch, name, step, limit)
        message = error_of(*flags, "--out", folder, starts=True)
    monkeypatch.undo()
    assert f"cannot write {folder / file}: " in message and "File too large" in message
    assert not list(folder.glob("checkpoint.*"))                               # its room is free again
    assert reached is None or trainer_state(folder)["state"]["step"] == reached
    continue_as_printed(message)
    assert_same(folder, whole)


def test_a_config_that_cannot_be_written_leaves_nothing_to_continue(flags, whole, tmp_path, capsys):
    with files_of_at_most(100) as limit:
        limit()
        message = error_of(*flags, "--out", tmp_path / "run", starts=True)
    assert "config.json" in message and message.endswith("start again")
    run_here(*flags, "--out", tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(flags, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        message = error_of(*flags, "--out", disk / "run", starts=True)         # three checkpoints of 2, 6 and 6 MB
        assert "No space left on device" in message and trainer_state(disk / "run")["state"]["step"] == 2
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        continue_as_printed(message)
        assert_same(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_evaluation_that_cannot_be_written_says_so(tmp_path, capsys):
    with files_of_at_most(100) as limit:
        limit()
        message = error_of("--eval-only", "--eval-size", 3, "--device", "cpu", "--out", tmp_path / "run", starts=True)
    assert "cannot write" in message and "answers.tmp" in message and message.endswith("start again")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_checkpoints_are_kept_the_newest_of_them_whole(keep, flags, whole, tmp_path):
    run_here(*flags, "--keep-checkpoints", keep, "--save-every", 1, "--out", tmp_path / "run")
    kept = train.checkpoints(tmp_path / "run")
    assert [path.name for path in kept] == ["checkpoint", "checkpoint-4", "checkpoint-3"][:keep]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint*")) == sorted(path.name for path in kept)
    for path, step in zip(kept, (5, 4, 3)):
        content = json.loads((path / "manifest.json").read_text())
        assert content["step"] == step == torch.load(path / "trainer.pt", weights_only=True)["state"]["step"]
        assert set(content["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}
        assert all(hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
                   for name, digest in content["files"].items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """The order of what reaches the disk: every file, then the folder, then the names; and the log before all that."""
    args, done = train.parse_args(["--out", "unused"]), []
    args.out = str(tmp_path)
    model, tokenizer = (kind.from_pretrained(ROOT / "tiny") for kind in (AutoModelForCausalLM, AutoTokenizer))
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync",
                        lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle))
    monkeypatch.setattr(Path, "rename", lambda self, to: done.append((str(self), str(to))) or rename(self, to))
    train.append(args, "metrics.jsonl", [{"step": 1}])
    train.save_checkpoint(model, tokenizer, torch.optim.AdamW(model.parameters()), dict(train.START), args)
    temporary, final, log = tmp_path / "checkpoint.tmp", tmp_path / "checkpoint", str(tmp_path / "metrics.jsonl")
    swap = done.index((str(temporary), str(final)))
    synced = set(done[:swap]) - {str(temporary / "manifest.tmp")}
    written = {str(temporary / path.name) for path in final.iterdir() if path.name != "manifest.json"}
    assert synced == written | {str(temporary), log} and done[0] == log
    assert str(temporary / "manifest.tmp") in done[:swap] and done[swap - 1] == str(temporary)
    assert str(tmp_path) in done[swap:]


# --------------------------------------------------------------------------------------------- 4. damaged checkpoints

@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """The folder of a run that was stopped after step 4: checkpoint (4) and checkpoint-2."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_here(*flags[:flags.index("--steps")], *flags[flags.index("--steps") + 2:], "--steps", 4, "--out", folder)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_model(path):
    shutil.copy(ROOT / "tiny" / "stack" / path.name, path)


def of_another_run(path):
    """A whole checkpoint, but of a run with another learning rate."""
    content = json.loads(path.read_text())
    content["flags"]["lr"] = 0.5
    path.write_text(json.dumps(content))


DAMAGE = [("model.safetensors", cut), ("model.safetensors", flip_a_bit), ("model.safetensors", of_another_model),
          ("model.safetensors", Path.unlink), ("trainer.pt", cut), ("trainer.pt", flip_a_bit),
          ("trainer.pt", Path.unlink), ("tokenizer.json", Path.unlink), ("config.json", of_another_model),
          ("manifest.json", Path.unlink), ("manifest.json", cut), ("manifest.json", of_another_run),
          ("manifest.json", lambda path: path.write_text("[]"))]


@pytest.mark.parametrize("name, damage", DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_named_and_the_newest_intact_one_offered(name, damage, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    damage(folder / "checkpoint" / name)
    message = error_of("--resume", folder, starts=True)
    assert f"{folder / 'checkpoint'} cannot be used" in message
    assert ("--lr 0.5, not 0.0001" if damage is of_another_run else name) in message
    assert f"the newest intact one is {folder}/checkpoint-2, of step 2: move {folder}/checkpoint away" in message
    assert (folder / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()


def test_the_offered_checkpoint_continues_to_the_same_end(stopped, whole, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    cut(folder / "checkpoint" / "model.safetensors")
    message = error_of("--resume", folder, starts=True)
    (folder / "checkpoint").rename(tmp_path / "away")
    assert "--resume" in message
    run_here("--resume", folder, "--steps", STEPS)
    assert_same(folder, whole)


def test_all_checkpoints_that_stand_before_the_intact_one_are_named(flags, tmp_path):
    folder = tmp_path / "run"
    run_here(*flags, "--steps", 3, "--save-every", 1, "--keep-checkpoints", 3, "--out", folder)
    for name in ("checkpoint", "checkpoint-2"):
        cut(folder / name / "trainer.pt")
    assert f"is {folder}/checkpoint-1, of step 1: move {folder}/checkpoint and {folder}/checkpoint-2 away" in error_of(
        "--resume", folder, starts=True)


@pytest.mark.parametrize("files, words", [
    ({"/dev/zero": "0"}, "its /dev/zero is missing"), ({"../config.json": "0"}, "its ../config.json is missing"),
    ({}, "its chat_template.jinja was not saved with it")])
def test_a_manifest_has_a_hash_for_each_file_of_its_folder_and_for_no_other(files, words, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    content = json.loads((folder / "checkpoint" / "manifest.json").read_text())
    write(folder / "checkpoint" / "manifest.json", json.dumps({**content, "files": files}))
    assert words in error_of("--resume", folder, "--steps", STEPS, starts=True)


def test_without_an_intact_checkpoint_nothing_is_offered(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    for path in train.checkpoints(folder):
        cut(path / "trainer.pt")
    assert "no older one is intact" in error_of("--resume", folder, starts=True)
    for path in train.checkpoints(folder):
        shutil.rmtree(path)
    assert "no checkpoint is left" in error_of("--resume", folder, starts=True)
    assert metrics_of(folder) == metrics_of(stopped)


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(stopped, whole, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(stopped / "config.json", tmp_path / "run")
    run_here("--resume", tmp_path / "run", "--steps", STEPS)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_other_problems_under_the_same_name_are_not_continued_with(flag, flags, tmp_path):
    data = shutil.copy(flags[flags.index(flag) + 1], tmp_path / "rows.jsonl")
    run_here(*flags, flag, data, "--steps", 2, "--out", tmp_path / "run")
    rows = read_lines(data)
    write(data, "".join(json.dumps(row) + "\n" for row in reversed(rows)))
    message = error_of("--resume", tmp_path / "run", "--steps", 3, starts=True)
    assert str(data) in message and "not those that the run began with" in message


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def forge(checkpoint, name, content):
    """Replaces a file of a checkpoint, with the hash that belongs to it."""
    torch.save(content, checkpoint / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    write(checkpoint / "manifest.json", json.dumps(manifest))


@pytest.mark.parametrize("kind", ["harmful", "other shapes", "no state", "no tensors"])
def test_a_forged_trainer_state_is_refused_and_runs_nothing(kind, stopped, tmp_path):
    folder, saved = shutil.copytree(stopped, tmp_path / "run"), trainer_state(stopped)
    if kind == "harmful":
        content = {**saved, "state": Harm(tmp_path / "harm")}
    elif kind == "other shapes":
        saved["optimizer"]["param_groups"][0]["params"].pop()
        content = saved
    else:
        content = {**saved, "state": {}} if kind == "no state" else [1, 2]
    forge(folder / "checkpoint", "trainer.pt", content)
    message = error_of("--resume", folder, "--steps", 5, starts=True)
    assert "trainer.pt cannot be used" in message and not (tmp_path / "harm").exists()


def test_a_model_that_is_pickled_is_refused_with_the_reason_and_not_loaded(flags, tmp_path):
    folder = shutil.copytree(ROOT / "tiny", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(Harm(tmp_path / "harm"), folder / "pytorch_model.bin")
    message = error_of("--model", folder, *flags, "--out", tmp_path / "run", starts=True)
    assert f"{folder} holds pickled weights only (pytorch_model.bin)" in message and "can run any code" in message
    assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()


def test_a_model_without_some_of_its_weights_is_refused(flags, tmp_path):
    """transformers would go on with random numbers in their place."""
    folder = shutil.copytree(ROOT / "tiny", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = error_of("--model", folder, *flags, "--out", tmp_path / "run", starts=True)
    assert f"{folder} has no weights for model.layers.1.mlp.up_proj.weight" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changed", [{"hidden_act": "strange"}, {"rope_parameters": {"rope_type": "strange"}}, {
    "num_hidden_layers": "3"}, {"model_type": ["qwen2"]}], ids=str)
def test_a_config_of_a_model_that_makes_no_sense_ends_in_one_line(changed, flags, tmp_path):
    folder = shutil.copytree(ROOT / "tiny", tmp_path / "model")
    write(folder / "config.json", json.dumps(json.loads((folder / "config.json").read_text()) | changed))
    message = error_of("--model", folder, *flags, "--out", tmp_path / "run", starts=True)
    assert str(folder) in message and not (tmp_path / "run").exists()


def test_code_that_a_runs_folder_names_as_its_reward_is_not_run_unasked(stopped, tmp_path):
    folder, harm = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "harm"
    file = write(folder / "reward.py", f"open({str(harm)!r}, 'w')\n\n\ndef reward(response, answer):\n    return 1\n")
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", json.dumps({**config, "reward": f"{file}:reward"}))
    assert f"add --reward {file}:reward if you trust it" in error_of("--resume", folder) and not harm.exists()
    train.parse_args(["--resume", str(folder), "--reward", f"{file}:reward"])
    assert harm.exists()


@pytest.mark.parametrize("change, words", [
    (lambda config: [1], "lacks"), (lambda config: {"steps": 3}, "lacks"),
    (lambda config: {**config, "lr": None}, "damaged"), (lambda config: {**config, "steps": [3]}, "damaged")])
def test_a_config_that_is_not_that_of_a_run_is_named(change, words, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    write(folder / "config.json", json.dumps(change(json.loads((folder / "config.json").read_text()))))
    message = error_of("--resume", folder)
    assert str(folder / "config.json") in message and words in message


def test_a_run_that_claims_to_be_an_evaluation_is_continued_all_the_same(stopped, whole, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", json.dumps({**config, "eval_only": True}))
    run_here("--resume", folder, "--steps", STEPS)
    assert_same(folder, whole)


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation", "_attn_implementation"])
def test_a_model_that_asks_for_code_from_the_hub_is_refused(key, flags, tmp_path):
    folder = shutil.copytree(ROOT / "tiny", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", json.dumps({**config, key: "someone/kernel"}))
    message = error_of("--model", folder, *flags, "--out", tmp_path / "run", starts=True)
    assert "asks for code from the Hub (someone/kernel), which is not run" in message


def test_a_damaged_line_in_the_middle_of_the_log_is_named(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    write(folder / "metrics.jsonl", "\n".join([*lines[:2], "\0" * 50, *lines[3:], ""]))
    before = (folder / "metrics.jsonl").read_bytes()
    assert f"{folder / 'metrics.jsonl'}, line 3 is damaged" in error_of("--resume", folder, "--steps", 5, starts=True)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", [lambda lines: lines[:2] + lines[3:], lambda lines: lines[:2] + lines[1:],
                                    lambda lines: [], lambda lines: lines[:3], lambda lines: lines[::-1]])
def test_a_log_that_lacks_a_step_or_has_one_twice_is_named(change, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    write(folder / "metrics.jsonl", "".join(change(lines)))
    message = error_of("--resume", folder, "--steps", 5, starts=True)
    assert f"{folder / 'metrics.jsonl'} does not have each of the steps 0 to 4 once" in message


# ------------------------------------------------------------------------------------- 5. two processes on one folder

def waits(flags, ready):
    """In a process of its own: a run that stays in its first evaluation."""
    train.evaluate = lambda *args: ready.set() or time.sleep(600)
    run_quietly(flags)


def test_a_second_process_on_the_same_folder_refuses_until_the_first_is_gone(flags, whole, processes, tmp_path):
    folder, ready = tmp_path / "run", processes.Event()
    first = processes.Process(target=waits, args=([*flags, "--out", folder], ready), daemon=True)
    first.start()
    assert ready.wait(60)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    message = error_of("--resume", folder, starts=True)
    assert f"another process is writing to {folder}" in message
    assert "already holds a run" in error_of(*flags, "--out", folder)
    assert "another process" in error_of("--eval-only", "--eval-size", 1, "--out", folder, starts=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    first.kill()
    first.join()
    run_here("--resume", folder)                                               # the lock died with its process
    assert_same(folder, whole)


# -------------------------------------------------------------------------------------- 6. losses that are not finite

def questions_of(args, problems, step):
    """The ids of the problems that a step draws: the same permutation for every pass over the data."""
    places = range((step - 1) * args.batch_size, step * args.batch_size)
    orders = [np.random.default_rng([args.seed, i // len(problems)]).permutation(len(problems)) for i in places]
    return [1 + int(order[i % len(problems)]) for order, i in zip(orders, places)]


@pytest.mark.parametrize("whose", ["loss", "gradient"])
def test_the_problems_of_a_skipped_update_are_named(whose, flags, tmp_path, monkeypatch):
    """A problem whose loss is NaN is found alone; of a gradient only the update is known, with all of its problems."""
    flags = [*flags, "--steps", 1, "--minibatch-size", 8]
    args = train.parse_args([str(flag) for flag in (*flags, "--out", "unused")])
    problems = train.load_problems(args.data)
    run_here(*flags, "--out", tmp_path / "sound")
    drawn = questions_of(args, problems, 1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    original, kept = train.policy_logprobs, []

    def poisoned(model, rollout, rows, args, return_hidden=False):
        values = original(model, rollout, rows, args, return_hidden)
        if not torch.is_grad_enabled():
            return values
        texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask)]
        kept[:] = sorted({drawn[[problems[i - 1]["problem"] in text for i in drawn].index(True)] for text in texts})
        bad = torch.tensor([problems[kept[0] - 1]["problem"] in texts[row] for row in rows.tolist()])[:, None]
        return torch.where(bad, values * (math.nan if whose == "loss" else 1) + (values * 0).sqrt(), values)

    monkeypatch.setattr(train, "policy_logprobs", poisoned)
    run_here(*flags, "--micro-batch-size", 1, "--out", tmp_path / "run")
    row = metrics_of(tmp_path / "run")[1]
    assert row["updates"] == 0 and row["skipped_updates"] == 1 and len(kept) == row["groups_kept"] > 1
    assert row["skipped_questions"] == (kept[:1] if whose == "loss" else kept)
    assert trainer_state(tmp_path / "run")["optimizer"]["state"] == {}
    sound = metrics_of(tmp_path / "sound")[1]
    assert (sound["updates"], sound["skipped_updates"], sound["skipped_questions"]) == (1, 0, [])


def test_three_skipped_updates_in_a_row_name_the_problems_of_these_three(flags, tmp_path, monkeypatch):
    original, calls = train.grpo_loss, itertools.count(1)
    flags = [*flags, "--minibatch-size", 8, "--micro-batch-tokens", 16384]     # one call an update, one update a step

    def broken(*args, **kwargs):
        loss, metrics = original(*args, **kwargs)
        factor = 1.0 if next(calls) == 2 else math.nan
        return loss * factor, {**metrics, "loss": metrics["loss"] * factor}

    monkeypatch.setattr(train, "grpo_loss", broken)
    message = error_of(*flags, "--out", tmp_path / "run", starts=True)
    rows = metrics_of(tmp_path / "run")
    assert [row["updates"] for row in rows[1:]] == [0, 1, 0, 0, 0] and rows[2]["skipped_questions"] == []
    blamed = sorted({number for row in rows[3:] for number in row["skipped_questions"]})
    assert f"with problems {', '.join(map(str, blamed))} of {flags[1]}" in message
    args = train.parse_args([str(flag) for flag in (*flags, "--out", "unused")])
    for row in rows[1:]:
        assert set(row["skipped_questions"]) <= set(questions_of(args, [None] * 24, row["step"]))
        assert len(row["skipped_questions"]) == (0 if row["updates"] else row["groups_kept"])
    assert trainer_state(tmp_path / "run")["state"]["step"] == 5
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())


# --------------------------------------------------------------------------------------------- 7. degenerate rollouts

RESULTS = ROOT / "tests" / "results"
METHODS = ("nthr", "grpo", "pos-only", "random")
PAD, EOS, LETTER = 0, 1, 20
LONGEST = 6                                                                    # --max-new-tokens


def certain(folder, *tokens):
    """A model that says these tokens with all of the probability, in equal parts, whatever came before.

    One entry of each embedding is so large that the head's input is nearly (√d, 0, ..., 0); the head reads it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(tie_word_embeddings=False, **SIZES))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 100
        model.get_output_embeddings().weight[:, 0] = 0
        model.get_output_embeddings().weight[list(tokens), 0] = 10             # logits 10 √32 = 57 and about 0
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"end": certain(folder / "end", EOS), "letter": certain(folder / "letter", LETTER),
            "padding": certain(folder / "padding", PAD), "end or letter": certain(folder / "either", EOS, LETTER),
            "any": save(Qwen2Config(tie_word_embeddings=False, **SIZES), folder / "any")}


def reward_file(folder, rule):
    """--reward for a function of n, how many responses were rewarded before this one."""
    file = folder / "reward.py"
    file.write_text(f"import itertools\n\ncounter = itertools.count()\n\n\ndef reward(response, answer):\n"
                    f"    n = next(counter)\n    return {rule}\n")
    return f"{file}:reward"


def flags_for(folder, reward, out, steps=2):
    """4 questions in 2 mini-batches, 4 responses each; evaluations reward 2 responses."""
    return ["--model", folder, "--data", ROOT / "tiny" / "train.jsonl", "--eval-data", ROOT / "tiny" / "test.jsonl",
            "--eval-size", 2, "--reward", reward, "--batch-size", 4, "--minibatch-size", 2, "--group-size", 4,
            "--max-new-tokens", LONGEST, "--micro-batch-tokens", 200, "--lr", 1e-3, "--kl-coef", 0.1, "--nll-coef", 0.1,
            "--steps", steps, "--delta-every", 1, "--eval-every", 0, "--save-every", 0, "--device", "cpu",
            "--dtype", "float32", "--out", out]


def assert_finite_or_null(value):
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_finite_or_null(part)
    if not isinstance(value, (dict, list)):
        assert value is None or isinstance(value, str) or math.isfinite(value)


def steps_of(folder):
    """The rows of metrics.jsonl after step 0, once every number in it and every weight is found finite."""
    rows = metrics_of(folder)
    assert_finite_or_null(rows)
    assert all(weight.isfinite().all() for weight in weights_of(folder).values())
    assert [row["step"] for row in rows] == list(range(len(rows)))
    for row in rows[1:]:
        assert set(row) == METRICS and not any(row[name] is None for name in SAMPLE_METRICS)
    return rows[1:]


def largest_move(folder, model):
    """By how much the weight that changed most did, between a model and a run's checkpoint."""
    before, after = load_file(model / "model.safetensors"), weights_of(folder)
    return max((before[name] - after[name]).abs().max().item() for name in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, longest, length", [
    ("end", LONGEST, 1), ("letter", LONGEST, LONGEST), ("padding", LONGEST, LONGEST), ("end or letter", LONGEST, None),
    ("any", LONGEST, None), ("any", 1, 1)])
def test_rewards_that_have_nothing_to_do_with_the_responses(name, longest, length, method, dtype, models, tmp_path):
    """Every second response is right: empty, cut off, one token again and again, decoded as "", one token long, any."""
    run_here(*flags_for(models[name], reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=1), "--method", method,
             "--dtype", dtype, "--max-new-tokens", longest)
    row, = steps_of(tmp_path / "run")
    assert row["groups_kept"] == 4 and row["success_rate"] == 0.5 and row["updates"] == 2
    for metric in UPDATE_METRICS:
        measured = method in ("nthr", "random") or metric not in ("tau", "eta", "selected_share")
        assert (row[metric] is not None) == measured, metric
    if name == "end or letter":
        assert 1 < row["response_length"] < LONGEST and 0 <= row["truncated_share"] < 1
    if length:
        assert row["response_length"] == length
    if name in ("end", "letter", "padding"):
        assert row["truncated_share"] == (name != "end")
        # π = 1 of what is sampled: no error e_y − π, so no score, no gradient, no likelihood to gain
        assert row["nll"] == row["kl"] == row["delta_mean"] == 0 and row["grad_norm"] < 1e-10
        assert not row["tau"] or abs(row["tau"]) < 1e-10
        assert largest_move(tmp_path / "run", models[name]) < 1e-9
    else:
        assert largest_move(tmp_path / "run", models[name]) > 0.9e-3           # AdamW's first step moves by lr


def test_the_padding_of_the_models_above_is_decoded_as_nothing(models):
    model = train.load_model(models["padding"], "cpu")
    assert train.generate(model, TOKENIZER, [[5, 6]], 3, LONGEST, seed=0).texts == [""] * 3


@pytest.mark.parametrize("group_size", [2, 64])
@pytest.mark.parametrize("method", METHODS)
def test_identical_responses_to_one_question_half_of_them_right(method, group_size, models, tmp_path, monkeypatch):
    """With p = 1/2, Â = ±1 and η = 0. At γ = 1 Eq. 1's loss is −(1 − what is left of the wrong ones) / 2.

    What is left: for pos-only nothing, for grpo all, else all but the selected share; the KL penalty is still 0."""
    generate = train.generate

    def same(model, tokenizer, prompts, size, *args, **kwargs):
        sampled = generate(model, tokenizer, prompts, size, *args, **kwargs)
        return sampled.select(torch.arange(len(prompts)).repeat_interleave(size) * size)

    monkeypatch.setattr(train, "generate", same)
    run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run"), "--method", method,
             "--batch-size", 1, "--minibatch-size", 1, "--group-size", group_size, "--nll-coef", 0.25)
    first, second = steps_of(tmp_path / "run")
    assert first["groups_kept"] == first["updates"] == second["updates"] == 1
    left = {"grpo": 1, "pos-only": 0}.get(method, 1 - (first["selected_share"] or 0))
    if method in ("nthr", "random"):                                           # s⁻ = s⁺, and τ is their mean
        assert first["eta"] == 0 and 0 < first["selected_share"] < 1
    assert first["loss"] == pytest.approx(-(1 - left) / 2 + 0.25 * first["nll"], abs=1e-5) and abs(first["kl"]) < 1e-6
    assert second["kl"] > 0 and largest_move(tmp_path / "run", models["any"]) > 0


@pytest.mark.parametrize("group_size", [2, 64])
@pytest.mark.parametrize("method", METHODS)
def test_one_question_per_batch_with_the_smallest_group_and_a_large_one(method, group_size, models, tmp_path):
    """The micro-batches hold only a part of the large group."""
    run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run"), "--method", method,
             "--batch-size", 1, "--minibatch-size", 1, "--group-size", group_size, "--micro-batch-tokens", 40)
    for row in steps_of(tmp_path / "run"):
        assert row["questions"] == row["groups_kept"] == row["updates"] == 1 and row["success_rate"] == 0.5
    assert largest_move(tmp_path / "run", models["any"]) > 0


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("method", ["nthr", "grpo"])
def test_batches_without_a_mixed_group_update_nothing_and_then_training_goes_on(method, right, models, tmp_path):
    """All wrong, or all right, for three steps with a checkpoint after them; then every second response is right."""
    sampled = 2 + 3 * 2 * 16 + 2                                               # evaluations, three steps of two rounds
    reward = reward_file(tmp_path, f"n % 2 if n >= {sampled} else {right}")
    run_here(*flags_for(models["any"], reward, tmp_path / "run", steps=3), "--method", method, "--sampling-rounds", 2)
    for row in steps_of(tmp_path / "run"):
        assert row["groups_kept"] == 0 and row["success_rate"] == right and row["questions"] == 8
        assert all(row[metric] is None for metric in UPDATE_METRICS)
    assert largest_move(tmp_path / "run", models["any"]) == 0
    assert trainer_state(tmp_path / "run")["optimizer"]["state"] == {}
    run_here("--resume", tmp_path / "run", "--reward", reward, "--steps", 5)
    for row in steps_of(tmp_path / "run")[3:]:
        assert row["groups_kept"] == 4 and row["updates"] == 2 and row["questions"] == 4
    assert largest_move(tmp_path / "run", models["any"]) > 0


@pytest.mark.parametrize("family", ["rotary", "learned"])
@pytest.mark.parametrize("room, longest", [(LONGEST, LONGEST), (1, 1), (LONGEST - 1, LONGEST), (0, 1), (-1, 1)])
def test_a_prompt_that_leaves_room_for_the_response_works_and_a_longer_one_is_named(family, room, longest, tmp_path):
    """Learned positions are rows of a table, so that one position too many would be an index error."""
    problem = "1+2*3-4"
    length = len(train.encode_prompt(TOKENIZER, problem, ""))
    sizes = SIZES | {"max_position_embeddings": length + room}
    config = Qwen2Config(**sizes) if family == "rotary" else OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **sizes)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": text, "answer": 1}) + "\n" for text in ("1", problem)))
    flags = [*flags_for(save(config, tmp_path / "model"), reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=1),
             "--data", data, "--eval-data", data, "--max-new-tokens", longest, "--group-size", 16]
    if room >= longest:
        run_here(*flags)
        row, = steps_of(tmp_path / "run")
        assert row["updates"] == 2 and row["truncated_share"] > 0              # some went on to the end of the context
    else:
        message = error_of(*flags, starts=True)
        for words in (problem, f"takes {length} tokens", f"--max-new-tokens {longest}", f"context of {length + room}"):
            assert words in message
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e30])
@pytest.mark.parametrize("method", ["nthr", "grpo"])
def test_temperatures_at_which_every_token_is_certain_or_every_one_as_likely(method, temperature, models, tmp_path):
    run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run"), "--method", method,
             "--temperature", temperature)
    for row in steps_of(tmp_path / "run"):
        assert row["groups_kept"] == 4 and row["updates"] >= 1
        if temperature == 1e30:                                                # −ln π = ln V, for half of the responses
            assert row["nll"] == pytest.approx(math.log(SIZES["vocab_size"]) / 2, rel=0.2)


def test_rounding_that_spoils_the_scores_is_named_and_not_a_traceback(models, tmp_path):
    """At so low a temperature the logits of bfloat16, divided by it, are far from those of float32."""
    flags = flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=3)
    message = error_of(*flags, "--temperature", 1e-3, "--dtype", "bfloat16", starts=True)
    assert "cannot score the answers of step" in message and "--dtype float32" in message and "--resume" in message


@pytest.mark.parametrize("rule, warned", [("1", True), ("n % 2", False)])
def test_a_run_that_made_no_update_says_so(rule, warned, models, tmp_path, capsys):
    run_here(*flags_for(models["any"], reward_file(tmp_path, rule), tmp_path / "run"))
    assert ("warning: no update was made" in capsys.readouterr().err) == warned


def test_an_infinite_threshold_is_null(models, tmp_path):
    run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=1), "--beta=-inf")
    row, = steps_of(tmp_path / "run")
    assert row["tau"] is None and row["selected_share"] == 1                   # every wrong token


def test_a_temperature_that_float32_cannot_divide_by_is_named(models, tmp_path):
    flags = flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run")
    message = error_of(*flags, "--temperature", 1e-38, starts=True)
    assert "at temperature 1e-38 are not finite" in message and "too low" in message and "is of step 0" in message


# -------------------------------------------------------------------------------------- 8. hostile data and responses

ANSWERS = sorted({text for pair in EQUAL + DIFFERENT for text in pair})
FRAGMENTS = sorted([  # all that the parser knows, and what it does not; sorted, as some of it comes from sets
    *"0123456789+-*/^_(){}[]|,.=<>!xyzeinfg'& \"~$%;:\\\n\t\r\0\1\2", *map(chr, reward.UNICODE),
    *(text for pair in reward.REWRITES for text in pair), *reward.DROPPED, *reward.FUNCTIONS, *reward.LETTERS,
    *reward.RELATIONS, *reward.UNITS, *reward.PLAIN, *reward.CLOSERS, *("\\" + name for name in reward.ALIASES),
    *("\\" + name + "{" for name in reward.TEXT), "\\rfloor", "\\rceil", "{1\\over ", "{5\\choose ", "\\frac",
    "\\frac12", "\\frac{1}{", "\\sqrt", "\\sqrt[3]{", "\\sqrt[", "\\binom", "\\binom{800}{400}", "\\pm", "\\cup", "\\{",
    "\\}", "\\\\", "^{", "_{", "\\left(", "\\right)", "\\left|", "\\boxed{", "\\fbox", "\\begin{pmatrix}1&2",
    "\\end{pmatrix}", "\\begin{array}{cc}", "\\begin{vmatrix}", "\\\\[4pt]", "\\log_", "\\sin^2 ", "\\tan^{-1}",
    "x \\in ", "f(x)=", "(-\\infty,2]", "0.\\overline{3}", "0.\\overline{", "\\overline{", "x_{12}", "12_5",
    "1,000", "1 000", "100,200", "3 1/2", "1\\frac12", " and ", " or ", "(C)", "III", "10:30", "miles per hour",
    "9" * 1000, "9" * 4400, "9^{9^9}", "2^{2000}", "899!", "1e999", "1e-999", "10^{400}", "10^{-320}", "0^0", "1/0",
    "nan", "inf", "(-8)^{1/3}", "e^{i\\pi}", "{" * 50, "(" * 50, "\\{" * 30, "2^" * 40, "1," * 45, "-" * 60, "\ud800",
    "\udfff",
    "\x1b[2J", "\x1b]0;x\x07", "\x9b", "\u202e", "\u200f", "\u200b", "\u2028", "\x85", "\ufeff", "٣", "①", "𝟙", "Ⅳ",
    "ſ", "İ", "ß"])


def mutated(rng, text):
    """`text` with something inserted, deleted, repeated, swapped, spliced, replaced or put in front many times."""
    a, b, c = sorted(rng.randint(0, len(text)) for _ in range(3))
    fragment, other = rng.choice(FRAGMENTS), rng.choice(ANSWERS)
    return rng.choices((
        text[:a] + fragment + text[a:], text[:a] + text[a + rng.randint(1, 4):],
        text[:b] + text[a:b] * rng.choice((1, 2, 8, 60)) + text[b:], text[:a] + text[b:c] + text[a:b] + text[c:],
        text[:a] + other[rng.randint(0, len(other)):], text[:a] + fragment + text[a + rng.randint(0, 3):],
        fragment * rng.choice((2, 5, 20, 100)) + text), (6, 3, 3, 2, 3, 2, 1))[0]


def hostile_text(rng):
    random_text = "".join(rng.choices(FRAGMENTS, k=rng.choice((2, 4, 8, 20, 60))))
    text = random_text if rng.random() < 0.3 else rng.choice(ANSWERS)
    for _ in range(rng.randint(0, 6)):
        text = mutated(rng, text)
    return text[:reward.MAX_CHARS if rng.random() < 0.9 else 5000]


def in_time(function, *arguments):
    """The function's result; at most 50 ms of CPU time, measured again with nothing cached before it counts."""
    start = time.process_time()
    result = function(*arguments)
    seconds = [time.process_time() - start]
    while min(seconds) > 0.05 and len(seconds) < 5:
        forget()
        start = time.process_time()
        function(*arguments)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.05, (min(seconds), function.__name__, [argument[:2000] for argument in arguments])
    return result


def forget():
    for function in (reward._tokens, reward._value, reward._generic, reward._factorial):
        function.cache_clear()


@pytest.mark.parametrize("seed", range(4))
def test_51200_mutated_strings_raise_nothing_take_no_time_and_compare_symmetrically(seed):
    rng, equal = random.Random(f"hostile {seed}"), 0
    for number in range(25_600):
        first = hostile_text(rng)
        second = mutated(rng, first)[:1500] if rng.random() < 0.6 else hostile_text(rng)
        result = in_time(is_equivalent, first, second)
        assert type(result) is bool
        if number % 4 == 0:                                                    # with and without what is remembered
            forget()
        assert in_time(is_equivalent, second, first) is result, (first, second)
        if first.replace("$", "").strip():
            assert in_time(is_equivalent, first, first) is True, first
        response = rng.choice((f"so \\boxed{{{first}}}.", first, f"\\boxed {first}$", f"\\fbox{{{first}}} {second}"))
        assert in_time(math_reward, response, second) in (0.0, 1.0)
        answer = in_time(extract_answer, response)
        assert answer is None or answer in response
        equal += result
    assert 0.02 < equal / 25_600 < 0.5                                         # both happen


@pytest.mark.parametrize("text", ["\\", "\\right.", ",", "^{\\circ}", "%", "\\text", "\\(\\(\\)", "\1\2", "~", "$\\,$"])
def test_what_leaves_no_tokens_is_still_equal_to_itself_and_to_nothing_else(text):
    assert is_equivalent(text, text) and math_reward(f"\\boxed{{{text} }}", text) == 1.0
    assert not is_equivalent(text, "") and not is_equivalent("", text) and not is_equivalent(text, "5")


@pytest.mark.parametrize("text", ["", " ", "$", "$ $", "$\n$", "\u00a0"])
def test_nothing_is_not_equal_to_itself(text):
    assert not is_equivalent(text, text) and math_reward(f"\\boxed{{{text}}}", text) == 0.0


def list_of_lists(lists, length, brackets, reverse):
    """Lists that differ in their last element only, in order or with all that has no order reversed."""
    letters = "abcdfghjkmnpqrstuvwxyzABCDEFGHJKLMNOPQRSTUVW"
    items = [["e"] * (length - 1) + [letters[k]] for k in range(lists)]
    texts = [brackets[0] + ",".join(item[::-1] if reverse and brackets[0] == "\\{" else item) + brackets[1]
             for item in items]
    return ",".join(texts[::-1] if reverse else texts)


SLOW = {  # each took 35 to 120 ms, or was quadratic, before it was bounded
    "thousands that are none": ("1 " * 490, "1+" + "1 " * 490), "zeros": ("0" + " 0" * 490, "0+0" + " 0" * 490),
    "groups of three, and one digit": ("111 " * 240 + "1", "0+" + "111 " * 240 + "1"),
    "sum of factorials": ("+".join(["899!"] * 190) + "+x", "x+" + "+".join(["899!"] * 190)),
    "factorials with both signs": (r"\pm1/899!," * 90 + "x", "0+" + r"\pm1/899!," * 90 + "x"),
    "signs within signs": (r"\{" * 16 + "x" + r"\}=\pm1" * 120, "0+" + r"\{" * 16 + "x" + r"\}=\pm1" * 120),
    "sums under signs": (r"\{" * 12 + "x" + r"\}=\pm1" * 12 + "+x" * 300, "0+" + r"\{" * 12 + "x" + r"\}=\pm1" * 90),
    "sets of sets": (list_of_lists(20, 22, ("\\{", "\\}"), False), list_of_lists(20, 22, ("\\{", "\\}"), True)),
    "set of tuples": (list_of_lists(39, 11, "()", False), list_of_lists(39, 11, "()", True)),
}


@pytest.mark.parametrize("name", SLOW)
def test_answers_that_were_slow_to_compare_are_not(name):
    for first, second in (SLOW[name], SLOW[name][::-1]):
        first, second = first[:reward.MAX_CHARS], second[:reward.MAX_CHARS]
        forget()
        in_time(is_equivalent, first, second)
        in_time(math_reward, f"\\boxed{{{first}}}", second)


@pytest.mark.parametrize("size", [10**4, 10**6, 10**7])
@pytest.mark.parametrize("start, unit, end", [
    ("\\boxed ", "$", ""), ("\\boxed", " ", "{5}"), ("\\boxed ", "a ", ""), ("\\boxed{", "{}", "}"),
    ("\\boxed{", "\\\\", "}"), ("\\boxed{", "a ", "}"), ("\\boxed{", "\\boxed{", ""), ("\\boxed{", "123 ", "}"),
    ("", "é ", ""), ("\\boxed{", "é{", ""), ("\\boxed{" * 1000, "}", ""), ("", "\\boxed", ""),
    ("", "\\", "")], ids=repr)
def test_long_responses_are_read_in_time(start, unit, end, size):
    text = start + unit * (size // len(unit)) + end
    in_time(extract_answer, text)
    in_time(math_reward, text, "5")
    in_time(math_reward, text, "1 " * 500_000)
    in_time(is_equivalent, text, "5")
    assert in_time(is_equivalent, text, text) is True
    assert in_time(is_equivalent, text, text + "6") is False


def test_a_box_is_read_up_to_its_limit_and_texts_beyond_the_parser_are_compared_without_spaces():
    content = "9" * (reward.MAX_BOX - 8)
    assert extract_answer(f"so \\boxed{{{content}}}.") == content
    assert extract_answer(f"so \\boxed{{{content}9}}.") is None
    assert is_equivalent("x + " * 600 + "1", "x+" * 600 + "1") and not is_equivalent("x+" * 600 + "1", "x+" * 600 + "2")


def test_an_answer_of_more_than_the_most_steps_is_not_computed():
    assert is_equivalent("ii " * (reward.MAX_STEPS // 2), "1") and not is_equivalent("ii " * 300, "1")   # i^600 = 1


@pytest.mark.parametrize("n", [5, 20])
def test_sets_of_pairs_still_have_no_order(n):
    pairs = [f"({k},{k * k})" for k in range(n)]
    assert is_equivalent(",".join(pairs), ",".join(pairs[::-1]))
    assert not is_equivalent(",".join(pairs), ",".join([*pairs[:0:-1], "(0,1)"]))


def random_tree(rng, depth):
    """(operation, operands...) or a Fraction, and its value computed with Fractions alone."""
    operation = rng.choice(("number", "+", "-", "*", "/", "^", "negative", "factorial")) if depth else "number"
    if operation == "number":
        value = Fraction(rng.randint(0, 30), rng.choice((1, 1, 1, 2, 3, 5, 7, 8, 10, 100)))
        return value, value
    if operation == "factorial":
        n = rng.randint(0, 6)
        return ("factorial", n), Fraction((1, 1, 2, 6, 24, 120, 720)[n])
    left, x = random_tree(rng, depth - 1)
    if operation == "negative":
        return ("negative", left), -x
    if operation == "^":
        n = rng.randint(-3 if x else 1, 3)
        return ("^", left, n), x ** n
    right, y = random_tree(rng, depth - 1)
    if operation == "/" and y == 0:
        operation = "+"
    return (operation, left, right), {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[operation]


def spelled(rng, value):
    """One of the spellings of a Fraction; a negative one begins with its sign."""
    top, bottom = abs(value.numerator), value.denominator
    texts = [f"\\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"\\dfrac{{{3 * top}}}{{{3 * bottom}}}",
             f"{{{top} \\over {bottom}}}", f"\\frac{{{top}.0}}{{{bottom}}}"]
    if bottom == 1:
        texts += [str(top), f"{top}.0", f"{{{top}}}", f"0{top}", f"{top}.", f"({top})"]
    if 10**6 % bottom == 0:
        digits = f"{top * 10**6 // bottom:07d}"
        texts += [f"{digits[:-6]}.{digits[-6:]}", f"{digits[:-6]}.{digits[-6:]}".rstrip("0") + "0", f"{digits}e-6",
                  f"{digits} \\cdot 10^{{-6}}"]
    period = next(((d, p) for d in (0, 1, 2) for p in (1, 2, 3, 6) if bottom > 1
                   and (abs(value) * 10**d * (10**p - 1)).denominator == 1), None)
    if period:
        d, p = period
        digits, rest = divmod(abs(value) * 10**d, 1)
        whole, decimals = divmod(digits, 10**d)
        texts.append(f"{whole}.{f'{decimals:0{d}}' if d else ''}\\overline{{{int(rest * (10**p - 1)):0{p}}}}")
    if top > bottom > 1:
        texts.append(f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    return "-" * (value < 0) + rng.choice(texts)


def written(rng, tree):
    """LaTeX of a tree; operands are in brackets of some kind, so that precedence is not in question."""
    def operand(tree):
        brackets = ("(", ")"), ("\\left(", "\\right)"), ("[", "]"), ("{(", ")}"), ("\\bigl( ", " \\bigr)")
        left, right = rng.choice(brackets)
        return left + written(rng, tree) + right

    if isinstance(tree, Fraction):
        return spelled(rng, tree)
    operation, left, *right = tree
    if operation == "factorial":
        return rng.choice((f"{left}!", f"{left} !", f"({left})!"))
    if operation == "negative":
        return rng.choice(("-", "- ", "+-", "−", "---")) + operand(left)
    if operation == "^":
        return operand(left) + (f"^{right[0]}" if right[0] >= 0 and rng.random() < 0.5 else f"^{{{right[0]}}}")
    if operation == "/" and rng.random() < 0.6:
        a, b = written(rng, left), written(rng, right[0])
        return rng.choice((f"\\frac{{{a}}}{{{b}}}", f"\\tfrac{{{a}}}{{{b}}}", f"{{{a} \\over {b}}}"))
    signs = {"+": ("+", " + "), "-": ("-", " − ", "+-"), "/": ("/", " \\div ", "÷"),
             "*": ("", "*", " \\cdot ", "\\times ", "×")}
    return operand(left) + rng.choice(signs[operation]) + operand(right[0])


def test_generated_arithmetic_agrees_with_fractions():
    rng, values, compared = random.Random("oracle"), {}, [0, 0]
    while len(values) < 4000:
        tree, value = random_tree(rng, rng.randint(0, 4))
        if max(abs(value.numerator), value.denominator) > 10**40:
            continue
        text, again, result = written(rng, tree), written(rng, tree), spelled(rng, value)
        if max(map(len, (text, again, result))) > reward.MAX_CHARS:
            continue
        for first, second in ((text, result), (result, again), (text, again)):
            assert is_equivalent(first, second), (first, second)
        for difference in (1, Fraction(1, 1000), Fraction(-1, 10**9)):
            assert not is_equivalent(text, spelled(rng, value + difference)), (text, value + difference)
        assert math_reward(f"thus \\boxed{{{text}}}", result) == 1.0
        values[text] = value
    texts = sorted(values, key=lambda text: (values[text], text))
    for first, second in [*zip(texts, texts[1:]), *(rng.sample(texts, 2) for _ in range(2000))]:
        same = values[first] == values[second]
        assert is_equivalent(first, second) is same, (first, second)
        compared[same] += 1
    assert min(compared) > 1000


# Terminals. Whatever a stranger wrote is printed with escapes: no character that a terminal obeys, hides or reorders.

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\u202egpj\u2066\u200b\x7f"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\x08\\u202egpj\\u2066\\u200b\\x7f"
TINY_EVALUATION = ["--eval-only", "--eval-size", 2, "--max-new-tokens", 4, "--device", "cpu", "--dtype", "float32"]


def assert_harmless(text):
    """Only printable characters and line ends. \r is what tqdm's bar begins with, so it counts only where no bar is."""
    assert [char for char in text if not char.isprintable() and char not in "\n\t"] == []


def test_printable_escapes_all_that_a_terminal_obeys_and_nothing_else():
    assert train.printable(EVIL) == SHOWN
    assert train.printable("a\nb\rc\td\0\u2028\ud800") == "a\\nb\\rc\\td\\x00\\u2028\\ud800"
    for text in ("café, 漢字, 🙂, שלום", "β = 1, Δ(x) ≤ 0", "\\boxed{5} 'x' \"y\""):
        assert train.printable(text) == text
    assert_harmless(train.printable("".join(map(chr, range(0x110000)))))


def test_fail_ends_with_one_harmless_line():
    with pytest.raises(SystemExit) as caught:
        train.fail(f"cannot read {EVIL}\r\nerror: another")
    assert caught.value.code == f"error: cannot read {SHOWN}\\r\\nerror: another"


def test_names_of_data_files_and_of_a_models_weights_reach_the_terminal_with_escapes(tmp_path):
    """Through the script: transformers lists unknown weights, and the table of an evaluation names its files."""
    model, data = tmp_path / "model", tmp_path / f"data {EVIL}\r\n\udcff.jsonl"
    shutil.copytree(ROOT / "tiny", model, ignore=shutil.ignore_patterns("*.jsonl", "*.py", "stack", "__pycache__"))
    weights = load_file(model / "model.safetensors")
    save_file({**weights, f"model.{EVIL}.weight": torch.zeros(2)}, model / "model.safetensors", {"format": "pt"})
    rows = [{**row, EVIL: EVIL} for row in tiny_rows("test.jsonl", 2)]
    write(data, "".join(json.dumps(row) + "\n" for row in rows))
    result = run("--model", model, *TINY_EVALUATION, "--eval-data", f"{data},{ROOT}/tiny/test.jsonl", "--out", "run",
                 cwd=tmp_path)
    assert_harmless(result.stdout + result.stderr)
    assert f"model.{SHOWN}.weight" in result.stderr and f"{SHOWN}\\r\\n\\udcff.jsonl" in result.stdout
    assert json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[0])["benchmark"] == str(data)

    write(data, '{"problem": "1", "answer": 1}\n{"problem": "2", "answer": 2, "answer": 3}')
    result = run("--data", data, "--out", "run", cwd=tmp_path, check=False)
    assert_harmless(result.stdout + result.stderr)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and f"{SHOWN}\\r" in result.stderr


def test_hostile_problems_in_a_training_run_reach_no_terminal(tmp_path, capfd):
    rows = [{"problem": f"{EVIL}\r{row['problem']}", "answer": f"{EVIL}\r{row['answer']}"}
            for row in tiny_rows("train.jsonl", 4)]
    data = write(tmp_path / f"{EVIL}\rnumbers.json", json.dumps(rows))
    flags = ["--data", data, "--eval-data", f"{data},{ROOT}/tiny/test.jsonl", "--eval-size", 2, "--steps", 1,
             "--device", "cpu", "--dtype", "float32", "--batch-size", 2, "--minibatch-size", 2, "--group-size", 2]
    run_here(*flags, "--max-new-tokens", 4, "--out", tmp_path / "run")
    printed = "".join(capfd.readouterr())
    assert f"{SHOWN}\\rnumbers.json" in printed and "\rnumbers" not in printed     # other \r are of tqdm's bar
    assert_harmless(printed.replace("\r", ""))
    context = json.loads((ROOT / "tiny" / "config.json").read_text())["max_position_embeddings"]
    message = error_of(*flags, "--max-new-tokens", context, "--out", tmp_path / "other", starts=True)
    assert SHOWN in message and f"context of {context}" in message
    assert_harmless(message)


def test_the_experiments_print_foreign_names_and_logs_with_escapes(tmp_path, capfd, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    write(source / "config.json", json.dumps({"method": EVIL}))
    write(source / "metrics.jsonl", "".join(json.dumps({"step": step, "eval_accuracy": 0.5}) + "\n" for step in (0, 1)))
    curves.main([str(source), "--out", str(tmp_path / "curves")])
    printed = "".join(capfd.readouterr())
    assert SHOWN in printed
    assert_harmless(printed)

    def start(folder, flags, environment):
        write(folder / "log.txt", f"error: {EVIL}\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(ablations, "start", start)
    assert ablations.run_all([(source, [])], 1, 1, 1, True) == [source]
    printed = "".join(capfd.readouterr())
    assert f"source failed:\n    error: {SHOWN}\n" in printed
    assert_harmless(printed.replace("\r", ""))


# Data files: read as they are meant, or refused in one line with the place.

def refusal(tmp_path, content):
    path = write(tmp_path / "data.jsonl", content)
    with pytest.raises(SystemExit) as caught:
        train.load_problems(str(path))
    message = caught.value.code
    assert message.startswith(f"error: {path}, ") and len(message) < 600
    assert_harmless(message.replace("\n", "\0"))                                   # one line
    return message.removeprefix(f"error: {path}, ")


GOOD = '{"problem": "1+1", "answer": 2}'
BAD_OBJECTS = [  # an object, what is said of it, and whether it is no JSON (then the line is named even in a list)
    ('{"problem": "1", "answer": 1, "answer": 2}', "'answer'", True),
    ('{"problem": "1", "problem": "1", "answer": 2}', "'problem'", True),
    ('{"problem": "1", "answer": 2, "meta": {"a": 1, "a": 1}}', "'a'", True),
    (f'{{"problem": "1", "answer": 2, {json.dumps(EVIL)}: 1, {json.dumps(EVIL)}: 2}}', SHOWN[:20], True),
    (f'{{"problem": "1", "answer": 2, "{"k" * 10**6}": 1, "{"k" * 10**6}": 2}}', "kkk", True),
    ('{"problem": "1", "answer": NaN}', "NaN", True), ('{"problem": "1", "answer": [1, -Infinity]}', "Infinity", True),
    ('{"problem": "1", "answer": 2, "unread": [[Infinity]]}', "Infinity", True),
    ('{"problem": "1", "answer": ' + "9" * 5000 + "}", "digits", True),
    ('{"problem": "1", "answer": ' + "[" * 100_000, "recursion", True),
    ('{"a":' * 100_000, "recursion", True), ('{"problem": "1", "answer": 01}', "not valid JSON", True),
    ('{"problem": "1", "answer": "2}', "not valid JSON", True),
    ("{'problem': '1', 'answer': 2}", "not valid JSON", True),
    ('{"problem": "a\tb", "answer": 2}', "not valid JSON", True),
    ('{"problem": "\x1b[2J", "answer": 2}', "not valid", True),
    ('\ufeff{"problem": "1", "answer": 2}', "not valid JSON", True), ("x" * 10**6, "not valid JSON", True),
    ('{"problem": "1", "answer": "\0"}', "NUL", True),
    ('{"problem": "\\ud800", "answer": 2}', "surrogate", False),
    ('{"problem": "1", "answer": "\\udfff x"}', "surrogate", False),
    ('{"problem": "1", "solution": "\\\\boxed{\\ud83d}"}', "surrogate", False),
    ('{"problem": "' + "a" * (10**6 + 1) + '", "answer": 2}', "1000001 characters", False),
    ('{"problem": "1", "answer": "' + "a" * (10**6 + 1) + '"}', "1000001 characters", False),
    ('{"problem": "1", "answer": [' + "1," * 400_000 + "1]}", "at most 1000000", False),
    ('{"problem": "1", "answer": 1e999}', "answer", False), ('{"problem": "1", "answer": -1e999}', "answer", False),
    ('{"problem": "1", "answer": [1, null]}', "answer", False),
    ('{"problem": "1", "answer": [[1, 2], [3]]}', "answer", False),
    ('{"problem": "1", "answer": ' + "[" * 900 + "1" + "]" * 900 + "}", "answer", False),
    ('{"problem": "1", "answer": [true]}', "answer", False),
    ('{"problem": "1", "answer": {"value": 2}}', "answer", False),
    ('{"problem": "1", "answer": " \\n "}', "answer", False),
    ('{"problem": "1", "solution": {"boxed": 2}}', "answer", False),
    ('{"problem": null, "answer": 2}', "problem", False), ('{"problem": ["1"], "answer": 2}', "problem", False),
    ('{"problem": {"text": "1"}, "answer": 2}', "problem", False), ('{"Problem": "1", "answer": 2}', "problem", False),
    ("null", "NoneType", False), ("true", "bool", False), ("1.5", "float", False), ('"text"', "str", False)]


@pytest.mark.parametrize("text, said, no_json", BAD_OBJECTS, ids=[row[0][:60] for row in BAD_OBJECTS])
def test_an_object_that_cannot_be_used_is_refused_with_its_line_or_item(text, said, no_json, tmp_path):
    message = refusal(tmp_path, f"{GOOD}\r\n\r\n{text}\r\n{GOOD}")
    assert message.startswith("line 3: ") and said in message
    message = refusal(tmp_path, f"[{GOOD},\n\n{GOOD}, {GOOD},\n{text},\n{GOOD}]")
    assert message.startswith("line 4: " if no_json else "item 4: ") and said in message


@pytest.mark.parametrize("content, line", [
    (f"{GOOD}\n{GOOD}\n".encode() + b'{"problem": "caf\xe9", "answer": 2}', 3),
    (f"\ufeff{GOOD}\r\n{GOOD}\r\n".encode() + b"\xc3\x28", 3), (f"[{GOOD},\r{GOOD},\r".encode() + b'{"\xff": 1}]', 3),
    (b"\xed\xa0\x80", 1), (b"\xc0\xaf", 1), (GOOD.encode() + b"\n\xf0\x9f\x99", 2)])
def test_bytes_that_are_no_utf_8_are_refused_with_their_line(content, line, tmp_path):
    message = refusal(tmp_path, content)
    assert message.startswith(f"line {line}: ") and "UTF-8" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("text", [GOOD, f"[{GOOD}]"])
def test_utf_16_and_utf_32_are_refused_by_name(text, encoding, tmp_path):
    message = refusal(tmp_path, text.encode(encoding))
    assert message.startswith("line 1: ") and "expected" in message and "UTF-8" in message


@pytest.mark.parametrize("content, line", [
    (f"[{GOOD} {GOOD}]", 1), (f"[{GOOD},\n{GOOD},\n]", 3), (f"[{GOOD},\n{GOOD}", 2), (f"[{GOOD}\n]\n{GOOD}", 3),
    (f"[\n,{GOOD}]", 2), ("[", 1), ("[]]", 1), (f"{GOOD}\n{GOOD} {GOOD}", 2), (f"{GOOD}\n{GOOD},", 2),
    (f"[{GOOD}}}", 1), ('{"problem": "1",\n"answer": 2}', 1), (f"{GOOD}\r\r\r]", 4), (f"\ufeff\ufeff{GOOD}", 1)])
def test_text_that_is_neither_one_list_nor_one_object_a_line_is_refused_with_the_line(content, line, tmp_path):
    assert refusal(tmp_path, content).startswith(f"line {line}: not valid JSON")


def test_a_line_of_100_megabytes_is_refused_with_its_number(tmp_path):
    for middle in (b'{"problem": "' + b"a" * 10**8 + b'", "answer": 2}', b"{" + b"\\" * 10**8):
        assert refusal(tmp_path, GOOD.encode() + b"\n" + middle).startswith("line 2: ")
    (tmp_path / "data.jsonl").unlink()


READ = [{"problem": "a\u2028b\u2029c\x85d\ufeffe\x1b\0\r\nf", "answer": "🙂"}, {"problem": "1+1", "answer": "2"}]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\r\n \r"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\ufeff\r\n\r\n", " \n\t"])
def test_line_ends_a_bom_and_unicode_separators_are_read_and_counted_right(start, end, ascii_only, tmp_path):
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in READ]
    lines = end.join(texts)
    for content in (lines, lines + end, "[" + f",{end}".join(texts) + end + "]",
                    f"[{end}" + f"{end},{end}".join(texts) + f"{end}]{end}"):
        assert train.load_problems(str(write(tmp_path / "data.json", start + content))) == READ
    number = (start + lines + end).replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
    assert refusal(tmp_path, start + lines + end + "{").startswith(f"line {number}: ")


@pytest.mark.parametrize("value, text", [
    ("a" * 10**6, "a" * 10**6), (10**4000, "1" + "0" * 4000), (1e22, "1" + "0" * 22), (-0.0, "0"), (1e-7, "1e-07"),
    ("\ud83d\ude42", "🙂"), ([1, "", "x"], "1, x")], ids=lambda value: repr(value)[:20])
def test_large_and_odd_answers_that_can_be_read_are(value, text, tmp_path):
    path = write(tmp_path / "data.json", json.dumps([{"problem": "p" * 10**6, "answer": value}]))
    assert train.load_problems(str(path)) == [{"problem": "p" * 10**6, "answer": text}]


# ------------------------------------------------------------------------------------------- 9. properties of nthr.py

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = range(25)


class Group(NamedTuple):
    """The arguments of `nthr_scores`, by the names and shapes that it has."""
    hidden: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    correct: torch.Tensor
    lm_head: torch.Tensor


def random_group(seed, dtype=torch.float32, mixed=True):
    """G 2 to 16, T 1 to 12, V 2 to 60, d 1 to 20, rows of any length from 0, garbage on padding.

    mixed: a correct and a wrong response have a token; else none, all, or any may be right."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    G, T, V, d = integer(2, 16), integer(1, 12), integer(2, (4, 60)[integer(0, 1)]), integer(1, 20)
    scale = (0.03, 1.0, 100.0)[integer(0, 2)]                                  # float16 would overflow at 256²
    common = torch.randn(d, generator=generator) * (0, 2)[integer(0, 1)]       # states of one direction: tokens compete
    hidden = ((torch.randn(G, T, d, generator=generator) + common) * scale).to(dtype)
    lm_head = (torch.randn(V, d, generator=generator) / scale).to(dtype)
    lengths = torch.randint(0, T + 1, (G,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    tokens = torch.randint(0, V, (G, T), generator=generator)
    correct = torch.rand(G, generator=generator) < (0.5 if mixed else integer(0, 2) / 2)
    if mixed:
        correct[:2], mask[:2, 0] = torch.tensor([True, False]), True           # a correct token, and a wrong one
    hidden[~mask], tokens[~mask] = (math.nan, math.inf)[seed % 2], (-100, 10 ** 9)[seed % 2]
    return Group(hidden, tokens, mask, correct, lm_head)


def logprobs_of(group, temperature=1.0):
    """ln π of the tokens in float32, (G, T), NaN on padding."""
    logits = group.hidden[group.mask].double() @ group.lm_head.double().T / temperature
    logprobs = torch.log_softmax(logits, -1).gather(1, group.tokens[group.mask][:, None])[:, 0]
    return torch.full(group.mask.shape, math.nan).masked_scatter(group.mask, logprobs.float())


def exact_and_bound(group, vocabulary="all", temperature=1.0):
    """Eq. 7 pair by pair in float64, (G, T), and how far a float32 computation on the same input may be from it.

    To first order, a float32 sum of n products is off by at most n ε Σ|terms|, ε = 2⁻²³. So a logit is off by d ε L,
    L = max_v Σ_j |w_vj h_j| / temperature. With the normaliser, a sum over V, and the exponential, π is wrong by a
    factor of at most 1 + ρ, ρ = ε (2 (d + 3) L + V + |ln π_y| + 4), and an entry of e_y − π by ρ (e_y + π). s is a sum
    over N⁺ tokens, the columns and d: off by (2 ρ + (N⁺ + columns + d + 3) ε) Σ_a ⟨e_y + π_a, e_y + π_b⟩ |h_a|ᵀ|h_b|.
    The dtype does not enter: half-precision input is exact in float32, and all arithmetic is float32."""
    mask, correct, W = group.mask, group.correct, group.lm_head.double()
    h, y = group.hidden[mask].double(), group.tokens[mask]                     # (N, d), (N,)
    pi = torch.softmax(h @ W.T / temperature, -1)                              # (N, V)
    e = torch.nn.functional.one_hot(y, len(W)).double()
    columns = torch.unique(y) if vocabulary == "responses" else torch.arange(len(W))
    error, size = (e - pi)[:, columns], (e + pi)[:, columns]
    positive = correct[:, None].expand_as(mask)[mask]                          # (N,)
    exact = ((error @ error[positive].T) * (h @ h[positive].T)).sum(1)
    terms = ((size @ size[positive].T) * (h.abs() @ h[positive].abs().T)).sum(1)
    d, L = h.shape[1], (h.abs() @ W.abs().T).max() / temperature if len(h) else 0.0
    log_pi = pi.gather(1, y[:, None]).log().abs().max() if len(h) else 0.0
    rho = EPS * (2 * (d + 3) * L + len(W) + log_pi + 4)
    bound = (2 * rho + (int(positive.sum()) + len(columns) + d + 3) * EPS) * terms
    whole = torch.zeros(mask.shape, dtype=torch.float64)
    return whole.masked_scatter(mask, exact), whole.masked_scatter(mask, bound)


def assert_within(actual, expected, bound):
    assert actual.shape == expected.shape and actual.isfinite().all()
    assert ((actual.double() - expected).abs() <= bound).all()


def selection(group, beta=1.0, eta="2|0.5-p|", vocabulary="responses", advantages=None):
    advantages = torch.ones(group.mask.shape) if advantages is None else advantages
    return nthr_advantages(advantages, *group, beta=beta, eta=eta, vocabulary=vocabulary)


def eq_8(group, vocabulary="responses"):
    """(G, T) bool, twice: V⁻ for β = 1 in float64, and where a token is so far from τ that no rounding could change it.

    The mean of T float32 numbers is off by T ε times the largest, besides their own bounds."""
    scores, bound = exact_and_bound(group, vocabulary)
    rows = group.correct & group.mask.any(1)
    mean, error = ((x.sum(1) / group.mask.sum(1))[rows] for x in (scores, bound))
    slack = 2 * (bound + error.max() + group.mask.shape[1] * EPS * scores.abs().max())
    negative = group.mask & ~group.correct[:, None]
    return negative & (scores > mean.min()), (scores - mean.min()).abs() > slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_eq_7_in_float64_up_to_the_rounding_of_float32(seed, dtype):
    group, temperature = random_group(seed, dtype, mixed=seed % 5 != 0), (1.0, 0.7, 1.5)[seed % 3]
    for vocabulary in ("all", "responses"):
        expected, bound = exact_and_bound(group, vocabulary, temperature)
        for logprobs in (None, logprobs_of(group, temperature)):
            for chunk_size in (1, 3, 512):
                scores = nthr_scores(*group, logprobs, vocabulary, temperature, chunk_size)
                assert scores.dtype == torch.float32
                assert_within(scores, expected, bound)
        if seed % 5:                                                           # Eq. 8 for the tokens of no doubt, too
            selected, sure = eq_8(group, vocabulary)
            assert torch.equal(selection(group, vocabulary=vocabulary).selected[sure], selected[sure])
    whole = Group(group.hidden.double(), *group[1:4], group.lm_head.double())
    torch.testing.assert_close(nthr_scores_pairwise(*whole), exact_and_bound(group)[0], rtol=1e-9, atol=1e-9)
    assert_within(nthr_scores_pairwise(*group), *exact_and_bound(group))


@pytest.mark.parametrize("seed", SEEDS[:5])
def test_the_float64_reference_above_is_eq_7_in_plain_python(seed):
    group = random_group(seed)
    columns = sorted(set(group.tokens[group.mask].tolist()))
    for vocabulary, used in (("all", None), ("responses", columns)):
        expected = eq7(*group, columns=used, temperature=0.7)
        torch.testing.assert_close(exact_and_bound(group, vocabulary, 0.7)[0], expected, rtol=1e-9, atol=1e-9)


def test_the_random_groups_hold_the_cases_that_matter_and_the_bound_is_narrow():
    groups = [random_group(seed) for seed in SEEDS]
    G, T, V, d = zip(*[(*group.mask.shape, *group.lm_head.shape) for group in groups])
    assert min(G) == 2 and max(G) == 16 and min(T) == 1 and min(V) <= 3 and min(d) == 1
    assert any(not group.mask.any(1).all() for group in groups) and any(not group.mask.all() for group in groups)
    assert {0, 1} < {random_group(seed, mixed=False).correct.double().mean().item() for seed in SEEDS[::5]}
    ratios, shares = [], []
    for group in groups:
        exact, bound = exact_and_bound(group)
        ratios.append((bound.max() / exact.abs().max()).item())
        shares.append(eq_8(group)[1][group.mask].float().mean().item())
    assert max(ratios) < 0.05 and sorted(ratios)[len(ratios) // 2] < 1e-3
    assert sorted(shares)[len(shares) // 2] > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", ["all", "responses"])
@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_linear_in_the_correct_responses(seed, vocabulary, dtype):
    """Eq. 7 sums over the correct responses: those of P₁ ∪ P₂ are those of P₁ plus those of P₂, on every row.

    V*_x is that of the whole group, whoever is correct in it."""
    group = random_group(seed, dtype)
    first = group.correct & (torch.rand(len(group.correct), generator=torch.Generator().manual_seed(seed)) < 0.5)
    parts = [group._replace(correct=correct) for correct in (first, group.correct & ~first)]
    bound = sum(exact_and_bound(part, vocabulary)[1] for part in [group, *parts])
    total = sum(nthr_scores(*part, vocabulary=vocabulary).double() for part in parts)
    assert_within(nthr_scores(*group, vocabulary=vocabulary), total, bound)
    if vocabulary == "all":                                                    # then the others may also be left out
        for rows in (~group.correct | first, ~group.correct | ~first):
            fewer = Group(*[x[rows] for x in group[:4]], group.lm_head)
            scores, bounds = exact_and_bound(fewer)
            whole = exact_and_bound(group._replace(correct=group.correct & rows))[0]
            torch.testing.assert_close(whole[rows], scores)
            assert_within(nthr_scores(*fewer, vocabulary="all"), scores, bounds)


def rearranged(group, generator):
    """(name, the group in another order or with more padding, where each of its (G, T) entries is in the new one)."""
    G, T = group.mask.shape
    index = torch.arange(G * T).view(G, T)
    order = torch.randperm(G, generator=generator)
    yield "responses", Group(*[x[order] for x in group[:4]], group.lm_head), index[order]
    # A score depends on a token and its state, not on its place; so padding may be anywhere, too.
    padding = [torch.full((G, 3, *x.shape[2:]), value, dtype=x.dtype)
               for x, value in zip(group[:3], (math.nan, 10 ** 12, False))]
    columns = torch.randperm(T + 3, generator=generator)
    hidden, tokens, mask = (torch.cat([x, more], 1)[:, columns] for x, more in zip(group[:3], padding))
    new = torch.cat([index, torch.full((G, 3), -1)], 1)[:, columns]
    yield "columns and padding", Group(hidden, tokens, mask, *group[3:]), new
    ids = torch.randperm(len(group.lm_head), generator=generator)
    tokens = group.tokens.clone()
    tokens[group.mask] = ids.argsort()[group.tokens[group.mask]]
    yield "vocabulary", group._replace(tokens=tokens, lm_head=group.lm_head[ids]), index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", ["all", "responses"])
@pytest.mark.parametrize("seed", SEEDS)
def test_order_padding_and_the_numbering_of_the_vocabulary_change_nothing(seed, vocabulary, dtype):
    group = random_group(seed, dtype)
    expected, bound = exact_and_bound(group, vocabulary)
    selected, sure = eq_8(group, vocabulary)
    eta = 2 * abs(0.5 - group.correct.double().mean().item())
    for name, other, place in rearranged(group, torch.Generator().manual_seed(seed)):
        found, real = selection(other, vocabulary=vocabulary), place >= 0
        assert_within(found.scores[real], expected.flatten()[place[real]], bound.flatten()[place[real]])
        assert not found.scores[~real].any() and not found.selected[~real].any(), name
        certain = sure.flatten()[place[real]]
        assert torch.equal(found.selected[real][certain], selected.flatten()[place[real]][certain]), name
        assert found.eta == pytest.approx(eta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", ["all", "responses"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_group_listed_twice_has_twice_the_scores_and_the_same_selection(seed, vocabulary, dtype):
    """By linearity each s doubles, so τ does, and s > τ holds for the same tokens; p and so η stay as they are.

    Listing only the wrong responses twice changes no score (but p); only the correct ones: as for the whole group."""
    group = random_group(seed, dtype)
    expected, bound = exact_and_bound(group, vocabulary)
    (selected, sure), G = eq_8(group, vocabulary), len(group.mask)
    for twice, factor in ((torch.arange(G), 2), ((~group.correct).nonzero()[:, 0], 1),
                          (group.correct.nonzero()[:, 0], 2)):
        rows = torch.cat([torch.arange(G), twice])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        double = Group(*[x[rows] for x in group[:4]], group.lm_head)
        found = selection(double, vocabulary=vocabulary)
        assert_within(found.scores, factor * expected[rows], exact_and_bound(double, vocabulary)[1])
        certain = sure[rows] & eq_8(double, vocabulary)[1]
        assert torch.equal(found.selected[certain], selected[rows][certain])
        assert found.eta == pytest.approx(2 * abs(0.5 - group.correct[rows].double().mean().item()))


BETAS = (-math.inf, -1e300, -2.0, -0.5, 0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 30.0, 1e300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_larger_beta_selects_fewer_tokens_if_the_smallest_mean_is_positive_and_more_if_it_is_negative(seed, dtype):
    """τ = β · min s̄⁺ rises with β or falls with it, and V⁻ = {s > τ}: each set holds the next one.

    Only β = −∞, which stands for "every negative token" (Table 4), does so whatever the sign."""
    group = random_group(seed, dtype)
    negative = group.mask & ~group.correct[:, None]
    smallest = selection(group, beta=1.0).tau.item()
    results = [selection(group, beta=beta) for beta in BETAS]
    assert not any(result.tau.isnan() for result in results)
    assert torch.equal(results[0].selected, negative)
    chain = [result.selected for result in results[1:]][::1 if smallest >= 0 else -1]
    for larger, smaller in zip(chain, chain[1:]):
        assert not (smaller & ~larger).any()
    if smallest:
        assert (torch.equal(chain[0], negative), chain[-1].any()) == (True, False)     # τ = ∓∞ in float32


def test_both_signs_of_the_smallest_mean_occur_above_and_one_correct_response_has_a_positive_one():
    """With one correct response its mean is ‖M⁺‖² / |y| ≥ 0; with more, some may work against the others."""
    signs = []
    for seed in SEEDS:
        group = random_group(seed)
        signs.append((selection(group).tau > 0).item())
        one = group._replace(correct=torch.arange(len(group.correct)) == 0)
        scores, bound = exact_and_bound(one, "responses")
        length = group.mask[0].sum()
        h, y = group.hidden[0][group.mask[0]].double(), group.tokens[0][group.mask[0]]
        columns = torch.unique(group.tokens[group.mask])
        pi = torch.softmax(h @ group.lm_head.double().T, -1)
        M = (torch.nn.functional.one_hot(y, len(group.lm_head)) - pi)[:, columns].T @ h
        tau = nthr_threshold(nthr_scores(*one), one.mask, one.correct).double()
        tolerance = bound[0].sum() / length + len(bound[0]) * EPS * scores[0].abs().max()
        assert (tau - M.square().sum() / length).abs() <= tolerance
    assert 0.1 < sum(signs) / len(signs) < 0.95


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_eta_1_gives_the_advantages_back_bit_for_bit_and_others_touch_the_selected_ones_only(seed, dtype):
    group = random_group(seed, dtype, mixed=seed % 5 != 0)
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(group.mask.shape, generator=generator).to(dtype)
    for beta in (-math.inf, -1.0, 0.0, 1.0):
        for eta in (1, "1", 1.0):
            same = selection(group, beta, eta, advantages=advantages).advantages
            assert same.dtype == dtype and torch.equal(same, advantages)
        result = selection(group, beta, 0.25, advantages=advantages)
        assert torch.equal(result.advantages[~result.selected], advantages[~result.selected])
        assert torch.equal(result.advantages[result.selected], advantages[result.selected] / 4)    # exact in binary
        assert not (result.selected & (group.correct[:, None] | ~group.mask)).any()
        if group.correct.all() or not group.correct.any():                     # β = −∞ included
            assert not result.selected.any() and not result.scores.any() and result.eta == 1


def test_scores_that_float32_cannot_hold_are_an_error_and_not_infinite():
    hidden, lm_head = torch.full((2, 1, 1), 1e22, dtype=torch.float64), torch.tensor([[0.0], [1e-22]]).double()
    args = hidden, torch.tensor([[1], [0]]), torch.ones(2, 1), torch.tensor([1, 0]), lm_head
    assert nthr_scores_pairwise(*args).abs().min() > 1e43
    with pytest.raises(ValueError, match="scores are not finite: .*overflow"):
        nthr_scores(*args, vocabulary="all")


# ----------------------------------------------------------------------------------------------------- 10. a long run

SOAK = ["--steps", 500, "--batch-size", 16, "--minibatch-size", 8, "--eval-every", 100, "--save-every", 10, "--seed", 0]


def slope(x, y):
    """Least squares: the slope of y over x, and half the width of its 95% band if the residuals were independent."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    centered = x - x.mean()
    value = centered @ y / (centered @ centered)
    residuals = y - y.mean() - value * centered
    return value, 1.96 * math.sqrt(residuals @ residuals / (len(x) - 2) / (centered @ centered))


def test_the_slope_of_a_line_a_leak_and_noise():
    x = np.arange(200)
    assert slope(x, 7 - 0.25 * x) == pytest.approx((-0.25, 0), abs=1e-12)
    # by hand: x = 0, 1, 2, 3 and y = 0, 2, 2, 4: Σ(x−x̄)y = 6, Σ(x−x̄)² = 5; residuals −0.2, 0.6, −0.6, 0.2
    assert slope([0, 1, 2, 3], [0, 2, 2, 4]) == pytest.approx((6 / 5, 1.96 * math.sqrt(0.8 / 2 / 5)))
    noise = np.random.default_rng(0).normal(0, 3, (100, 200))
    inside = [abs(slope(x, 500 + 0.02 * x + y)[0] - 0.02) < slope(x, 500 + 0.02 * x + y)[1] for y in noise]
    assert 88 <= sum(inside) <= 100                                            # 95 are expected
    assert slope(x, [3 if i % 10 else 30 for i in range(200)])[0] == pytest.approx(0, abs=0.01)   # peaks, but no trend


def resources(pid):
    """MiB resident and the number of open file handles of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, len(os.listdir(f"/proc/{pid}/fd"))


def fifth(rows, number, steps):
    """The rows, which begin with a step, of one fifth of the steps, counted from 1."""
    return [row for row in rows if (number - 1) * steps / 5 < row[0] <= number * steps / 5]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory and files of a process in /proc")
def test_the_resources_of_a_process_are_counted(tmp_path):
    memory, handles = resources(os.getpid())
    kilobytes = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert memory == pytest.approx(int(kilobytes[1]) / 1024, rel=0.05)
    with open(tmp_path / "a", "w"), open(tmp_path / "b", "w"):
        assert resources(os.getpid())[1] == handles + 2
    assert resources(os.getpid())[1] == handles
    assert [row[0] for row in fifth([(step,) for step in range(21)], 2, 20)] == [5, 6, 7, 8]


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory and files of a process in /proc")
def test_memory_file_handles_and_speed_stay_as_they_are_over_hundreds_of_steps(tmp_path):
    """Memory over the steps after the first fifth; handles and speed of the second fifth against those of the last."""
    metrics, samples = tmp_path / "run" / "metrics.jsonl", []                  # (step, MiB, handles)
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command(*SOAK, "--out", "run"), cwd=tmp_path, env=ENVIRONMENT, stdout=output,
                                   stderr=output)
        try:
            while process.poll() is None:
                step = metrics.read_text().count("\n") - 1 if metrics.exists() else -1
                with contextlib.suppress(OSError):                             # it has just ended
                    samples.append((step, *resources(process.pid)))
                time.sleep(0.25)
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "output").read_text()[-2000:]
    rows = metrics_of(tmp_path / "run")[1:]
    assert_finite_or_null(rows)
    steps = len(rows)
    samples = [row for row in samples if row[0] < steps]                       # not of a process that is ending
    late = [row for row in samples if row[0] > steps / 5]
    growth, band = (100 * value for value in slope([row[0] for row in late], [row[1] for row in late]))
    handles = [statistics.median_low(row[2] for row in fifth(samples, number, steps)) for number in (2, 5)]
    # seconds of a step but for its evaluation, per 1000 sampled tokens
    cost = [(row["step"], 1000 * sum(value for phase, value in row["seconds"].items() if phase != "evaluation")
             / (row["response_length"] * row["questions"] * 8)) for row in rows]
    seconds = [statistics.median(row[1] for row in fifth(cost, number, steps)) for number in (2, 5)]
    model_name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    measured = {
        "command": " ".join(["python train.py", *map(str, SOAK)]), "seed": 0, "steps": steps,
        "samples_after_warm_up": len(late),
        "memory_mib_per_100_steps": growth, "band_of_95_percent": band,
        "median_memory_mib_by_fifth": [statistics.median(row[1] for row in fifth(samples, number, steps))
                                       for number in range(1, 6)],
        "file_handles": {"second_fifth": handles[0], "last_fifth": handles[1]},
        "seconds_per_1000_tokens": {"second_fifth": seconds[0], "last_fifth": seconds[1]},
        "speed_drift": seconds[1] / seconds[0], "greedy_accuracy": rows[-1]["eval_accuracy"],
        "machine": {"cores": os.cpu_count(), "threads_used": 1, "cpu": model_name[1] if model_name else None},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__}}
    print(json.dumps(measured, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(measured, indent=1) + "\n")
    assert growth < 2 and handles[0] == handles[1] and 0.5 < measured["speed_drift"] < 2


# --------------------------------------------------------------------------------------------------- 11. supply chain

FOREIGN = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "imp"}
TRUST = "_".join(("trust", "remote", "code"))                                      # no string for the search to find
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {  # (what it is called on, name)
    *(("os", name) for name in ("system", "popen", "execv", "execl", "execve", "spawnv", "spawnl", "startfile")),
    ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"), ("hub", "load"), ("pd", "read_pickle"),
    *(("builtins", name) for name in NAMES)}


def dangers(source):
    """[(line, what)] of all that could run code from data or a download, or fetch what may change."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, f"import {name}") for name in names if name.split(".")[0] in FOREIGN]
            found += [(node.lineno, "import runpy") for name in names if name == "runpy"]
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            for part in ast.walk(keywords[None]) if None in keywords else ():      # **options | {"name": value}
                keywords |= {key.value: value for key, value in zip(part.keys, part.values)
                             if isinstance(key, ast.Constant)} if isinstance(part, ast.Dict) else {}
            constant = {name: value.value for name, value in keywords.items() if isinstance(value, ast.Constant)}
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
            owner = getattr(node.func, "value", None)
            owner = getattr(owner, "id", None) or getattr(owner, "attr", None)
            if (isinstance(node.func, ast.Name) and name in NAMES or (owner, name) in ATTRIBUTES
                    or name == "exec_module"):
                found.append((node.lineno, name))
            if (owner, name) == ("torch", "load") and constant.get("weights_only") is not True:
                found.append((node.lineno, "torch.load without weights_only=True"))
            if name == "load" and owner in ("np", "numpy") and "allow_pickle" in keywords:
                found.append((node.lineno, "allow_pickle"))
            if "shell" in keywords and constant.get("shell") is not False:
                found.append((node.lineno, "shell"))
            if TRUST in keywords and constant.get(TRUST) is not False:
                found.append((node.lineno, TRUST))
            if name == "from_pretrained" and TRUST not in keywords:
                found.append((node.lineno, "from_pretrained without trust_remote_code=False"))
            if "use_safetensors" in keywords and constant.get("use_safetensors") is not True or (
                    "AutoModelForCausalLM" in map(lambda part: getattr(part, "id", None), [*node.args, getattr(
                        node.func, "value", None)]) and name in ("load", "from_pretrained")
                    and "use_safetensors" not in keywords):
                found.append((node.lineno, "a model without use_safetensors=True"))
        elif isinstance(node, ast.Attribute) and node.attr == TRUST:
            found.append((node.lineno, TRUST))
        elif isinstance(node, ast.Constant) and node.value == TRUST:
            found.append((node.lineno, TRUST))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for url in re.findall(r"https?://\S+", node.value):
                if not re.search(r"/[0-9a-f]{40}(/|$)", url):
                    found.append((node.lineno, f"no fixed commit in {url}"))
    return found


def python_files():
    outside = {"runs", ".venv", "venv", "build", ".git"}
    return [path for path in ROOT.rglob("*.py") if not outside & set(path.relative_to(ROOT).parts)]


WEB = "{}://".format("https")                                                      # no URL for the search to find

# from_pretrained of test code reads only the embedded models and those it has just made
MAY_TRUST_ITS_OWN = ("from_pretrained without trust_remote_code=False", "a model without use_safetensors=True")


def test_no_file_runs_code_from_data_or_fetches_what_may_change():
    found = {}
    for path in python_files():
        is_test = path.parent.name == "tests" or path.name.startswith("test_")
        for line, what in dangers(path.read_text(encoding="utf-8")):
            if not (is_test and what in MAY_TRUST_ITS_OWN):
                found.setdefault((path.relative_to(ROOT).as_posix(), what), []).append(line)
    assert found.keys() == {
        ("train.py", "import runpy"),                                              # the user's own --reward
        ("tests/test_stack.py", "eval"),                                           # of this repository's problems
        ("tests/test_tiny.py", "exec_module"),                                     # of this repository's make_tiny.py
    }, found


def test_only_the_users_own_reward_is_run():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    uses = [function.name for function in functions for node in ast.walk(function)
            if isinstance(node, ast.Name) and node.id == "runpy"]
    assert uses == ["run_file"] and source.count("runpy") == 2                     # the other is the import


@pytest.mark.parametrize("snippet", [
    "eval('1')", "x = exec(text)", "compile(text, '', 'exec')", "__import__(name)", "builtins.eval(x)", "import pickle",
    "from pickle import loads", "import os, marshal", "import yaml", "from joblib import load", "import runpy",
    "from runpy import run_path", "spec.loader.exec_module(module)", "torch.load(path)",
    "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "torch.load(path, **options)",
    "np.load(path, allow_pickle=True)", "os.system(x)", "os.popen(x)", "subprocess.run(x, shell=True)",
    "subprocess.Popen(x, shell=flag)", "subprocess.getoutput(x)", "torch.hub.load(repository, name)",
    "AutoModel.from_pretrained(name)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "load(AutoConfig, name, trust_remote_code=args.trust)",
    "options = {'trust_remote_code': True}", "config.trust_remote_code = True",
    "load(AutoModelForCausalLM, name, dtype=dtype)", "load(AutoModelForCausalLM, name, use_safetensors=None)",
    "load(AutoModelForCausalLM, name, **options | {'use_safetensors': False})",
    f"URL = '{WEB}raw.githubusercontent.com/owner/name/main/data.json'", f"f'{WEB}example.org/{{name}}'",
    f"'{WEB}github.com/owner/name/raw/1636438eae81f1a7179d/data.json'"])
def test_the_search_finds_what_is_planted(snippet):
    assert dangers(f"def f():\n    {snippet}\n"), snippet


@pytest.mark.parametrize("snippet", [
    "model.eval()", "re.compile(x)", "torch.compile(model)", "torch.load(path, weights_only=True)", "np.load(path)",
    "AutoModel.from_pretrained(name, trust_remote_code=False, **options)", "subprocess.run([x], shell=False)",
    "load(AutoModelForCausalLM, name, use_safetensors=True)", "json.load(file)",
    "load(AutoModelForCausalLM, name, **options | {'use_safetensors': True})",
    f"'{WEB}raw.githubusercontent.com/owner/name/{'0123456789' * 4}/data.json'"])
def test_the_search_lets_pass_what_is_harmless(snippet):
    assert dangers(snippet) == [], snippet


def test_all_that_is_downloaded_comes_from_a_fixed_commit():
    urls = [url for url, _ in train.DOWNLOADS.values()]
    assert len(urls) == 6
    for url in urls:
        assert re.fullmatch(WEB + r"raw\.githubusercontent\.com/[\w.-]+/[\w.-]+/[0-9a-f]{40}/[\w./-]+", url), url


REQUIREMENTS = ("requirements.txt", "experiments/requirements.txt", "examples/requirements.txt")


def loose(line):
    """Whether a line of a requirements file leaves the lowest or the highest version open."""
    operators = [specifier.operator for specifier in Requirement(line).specifier]
    return not ("==" in operators or {">=", "<"} <= set(operators))


def test_every_dependency_has_a_lower_and_an_upper_bound():
    lines = [line for name in REQUIREMENTS for line in (ROOT / name).read_text().splitlines()
             if line.strip() and line[0] != "#"]
    assert lines.count("-r ../requirements.txt") == 2
    assert [line for line in lines if line != "-r ../requirements.txt" and loose(line)] == []
    assert loose("torch") and loose("torch>=2") and loose("torch<3")
    assert not loose("torch>=2,<3") and not loose("torch==2.6")


def test_every_package_that_is_imported_is_a_named_dependency():
    names = {Requirement(line).name for name in REQUIREMENTS
             for line in (ROOT / name).read_text().splitlines() if line.strip() and line[0] not in "#-"}
    own = {path.stem for path in python_files()}
    imported = set()
    for path in python_files():
        if not path.name.startswith("test_") and path.name != "conftest.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.split(".")[0])
    assert "torch" in imported
    assert imported - own - sys.stdlib_module_names - {"datasets"} <= names            # which trl depends on
