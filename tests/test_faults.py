"""What happens to real runs and real files: each fault is injected, and what must be left is checked.

Runs are small ones of the embedded model; the yardstick is the same run without a fault."""
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from test_train import (ENVIRONMENT, ROOT, error_of, metrics_of, read_lines, run_here, same_weights, tiny_rows,
                        trainer_state, weights_of, without_wall_clock, write)

STEPS = 5


# ---------------------------------------------------------------------------------------------------------- helpers

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


# ------------------------------------------------------------------------------------------------------- 1. kill -9

WATCHED = ("generate", "update", "evaluate", "save_checkpoint")


def watched_run(flags, phase, visits):
    """In a process of its own: a run that tells which of `WATCHED` it is in (from 1; 0: none), and how often it was."""
    def watch(number, name):
        original = getattr(train, name)

        def watched(*args, **kwargs):
            before, phase.value = phase.value, number
            visits[number] += 1
            try:
                return original(*args, **kwargs)
            finally:
                phase.value = before

        setattr(train, name, watched)

    for number, name in enumerate(WATCHED, start=1):
        watch(number, name)
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


@pytest.mark.parametrize("chain", range(12))
def test_a_run_killed_three_times_at_random_moments_ends_like_one_that_was_not(chain, flags, whole, processes, tmp_path):
    """36 kills: each chain kills a run in three of the four phases, some milliseconds after it began one of them."""
    generator, folder = random.Random(chain), tmp_path / "run"
    for target, visit in zip(generator.sample(range(1, 5), 3), (generator.choice((1, 2)), 1, 1)):
        phase, visits = processes.Value("i", 0), processes.Array("i", len(WATCHED) + 1)
        resumed = (folder / "config.json").is_file()
        process = processes.Process(target=watched_run, args=(
            ["--resume", folder] if resumed else [*flags, "--out", folder], phase, visits))
        process.start()
        while process.is_alive() and (visits[target] < visit or phase.value != target):
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL                             # and not 0: it was still at work
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
    assert made.value > 20 and steps == sorted(steps) and set(steps) == {2, 3}     # the old one, and from a rename on the new


# ------------------------------------------------------------------------------------------- 2. Ctrl-C and SIGTERM

CTRL_C, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize("number, name, step, times, reached", [
    (CTRL_C, "evaluate", 0, 1, 0), (TERM, "generate", 1, 1, 0), (CTRL_C, "generate", 3, 1, 2),
    (TERM, "old_policy_pass", 3, 1, 2), (CTRL_C, "nthr_advantages", 4, 1, 3), (TERM, "update", 4, 1, 3),
    (CTRL_C, "step_likelihood_change", 3, 1, 3), (TERM, "evaluate", 4, 1, 4), (CTRL_C, "save_checkpoint", 4, 1, 4),
    (TERM, "append", 3, 1, 3), (CTRL_C, "step_likelihood_change", 3, 2, 2)])
def test_a_signal_in_any_phase_saves_what_is_whole_and_says_how_to_continue(number, name, step, times, reached, flags,
                                                                            whole, tmp_path, monkeypatch, capsys):
    """At once, unless the weights have moved: then after the step, or with a second signal at the last checkpoint."""
    hook(monkeypatch, name, step, lambda: [os.kill(os.getpid(), number) for _ in range(times)])
    assert stops(*flags, "--out", tmp_path / "run") == 128 + number
    printed = capsys.readouterr().out
    assert f"stopped after step {reached}; continue with: python train.py --resume {tmp_path / 'run'}" in printed
    assert ("finishing this step" in printed) == (reached == step > 0 and name != "save_checkpoint" or times == 2)
    assert trainer_state(tmp_path / "run")["state"]["step"] == reached
    monkeypatch.undo()
    continue_as_printed(printed)
    assert_same(tmp_path / "run", whole)


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


# --------------------------------------------------------------------------------- 3. full disks and write errors

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


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """The order of what reaches the disk: every file, then the folder, then the names; and the log before all that."""
    args, done = train.parse_args(["--out", "unused"]), []
    args.out = str(tmp_path)
    model, tokenizer = (kind.from_pretrained(ROOT / "tiny") for kind in (AutoModelForCausalLM, AutoTokenizer))
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle))
    monkeypatch.setattr(Path, "rename", lambda self, to: done.append((str(self), str(to))) or rename(self, to))
    train.append(args, "metrics.jsonl", [{"step": 1}])
    train.save_checkpoint(model, tokenizer, torch.optim.AdamW(model.parameters()), dict(train.START), args)
    temporary, final = tmp_path / "checkpoint.tmp", tmp_path / "checkpoint"
    swap = done.index((str(temporary), str(final)))
    synced = set(done[:swap]) - {str(temporary / "manifest.tmp")}
    written = {str(temporary / path.name) for path in final.iterdir() if path.name != "manifest.json"}
    assert synced == written | {str(temporary), str(tmp_path / "metrics.jsonl")} and done[0] == str(tmp_path / "metrics.jsonl")
    assert str(temporary / "manifest.tmp") in done[:swap] and done[swap - 1] == str(temporary) and str(tmp_path) in done[swap:]


