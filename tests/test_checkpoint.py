"""What a run promises when something goes wrong: it is killed, stopped, out of disk, or given damaged or forged files.

Faults are injected into small runs of a random model whose reward is right about half of the time. The yardstick is
the same run without a fault, `whole`. Running out of memory is in test_memory.py; flags of a resumed run, and files
that only its config.json names, are in test_flags.py."""
import ast
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
from contextlib import contextmanager, suppress
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import grpo
import nthr
import rollout
from helpers import (ENVIRONMENT, ROOT, SIZES, assert_same_run, command, error_of, metrics_of, read_lines, run,
                     run_here, same_weights, save_random_model, small_flags, weights_of, write)
from support import checkpoint, data, errors, evaluate, memory, models
from support.checkpoint import Progress, checkpoints, load_progress, lock_folder, read_progress, save_checkpoint

resource = pytest.importorskip("resource")                                     # Linux and macOS

CTRL_C, TERM = signal.SIGINT, signal.SIGTERM
STEPS = 5
COIN = """import zlib


def coin(response, answer):
    return response == "\\\\boxed{" + answer + "}" or zlib.crc32(response.encode()) % 2
"""


# ------------------------------------------------------------------------------------------------------------ helpers

def coin_flags(folder):
    """Flags of a run with two updates a step, and an evaluation and a checkpoint every second step."""
    save_random_model(Qwen2Config(tie_word_embeddings=True, **SIZES), folder / "model")
    reward = write(folder / "coin.py", COIN)
    return small_flags(folder, "--model", folder / "model", "--reward", f"{reward}:coin", "--steps", STEPS,
                       "--batch-size", 4, "--minibatch-size", 2, "--group-size", 4, "--max-new-tokens", 12,
                       "--eval-size", 2, "--eval-every", 2, "--save-every", 2, "--delta-every", 1, "--lr", 1e-3,
                       "--kl-coef", 0.1, "--keep-checkpoints", 3, "--no-gradient-checkpointing")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return coin_flags(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The folder of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(*small, "--out", folder)
    assert [row["step"] for row in metrics_of(folder)] == list(range(STEPS + 1))
    assert all(row["updates"] == 2 for row in metrics_of(folder)[1:])
    assert [path.name for path in checkpoints(folder)] == ["checkpoint", "checkpoint-4", "checkpoint-2"]
    return folder


def reward_of(small):
    return "--reward", small[small.index("--reward") + 1]


def stopped_copy(whole, folder):
    """A copy of the run as a crash in the last step would leave it: checkpoints of steps 4 and 2, logs up to step 5."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint")
    (folder / "checkpoint-4").rename(folder / "checkpoint")
    return folder


def act_at(monkeypatch, module, name, step, act, call=1):
    """Call act() before this call, counted from 1, of module.name in this step of a run."""
    original, step_seed, now, calls = getattr(module, name), data.step_seed, [0], itertools.count(1)

    def follow(seed, number, *rest):
        now[0] = max(now[0], number)
        return step_seed(seed, number, *rest)

    def watched(*args, **kwargs):
        if now[0] == step and next(calls) == call:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(data, "step_seed", follow)
    monkeypatch.setattr(module, name, watched)


def exit_code(*flags):
    with pytest.raises(SystemExit) as caught:
        run_here(*flags)
    return caught.value.code


def continue_as_printed(text):
    """Run the command that a message gives; it names the reward again, which is a file."""
    words = shlex.split(text[text.index("--resume"):])[:4]
    assert words[2] == "--reward"
    run_here(*words)


@contextmanager
def files_of_at_most(size):
    """Writing more to any file fails, as on a full disk, once what this yields is called."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size() if callable(size) else size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def processes():
    """Processes that start at once: copies of one that has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_checkpoint", "transformers.models.qwen2.modeling_qwen2"])
        yield context


def in_child(log, flags, prepare, details):
    """In a process of its own: train.py after prepare(*details). What it prints goes to the file `log`."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    prepare(*details)
    run_here(*flags)


def child_code(processes, folder, flags, prepare=int, *details):
    """The exit code of train.py in a process of its own, and what it printed."""
    log = folder / "printed.txt"
    process = processes.Process(target=in_child, args=(log, flags, prepare, details))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def send_at(module, name, step, number, times=1, call=1):
    """This process will get a signal in this call of module.name, in this step."""
    act_at(pytest.MonkeyPatch(), sys.modules[module], name, step,
           lambda: [os.kill(os.getpid(), number) for _ in range(times)], call)


# --------------------------------------------------------------------------------------------------------- 1. kill -9

def test_a_run_killed_in_the_middle_of_an_update_resumes_to_the_end_of_one_that_was_not(small, whole, processes,
                                                                                        tmp_path):
    folder = tmp_path / "run"
    code, _ = child_code(processes, tmp_path, [*small, "--out", folder], send_at, "grpo", "grpo_loss", 4,
                         signal.SIGKILL, 1, 2)
    assert code == -signal.SIGKILL and read_progress(folder / "checkpoint").step == 2
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2, 3]         # 3 is made again
    run_here("--resume", folder, *reward_of(small))
    assert_same_run(folder, whole)


