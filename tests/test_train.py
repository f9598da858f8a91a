"""train.py as its users run it: learning, exact resume, A/B comparisons, bad input, data files and local models.

The script runs as a subprocess where its process matters (signals, exit codes, stderr), else in this process, which
saves the seconds of its imports. Everything is on the CPU, in one thread and offline."""
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import rollout  # noqa: E402
import train  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
               "COLUMNS": "200", "NO_COLOR": "1"}
WALL_CLOCK = ("seconds", "tokens_per_second", "peak_memory_gib")
SAMPLE_METRICS = {"questions", "groups_kept", "success_rate", "response_length", "truncated_share"}
UPDATE_METRICS = {"tau", "eta", "selected_share", "updates", "skipped_updates", "skipped_questions", "loss", "clip_share", "kl", "nll", "grad_norm",
                  "ratio_deviation", "delta_mean", "delta_nonpositive_share"}
METRICS = {"step", "eval_accuracy", *WALL_CLOCK} | SAMPLE_METRICS | UPDATE_METRICS


# ---------------------------------------------------------------------------------------------------------- helpers

def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags)]


def run(*flags, cwd, check=True):
    """The script in a subprocess."""
    result = subprocess.run(command(*flags), cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, timeout=300,
                            stdin=subprocess.DEVNULL)
    assert not check or result.returncode == 0, result.stderr
    return result