# ----------------------------------------------------------------------------------------- 4. damaged checkpoints

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
          ("model.safetensors", Path.unlink), ("trainer.pt", cut), ("trainer.pt", flip_a_bit), ("trainer.pt", Path.unlink),
          ("tokenizer.json", Path.unlink), ("config.json", of_another_model), ("manifest.json", Path.unlink),
          ("manifest.json", cut), ("manifest.json", of_another_run), ("manifest.json", lambda path: path.write_text("[]"))]


@pytest.mark.parametrize("name, damage", DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_named_and_the_newest_intact_one_offered(name, damage, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    damage(folder / "checkpoint" / name)
    message = error_of("--resume", folder, starts=True)
    assert f"{folder / 'checkpoint'} cannot be used" in message
    assert ("--lr 0.5, not 0.0001" if damage is of_another_run else name) in message
    assert f"the newest intact one is {folder / 'checkpoint-2'}, of step 2: move {folder / 'checkpoint'} away" in message
    assert (folder / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()


def test_the_offered_checkpoint_continues_to_the_same_end(stopped, whole, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    cut(folder / "checkpoint" / "model.safetensors")
    message = error_of("--resume", folder, starts=True)
    (folder / "checkpoint").rename(tmp_path / "away")
    assert "--resume" in message
    run_here("--resume", folder, "--steps", STEPS)
    assert_same(folder, whole)


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


def test_other_problems_under_the_same_name_are_not_continued_with(flags, tmp_path):
    data = shutil.copy(flags[1], tmp_path / "train.jsonl")
    run_here("--data", data, *flags[2:], "--steps", 2, "--out", tmp_path / "run")
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
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    message = error_of("--model", folder, *flags, "--out", tmp_path / "run", starts=True)
    assert f"{folder} holds pickled weights only (pytorch_model.bin)" in message and "can run any code" in message
    assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()


def test_code_that_a_runs_folder_names_as_its_reward_is_not_run_unasked(stopped, tmp_path):
    folder, harm = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "harm"
    file = write(folder / "reward.py", f"open({str(harm)!r}, 'w')\n\n\ndef reward(response, answer):\n    return 1\n")
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", json.dumps({**config, "reward": f"{file}:reward"}))
    assert f"add --reward {file}:reward if you trust it" in error_of("--resume", folder) and not harm.exists()
    train.parse_args(["--resume", str(folder), "--reward", f"{file}:reward"])
    assert harm.exists()


@pytest.mark.parametrize("content, words", [("[1]", "lacks"), ("{", "damaged"), ('{"steps": 3}', "lacks")])
def test_a_config_that_is_not_that_of_a_run_is_named(content, words, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    write(folder / "config.json", content)
    message = error_of("--resume", folder)
    assert str(folder / "config.json") in message and words in message


def test_a_damaged_line_in_the_middle_of_the_log_is_named(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    write(folder / "metrics.jsonl", "\n".join([*lines[:2], "\0" * 50, *lines[3:], ""]))
    before = (folder / "metrics.jsonl").read_bytes()
    assert f"{folder / 'metrics.jsonl'}, line 3 is damaged" in error_of("--resume", folder, "--steps", 5, starts=True)
    assert (folder / "metrics.jsonl").read_bytes() == before


# --------------------------------------------------------------------------------- 5. two processes on one folder

def waits(flags, ready):
    """In a process of its own: a run that stays in its first evaluation."""
    train.evaluate = lambda *args: ready.set() or time.sleep(600)
    run_quietly(flags)


def test_a_second_process_on_the_same_folder_refuses_until_the_first_is_gone(flags, whole, processes, tmp_path):
    folder, ready = tmp_path / "run", processes.Event()
    first = processes.Process(target=waits, args=([*flags, "--out", folder], ready))
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


# ------------------------------------------------------------------------------------ 6. losses that are not finite

def questions_of(args, problems, step):
    """The ids of the problems that a step draws: the same permutation for every pass over the data."""
    places = range((step - 1) * args.batch_size, step * args.batch_size)
    return [1 + int(np.random.default_rng([args.seed, i // len(problems)]).permutation(len(problems))[i % len(problems)])
            for i in places]


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
        return (loss * math.nan, {**metrics, "loss": metrics["loss"] * math.nan}) if next(calls) != 2 else (loss, metrics)

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