def die_between_the_renames(times):
    """This process is killed when checkpoint number `times` is about to take its name: 1 of step 0, 2 of 2, 3 of 4."""
    rename, calls = Path.rename, itertools.count(1)

    def watched(path, target):
        if path.name == "checkpoint.tmp" and next(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = watched


def test_a_kill_between_the_two_renames_of_a_checkpoint_resumes_from_the_older_one(small, whole, processes, tmp_path):
    folder = tmp_path / "run"
    code, _ = child_code(processes, tmp_path, [*small, "--out", folder], die_between_the_renames, 3)
    assert code == -signal.SIGKILL
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-0"]
    run_here("--resume", folder, *reward_of(small))
    assert_same_run(folder, whole)


def test_lines_torn_by_a_crash_are_cut(small, whole, tmp_path):
    folder = stopped_copy(whole, tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 3, "problem": "tor')
    run_here("--resume", folder, *reward_of(small))
    assert_same_run(folder, whole)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(small, whole, tmp_path):
    """As a kill in the first evaluation leaves it: samples of step 0 are written, metrics are not."""
    (tmp_path / "run").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "run")
    write(tmp_path / "run" / "metrics.jsonl", "")
    write(tmp_path / "run" / "samples.jsonl", json.dumps(read_lines(whole / "samples.jsonl")[0]) + "\n")
    run_here("--resume", tmp_path / "run", *reward_of(small))
    assert_same_run(tmp_path / "run", whole)


def test_resuming_a_finished_run_changes_nothing_and_more_steps_continue_it(small, whole, tmp_path):
    folder = tmp_path / "run"
    run_here(*small, "--steps", 3, "--out", folder)
    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "config.json")}
    trained = weights_of(folder)
    run_here("--resume", folder, *reward_of(small))
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert all(torch.equal(trained[name], value) for name, value in weights_of(folder).items())
    run_here("--resume", folder, *reward_of(small), "--steps", STEPS, "--save-every", 1, "--keep-checkpoints", 1)
    assert same_weights(folder, whole) and [path.name for path in checkpoints(folder)] == ["checkpoint"]
    recorded = json.loads((folder / "config.json").read_text())
    assert (recorded["steps"], recorded["save_every"], recorded["lr"]) == (STEPS, 1, 1e-3)


# The kills at random moments need runs that are still at work when the third one comes.
LONG = 20
PHASES = {"rollout": "generate", "grpo": "grpo_loss", "support.evaluate": "greedy_answers",
          "support.checkpoint": "save_checkpoint"}