def run_here(*flags):
    """What the script does after its imports, in this process; signal handlers and threads are put back after it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.train(train.parse_args([str(flag) for flag in flags]))
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


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


def trainer_state(folder):
    return torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    """The distance of two sets of weights, as one vector each."""
    return math.sqrt(sum((a[name].double() - b[name].double()).square().sum().item() for name in a))


def relative_difference(a, b, start):
    """How far two runs from the same start ended apart, in units of the way that they went."""
    a, b, start = weights_of(a), weights_of(b), load_file(start / "model.safetensors")
    assert distance(a, start) > 0
    return distance(a, b) / distance(a, start)


def error_of(*flags, starts=False):
    """The message that the script ends with: one line, for an exit code of 1."""
    with pytest.raises(SystemExit) as caught:
        run_here(*flags) if starts else train.parse_args([str(flag) for flag in flags])
    message = caught.value.code
    assert isinstance(message, str), f"exit code {message}"                    # str: on stderr, with exit code 1
    assert message.startswith("error: ") and "\n" not in message and len(message) < 600
    return message


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def tiny_rows(name, count):
    return [json.loads(line) for line in (ROOT / "tiny" / name).read_text().splitlines()[:count]]


def patch_loss(monkeypatch, broken, break_loss):
    """Passes the loss of the updates numbered in `broken` (from 1) through `break_loss`. Returns the updates made."""
    original, calls = train.grpo_loss, []

    def loss(*args, **kwargs):
        value, metrics = original(*args, **kwargs)
        calls.append(len(calls) + 1)
        if calls[-1] in broken:
            value = break_loss(value)
            metrics = {**metrics, "loss": value.detach()}
        return value, metrics

    monkeypatch.setattr(train, "grpo_loss", loss)
    return calls


# --------------------------------------------------------------------------------------------------------- fixtures

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of the smallest run that still learns something: 24 problems, 8 a step, 8 responses each."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("train.jsonl", "test.jsonl"):
        write(folder / name, "".join(json.dumps(row) + "\n" for row in tiny_rows(name, 24)))
    return ["--data", folder / "train.jsonl", "--eval-data", folder / "test.jsonl", "--eval-size", 8,
            "--batch-size", 8, "--minibatch-size", 8, "--group-size", 8, "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def step(small, tmp_path_factory):
    """step("--flag", value, ...) -> the folder of a one-step run with these flags; the same flags run once."""
    folders = {}

    def runs(*flags):
        if flags not in folders:
            folders[flags] = tmp_path_factory.mktemp("step") / "run"
            run_here(*small, "--steps", 1, *flags, "--out", folders[flags])
        return folders[flags]

    return runs


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a short run on the embedded model and data."""
    folder = tmp_path_factory.mktemp("learned")
    run("--steps", 15, "--minibatch-size", 4, "--eval-size", 200, "--delta-every", 5, "--out", "run", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def resumed(small, tmp_path_factory):
    """Runs of the same flags to the same step: one of a piece, the others stopped and resumed.

    The steps at which the others stop depend on the machine, so they start with many steps, and all of them
    end a few steps after the later stop."""
    folder = tmp_path_factory.mktemp("resumed")
    flags = [*small, "--save-every", 2, "--eval-every", 3]

    def stopped(name, number):
        process = subprocess.Popen(command(*flags, "--steps", 100000, "--out", name), cwd=folder, env=ENVIRONMENT,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        metrics, deadline = folder / name / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 5:     # steps 0 to 4
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
        return process.returncode, stdout, stderr

    stopped("killed", signal.SIGKILL)
    interrupted = stopped("interrupted", signal.SIGINT)
    at_interrupt = {"metrics": metrics_of(folder / "interrupted"),
                    "checkpoint_step": trainer_state(folder / "interrupted")["state"]["step"]}
    for name in ("torn", "swapped"):
        shutil.copytree(folder / "interrupted", folder / name)
    last_line = (folder / "killed" / "metrics.jsonl").read_text().split("\n")[-2]
    N = max(json.loads(last_line)["step"], at_interrupt["checkpoint_step"]) + 3
    run(*flags, "--steps", N, "--out", "whole", cwd=folder)
    run("--resume", "killed", "--steps", N, cwd=folder)
    continuation = re.search(r"python train\.py (.*)", interrupted[1])
    if continuation:
        run(*shlex.split(continuation[1]), "--steps", N, cwd=folder)
    return {"folder": folder, "steps": N, "interrupted": interrupted, "at_interrupt": at_interrupt}


def assert_same_run(resumed, name):
    whole, other = resumed["folder"] / "whole", resumed["folder"] / name
    assert [row["step"] for row in metrics_of(other)] == list(range(resumed["steps"] + 1))
    assert without_wall_clock(metrics_of(other)) == without_wall_clock(metrics_of(whole))
    assert read_lines(other / "samples.jsonl") == read_lines(whole / "samples.jsonl")
    assert same_weights(other, whole)
    assert not list(other.glob("checkpoint.*"))                                # nothing half-written is left


def make_model_folder(folder, chat_template, **config):
    """A random Qwen2 of two layers with a byte-level BPE tokenizer whose pad token is its end, as in Qwen2.5."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["What is 1+1? The answer is \\boxed{2}.", "Please reason step by step."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    if chat_template:
        tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                                   "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **config)).save_pretrained(folder)
    write(folder / "data.json", json.dumps([{"question": f"What is 1+{i}?", "answer": 1 + i} for i in range(6)]))
    return folder


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("local-model"), chat_template=True)


def local_flags(folder):
    return ["--model", folder, "--data", folder / "data.json", "--eval-data", folder / "data.json", "--steps", 2,
            "--batch-size", 2, "--minibatch-size", 1, "--micro-batch-tokens", 40, "--group-size", 2,
            "--max-new-tokens", 8, "--kl-coef", 0.01, "--gradient-checkpointing", "--device", "cpu",
            "--dtype", "float32"]


# ------------------------------------------------------------------------------------------------ 1. a run that learns

def test_a_short_run_raises_greedy_accuracy_and_the_sampled_success_rate(learned):
    rows = metrics_of(learned)
    success = [row["success_rate"] for row in rows[1:]]
    assert rows[-1]["eval_accuracy"] >= rows[0]["eval_accuracy"] + 0.05
    assert np.mean(success[-5:]) >= np.mean(success[:3]) + 0.05


def test_metrics_hold_one_line_per_step_with_every_documented_key(learned):
    rows = metrics_of(learned)                                                 # fails on NaN and Infinity
    assert [row["step"] for row in rows] == list(range(16))
    assert set(rows[0]) == {"step", "eval_accuracy"}
    for row in rows[1:]:
        assert set(row) == METRICS
        assert row["questions"] == 32 and 0 < row["groups_kept"] <= 32 and row["updates"] == 8
        assert 0 < row["success_rate"] < 1 and 1 <= row["response_length"] <= 64 and 0 <= row["truncated_share"] <= 1
        assert 0 <= row["eta"] <= 1 and 0 < row["selected_share"] < 1 and row["grad_norm"] > 0 and row["nll"] > 0
        assert {"data_generation", "old_probabilities", "nthr", "model_update"} <= set(row["seconds"])
        assert row["tokens_per_second"] > 0 and row["peak_memory_gib"] > 0 and row["kl"] is None
        assert (row["delta_mean"] is not None) == (row["step"] % 5 == 0) == ("likelihood_change" in row["seconds"])
        assert (row["eval_accuracy"] is not None) == (row["step"] == 15)


def test_the_throughput_is_the_sampled_tokens_over_the_sampling_time(learned):
    for row in metrics_of(learned)[1:]:
        tokens = row["response_length"] * row["questions"] * 8
        assert row["tokens_per_second"] * row["seconds"]["data_generation"] == pytest.approx(tokens, rel=1e-4)


def test_samples_hold_the_first_five_problems_of_each_evaluation(learned):
    rows, problems = read_lines(learned / "samples.jsonl"), tiny_rows("test.jsonl", 5)
    assert [row["step"] for row in rows] == [0] * 5 + [15] * 5
    for row, problem in zip(rows, problems * 2):
        assert {"problem": row["problem"], "answer": row["answer"]} == problem
        boxed = re.findall(r"\\boxed\{(-?\d+)\}", row["response"])
        assert row["reward"] == float(bool(boxed) and int(boxed[-1]) == int(row["answer"]))
        assert isinstance(row["finished"], bool)


def test_config_records_every_flag_as_it_was_used(learned):
    config = json.loads((learned / "config.json").read_text())
    actions = train.build_parser()._actions
    assert set(config) == {action.dest for action in actions} - {"help", "resume"}
    assert (config["steps"], config["minibatch_size"], config["eval_size"]) == (15, 4, 200)
    assert config["device"] in ("cpu", "cuda") and config["dtype"] in ("float32", "bfloat16")


def test_the_checkpoint_is_a_hugging_face_model_that_reaches_the_logged_accuracy(learned):
    model = AutoModelForCausalLM.from_pretrained(learned / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(learned / "checkpoint", padding_side="left")
    rows = tiny_rows("test.jsonl", 200)
    prompts = [[{"role": "user", "content": f"{row['problem']}\n{rollout.INSTRUCTION}"}] for row in rows]
    batch = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, padding=True, return_dict=True,
                                          return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**batch, do_sample=False, max_new_tokens=64)[:, batch["input_ids"].shape[1]:]
    responses = tokenizer.batch_decode(output, skip_special_tokens=True)
    boxed = [re.findall(r"\\boxed\{(-?\d+)\}", response) for response in responses]
    right = sum(bool(found) and int(found[-1]) == int(row["answer"]) for found, row in zip(boxed, rows))
    logged = metrics_of(learned)[-1]["eval_accuracy"] * 200
    assert abs(right - logged) <= 1                                            # one: a tie in another batch shape
    samples = [row["response"] for row in read_lines(learned / "samples.jsonl")[-5:]]
    assert sum(map(str.__eq__, samples, responses)) >= 4


def test_weights_stay_float32_when_bfloat16_computes(step):
    full, half = step(), step("--dtype", "bfloat16")
    assert {value.dtype for value in weights_of(half).values()} == {torch.float32}
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < relative_difference(full, half, ROOT / "tiny")
    moved = [(weights_of(half)[name] != value).float().mean()
             for name, value in load_file(ROOT / "tiny" / "model.safetensors").items() if "mlp" in name]
    assert min(moved) > 0.5                                                    # lr 1e-4 would vanish in bfloat16


def test_zero_for_eval_every_save_every_and_delta_every_means_only_the_first_and_last(small, tmp_path, monkeypatch):
    saved, save = [], train.save_checkpoint

    def recording_save(*args):
        saved.append(args[3]["step"])
        save(*args)

    monkeypatch.setattr(train, "save_checkpoint", recording_save)
    run_here(*small, "--steps", 3, "--eval-every", 0, "--save-every", 0, "--delta-every", 0, "--out", tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows if row["eval_accuracy"] is not None] == [0, 3] and saved == [0, 3]
    assert all(row["delta_mean"] is None for row in rows[1:])


def test_every_epoch_visits_every_problem_once_in_a_new_order_and_held_out_problems_never(small, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tiny", tmp_path / "model")                         # another folder: held-out evaluation
    trained, evaluated, original = [], [], train.generate

    def recording(model, tokenizer, prompts, group_size, *args, **kwargs):
        (trained if group_size > 1 else evaluated).extend(map(tuple, prompts))
        return original(model, tokenizer, prompts, group_size, *args, **kwargs)

    monkeypatch.setattr(train, "generate", recording)
    run_here("--model", tmp_path / "model", "--data", small[1], "--eval-size", 8, "--batch-size", 11,
             "--minibatch-size", 11, "--steps", 4, "--max-new-tokens", 48, "--eval-every", 0, "--device", "cpu",
             "--dtype", "float32", "--kl-coef", 0, "--out", tmp_path / "run")
    first, second = trained[:22], trained[22:]                                 # a tenth of 24 problems is held out
    assert len(set(first)) == 22 and set(first) == set(second) and first != second
    assert len(set(evaluated)) == 2 and evaluated[:2] == evaluated[2:] and not set(evaluated) & set(first)


# ------------------------------------------------------------------------------------------------- 2. and 3. stopping

def test_a_killed_run_resumes_to_the_metrics_and_weights_of_one_that_was_not(resumed):
    assert_same_run(resumed, "killed")


def test_ctrl_c_saves_a_checkpoint_at_the_step_it_reached_and_says_how_to_continue(resumed):
    code, stdout, stderr = resumed["interrupted"]
    last = resumed["at_interrupt"]["metrics"][-1]["step"]
    assert code == 130 and "Traceback" not in stderr
    assert resumed["at_interrupt"]["checkpoint_step"] == last >= 4
    assert f"step {last}" in stdout.splitlines()[-1] and "python train.py --resume interrupted" in stdout


def test_an_interrupted_run_continues_with_the_printed_command_to_the_same_end(resumed):
    assert_same_run(resumed, "interrupted")


def test_lines_torn_by_a_crash_are_dropped_on_resume(resumed):
    folder = resumed["folder"] / "torn"
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 99, "problem": "tor')
    run_here("--resume", folder, "--steps", resumed["steps"])
    assert_same_run(resumed, "torn")


def test_a_crash_while_checkpoints_are_swapped_loses_nothing(resumed):
    folder = resumed["folder"] / "swapped"
    (folder / "checkpoint").rename(folder / f"checkpoint-{trainer_state(folder)['state']['step']}")
    (folder / "checkpoint.tmp").mkdir()
    write(folder / "checkpoint.tmp" / "model.safetensors", b"half of a")
    run_here("--resume", folder, "--steps", resumed["steps"])
    assert_same_run(resumed, "swapped")


def test_resuming_a_finished_run_changes_nothing(resumed):
    before = (resumed["folder"] / "whole" / "metrics.jsonl").read_bytes()
    run_here("--resume", resumed["folder"] / "whole")
    assert (resumed["folder"] / "whole" / "metrics.jsonl").read_bytes() == before


def test_a_run_resumed_with_more_steps_and_stopped_again_keeps_them(small, tmp_path):
    run_here(*small, "--steps", 1, "--out", tmp_path / "run")
    run_here("--resume", tmp_path / "run", "--steps", 2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 2
    run_here("--resume", tmp_path / "run", "--steps", 3)
    run_here(*small, "--steps", 3, "--out", tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_no_clip_is_recorded_in_strict_json_and_resumed(small, tmp_path):
    run_here(*small, "--steps", 1, "--clip-eps", "inf", "--out", tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text(), parse_constant=not_json)
    assert recorded["clip_eps"] == "inf"
    assert train.parse_args(["--resume", str(tmp_path / "run"), "--steps", "2"]).clip_eps == math.inf
    run_here("--resume", tmp_path / "run", "--steps", 2)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("name", ["config.json", "checkpoint/trainer.pt"])
def test_a_torn_file_of_a_run_is_named(small, tmp_path, name):
    run_here(*small, "--steps", 1, "--out", tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:50])
    assert name.split("/")[-1] in error_of("--resume", tmp_path / "run", "--steps", 2, starts=True)


def test_the_logged_likelihood_change_is_that_of_full_logits_before_and_after_the_step(step, small):
    """Eq. 2 and the share of Eq. 3 (ε = 0), question by question, from the two models alone."""
    args = train.parse_args([str(flag) for flag in (*small, "--steps", 1, "--out", "unused")])
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (ROOT / "tiny", step() / "checkpoint")]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    problems = train.load_problems(args.data)
    prompts = train.encode_prompts(problems, tokenizer, models[0].config, args.max_new_tokens)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                   # as run_here: the same samples
    sample, rewards, _, _ = train.sample_groups(models[0], tokenizer, problems, prompts, args, 1, 0)
    torch.set_num_threads(threads)
    changes = []
    for question, reward in enumerate(rewards.tolist()):
        change = []
        for row in [question * len(reward) + i for i, right in enumerate(reward) if right]:
            ids = torch.cat([sample.prompt_ids[row][sample.prompt_mask[row]],
                             sample.response_ids[row][sample.response_mask[row]]])
            start = int(sample.prompt_mask[row].sum())
            with torch.no_grad():
                logprobs = [torch.log_softmax(model(ids[None]).logits[0].double(), -1) for model in models]
            before, after = (sum(lp[k - 1, ids[k]].item() for k in range(start, len(ids))) for lp in logprobs)
            change.append(after - before)
        changes.append(sum(change) / len(change))
    row = metrics_of(step())[1]
    assert len(changes) == row["groups_kept"] > 1
    assert row["delta_mean"] == pytest.approx(sum(changes) / len(changes), abs=1e-4)
    assert row["delta_nonpositive_share"] == pytest.approx(sum(change <= 0 for change in changes) / len(changes))


def test_other_data_is_evaluated_on_problems_held_out_of_it():
    assert train.parse_args(["--out", "unused"]).eval_data == str(ROOT / "tiny" / "test.jsonl")
    assert train.parse_args(["--data", "mine.jsonl", "--out", "unused"]).eval_data is None


def test_sigterm_stops_like_ctrl_c(small, tmp_path, monkeypatch):
    original = train.sample_groups

    def terminated(*args):
        if args[5] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train, "sample_groups", terminated)
    with pytest.raises(SystemExit) as caught:
        run_here(*small, "--steps", 5, "--out", tmp_path / "run")
    assert caught.value.code == 128 + signal.SIGTERM and trainer_state(tmp_path / "run")["state"]["step"] == 1


def test_a_run_stopped_in_its_first_evaluation_resumes_with_step_zero(small, step, tmp_path, monkeypatch):
    append = train.append

    def stopped(args, name, rows):
        if name == "metrics.jsonl":
            raise InterruptedError
        append(args, name, rows)

    monkeypatch.setattr(train, "append", stopped)                              # samples are written, metrics are not
    with pytest.raises(InterruptedError):
        run_here(*small, "--steps", 1, "--out", tmp_path / "run")
    monkeypatch.undo()
    run_here("--resume", tmp_path / "run")
    assert without_wall_clock(metrics_of(tmp_path / "run")) == without_wall_clock(metrics_of(step()))
    assert read_lines(tmp_path / "run" / "samples.jsonl") == read_lines(step() / "samples.jsonl")


# --------------------------------------------------------------------------------------------------------- 4. A/B

def test_methods_see_the_same_rollouts_in_their_first_step(step):
    first = [metrics_of(step(*flags))[1] for flags in
             ((), ("--method", "grpo"), ("--method", "pos-only"), ("--method", "random"))]
    sampled = [{name: row[name] for name in SAMPLE_METRICS} for row in first]
    assert sampled[0] == sampled[1] == sampled[2] == sampled[3]
    assert sampled[0]["groups_kept"] >= 2


def test_the_seed_decides_the_order_of_the_data_and_the_sampling(small, tmp_path, monkeypatch):
    same = write(tmp_path / "same.jsonl", 8 * (json.dumps(tiny_rows("train.jsonl", 1)[0]) + "\n"))
    original, prompts, responses = train.generate, [], []

    def recording(model, tokenizer, questions, group_size, *args, **kwargs):
        result = original(model, tokenizer, questions, group_size, *args, **kwargs)
        if group_size > 1:
            prompts.append(questions)
            responses.append(result.texts)
        return result

    monkeypatch.setattr(train, "generate", recording)
    for name, flags in enumerate((["--seed", 0], ["--seed", 0], ["--seed", 1],
                                  ["--data", same, "--seed", 0], ["--data", same, "--seed", 1])):
        run_here(*small, "--steps", 1, *flags, "--out", tmp_path / str(name))
    assert prompts[0] == prompts[1] != prompts[2] and responses[0] == responses[1]
    assert prompts[3] == prompts[4] and responses[3] != responses[4]           # eight times the same question


def test_methods_change_the_update(step):
    runs = [step(), step("--method", "grpo"), step("--method", "pos-only"), step("--method", "random")]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert not same_weights(a, b)


def test_nthr_with_eta_one_is_grpo(step):
    assert same_weights(step("--eta", "1"), step("--method", "grpo"))


def test_nthr_with_beta_minus_infinity_and_eta_zero_is_pos_only(step):
    assert same_weights(step("--beta=-inf", "--eta", "0"), step("--method", "pos-only"))
    row = metrics_of(step("--beta=-inf", "--eta", "0"))[1]
    assert row["selected_share"] == 1 and row["tau"] is None                   # −∞ is not JSON


def test_random_selects_as_many_tokens_as_nthr(step):
    nthr, chance = metrics_of(step())[1], metrics_of(step("--method", "random"))[1]
    assert 0 < nthr["selected_share"] == chance["selected_share"] < 1
    assert nthr["tau"] == chance["tau"] and nthr["eta"] == chance["eta"]


def test_methods_without_nthr_log_no_nthr_metrics(step):
    for method in ("grpo", "pos-only"):
        row = metrics_of(step("--method", method))[1]
        assert row["tau"] is row["eta"] is row["selected_share"] is None and "nthr" not in row["seconds"]


# ------------------------------------------------------------------------------------------------- 5. the update

@pytest.mark.parametrize("flags", [("--micro-batch-tokens", 1), ("--micro-batch-tokens", 700), ("--micro-batch-size", 3)])
def test_the_size_of_micro_batches_does_not_change_a_step(step, flags):
    whole, parts = step(), step(*flags)
    assert relative_difference(whole, parts, ROOT / "tiny") < 0.01
    for name in UPDATE_METRICS - {"kl"}:
        assert metrics_of(parts)[1][name] == pytest.approx(metrics_of(whole)[1][name], rel=1e-3, abs=1e-6), name


def test_micro_batches_are_sorted_by_length_and_hold_as_many_rows_as_the_budget_allows():
    """By hand: a row costs as many tokens as the longest prompt and the longest response of its part together."""
    def rollout(prompts, responses):
        P, T = max(prompts), max(responses)
        return SimpleNamespace(prompt_mask=torch.arange(P) >= P - torch.tensor(prompts)[:, None],
                               response_mask=torch.arange(T) < torch.tensor(responses)[:, None])

    sampled = rollout([2, 4, 2, 2, 2], [5, 1, 3, 1, 30])
    rows = torch.arange(5)
    for budget, size, expected in ((10, 9, [[1, 3], [2], [0], [4]]),            # (4+1)·2 = 10; 2+3, with 5: 7·2 = 14
                                   (14, 9, [[1, 3], [2, 0], [4]]),              # (4+3)·3 = 21; then 7·2 = 14
                                   (1, 9, [[1], [3], [2], [0], [4]]), (1000, 9, [[1, 3, 2, 0, 4]]),
                                   (1000, 3, [[1, 3, 2], [0, 4]]), (1000, 1, [[1], [3], [2], [0], [4]])):
        args = Namespace(micro_batch_tokens=budget, micro_batch_size=size)
        assert [part.tolist() for part in train.micro_batches(sampled, rows, args)] == expected
    args = Namespace(micro_batch_tokens=64, micro_batch_size=2)
    assert [part.tolist() for part in train.micro_batches(sampled, torch.tensor([4, 2]), args)] == [[2, 4]]


def test_minibatches_are_whole_groups_and_as_equal_as_possible():
    args = Namespace(batch_size=8, minibatch_size=2, group_size=2)
    assert [part.tolist() for part in train.minibatches(5, args)] == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9]]
    assert [part.tolist() for part in train.minibatches(1, args)] == [[0, 1]]


@pytest.mark.parametrize("flags", [[], ["--micro-batch-tokens", 300, "--minibatch-size", 4, "--gradient-checkpointing"]])
def test_in_bfloat16_old_and_new_probabilities_agree_before_the_first_update(step, flags):
    """Ratio 1 ± 1e-3: the clip must not fire on rounding."""
    row = metrics_of(step("--dtype", "bfloat16", *flags))[1]
    assert row["ratio_deviation"] <= 1e-3
    if not flags:
        assert row["clip_share"] == 0
    model, tokenizer = train.load_model(ROOT / "tiny", "cpu"), AutoTokenizer.from_pretrained(ROOT / "tiny")
    prompts = [train.encode_prompt(tokenizer, problem) for problem in ("1+2", "17+4*3", "(9-2)*8+5", "8*7")]
    rollout = train.generate(model, tokenizer, prompts, 2, 48, seed=0)
    with torch.no_grad():
        exact, rounded = (train.policy_logprobs(model, rollout, torch.arange(8), Namespace(
            dtype=dtype, device="cpu", temperature=1.0)) for dtype in ("float32", "bfloat16"))
    assert (exact - rounded).abs().max() > 3e-3                                 # bfloat16 alone is no better than this


def test_the_deviation_of_the_ratio_is_that_of_the_largest_token(step, monkeypatch):
    original = train.old_policy_pass

    def shifted(*args):
        old, *rest = original(*args)
        mask = args[2].response_mask
        old[3, 2] -= 0.25
        old[5, 0] += 0.5
        assert mask[3, 2] and mask[5, 0]
        return old, *rest

    monkeypatch.setattr(train, "old_policy_pass", shifted)
    row = metrics_of(step("--delta-every", 0))[1]                               # a step that no other test has made
    assert row["ratio_deviation"] == pytest.approx(max(1 - math.exp(-0.5), math.exp(0.25) - 1), rel=1e-3)


def test_each_minibatch_is_one_update(step):
    one, two = step(), step("--minibatch-size", 4)
    assert metrics_of(one)[1]["updates"] == 1 and metrics_of(two)[1]["updates"] == 2
    assert relative_difference(one, two, ROOT / "tiny") > 0.1


def test_gradient_checkpointing_recomputes_and_changes_nothing_else(step, small, tmp_path, monkeypatch):
    forward, calls = Qwen2MLP.forward, []

    def counting(*args, **kwargs):
        calls.append(None)
        return forward(*args, **kwargs)

    monkeypatch.setattr(Qwen2MLP, "forward", counting)
    counts = []
    for name, flags in (("without", []), ("with", ["--gradient-checkpointing"])):
        calls.clear()
        run_here(*small, "--steps", 1, "--micro-batch-tokens", 16384, *flags, "--out", tmp_path / name)
        counts.append(len(calls))
    layers = json.loads((ROOT / "tiny" / "config.json").read_text())["num_hidden_layers"]
    assert counts[1] == counts[0] + layers                                     # one micro-batch, each layer once more
    assert same_weights(tmp_path / "without", step("--micro-batch-tokens", 16384))
    assert relative_difference(tmp_path / "without", tmp_path / "with", ROOT / "tiny") < 0.01


def test_more_sampling_rounds_fill_the_batch_with_mixed_groups(step):
    one, four = (step("--batch-size", 16, "--minibatch-size", 16, "--group-size", 4, "--sampling-rounds", n)
                 for n in (1, 4))
    assert metrics_of(one)[1]["questions"] == 16 and metrics_of(one)[1]["groups_kept"] < 16
    assert metrics_of(four)[1]["questions"] in (32, 48, 64) and metrics_of(four)[1]["groups_kept"] == 16
    for folder in (one, four):
        assert trainer_state(folder)["state"]["position"] == metrics_of(folder)[1]["questions"]


def test_the_kl_penalty_is_zero_before_the_first_update_and_grows(step, small, tmp_path):
    flags = [*small, "--steps", 2, "--kl-coef", 10, "--minibatch-size", 8]
    run_here(*flags, "--out", tmp_path / "run")
    first, second = metrics_of(tmp_path / "run")[1:]
    assert abs(first["kl"]) < 1e-6 < second["kl"]
    assert "reference" in first["seconds"] and "reference" not in metrics_of(step())[1]["seconds"]
    assert relative_difference(step(), step("--kl-coef", 10), ROOT / "tiny") < 0.01   # at π_ref it has no gradient


def test_the_reference_of_a_resumed_run_is_the_initial_model(small, tmp_path):
    run_here(*small, "--steps", 2, "--kl-coef", 1, "--lr", 1e-3, "--out", tmp_path / "whole")
    run_here(*small, "--steps", 1, "--kl-coef", 1, "--lr", 1e-3, "--out", tmp_path / "parts")
    run_here("--resume", tmp_path / "parts", "--steps", 2)
    assert metrics_of(tmp_path / "parts")[2]["kl"] == metrics_of(tmp_path / "whole")[2]["kl"] > 1e-6


def test_the_nll_term_enters_the_loss_with_its_coefficient(step):
    without, with_nll = metrics_of(step())[1], metrics_of(step("--nll-coef", 0.5))[1]
    assert with_nll["nll"] == pytest.approx(without["nll"], rel=1e-5) and without["nll"] > 0
    assert with_nll["loss"] == pytest.approx(without["loss"] + 0.5 * without["nll"], rel=1e-4)
    assert not same_weights(step(), step("--nll-coef", 0.5))


# ------------------------------------------------------------------------------------------------- 6. bad input

@pytest.mark.parametrize("flags, expected", [
    (["--group-size", 1], ["--group-size", "at least 2", "got 1"]),
    (["--batch-size", 10, "--minibatch-size", 4], ["--batch-size 10", "--minibatch-size 4", "multiple"]),
    (["--lr=-1"], ["--lr", "above 0", "got -1.0"]),
    (["--lr", "inf"], ["--lr", "finite", "got inf"]),
    (["--temperature", "nan"], ["--temperature", "above 0", "got nan"]),
    (["--temperature", 0], ["--temperature", "above 0", "got 0.0"]),
    (["--eta", "half"], ["--eta", "2|0.5-p|", "[0, 1]", "half"]),
    (["--eta", 1.5], ["--eta", "[0, 1]", "1.5"]),
    (["--eta", "nan"], ["--eta", "[0, 1]", "nan"]),
    (["--beta", "nan"], ["--beta", "real number or -inf", "got nan"]),
    (["--beta", "inf"], ["--beta", "real number or -inf", "got inf"]),
    (["--device", "toaster"], ["--device", "toaster"]),
    (["--device", "cuda:99"], ["--device", "cuda:99"]),
    (["--device", "xla"], ["--device", "xla"]),
    (["--steps", 0], ["--steps", "at least 1", "got 0"]),
    (["--batch-size", 0], ["--batch-size", "at least 1", "got 0"]),
    (["--minibatch-size", 0], ["--minibatch-size", "at least 1", "got 0"]),
    (["--micro-batch-tokens", 0], ["--micro-batch-tokens", "at least 1", "got 0"]),
    (["--micro-batch-size", 0], ["--micro-batch-size", "at least 1", "got 0"]),
    (["--max-new-tokens", 0], ["--max-new-tokens", "at least 1", "got 0"]),
    (["--max-sequences", 0], ["--max-sequences", "at least 1", "got 0"]),
    (["--sampling-rounds", 0], ["--sampling-rounds", "at least 1", "got 0"]),
    (["--eval-size", 0], ["--eval-size", "at least 1", "got 0"]),
    (["--kl-coef=-0.1"], ["--kl-coef", "0 or more", "got -0.1"]),
    (["--nll-coef", "nan"], ["--nll-coef", "0 or more", "got nan"]),
    (["--save-every=-1"], ["--save-every", "0 or more", "got -1"]),
    (["--seed=-1"], ["--seed", "0 or more", "got -1"]),
    (["--clip-eps", 0], ["--clip-eps", "above 0", "got 0.0"]),
    (["--max-grad-norm", "nan"], ["--max-grad-norm", "above 0", "got nan"]),
], ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "")
def test_a_flag_that_cannot_work_is_named_with_its_value_and_what_was_expected(flags, expected, tmp_path):
    message = error_of(*flags, "--out", tmp_path / "run")
    for part in expected:
        assert part in message


def test_resume_without_a_checkpoint_names_the_folder(tmp_path):
    assert str(tmp_path) in error_of("--resume", tmp_path) and "--resume" in error_of("--resume", tmp_path)
    assert "nowhere" in error_of("--resume", "--out", "nowhere")


def test_resume_with_a_changed_flag_names_both_values(step):
    message = error_of("--resume", step(), "--lr", 0.5)
    assert "--resume" in message and "--lr 0.5" in message and "0.0001" in message
    assert "--method grpo" in error_of("--resume", step(), "--method", "grpo")


def test_resume_accepts_the_flags_that_do_not_change_the_result(step):
    args = train.parse_args(["--resume", str(step()), "--steps", "7", "--eval-every", "2", "--save-every", "3"])
    assert (args.steps, args.eval_every, args.save_every, args.batch_size) == (7, 2, 3, 8)


def test_a_folder_that_holds_a_run_is_not_overwritten(step):
    before = (step() / "metrics.jsonl").read_bytes()
    message = error_of("--out", step())
    assert f"--resume {step()}" in message and "--out" in message
    assert (step() / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("content, where", [
    ("", "holds no problems"), ("[]", "holds no problems"), (" \n\r\n", "holds no problems"),
    ('{"problem": "1", "answer": 1}\n\n{"problem": "2", answer}\n', "line 3"),
    ('[{"problem": "1", "answer": 1},\n {"problem": "2" "answer": 2}]', "line 2"),
    ('[{"problem": "1", "answer": 1}', "line 1"),
    ('{"problem": "1", "answer": 1}\n7\n', "line 2"),
    ('{"problem": "1", "answer": 1}\n"text"\n', "line 2"),
    ('[{"problem": "1", "answer": 1}, ["2", 2]]', "item 2"),
    ('{"problem": "1", "answer": 1}\n{"answer": 1}\n', "line 2"),
    ('{"problem": "1", "answer": 1}\n{"problem": " ", "answer": 1}\n', "line 2"),
    ('{"problem": "1", "answer": 1}\n{"problem": 5, "answer": 1}\n', "line 2"),
    ('{"problem": "1", "answer": 1}\n\n{"problem": "2"}\n', "line 3"),
    ('[{"problem": "1", "answer": 1}, {"problem": "2", "answer": null}]', "item 2"),
    ('[{"problem": "1", "answer": 1}, {"problem": "2", "solution": "it is 4"}]', "item 2"),
    ('[{"problem": "1", "answer": true}]', "item 1"),
    ('[{"problem": "1", "answer": {"value": 1}}]', "item 1"),
    (b'{"problem": "caf\xe9", "answer": "1"}', "line 1"),
    ("[" * 100000, "line 1"),
    ('[{"problem": "1", "answer": ' + "9" * 5000 + "}]", "line 1"),
])
def test_a_data_file_that_cannot_be_used_is_named_with_the_place(content, where, tmp_path):
    path = write(tmp_path / "data.jsonl", content)
    with pytest.raises(SystemExit) as caught:
        train.load_problems(str(path))
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message and len(message) < 600
    assert str(path) in message and where in message
    assert set(re.findall(r"line \d+", message)) <= {where}                    # no second, other line number


def test_a_missing_data_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(SystemExit) as caught:
            train.load_problems(str(path))
        assert str(path) in caught.value.code and "\n" not in caught.value.code


def broken_model(folder, kind):
    shutil.copytree(ROOT / "tiny", folder)
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "pickled weights only":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif kind == "cut weights":
        write(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:1000])
    elif kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif kind == "soft-capped logits":
        config = json.loads((folder / "config.json").read_text())
        write(folder / "config.json", json.dumps({**config, "final_logit_softcapping": 30.0}))
    elif kind == "no config":
        (folder / "config.json").unlink()
    else:
        shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize("kind, expected", [
    ("no folder", "folder with config.json"), ("no config", "folder with config.json"), ("no tokenizer", "tokenizer"),
    ("no weights", "safetensors"), ("cut weights", "safetensors"), ("pickled weights only", "safetensors"),
    ("soft-capped logits", "final_logit_softcapping")])
def test_a_model_that_cannot_be_loaded_is_named_and_nothing_is_written(kind, expected, small, tmp_path, capfd):
    folder = broken_model(tmp_path / "some-model", kind)
    start = time.monotonic()
    message = error_of("--model", folder, *small, "--max-new-tokens", 8, "--out", tmp_path / "run", starts=True)
    assert str(folder) in message and expected in message
    assert time.monotonic() - start < 10 and not (tmp_path / "run").exists()
    assert capfd.readouterr().err == ""                                        # the message is the only line


def test_code_that_comes_with_a_model_is_never_run_whatever_is_answered(local_model, small, tmp_path, monkeypatch):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(local_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    write(folder / "config.json", json.dumps(config))
    write(folder / "code.py", f"open({str(ran)!r}, 'w').close()\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    message = error_of("--model", folder, *small, "--out", tmp_path / "run", starts=True)
    assert str(folder) in message and not ran.exists() and not asked


def test_prompts_that_exceed_the_context_are_refused(small, tmp_path):
    context = json.loads((ROOT / "tiny" / "config.json").read_text())["max_position_embeddings"]
    message = error_of(*small, "--max-new-tokens", context, "--out", tmp_path / "run", starts=True)
    assert f"--max-new-tokens {context}" in message and f"context of {context}" in message
    assert not (tmp_path / "run").exists()


def test_a_single_problem_leaves_nothing_to_evaluate_on_and_is_refused(local_model, tmp_path):
    path = write(tmp_path / "one.jsonl", '{"problem": "1", "answer": 1}')
    message = error_of("--model", local_model, "--data", path, "--max-new-tokens", 8, "--out", tmp_path / "run",
                       starts=True)
    assert "--eval-data" in message and "one.jsonl" in message
    assert not (tmp_path / "run").exists()


def test_an_output_path_that_cannot_be_a_folder_is_refused(small, tmp_path):
    path = write(tmp_path / "file", "not a folder")
    message = error_of(*small, "--steps", 1, "--out", path, starts=True)
    assert "--out" in message or str(path) in message
    assert path.read_text() == "not a folder"


@pytest.mark.parametrize("flags, expected", [
    (["--batch-size", 12, "--minibatch-size", 8], "--batch-size 12"), (["--model", "no/such/model"], "no/such/model")])
def test_an_error_is_one_line_on_stderr_with_exit_code_one(flags, expected, tmp_path):
    result = run(*flags, "--out", "run", cwd=tmp_path, check=False)
    assert result.returncode == 1 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]


# ------------------------------------------------------------------------------------------------- 7. data files

def loaded(tmp_path, content):
    return train.load_problems(str(write(tmp_path / "data.json", content)))


@pytest.mark.parametrize("row, answer", [
    ({"answer": "42"}, "42"), ({"answer": " x+1 "}, "x+1"), ({"answer": 42}, "42"), ({"answer": 0}, "0"),
    ({"answer": -3}, "-3"), ({"answer": 27.0}, "27"), ({"answer": 2.5}, "2.5"), ({"answer": ["1", 2, 3.0]}, "1, 2, 3"),
    ({"final_answer": ["$\\frac{1}{2}$"]}, "$\\frac{1}{2}$"), ({"final_answer": ["1", "2"]}, "1, 2"),
    ({"final_answer": "7"}, "7"), ({"answer": "", "final_answer": ["8"]}, "8"),
    ({"solution": r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}}."}, r"\frac{1}{\sqrt{2}}"),
    ({"solution": ["It is", r"\boxed{\{1, 2\}}"]}, r"\{1, 2\}"),
    ({"answer": None, "solution": r"\boxed{5}"}, "5"), ({"answer": "6", "solution": r"\boxed{5}"}, "6"),
    ({"answer": [], "final_answer": None, "solution": r"\boxed{5}"}, "5"),
], ids=str)
def test_answers_are_read_from_each_field_that_data_sets_use(row, answer, tmp_path):
    for name in ("problem", "question"):
        assert loaded(tmp_path, json.dumps([{name: "What?", **row}])) == [{"problem": "What?", "answer": answer}]


ROWS = [{"problem": "1+1", "answer": "2"}, {"problem": "a\u2028b\u0085c", "answer": "é"}]


@pytest.mark.parametrize("content", [
    json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n " + json.dumps(ROWS, ensure_ascii=False),
    "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n \n",
    "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
    "\ufeff" + "\n".join(json.dumps(row) for row in ROWS), "\ufeff" + json.dumps(ROWS)],
    ids=["list", "indented list", "list after blanks", "lines", "blank lines", "CRLF", "BOM lines", "BOM list"])
def test_json_lists_and_json_lines_are_read_alike(content, tmp_path):
    assert loaded(tmp_path, content) == ROWS


MATH_NAME = "math_full_minus_math500.json"
MATH_ROWS = [{"problem": f"p{level}", "level": f"Level {level}", "type": "Algebra", "answer": str(level)}
             for level in ("1", "2", "3", "4", "5", "?")]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder is tmp_path and `download(content)` sets what the next download writes, or raises."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def download(content):
        def write_or_raise(url, dst, hash_prefix=None, progress=True):
            assert url.endswith(MATH_NAME)
            if isinstance(content, Exception):
                raise content
            if content == "" and hash_prefix:
                raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0")')
            write(Path(dst), content or json.dumps(MATH_ROWS)[:50])            # "": a connection that was cut

        monkeypatch.setattr(torch.hub, "download_url_to_file", write_or_raise)

    return download


def test_math_is_downloaded_once_and_holds_levels_three_to_five(hub):
    hub(json.dumps(MATH_ROWS))
    expected = [{"problem": f"p{level}", "answer": level} for level in "345"]
    assert train.load_problems("math") == expected
    hub(URLError("no network"))
    assert train.load_problems("math") == expected


def test_math_without_a_network_says_where_to_put_the_file(hub, tmp_path):
    hub(URLError("no network"))
    with pytest.raises(SystemExit) as caught:
        train.load_problems("math")
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message and "no network" in message
    path = next(word for word in message.split() if word.endswith(MATH_NAME) and word.startswith(str(tmp_path)))
    write(Path(path), json.dumps(MATH_ROWS))
    assert len(train.load_problems("math")) == 3


def test_a_download_that_was_cut_is_not_kept(hub):
    hub("")
    with pytest.raises(SystemExit) as caught:
        train.load_problems("math")
    assert "\n" not in caught.value.code
    hub(json.dumps(MATH_ROWS))
    assert len(train.load_problems("math")) == 3


# ---------------------------------------------------------------------------------------------- 8. non-finite losses

def nan_loss(loss):
    return loss * math.nan


def nan_gradient(loss):
    return loss + torch.sqrt(loss * 0.0)                                       # finite, but 0 · ∞ in its gradient


@pytest.mark.parametrize("break_loss", [nan_loss, nan_gradient])
def test_a_non_finite_update_is_skipped_and_weights_and_optimizer_stay(break_loss, small, tmp_path, monkeypatch):
    patch_loss(monkeypatch, {1}, break_loss)
    run_here(*small, "--steps", 1, "--out", tmp_path / "run")
    tiny, after = load_file(ROOT / "tiny" / "model.safetensors"), weights_of(tmp_path / "run")
    assert all(torch.equal(tiny[name], after[name]) for name in tiny)
    assert trainer_state(tmp_path / "run")["optimizer"]["state"] == {}
    row = metrics_of(tmp_path / "run")[1]
    assert row["updates"] == 0 and row["loss"] is row["grad_norm"] is None


def test_three_non_finite_updates_in_a_row_end_the_run_with_its_last_good_weights(small, tmp_path, monkeypatch):
    calls = patch_loss(monkeypatch, {2, 3, 4}, nan_loss)
    small = [*small, "--micro-batch-tokens", 16384]                            # one call of the loss per update
    message = error_of(*small, "--steps", 9, "--save-every", 0, "--out", tmp_path / "run", starts=True)
    assert "non-finite" in message and str(tmp_path / "run" / "checkpoint") in message
    assert len(calls) == 4 and trainer_state(tmp_path / "run")["state"]["step"] == 4
    assert [row["updates"] for row in metrics_of(tmp_path / "run")[1:]] == [1, 0, 0, 0]
    monkeypatch.undo()
    run_here(*small, "--steps", 1, "--out", tmp_path / "one")
    assert same_weights(tmp_path / "run", tmp_path / "one")
    patch_loss(monkeypatch, {1}, nan_loss)
    run_here("--resume", tmp_path / "run", "--steps", 6)                       # tries again, and counts again
    assert [row["updates"] for row in metrics_of(tmp_path / "run")[5:]] == [0, 1]


def test_three_non_finite_updates_within_one_step_end_it_there(small, tmp_path, monkeypatch):
    calls = patch_loss(monkeypatch, {1, 2, 3}, nan_loss)
    error_of(*small, "--steps", 2, "--minibatch-size", 2, "--out", tmp_path / "run", starts=True)
    assert len(calls) == 3


def test_single_non_finite_updates_let_the_run_go_on(small, tmp_path, monkeypatch):
    patch_loss(monkeypatch, {1, 2, 4}, nan_loss)
    run_here(*small, "--steps", 5, "--micro-batch-tokens", 16384, "--out", tmp_path / "run")
    assert [row["updates"] for row in metrics_of(tmp_path / "run")[1:]] == [0, 0, 1, 0, 1]


def test_logits_that_are_not_finite_end_the_run_with_one_line(local_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(local_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(folder)
    result = run(*local_flags(folder), "--out", "run", cwd=tmp_path, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: " in result.stderr.splitlines()[-1] and "not finite" in result.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------------- 9. local models

def assert_untrainable_run(folder, start):
    """A random model is never right: nothing is learned, nothing is NaN, and the weights are those of the start."""
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["eval_accuracy"] == 0
    for row in rows[1:]:
        assert set(row) == METRICS and row["success_rate"] == 0 and row["groups_kept"] == 0
        assert all(row[name] is None for name in UPDATE_METRICS)
    weights, initial = weights_of(folder), load_file(start / "model.safetensors")
    assert weights.keys() == initial.keys() and all(torch.equal(weights[name], initial[name]) for name in weights)
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint").config.tie_word_embeddings


def test_a_local_model_with_a_chat_template_runs_end_to_end(local_model, tmp_path):
    result = run(*local_flags(local_model), "--out", "run", cwd=tmp_path)
    assert_untrainable_run(tmp_path / "run", local_model)
    assert "run/metrics.jsonl" in result.stdout.splitlines()[-1] and "Warning" not in result.stderr


def test_a_local_model_without_a_chat_template_runs_end_to_end(tmp_path):
    folder = make_model_folder(tmp_path / "model", chat_template=False)
    run_here(*local_flags(folder), "--out", tmp_path / "run")
    assert_untrainable_run(tmp_path / "run", folder)


def test_a_local_model_learns_all_the_same_with_its_dropout_switched_off(local_model, tmp_path, monkeypatch):
    """Rewards by the parity of the length; attention dropout would make gradient checkpointing's train mode random."""
    monkeypatch.setattr(train, "math_reward", lambda text, gold: float(len(text) % 2))
    dropout = make_model_folder(tmp_path / "dropout", chat_template=True, attention_dropout=0.5)
    for name, model, extra in (("eval", local_model, ["--no-gradient-checkpointing"]), ("train", dropout, [])):
        run_here(*local_flags(model), "--group-size", 4, "--micro-batch-tokens", 100, "--lr", 1e-3, *extra,
                 "--out", tmp_path / name)
        assert metrics_of(tmp_path / name)[1]["updates"] >= 1
    assert relative_difference(tmp_path / "eval", tmp_path / "train", local_model) < 0.01


# -------------------------------------------------------------------------------------------- 10. and 11. the flags

def test_help_lists_every_flag_in_its_group(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    for group in train.build_parser()._action_groups:
        flags = [flag for action in group._group_actions for flag in action.option_strings]
        if not flags:
            continue
        section = re.search(rf"^{re.escape(group.title)}:\n((?:  .*\n|\n)*)", result.stdout, re.MULTILINE)
        assert section, f"no section for {group.title}"
        for flag in flags:
            assert re.search(rf"^  (-.*, )?{flag}\b", section[1], re.MULTILINE), flag
    for title in ("model and data", "method", "sampling", "objective and update", "running"):
        assert title in result.stdout


def test_every_flag_is_explained():
    assert [action.option_strings for action in train.build_parser()._actions if not action.help] == []


def test_the_commands_of_the_docstring_parse():
    commands = re.findall(r"^python train\.py([^#\n]*)", train.__doc__, re.MULTILINE)
    assert len(commands) >= 3
    for flags in commands:
        train.build_parser().parse_args(shlex.split(flags))


def test_defaults_for_a_real_model_are_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse_args(["--model", "x/y", "--device", "cpu"])
    paper = {"batch_size": 32, "minibatch_size": 16, "lr": 5e-7, "max_new_tokens": 2500, "kl_coef": 1e-4,
             "clip_eps": 0.2, "steps": 105, "group_size": 8, "temperature": 1.0, "beta": 1.0, "eta": "2|0.5-p|",
             "nthr_vocab": "responses", "data": "math", "method": "nthr", "nll_coef": 0.0}
    assert {name: getattr(args, name) for name in paper} == paper
    assert args.eval_data is None and args.gradient_checkpointing and args.out == "runs/y-nthr-seed0"


def test_a_flag_overrides_the_default_of_either_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in ([], ["--model", "x/y"]):
        args = train.parse_args([*model, "--lr", "3e-6", "--steps", "9", "--no-gradient-checkpointing", "--seed", "4",
                                 "--method", "grpo", "--device", "cpu"])
        assert (args.lr, args.steps, args.gradient_checkpointing) == (3e-6, 9, False)
        assert args.out == f"runs/{'y' if model else 'tiny'}-grpo-seed4"