@pytest.fixture(scope="module")
def long_whole(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    run_here(*small, "--steps", LONG, "--out", folder)
    return folder


def die_after(module, visit, delay):
    """This process is killed so many seconds after it begins this phase for the visit-th time."""
    name, visits = PHASES[module], itertools.count(1)
    original = getattr(sys.modules[module], name)

    def kill():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(*args, **kwargs):
        if next(visits) == visit:
            threading.Thread(target=kill).start()                              # an exit would wait for it
        return original(*args, **kwargs)

    setattr(sys.modules[module], name, watched)


@pytest.mark.full
@pytest.mark.parametrize("chain", range(10))
def test_a_run_killed_three_times_at_random_moments_ends_like_any_other(chain, small, long_whole, processes, tmp_path):
    """30 kills: each chain kills a run in three of the four phases, some milliseconds after it began one of them."""
    generator, folder = random.Random(chain), tmp_path / "run"
    for module, visit in zip(generator.sample(list(PHASES), 3), (generator.choice((1, 2)), 1, 1)):
        again = ["--resume", folder, *reward_of(small)]
        begun = (folder / "config.json").is_file()
        code, printed = child_code(processes, tmp_path, again if begun else [*small, "--steps", LONG, "--out", folder],
                                   die_after, module, visit, generator.uniform(0, 0.05))
        assert code == -signal.SIGKILL, printed
    run_here("--resume", folder, *reward_of(small))
    assert_same_run(folder, long_whole)


def die_before_operation(folder, model_folder, operation, made):
    """In a process of its own: save steps 1 to 3 into the folder; a kill comes before this file operation of step 3."""
    model, tokenizer = (kind.from_pretrained(model_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    optimizer = torch.optim.AdamW(model.parameters())

    def count(event, details):
        writes = event == "open" and str(folder) in str(details[0]) and details[1] not in ("r", "rb")
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            made.value += 1
            if made.value == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    folder.mkdir()
    for step in (1, 2, 3):
        if step == 3:
            sys.addaudithook(count)
        save_checkpoint(folder, model, tokenizer, optimizer, Progress(step=step), keep=2)


@pytest.mark.full
def test_a_kill_before_any_file_operation_of_saving_leaves_whole_checkpoints(small, processes, tmp_path):
    model_folder, made = small[small.index("--model") + 1], processes.Value("i", 0)
    operations, newest = None, []
    for operation in itertools.count():                                        # 0: none, to count them
        folder, made.value = tmp_path / str(operation), 0
        process = processes.Process(target=die_before_operation, args=(folder, model_folder, operation, made))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if operation else 0), operation
        operations = operations or made.value
        steps = []
        for path in checkpoints(folder):
            model = AutoModelForCausalLM.from_pretrained(path)
            assert AutoTokenizer.from_pretrained(path), operation
            steps.append(load_progress(path, torch.optim.AdamW(model.parameters())).step)
        assert steps in ([2, 1], [2], [3, 2], [3, 2, 1]), (operation, steps)
        newest += steps[:1] if operation else []
        if operation == operations:
            break
    assert operations > 15 and newest == sorted(newest) and set(newest) == {2, 3}   # the old, then the new


# ---------------------------------------------------------------------------------------------- 2. Ctrl-C and SIGTERM

def test_a_signal_finishes_the_step_and_saves_it_and_a_second_one_ends_at_once(small, whole, processes, tmp_path):
    for number, times, code, reached in ((CTRL_C, 1, 130, 3), (TERM, 1, 143, 3), (CTRL_C, 2, 130, 2)):
        case, folder = f"signal {number}, {times} times", tmp_path / f"{number}-{times}"
        ended, printed = child_code(processes, tmp_path, [*small, "--out", folder], send_at, "grpo", "grpo_loss", 3,
                                    number, times)
        assert (ended, read_progress(folder / "checkpoint").step) == (code, reached), f"{case}: {printed}"
        assert "finishing this step and saving it" in printed and "Traceback" not in printed, f"{case}: {printed}"
        words = f"stopped after step {reached}" if times == 1 else "stopped in the middle of a step"
        assert f"{words}; continue with: python train.py --resume {folder}" in printed, f"{case}: {printed}"
        continue_as_printed(printed)
        assert_same_run(folder, whole)


def test_ctrl_c_while_a_run_is_loaded_leaves_nothing_behind(small, tmp_path, monkeypatch, capfd):
    act_at(monkeypatch, models, "load_model", 0, lambda: signal.default_int_handler(CTRL_C, None))
    assert exit_code(*small, "--out", tmp_path / "run") == 130
    assert "interrupted: run the same command again" in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_a_signal_in_the_last_evaluation_does_not_undo_the_run(small, whole, tmp_path, monkeypatch, capfd):
    act_at(monkeypatch, evaluate, "greedy_answers", STEPS, lambda: os.kill(os.getpid(), CTRL_C))
    run_here(*small, "--out", tmp_path / "run")                                # done: there is nothing to continue
    assert f"done: metrics in {tmp_path / 'run'}" in capfd.readouterr().out
    assert_same_run(tmp_path / "run", whole)


SIGNALS = [  # signal, module, function, step, call, the last step of the run
    (CTRL_C, evaluate, "greedy_answers", 0, 1, 0), (TERM, evaluate, "greedy_answers", 2, 1, 2),
    (TERM, rollout, "generate", 1, 1, 1), (CTRL_C, rollout, "generate", 3, 1, 3),
    (TERM, nthr, "nthr_advantages", 4, 1, 4), (CTRL_C, grpo, "response_logprobs", 3, 1, 3),   # ln π_old
    (TERM, grpo, "response_logprobs", 3, 2, 3), (CTRL_C, grpo, "grpo_loss", 3, 2, 3),          # the reference
    (TERM, grpo, "likelihood_change", 3, 1, 3), (CTRL_C, memory, "peak_memory", 1, 1, None),
    (TERM, checkpoint, "append_rows", 3, 1, None), (CTRL_C, checkpoint, "save_checkpoint", 2, 1, None),
    (TERM, torch, "save", 2, 1, None), (CTRL_C, Path, "rename", 2, 2, None)]   # between the two renames


@pytest.mark.full
def test_a_signal_in_any_phase_ends_after_a_whole_step(small, whole, tmp_path, capfd):
    """Where the last step is None, the step was already being written: that one, or the next."""
    for number, module, name, step, call, last in SIGNALS:
        case = f"signal {number} in {name} of step {step}"
        folder = tmp_path / f"{name}-{step}-{call}"
        with pytest.MonkeyPatch.context() as patch:
            act_at(patch, module, name, step, lambda: os.kill(os.getpid(), number), call)
            assert exit_code(*small, "--out", folder) == 128 + number, case
        printed, reached = capfd.readouterr().out, read_progress(folder / "checkpoint").step
        assert reached in ([last] if last is not None else [step, step + 1]), case
        assert f"stopped after step {reached}; continue with: " in printed, case
        continue_as_printed(printed)
        assert_same_run(folder, whole)


@pytest.mark.full
def test_ctrl_c_in_a_shell(small, whole, tmp_path):
    """The script itself, and a signal from outside at whatever moment its third line is written."""
    process = subprocess.Popen(command(*small, "--out", "run"), cwd=tmp_path, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(CTRL_C)
    printed, warned = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in warned, warned
    reached = read_progress(tmp_path / "run" / "checkpoint").step
    assert printed.splitlines()[-1].startswith(f"stopped after step {reached}; continue with: python train.py --resume")
    assert metrics_of(tmp_path / "run")[-1]["step"] == reached >= 2
    run(*shlex.split(printed[printed.index("--resume"):]), cwd=tmp_path)
    assert_same_run(tmp_path / "run", whole)


def test_a_fault_in_a_reward_shows_its_traceback_and_leaves_the_last_checkpoint(small, whole, tmp_path):
    calls = 2 + 2 * 16 + 2                                                     # evaluation, two steps, evaluation
    file, folder = tmp_path / "mine.py", tmp_path / "run"
    write(file, f"calls = []\n\n\n{COIN}".replace("    return", f"    calls.append(1 // (len(calls) != {calls + 5}))\n"
                                                                "    return"))
    with pytest.raises(ZeroDivisionError):
        run_here(*small, "--reward", f"{file}:coin", "--out", folder)
    assert read_progress(folder / "checkpoint").step == 2
    write(file, COIN)
    data.run_file.cache_clear()
    run_here("--resume", folder, "--reward", f"{file}:coin")
    assert_same_run(folder, whole)


# ------------------------------------------------------------------------------------- 3. full disks and write errors

def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_previous_checkpoint(small, whole, tmp_path, monkeypatch):
    """The weights are written (91 kB), the optimizer is not (204 kB)."""
    folder = tmp_path / "run"
    with files_of_at_most(150_000) as limit:
        act_at(monkeypatch, checkpoint, "save_checkpoint", 4, limit)
        message = error_of(*small, "--out", folder)
    assert f"cannot write {folder / 'checkpoint'}: " in message and "File too large" in message
    assert "make room" in message and "--resume" in message
    assert [path.name for path in checkpoints(folder)] == ["checkpoint", "checkpoint-0"]
    assert read_progress(folder / "checkpoint").step == 2 and not list(folder.glob("*.tmp"))   # its room is free again
    monkeypatch.undo()
    run_here("--resume", folder, *reward_of(small))
    assert_same_run(folder, whole)


@pytest.mark.full
def test_any_file_that_cannot_be_written_is_named_and_the_last_checkpoint_stays(small, whole, tmp_path, capsys):
    """Of a line of a log, half comes to the disk. capsys keeps what is printed in memory, not in a file."""
    for name, step, size, file, reached in (
            ("save_checkpoint", 4, 10, "checkpoint", 2), ("save_checkpoint", 4, 2_000, "checkpoint", 2),
            ("save_checkpoint", 4, 50_000, "checkpoint", 2), ("save_checkpoint", 0, 50_000, "checkpoint", None),
            ("append_rows", 3, "metrics.jsonl", "metrics.jsonl", 2),
            ("append_rows", 4, "samples.jsonl", "samples.jsonl", 2),
            ("append_rows", 0, "samples.jsonl", "samples.jsonl", None)):
        case, folder = f"{file} in step {step}, {size}", tmp_path / f"{name}-{step}-{size}"
        with files_of_at_most(size if isinstance(size, int) else lambda: (folder / size).stat().st_size + 60) as limit:
            with pytest.MonkeyPatch.context() as patch:
                act_at(patch, checkpoint, name, step, limit)
                message = error_of(*small, "--out", folder)
        assert f"cannot write {folder / file}: " in message and "File too large" in message, f"{case}: {message}"
        assert not list(folder.glob("checkpoint.*")), case
        assert reached is None or read_progress(folder / "checkpoint").step == reached, case
        run_here("--resume", folder, *reward_of(small))
        assert_same_run(folder, whole)


@pytest.mark.full
def test_a_config_or_an_evaluation_that_cannot_be_written_leaves_nothing_to_continue(small, whole, tmp_path, capsys):
    with files_of_at_most(100) as limit:
        limit()
        message = error_of(*small, "--out", tmp_path / "run")
        evaluation = error_of(*small[:-1], "--eval-only", "--eval-data", ROOT / "tiny" / "test.jsonl", "--eval-size", 3,
                              "--out", tmp_path / "evaluation")
    assert "cannot write" in message and "config.json" in message and "start again" in message
    assert "cannot write" in evaluation and "answers.jsonl" in evaluation and "start again" in evaluation
    run_here(*small, "--out", tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.full
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(small, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        message = error_of(*small, "--out", disk / "run")                      # checkpoints of 0.1, 0.3 and 0.3 MB
        assert "No space left on device" in message and read_progress(disk / "run" / "checkpoint").step == 2
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        run_here("--resume", disk / "run", *reward_of(small))
        assert_same_run(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def parts(small):
    """Model, tokenizer and optimizer: what a checkpoint is made of."""
    folder = small[small.index("--model") + 1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder), torch.optim.AdamW(model.parameters())


def test_so_many_checkpoints_are_kept_under_their_steps(parts, tmp_path):
    for keep in (1, 2, 3):
        folder = tmp_path / str(keep)
        (folder / "checkpoint-best").mkdir(parents=True)                       # the user's own stays
        for step in (8, 9, 10, 11):                                            # by number, not by name
            save_checkpoint(folder, *parts, Progress(step=step), keep)
        names = [path.name for path in checkpoints(folder)]
        assert names == ["checkpoint", "checkpoint-10", "checkpoint-9"][:keep]
        assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "checkpoint-best"])
        assert [read_progress(path).step for path in checkpoints(folder)] == [11, 10, 9][:keep]


def test_a_checkpoint_gives_back_the_optimizer_the_random_numbers_and_the_progress(small, whole, parts):
    model, _, _ = parts
    saved = torch.load(whole / "checkpoint" / "trainer.pt", weights_only=True)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(12345)
    progress = load_progress(whole / "checkpoint", optimizer)
    assert progress == Progress(step=STEPS, position=4 * STEPS, nonfinite=0)   # 4 questions a step
    assert torch.equal(torch.get_rng_state(), saved["rng"]["cpu"])
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert {int(state["step"]) for state in optimizer.state.values()} == {2 * STEPS}


def test_a_full_disk_is_called_by_its_name_wherever_it_strikes(whole, parts, tmp_path, capsys):
    """torch.save has an error of its own, which does not say what is wrong."""
    model, tokenizer, _ = parts
    optimizer = torch.optim.AdamW(model.parameters())
    load_progress(whole / "checkpoint", optimizer)                             # with its moments
    save_checkpoint(tmp_path, model, tokenizer, optimizer, Progress(step=1), keep=2)
    for size in range(0, (tmp_path / "checkpoint" / "trainer.pt").stat().st_size, 7_000):
        with files_of_at_most(size) as limit, pytest.raises(SystemExit) as caught:
            limit()
            save_checkpoint(tmp_path, model, tokenizer, optimizer, Progress(step=2), keep=2)
        assert "File too large" in caught.value.code, (size, caught.value.code)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert read_progress(tmp_path / "checkpoint").step == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(parts, tmp_path, monkeypatch):
    """The order of what reaches the disk: the log, then every file, then their folder, then the names."""
    done, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync",
                        lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append((str(path), str(to))) or rename(path, to))
    checkpoint.append_rows(tmp_path / "metrics.jsonl", [{"step": 1}])
    save_checkpoint(tmp_path, *parts, Progress(), keep=2)
    temporary, final, log = tmp_path / "checkpoint.tmp", tmp_path / "checkpoint", str(tmp_path / "metrics.jsonl")
    swap = done.index((str(temporary), str(final)))
    written = {str(temporary / path.relative_to(final)) for path in final.rglob("*")}
    assert len(written) > 5 and set(done[:swap]) == written | {str(temporary), log}
    assert done[0] == log and done[swap - 1] == str(temporary) and done[swap + 1] == str(tmp_path)
    checkpoint.replace_text(tmp_path / "config.json", "{}")
    assert done[-1] == str(tmp_path / "config.tmp") and (tmp_path / "config.json").read_text() == "{}"


def test_a_number_that_json_cannot_hold_is_null(tmp_path):
    checkpoint.append_rows(tmp_path / "log", [{"a": math.nan, "b": -math.inf, "c": 0.5, "d": "∞"}, {"a": None}])
    assert read_lines(tmp_path / "log") == [{"a": None, "b": None, "c": 0.5, "d": "∞"}, {"a": None}]


# ---------------------------------------------------------------------------------------- 4. damaged and forged files

class Harm:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def torn(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) * 2 // 3])


def damaged_line(path):
    lines = path.read_text().splitlines()
    write(path, "\n".join([lines[0], "\0" * 50, *lines[2:], ""]))


def of_another_model(path):
    shutil.copy(ROOT / "tiny" / path.name, path)


def other_shapes(path):
    saved = torch.load(path, weights_only=True)
    saved["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(saved, path)


DAMAGE = [  # file of a run, what happens to it, what the message must name beside the folder
    ("config.json", torn, "config.json is damaged"), ("config.json", Path.unlink, "no config.json"),
    ("config.json", lambda path: write(path, '{"steps": 3}'), "config.json lacks"),
    ("config.json", lambda path: write(path, "[1]"), "config.json"),
    ("checkpoint/trainer.pt", torn, "trainer.pt"), ("checkpoint/trainer.pt", Path.unlink, "trainer.pt"),
    ("checkpoint/trainer.pt", other_shapes, "trainer.pt"),
    ("checkpoint/trainer.pt", lambda path: torch.save([1, 2], path), "trainer.pt"),
    ("checkpoint/progress.json", torn, "progress.json"), ("checkpoint/progress.json", Path.unlink, "progress.json"),
    ("checkpoint/progress.json", lambda path: write(path, '{"steps": 3}'), "progress.json"),
    ("checkpoint/model.safetensors", torn, "checkpoint"), ("checkpoint/model.safetensors", Path.unlink, "checkpoint"),
    ("checkpoint/model.safetensors", of_another_model, "checkpoint"),
    ("checkpoint/config.json", torn, "checkpoint"), ("checkpoint/tokenizer.json", torn, "checkpoint"),
    ("metrics.jsonl", damaged_line, "metrics.jsonl, line 2 is damaged"),
    ("samples.jsonl", damaged_line, "samples.jsonl, line 2 is damaged")]


def test_a_damaged_file_of_a_run_is_named_in_one_line_and_nothing_is_lost(small, whole, tmp_path):
    template, failures = stopped_copy(whole, tmp_path / "template"), []
    for number, (name, damage, words) in enumerate(DAMAGE):
        folder = shutil.copytree(template, tmp_path / str(number))
        damage(folder / name)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        message = error_of("--resume", folder, *reward_of(small))              # one line
        if str(folder) not in message or words not in message:
            failures.append((name, getattr(damage, "__name__", ""), message))
        # config.json records --out again; metrics.jsonl is cut to the checkpoint before samples.jsonl is read
        may_change = {"metrics.jsonl": {"config.json"}, "samples.jsonl": {"config.json", "metrics.jsonl"}}
        changed = {path.name for path, content in before.items() if path.read_bytes() != content}
        if changed - may_change.get(name, set()):
            failures.append((name, getattr(damage, "__name__", ""), changed))
    assert not failures, failures


def test_a_run_continues_from_the_older_checkpoint_when_a_damaged_one_is_moved_away(small, whole, tmp_path):
    folder = stopped_copy(whole, tmp_path / "run")
    torn(folder / "checkpoint" / "trainer.pt")
    message = error_of("--resume", folder, *reward_of(small))
    assert f"move {folder / 'checkpoint'} away" in message
    (folder / "checkpoint").rename(tmp_path / "away")
    run_here("--resume", folder, *reward_of(small))
    assert_same_run(folder, whole)


def test_a_forged_trainer_state_runs_nothing(small, whole, tmp_path):
    folder, harm = stopped_copy(whole, tmp_path / "run"), tmp_path / "harm"
    path = folder / "checkpoint" / "trainer.pt"
    torch.save({**torch.load(path, weights_only=True), "rng": Harm(harm)}, path)
    assert str(path) in error_of("--resume", folder, *reward_of(small)) and not harm.exists()
    torch.load(path, weights_only=False)                                       # it would have
    assert harm.exists()


# ------------------------------------------------------------------------------------- 5. two processes on one folder

def stay_in_the_first_evaluation(ready):
    evaluate.greedy_answers = lambda *args: ready.set() or time.sleep(600)


def test_a_second_process_on_the_same_folder_refuses_until_the_first_is_gone(small, whole, processes, tmp_path):
    folder, ready = tmp_path / "run", processes.Event()
    first = processes.Process(target=in_child, daemon=True, args=(
        tmp_path / "printed.txt", [*small, "--out", folder], stay_in_the_first_evaluation, (ready,)))
    first.start()
    try:
        assert ready.wait(60)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert f"another process is writing to {folder}" in error_of("--resume", folder, *reward_of(small))
        assert "already holds a run" in error_of(*small, "--out", folder)
        assert "another process" in error_of("--eval-only", "--eval-size", 1, "--out", folder)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    finally:
        first.kill()
        first.join()
    run_here("--resume", folder, *reward_of(small))                            # the lock died with its process
    assert_same_run(folder, whole)


def test_a_folder_is_locked_while_it_is_used_and_an_empty_one_is_not_left_behind(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "new"
    for _ in range(2):
        with lock_folder(folder):
            assert folder.is_dir()
            with pytest.raises(SystemExit, match="another process is writing to"), lock_folder(folder):
                pass
            assert folder.is_dir()
        assert not folder.exists()
    with pytest.raises(ZeroDivisionError), lock_folder(folder):
        write(folder / "kept", "")
        raise ZeroDivisionError
    with lock_folder(folder):                                                  # the lock went with the error
        pass
    assert (folder / "kept").exists()
    with pytest.raises(SystemExit, match="cannot be used as a folder"), lock_folder(folder / "kept"):
        pass
    assert (folder / "kept").read_text() == ""

    def no_locks(*args):                                                       # as on some network drives
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", no_locks)
    with lock_folder(folder):
        pass
    monkeypatch.setattr(checkpoint, "fcntl", None)                             # as on Windows
    with lock_folder(folder), lock_folder(folder):
        pass


# -------------------------------------------------------------------------------------- 6. losses that are not finite

def not_a_number(loss):
    return loss * math.nan


def infinite_gradient(loss):
    return loss + torch.sqrt(loss * 0.0)                                       # finite, but 0 · ∞ in its gradient


def break_loss(monkeypatch, broken):
    """Pass the loss of each update in `broken`, {number from 1: function}, through that. Returns the numbers so far."""
    original, calls = grpo.grpo_loss, []

    def loss(*args, **kwargs):
        value, metrics = original(*args, **kwargs)
        calls.append(len(calls) + 1)
        if calls[-1] in broken:
            value = broken[calls[-1]](value)
            metrics = {**metrics, "loss": value.detach()}
        return value, metrics

    monkeypatch.setattr(grpo, "grpo_loss", loss)
    return calls


def test_an_update_that_is_not_finite_is_skipped_and_counted(small, tmp_path, monkeypatch, capfd):
    break_loss(monkeypatch, {1: infinite_gradient, 2: not_a_number, 4: not_a_number})
    run_here(*small, "--steps", 2, "--save-every", 1, "--out", tmp_path / "run")
    rows = metrics_of(tmp_path / "run")[1:]
    assert [(row["updates"], row["skipped_updates"]) for row in rows] == [(0, 2), (1, 1)]
    assert rows[0]["loss"] is rows[0]["grad_norm"] is None and math.isfinite(rows[1]["loss"])
    assert capfd.readouterr().out.count("update skipped: loss") == 3
    first, start = tmp_path / "run" / "checkpoint-1", small[small.index("--model") + 1]
    assert torch.load(first / "trainer.pt", weights_only=True)["optimizer"]["state"] == {}
    weights, initial = load_file(first / "model.safetensors"), load_file(start / "model.safetensors")
    assert all(torch.equal(weights[name], initial[name]) for name in initial)
    assert (read_progress(first).nonfinite, read_progress(tmp_path / "run" / "checkpoint").nonfinite) == (2, 1)
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())


def test_three_in_a_row_end_the_run_with_the_last_good_weights(small, tmp_path, monkeypatch):
    one = [*small, "--minibatch-size", 4, "--save-every", 0]                   # one update a step
    calls = break_loss(monkeypatch, {2: not_a_number, 3: infinite_gradient, 4: not_a_number})
    message = error_of(*one, "--steps", 9, "--out", tmp_path / "run")
    assert "non-finite" in message and f"{tmp_path / 'run'}/checkpoint" in message
    assert [row["updates"] for row in metrics_of(tmp_path / "run")[1:]] == [1, 0, 0, 0] and len(calls) == 4
    assert read_progress(tmp_path / "run" / "checkpoint") == Progress(step=4, position=16, nonfinite=3)
    assert metrics_of(tmp_path / "run")[-1]["eval_accuracy"] is not None       # of these weights
    monkeypatch.undo()
    assert "non-finite" in error_of("--resume", tmp_path / "run", *reward_of(small))       # it would go the same way
    run_here(*one, "--steps", 1, "--out", tmp_path / "good")
    assert same_weights(tmp_path / "run", tmp_path / "good")


def test_three_in_a_row_within_one_step_or_across_a_resumption_count(small, tmp_path, monkeypatch):
    broken = dict.fromkeys((1, 2, 3), not_a_number)
    calls = break_loss(monkeypatch, broken)
    assert "non-finite" in error_of(*small, "--minibatch-size", 1, "--steps", 2, "--out", tmp_path / "one")
    assert len(calls) == 3
    monkeypatch.undo()
    break_loss(monkeypatch, broken)
    run_here(*small, "--steps", 1, "--out", tmp_path / "two")
    monkeypatch.undo()
    break_loss(monkeypatch, broken)
    assert "non-finite" in error_of("--resume", tmp_path / "two", *reward_of(small), "--steps", 3)
    assert [row["skipped_updates"] for row in metrics_of(tmp_path / "two")[1:]] == [2, 1]


@pytest.mark.full
def test_logits_that_are_not_finite_end_the_run_with_one_line(small, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(small[small.index("--model") + 1])
    tokenizer = AutoTokenizer.from_pretrained(small[small.index("--model") + 1])
    model.model.norm.weight.data.fill_(math.nan)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    message = error_of(*small, "--model", tmp_path / "model", "--out", tmp_path / "run")
    assert "logits" in message and "not finite" in message


# ------------------------------------------------------------------------------------------------------- 7. one line

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\u202egpj\u2066\u200b\x7f"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\x08\\u202egpj\\u2066\\u200b\\x7f"


def test_an_error_is_one_line_of_printable_characters():
    assert errors.printable(EVIL) == SHOWN
    assert errors.printable("a\nb\rc\td\0\u2028\ud800") == "a\\nb\\rc\\td\\x00\\u2028\\ud800"
    for text in ("café, 漢字, 🙂, שלום", "β = 1, Δ(x) ≤ 0", "\\boxed{5} 'x' \"y\""):
        assert errors.printable(text) == text
    assert all(char.isprintable() for char in errors.printable("".join(map(chr, range(0x10000)))))
    with pytest.raises(SystemExit) as caught:
        errors.fail(f"cannot read {EVIL}\r\nerror: another")
    assert caught.value.code == f"error: cannot read {SHOWN}\\r\\nerror: another"


@pytest.mark.full
def test_an_error_of_the_script_is_on_stderr_with_exit_code_one(tmp_path):
    for given, expected in ((["--batch-size", 12, "--minibatch-size", 8], "--batch-size 12"),
                            (["--model", "no/such/model"], "no/such/model")):
        result = run(*given, "--out", "run", cwd=tmp_path, check=False)
        assert result.returncode == 1 and result.stdout == "" and not (tmp_path / "run").exists()
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], lines


# ------------------------------------------------------------------------------------------------------ 8. a long run

SOAK = ["--steps", 100, "--batch-size", 8, "--minibatch-size", 4, "--eval-every", 50, "--save-every", 10, "--seed", 0]


def slope(x, y):
    """Least squares: the slope of y over x, and half the width of its 95% band if the residuals were independent."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    centered = x - x.mean()
    value = centered @ y / (centered @ centered)
    residuals = y - y.mean() - value * centered
    return value, 1.96 * math.sqrt(residuals @ residuals / (len(x) - 2) / (centered @ centered))


def resources(pid):
    """MiB resident and the number of open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, len(os.listdir(f"/proc/{pid}/fd"))


def fifth(rows, number, steps):
    """The rows, which begin with a step, of one fifth of the steps, counted from 1."""
    return [row for row in rows if (number - 1) * steps / 5 < row[0] <= number * steps / 5]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory and files of a process in /proc")
def test_what_the_long_run_is_measured_with(tmp_path):
    x = np.arange(200)
    assert slope(x, 7 - 0.25 * x) == pytest.approx((-0.25, 0), abs=1e-12)
    # by hand: x = 0, 1, 2, 3 and y = 0, 2, 2, 4: Σ(x−x̄)y = 6, Σ(x−x̄)² = 5; residuals −0.2, 0.6, −0.6, 0.2
    assert slope([0, 1, 2, 3], [0, 2, 2, 4]) == pytest.approx((6 / 5, 1.96 * math.sqrt(0.8 / 2 / 5)))
    noise = np.random.default_rng(0).normal(0, 3, (100, 200))
    inside = [abs(slope(x, 500 + 0.02 * x + y)[0] - 0.02) < slope(x, 500 + 0.02 * x + y)[1] for y in noise]
    assert 88 <= sum(inside) <= 100                                            # 95 are expected
    megabytes, files = resources(os.getpid())
    kilobytes = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert megabytes == pytest.approx(int(kilobytes[1]) / 1024, rel=0.05)
    with open(tmp_path / "a", "w"), open(tmp_path / "b", "w"):
        assert resources(os.getpid())[1] == files + 2
    assert resources(os.getpid())[1] == files
    assert [row[0] for row in fifth([(step,) for step in range(21)], 2, 20)] == [5, 6, 7, 8]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory and files of a process in /proc")
def test_memory_open_files_and_step_time_do_not_grow_in_a_long_run(tmp_path):
    """Memory over the steps after the first fifth; files and speed of the second fifth against those of the last."""
    log, samples = tmp_path / "run" / "metrics.jsonl", []                      # (step, MiB, files)
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command(*SOAK, "--out", "run"), cwd=tmp_path, env=ENVIRONMENT, stdout=output,
                                   stderr=output)
        try:
            while process.poll() is None:
                step = log.read_text().count("\n") - 1 if log.exists() else -1
                with suppress(OSError):                                        # it has just ended
                    samples.append((step, *resources(process.pid)))
                time.sleep(0.1)
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "output").read_text()[-2000:]
    rows = metrics_of(tmp_path / "run")[1:]
    steps = len(rows)
    samples = [row for row in samples if row[0] < steps]                       # not of a process that is ending
    late = [row for row in samples if row[0] > steps / 5]
    growth, band = (100 * value for value in slope([row[0] for row in late], [row[1] for row in late]))
    files = [statistics.median_low(row[2] for row in fifth(samples, number, steps)) for number in (2, 5)]
    # seconds of a step but for its evaluation, per 1000 sampled tokens
    cost = [(row["step"], 1000 * sum(value for phase, value in row["seconds"].items() if phase != "evaluation")
             / (row["response_length"] * row["questions"] * 8)) for row in rows]
    seconds = [statistics.median(row[1] for row in fifth(cost, number, steps)) for number in (2, 5)]
    model_name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    measured = {
        "command": " ".join(["python train.py", *map(str, SOAK)]), "seed": 0, "steps": steps,
        "samples_after_warm_up": len(late), "memory_mib_per_100_steps": growth, "band_of_95_percent": band,
        "median_memory_mib_by_fifth": [statistics.median(row[1] for row in fifth(samples, number, steps))
                                       for number in range(1, 6)],
        "open_files": {"second_fifth": files[0], "last_fifth": files[1]},
        "seconds_per_1000_tokens": {"second_fifth": seconds[0], "last_fifth": seconds[1]},
        "speed_drift": seconds[1] / seconds[0], "greedy_accuracy": rows[-1]["eval_accuracy"],
        "machine": {"cores": os.cpu_count(), "threads_used": 1, "cpu": model_name[1] if model_name else None},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__}}
    print(json.dumps(measured, indent=1))
    assert growth < 20 and files[0] == files[1] and 0.5 < measured["speed_drift"] < 2, measured


# ---------------------------------------------------------------------------------------------------- 9. supply chain

FOREIGN = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "imp"}
TRUST = "_".join(("trust", "remote", "code"))                                  # no string for the search to find
WEB = "{}://".format("https")                                                  # no URL for the search to find
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {  # (what it is called on, name)
    *(("os", name) for name in ("system", "popen", "execv", "execl", "execve", "spawnv", "spawnl", "startfile")),
    ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"), ("hub", "load"), ("pd", "read_pickle"),
    *(("builtins", name) for name in NAMES)}


def dangers(source):
    """What in a source could run code from data or a download, or fetch what may change; not an XML namespace."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in FOREIGN | {"runpy"}]
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            constant = {name: value.value for name, value in keywords.items() if isinstance(value, ast.Constant)}
            name, owner = getattr(node.func, "id", getattr(node.func, "attr", "")), getattr(node.func, "value", None)
            owner = getattr(owner, "id", getattr(owner, "attr", None))
            if (isinstance(node.func, ast.Name) and name in NAMES or (owner, name) in ATTRIBUTES
                    or name == "exec_module"):
                found.append(name)
            if (owner, name) == ("torch", "load") and constant.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
            if "allow_pickle" in keywords:
                found.append("allow_pickle")
            if "shell" in keywords and constant.get("shell") is not False:
                found.append("shell")
            if TRUST in keywords and constant.get(TRUST) is not False:
                found.append(TRUST)
            if name == "from_pretrained" and TRUST not in keywords:
                found.append("from_pretrained without trust_remote_code=False")
            loads = name in ("load_pretrained", "from_pretrained") and any(
                getattr(part, "id", "") == "AutoModelForCausalLM" for part in [*node.args, getattr(
                    node.func, "value", None)])
            if constant.get("use_safetensors", not loads) is not True:
                found.append("a model without use_safetensors=True")
        elif TRUST in (getattr(node, "attr", None), getattr(node, "value", None)):
            found.append(TRUST)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            urls = re.findall(r"https?://(?!www\.w3\.org/)[^\s/]+/\S*", node.value)
            found += [f"no fixed commit in {url}" for url in urls
                      if not re.search(r"/[0-9a-f]{40}(/|$)", url)]
    return found


def python_files():
    outside = {"runs", "models", ".venv", "venv", "build", ".git"}
    return [path for path in ROOT.rglob("*.py") if not outside & set(path.relative_to(ROOT).parts)]


DANGEROUS = [
    "eval('1')", "x = exec(text)", "compile(text, '', 'exec')", "__import__(name)", "builtins.eval(x)", "import pickle",
    "from pickle import loads", "import os, marshal", "import yaml", "from joblib import load", "import runpy",
    "from runpy import run_path", "spec.loader.exec_module(module)", "torch.load(path)",
    "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "torch.load(path, **options)",
    "np.load(path, allow_pickle=True)", "os.system(x)", "os.popen(x)", "subprocess.run(x, shell=True)",
    "subprocess.Popen(x, shell=flag)", "subprocess.getoutput(x)", "torch.hub.load(repository, name)",
    "AutoModel.from_pretrained(name)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "load_pretrained(AutoConfig, name, trust_remote_code=args.trust)", "options = {'trust_remote_code': True}",
    "config.trust_remote_code = True", "load_pretrained(AutoModelForCausalLM, name, dtype=dtype)",
    "load_pretrained(AutoModelForCausalLM, name, use_safetensors=None)",
    f"URL = '{WEB}raw.githubusercontent.com/owner/name/main/data.json'", f"f'{WEB}example.org/{{name}}'",
    f"'{WEB}github.com/owner/name/raw/1636438eae81f1a7179d/data.json'"]
HARMLESS = [
    "model.eval()", "re.compile(x)", "torch.compile(model)", "torch.load(path, weights_only=True)", "np.load(path)",
    "AutoModel.from_pretrained(name, trust_remote_code=False, **options)", "subprocess.run([x], shell=False)",
    "load_pretrained(AutoModelForCausalLM, name, use_safetensors=True)", "json.load(file)",
    f"'{WEB}raw.githubusercontent.com/owner/name/{'0123456789' * 4}/data.json'"]


@pytest.mark.full
def test_the_search_finds_what_is_planted_and_nothing_else():
    missed = [snippet for snippet in DANGEROUS if not dangers(f"def f():\n    {snippet}\n")]
    assert not missed and not [snippet for snippet in HARMLESS if dangers(snippet)], missed


@pytest.mark.full
def test_no_file_runs_code_from_data_or_fetches_what_may_change():
    found = set()
    for path in python_files():
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("tests/", "test_")):                           # tests forge files, and read their own
            found |= {(name, what) for what in dangers(path.read_text(encoding="utf-8"))}
    assert found == {("support/data.py", "import runpy"),                      # the user's own --reward or --method
                     ("experiments/overhead.py", "import runpy"),              # train.py
                     ("examples/trl_nthr.py", "a model without use_safetensors=True")}     # its `options` hold it


REQUIREMENTS = ("requirements.txt", "experiments/requirements.txt", "examples/requirements.txt")


def requirement_lines():
    return [line for name in REQUIREMENTS for line in (ROOT / name).read_text().splitlines()
            if line.strip() and line[0] not in "#-"]


def loose(line):
    """Whether a line of a requirements file leaves the lowest or the highest version open."""
    operators = [specifier.operator for specifier in Requirement(line).specifier]
    return not ("==" in operators or {">=", "<"} <= set(operators))


@pytest.mark.full
def test_every_dependency_has_both_bounds_and_every_package_that_is_imported_is_one():
    assert [line for line in requirement_lines() if loose(line)] == []
    assert loose("torch") and loose("torch>=2") and loose("torch<3")
    assert not loose("torch>=2,<3") and not loose("torch==2.6")
    names, imported = {Requirement(line).name for line in requirement_lines()}, set()
    own = {path.stem for path in python_files()} | {"support"}
    for path in python_files():
        if path.relative_to(ROOT).parts[0] != "tests" and not path.name.startswith("test_"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.split(".")[0])
    assert "torch" in imported
    assert not loose(next(line for line in requires("transformers") if line.startswith("huggingface-hub")))
    others = {"datasets", "huggingface_hub"}                                   # of trl and of transformers
    assert imported - own - sys.stdlib_module_names - others <= names
