"""examples/trl_nthr.py, on one and two processes, against Eq. 7 over all pairs of tokens, GRPOTrainer and train.py."""
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

for package in ("trl", "peft"):
    pytest.importorskip(package, reason="needs TRL: pip install -r examples/requirements.txt")
# TRL 1.16 calls transformers by names that 5.24 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore::UserWarning")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]

import trl_nthr  # noqa: E402
from helpers import ENVIRONMENT, train_functions  # noqa: E402
from nthr import nthr_advantages  # noqa: E402
from reward import math_reward  # noqa: E402
from rollout import generate, stop_token_ids  # noqa: E402
from support.checkpoint import Progress  # noqa: E402
from support.data import TINY, encode_prompt, load_problems  # noqa: E402
from support.flags import model_defaults, parse_args  # noqa: E402
from support.memory import Timer  # noqa: E402
from support.models import load_model  # noqa: E402
from trl_nthr import NTHRTrainer  # noqa: E402
from trl_worker import (CASES, CHECKPOINTING, ROWS, config, first_batch, fixed_trainer, rollouts,  # noqa: E402
                        tiny_model, verdict)

full = pytest.mark.full


@contextmanager
def case(name, failures):
    """One case of a loop: its traceback is kept, and the other cases run, too."""
    try:
        yield
    except Exception:
        failures.append(f"{name}: {traceback.format_exc()}")


def whole_weights(trainer):
    """The policy as an ordinary model's weights, adapters merged."""
    model = trainer.model
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def standardised(rewards):
    """TRL's advantages of one group: over the sample standard deviation + 1e-4; without a reward, 0."""
    known = [r for r in rewards if r is not None]
    mean = sum(known) / len(known)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1))
    return [0.0 if r is None else (r - mean) / (deviation + 1e-4) for r in rewards]


@torch.no_grad()
def reduced(weights, group, verdicts, beta=1.0, eta=None, temperature=1.0, valid=None):
    """[[η on V⁻, else 1]] for rows (prompt ids, completion ids), pair by pair in float64 from unpadded rows' logits.

    NaN where a score is so close to τ that float32 may decide otherwise."""
    model = tiny_model(attn_implementation="eager").double().eval()
    model.load_state_dict(weights)
    valid = valid or [[True] * len(answer) for _, answer in group]
    scored = [i for i, right in enumerate(verdicts) if right is not None]
    p = sum(verdicts[i] for i in scored) / max(1, len(scored))
    result = [[1.0] * len(answer) for _, answer in group]
    if p in (0, 1):
        return result
    used = sorted({y for i in scored for y, ok in zip(group[i][1], valid[i]) if ok})
    tokens = []                                                                # row, position, state, e_y − π over V*_x
    for i in scored:
        prompt, answer = group[i]
        output = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        for k, y in enumerate(answer):
            if valid[i][k]:
                at = len(prompt) - 1 + k
                error = -torch.softmax(output.logits[0, at] / temperature, -1)
                error[y] += 1
                tokens.append((i, k, output.hidden_states[-1][0, at], error[used]))
    score = {}
    for j, l, h_b, error_b in tokens:
        score[j, l] = sum(float(error_a @ error_b) * float(h_a @ h_b) for i, _, h_a, error_a in tokens if verdicts[i])
    lengths = Counter(i for i, *_ in tokens)
    means = [sum(score[i, k] for i, k, *_ in tokens if i == row) / lengths[row]
             for row in scored if verdicts[row] and lengths[row]]
    tau = beta * min(means) if means else math.inf
    for j, l, *_ in tokens:
        if not verdicts[j]:
            close = abs(score[j, l] - tau) < 1e-5 * max(map(abs, score.values()))
            chosen = abs(1 - 2 * p) if eta is None else eta
            result[j][l] = math.nan if close else chosen if score[j, l] > tau else 1.0
    return result


def expected(weights, rows, verdicts, G, advantages=None, **settings):
    """[[Â of each token]] of all rows, group by group."""
    result = []
    for first in range(0, len(rows), G):
        part = slice(first, first + G)
        valid = settings.get("valid")
        factors = reduced(weights, rows[part], verdicts[part], **settings | {"valid": valid and valid[part]})
        for A, row in zip((advantages or [])[part] or standardised(verdicts[part]), factors):
            result.append([A * factor if A < 0 else A for factor in row])
    return result


def check(found, wanted):
    """(n, T) tensor against rows of lists, to 1e-5; almost all tokens must be decided, and some of them weakened."""
    pairs = [(a, b) for row, values in zip(found.tolist(), wanted, strict=True) for a, b in zip(row, values)]
    assert sum(len(values) for values in wanted) == len(pairs)
    decided = [(a, b) for a, b in pairs if not math.isnan(b)]
    assert len(decided) > 0.98 * len(pairs)
    assert max(abs(a - b) for a, b in decided) < 1e-5


def weakened(wanted):
    return sum(len(set(row)) > 1 for row in wanted)                            # rows whose tokens differ


# Processes

@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """(their folder, {case: ([batch of each process], [facts of each])}); one launch, as most of it is imports."""
    folder = tmp_path_factory.mktemp("two")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(ROOT / "tests" / "trl_worker.py"), str(folder)], start_new_session=True,
        env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"})
    try:
        assert launcher.wait(timeout=300) == 0
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGTERM)                            # it ends its two workers, too
            launcher.wait(timeout=60)
    return folder, {name: ([torch.load(folder / f"{name} {rank}.pt", weights_only=True) for rank in (0, 1)],
                           [json.loads((folder / f"{name} {rank}.json").read_text()) for rank in (0, 1)])
                    for name in CASES}


@full
def test_two_processes_have_the_advantages_of_the_gathered_batch(two_processes):
    failures = []
    for name, (G, _, version) in CASES.items():
        with case(name, failures):
            batches, facts = two_processes[1][name]
            rows, verdicts, model = rollouts(G), [verdict(row) for row in range(ROWS)], tiny_model()
            assert [fact["processes"] for fact in facts] == [2, 2]
            assert [fact["weight"] for fact in facts] == ["DTensor" if version == 2 else "Parameter"] * 2
            if version == 1:                                                   # in parts, or on one process only
                assert sum(fact["size"] for fact in facts) == 12800
            wanted = expected(model.state_dict(), rows, verdicts, G, eta=0.25)
            assert weakened(wanted) > 4
            for rank, batch in enumerate(batches):
                block = rows[12 * rank:12 * rank + 12]
                assert [ids[mask.bool()].tolist() for ids, mask in zip(
                    batch["completion_ids"], batch["completion_mask"])] == [answer for _, answer in block]
                check(batch["advantages"], wanted[12 * rank:12 * rank + 12])
            count = sum(abs(a - 0.25 * min(row)) < 1e-9 for row in wanted if min(row) < 0 for a in row)
            assert facts[0]["metrics"]["nthr/weakened"] == facts[1]["metrics"]["nthr/weakened"] == [count]
    assert not failures, "\n".join(failures)


@full
def test_a_model_that_fsdp_keeps_in_parts_is_saved_whole(two_processes):
    saved = load_model(str(two_processes[0] / "saved"), "cpu", "nthr").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in tiny_model().state_dict().items())


@pytest.mark.parametrize("G", [4, pytest.param(8, marks=full)])
def test_one_process_has_those_of_nthr_advantages_and_of_all_pairs(tmp_path, G):
    rows, verdicts, model = rollouts(G), torch.tensor([verdict(row) for row in range(ROWS)]), tiny_model()
    trainer = fixed_trainer(tmp_path, G, nthr_beta=0.5, options={"per_device_train_batch_size": ROWS})
    found = first_batch(trainer)["advantages"]
    assert trainer.model.training and not trainer.model.base_model._forward_hooks      # all is as it was
    check(found, expected(model.state_dict(), rows, verdicts.tolist(), G, beta=0.5))
    for first in range(0, ROWS, G):
        group = rows[first:first + G]
        P, T = len(group[0][0]), max(len(answer) for _, answer in group)
        lengths = torch.tensor([len(answer) for _, answer in group])
        ids = torch.tensor([prompt + answer + [0] * (T - len(answer)) for prompt, answer in group])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][:, P - 1:-1]
        mask = torch.arange(T) < lengths[:, None]
        A = torch.tensor(standardised(verdicts[first:first + G].tolist()))[:, None].expand(G, T)
        own = nthr_advantages(A, hidden, ids[:, P:], mask, verdicts[first:first + G], model.lm_head.weight, beta=0.5)
        torch.testing.assert_close(found[first:first + G, :T][mask], own.advantages[mask], atol=1e-5, rtol=0)


# Whole runs

def right(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


def brief(completion_ids, **_):
    return [len(ids) / 10 for ids in completion_ids]


def sometimes(completion_ids, **_):
    return [None if len(ids) % 3 == 0 else float(sum(ids) % 2) for ids in completion_ids]


FIELDS = "prompt_ids", "prompt_mask", "completion_ids", "advantages"


class Recorder(NTHRTrainer):
    """Keeps what it generates, with the weights it did that with, and what it trains on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generations, self.trained = [], []

    def _calculate_rewards(self, inputs, prompts, completions, ids):
        self.completions = ids
        return super()._calculate_rewards(inputs, prompts, completions, ids)

    def _generate_and_score_completions(self, inputs):
        weights = whole_weights(self)
        batch = super()._generate_and_score_completions(inputs)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"])]
        self.generations.append((weights, list(zip(prompts, self.completions)), batch["advantages"]))
        return batch

    def _compute_loss(self, model, inputs):
        self.trained.append({name: inputs[name].clone() for name in (*FIELDS, "completion_mask")})
        return super()._compute_loss(model, inputs)


def run(folder, kind, rewards=(right,), lora=None, options=None, **arguments):
    """Two steps or more on chats with the embedded model, with dropout, which samples by itself."""
    problems = load_problems(str(TINY / "train.jsonl"))[:12]
    prompts = [[{"role": "user", "content": row["problem"]}] for row in problems]
    options = {"max_steps": 2} | (options or {})
    trainer = kind(tiny_model(attention_dropout=0.1), list(rewards), config(folder, **options),
                   Dataset.from_dict({"prompt": prompts}),
                   processing_class=AutoTokenizer.from_pretrained(TINY, padding_side="left"),
                   peft_config=lora and LoraConfig("CAUSAL_LM", target_modules="all-linear", **lora), **arguments)
    trainer.train()
    return trainer


ADAPTER = {"r": 4, "lora_dropout": 0.2, "init_lora_weights": False}
RUNS = {   # name: arguments of `run`, and the micro-batches of a generation
    "gradient accumulation": ({"options": {
        "per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}}, 4),
    "two updates of a generation": ({"options": {"steps_per_generation": 2, "max_steps": 4}}, 2),
    "num_iterations": ({"options": {"num_iterations": 2, "max_steps": 4}}, 2),
    "LoRA": ({"lora": ADAPTER}, 1),
    "temperature": ({"options": {"temperature": 1.6}}, 1),
    "cold": ({"options": {"temperature": 0.6, "scale_rewards": "none"}}, 1),
    "truncated": ({"options": {"mask_truncated_completions": True, "max_completion_length": 33, "max_steps": 3},
                   "nthr_beta": 0.01}, 1),
    "several rewards": ({"rewards": (brief, right), "correctness": "right", "nthr_beta": 0.1}, 1),
    "no verdict": ({"rewards": (sometimes, brief), "correctness": "sometimes", "eta": 0.5}, 1)}


def check_run(folder, name):
    """A run of RUNS trained on Algorithm 1's advantages of what it had generated."""
    arguments, parts = RUNS[name]
    options, rewards = arguments.get("options", {}), arguments.get("rewards", (right,))
    trainer = run(folder, Recorder, **arguments)
    assert len(trainer.trained) == parts * len(trainer.generations)
    total = truncated = 0
    for number, (weights, rows, _) in enumerate(trainer.generations):
        values = [function(completion_ids=[answer for _, answer in rows]) for function in rewards]
        verdicts = values[1] if name == "several rewards" else values[0]
        sums = [sum(value for value in row if value is not None) for row in zip(*values)]
        advantages = [A for first in range(0, len(rows), 4) for A in standardised(sums[first:first + 4])]
        if name == "cold":
            advantages = [r - sum(sums[i // 4 * 4:i // 4 * 4 + 4]) / 4 for i, r in enumerate(sums)]
        ended = [answer[-1] == 1 for _, answer in rows]
        valid = [[ok] * len(answer) for ok, (_, answer) in zip(ended, rows)] if name == "truncated" else None
        wanted = expected(weights, rows, verdicts, 4, advantages, beta=arguments.get("nthr_beta", 1.0), valid=valid,
                          eta=arguments.get("eta"), temperature=options.get("temperature", 1.0))
        check(trainer.generations[number][2], wanted)
        total, truncated = total + weakened(wanted), truncated + ended.count(False)
        T = max(len(answer) for _, answer in rows)                             # TRL shuffles and splits rows: find them
        keys, seen = [(*prompt, -1, *answer, *[0] * (T - len(answer))) for prompt, answer in rows], []
        for batch in trainer.trained[parts * number:parts * (number + 1)]:
            for ids, mask, answer, A in zip(*(batch[field] for field in FIELDS)):
                seen.append((*ids[mask.bool()].tolist(), -1, *answer.tolist()))
                check(A[None], [wanted[keys.index(seen[-1])]])
        assert Counter(seen) == Counter(keys * options.get("num_iterations", 1))
    assert total > 0
    if name == "truncated":
        assert truncated > 0 and trainer.trained[0]["completion_mask"].sum(1).eq(0).any()


@full
def test_what_is_trained_on_is_algorithm_1_of_what_was_generated(tmp_path):
    failures = []
    for name in RUNS:
        with case(name, failures):
            check_run(tmp_path, name)
    assert not failures, "\n".join(failures)


@full
def test_eta_1_is_grpo_trainer_bit_for_bit(tmp_path):
    failures = []
    for name, lora, options in (
            ("two iterations", None, {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2,
                                      "num_iterations": 2, "max_steps": 4}),
            ("LoRA and KL", ADAPTER | {"init_lora_weights": True}, {"beta": 0.1, "max_steps": 3})):
        with case(name, failures):
            plain, same, other = (run(tmp_path, kind, lora=lora, options=options, **arguments) for kind, arguments in (
                (GRPOTrainer, {}), (NTHRTrainer, {"eta": 1.0}), (NTHRTrainer, {"eta": 0.0})))
            weights, equal, different = (trainer.model.state_dict() for trainer in (plain, same, other))
            assert all(torch.equal(value, equal[key]) for key, value in weights.items())
            assert not all(torch.equal(value, different[key]) for key, value in weights.items())
            losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (plain, same)]
            assert losses[0] == losses[1] and len(losses[0]) == options["max_steps"]
    assert not failures, "\n".join(failures)


# The example

def run_example(monkeypatch, folder, *flags):
    """main with these flags; returns the trainer that it made, a `Recorder`."""
    trainers = []

    class Kept(Recorder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(trl_nthr, "NTHRTrainer", Kept)
    monkeypatch.setattr(sys, "argv", ["trl_nthr.py", "--output_dir", str(folder), *map(str, flags)])
    trl_nthr.main()
    trainer, = trainers
    return trainer


def test_the_smallest_run_has_the_prompts_and_stops_of_rollout_and_warns_of_nothing(tmp_path, monkeypatch, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = run_example(monkeypatch, tmp_path / "out", "--per_device_train_batch_size", 16, "--max_steps", 1)
    assert not [w for w in caught if issubclass(w.category, (FutureWarning, DeprecationWarning))]
    tokenizer = trainer.processing_class
    prompts = [encode_prompt(tokenizer, row["problem"]) for row in load_problems(str(TINY / "train.jsonl"))]
    assert all(prompt in prompts for prompt, _ in trainer.generations[0][1])
    assert sorted(trainer.eos_token_ids) == stop_token_ids(tiny_model(), tokenizer)
    assert len(trainer.trained) == 1 and trainer.trained[0]["advantages"].shape[0] == 16
    printed = capsys.readouterr().out
    assert "success rate: " in printed and f"% at last; saved to {tmp_path / 'out'}\n" in printed
    load_model(str(tmp_path / "out"), "cpu", "nthr")


@full
def test_the_example_learns(tmp_path, monkeypatch):
    run_example(monkeypatch, tmp_path / "out", "--per_device_train_batch_size", 80, "--max_steps", 20,
                "--learning_rate", 3e-4)                                       # + 11 points
    problems, tokenizer = load_problems(str(TINY / "test.jsonl")), AutoTokenizer.from_pretrained(TINY)

    def accuracy(model):
        asked = [encode_prompt(tokenizer, row["problem"]) for row in problems]
        texts = generate(model, tokenizer, asked, 1, 64, 0.0, keep_hidden=False).texts
        return sum(math_reward(text, row["answer"]) for text, row in zip(texts, problems)) / len(problems)
    assert accuracy(load_model(str(tmp_path / "out"), "cpu", "nthr")) > accuracy(tiny_model()) + 0.05


@full
def test_the_example_with_a_model_and_data_of_ones_own(tmp_path, monkeypatch, capsys):
    """No chat template, an end of turn that the model does not list, LoRA, bfloat16, gradient checkpointing, KL."""
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.jsonl", "stack", "*.jinja"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    assert not tokenizer.chat_template
    data.write_text("".join(json.dumps({"question": f"{i}+1", "answer": i + 1}) + "\n" for i in range(4)))
    trainer = run_example(monkeypatch, tmp_path / "out", "--model", folder, "--data", data, *(
        "--lora_rank 2 --num_generations 4 --max_steps 1 --generation_batch_size 16 --max_completion_length 8 "
        "--gradient_accumulation_steps 2 --eta p --nthr_beta 0.5 --use_cpu").split())
    assert sorted(trainer.eos_token_ids) == stop_token_ids(tiny_model(), tokenizer) == [1, len(tokenizer) - 1]
    prompts = [prompt for prompt, _ in trainer.generations[0][1]]
    assert sorted(prompts) == sorted(4 * [encode_prompt(tokenizer, f"{i}+1") for i in range(4)])
    assert trainer._nthr == {"beta": 0.5, "eta": "p", "temperature": 1.0}
    assert trainer.args.bf16 and getattr(trainer.args, CHECKPOINTING) and trainer.args.beta == 1e-4
    assert trainer.args.learning_rate == 5e-7 and trainer.args.adam_beta2 == 0.95
    assert trainer.args.disable_dropout and not trainer.args.use_bias_correction_kl
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert "success rate: 0.0% at first, 0.0% at last" in capsys.readouterr().out


@full
def test_bad_flags_of_the_example_end_with_one_line(tmp_path, monkeypatch):
    failures, cpu = [], ["--use_cpu"]                                          # without, TRL may ask for a GPU
    for flags, message in (
            (["--model", "."], "the folder . has no config.json"),             # a folder: nothing is asked of a hub
            (["--model", ".", *cpu], "the folder . has no config.json"),
            (["--model", str(ROOT / "tests")], "has no config.json"),
            (["--model", str(ROOT / "tests"), *cpu], "has no config.json"),
            (["--data", "missing"], "cannot read the data file missing"),
            (["--eta", "q", *cpu], "eta must be one of 2|0.5-p|, p, 1-p or a number in [0, 1], got 'q'"),
            (["--eta", "3"], "eta must be one of 2|0.5-p|, p, 1-p or a number in [0, 1], got '3'"),
            (["--num_generations", "1", *cpu], "at least 2 generations per prompt"),
            (["--torch_compile"], "no torch_compile"),
            (["--use_transformers_continuous_batching", *cpu], "NTHR refuses use_transformers_continuous_batching"),
            (["--use_transformers_continuous_batching", "--bf16", "true", *cpu], "casts the trained float32 weights"),
            (["--data", str(TINY / "test.jsonl"), "--generation_batch_size", "8192"],
             "holds 600 questions, a generation takes 1024: lower --generation_batch_size")):
        monkeypatch.setattr(sys, "argv", ["trl_nthr.py", "--output_dir", str(tmp_path), *flags])
        with case(flags, failures):
            with pytest.raises(SystemExit) as caught:
                trl_nthr.main()
            line = str(caught.value.code)                                      # which goes to stderr, with exit code 1
            assert line.startswith("error: ") and message in line and "\n" not in line
    assert not failures, "\n".join(failures)


def asked_of_trl(monkeypatch, *flags):
    """(arguments, keyword arguments) that the example would build its trainer with."""
    calls = []
    monkeypatch.setattr(trl_nthr, "NTHRTrainer", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(sys, "argv", ["trl_nthr.py", *flags])
    trl_nthr.trainer_from_flags()
    return calls[0]


@pytest.fixture
def own_model(tmp_path):
    """Flags for a model that is not embedded, and 32 questions."""
    shutil.copytree(TINY, tmp_path / "own", ignore=shutil.ignore_patterns("*.py", "stack"))
    return ["--model", str(tmp_path / "own"), "--data", str(tmp_path / "own" / "test.jsonl"), "--use_cpu"]


@full
def test_the_defaults_are_those_of_train_py(monkeypatch, own_model):
    """Except for the number of steps: TRL counts updates, of which train.py's real settings have two in a step."""
    for flags, model, steps in ((["--use_cpu"], str(TINY), 50), (own_model, own_model[1], 210)):
        ours, config = model_defaults(model), asked_of_trl(monkeypatch, *flags)[0][2]
        assert (config.learning_rate, config.beta, config.max_completion_length, getattr(config, CHECKPOINTING)) == (
            ours["lr"], ours["kl_coef"], ours["max_new_tokens"], ours["gradient_checkpointing"])
        assert config.num_generations == 8 and config.generation_batch_size == 8 * ours["batch_size"]
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8 * ours["minibatch_size"]
        assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.max_grad_norm) == (0.9, 0.95, 0, 1)
        assert (config.temperature, config.epsilon, config.lr_scheduler_type) == (1, 0.2, "constant")
        assert config.disable_dropout and not config.use_bias_correction_kl and config.max_steps == steps
    assert (config.learning_rate, config.max_completion_length, config.gradient_accumulation_steps) == (5e-7, 2500, 16)


@full
def test_the_old_and_the_new_name_of_activation_checkpointing_count(monkeypatch, own_model):
    for name in {CHECKPOINTING, "gradient_checkpointing"}:
        for flags in (["--use_cpu"], own_model):
            for value in (True, False):
                config = asked_of_trl(monkeypatch, *flags, f"--{name}", str(value))[0][2]
                assert getattr(config, CHECKPOINTING) is value, (name, flags)


@full
def test_one_to_32_processes_can_share_the_defaults(monkeypatch, own_model):
    monkeypatch.setattr(trl_nthr.GRPOConfig, "main_process_first", nullcontext)        # no others are there to wait for
    for processes in (1, 2, 4, 8, 16, 32):
        monkeypatch.setattr(trl_nthr, "os", SimpleNamespace(environ={"WORLD_SIZE": str(processes)}))
        monkeypatch.setattr(trl_nthr.GRPOConfig, "world_size", processes)
        for flags, update in ((["--use_cpu"], 256), (own_model, 256 if processes == 32 else 128)):
            config = asked_of_trl(monkeypatch, *flags)[0][2]
            rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
            assert (config.generation_batch_size, rows) == (256, update), (processes, flags)


@full
def test_vllm_stops_where_the_model_does(monkeypatch, own_model):
    assert asked_of_trl(monkeypatch, *own_model)[0][2].generation_kwargs is None
    model, _, config, *_ = asked_of_trl(monkeypatch, *own_model, "--use_vllm", "--generation_kwargs", '{"seed": 3}')[0]
    assert config.generation_kwargs == {"stop_token_ids": model.generation_config.eos_token_id, "seed": 3}
    assert config.generation_kwargs["stop_token_ids"] == [1]


@full
def test_a_model_takes_init_kwargs(monkeypatch, own_model):
    given = json.dumps({"use_safetensors": True, "attn_implementation": "eager"})
    model = asked_of_trl(monkeypatch, *own_model, "--model_init_kwargs", given)[0][0]
    assert model.config._attn_implementation == "eager" and model.dtype == torch.float32


def test_help_shows_the_defaults_that_are_used(monkeypatch, capsys):
    names = "--learning_rate", "--max_steps", "--reward", f"--{CHECKPOINTING}"
    for flags, wanted in (([], ("0.0001", "50", "math", "False")),
                          (["--model", "some/model"], ("5e-07", "210", "math", "True"))):
        monkeypatch.setattr(sys, "argv", ["trl_nthr.py", *flags, "--help"])
        with pytest.raises(SystemExit) as caught:
            trl_nthr.main()
        text = " ".join(capsys.readouterr().out.split())
        assert caught.value.code == 0
        for name, value in zip(names, wanted):
            shown = text.split("options: ")[1].split(f" {name} ")[1].split("(default: ")[1]
            assert shown.startswith(f"{value})"), (name, shown[:40])


@full
def test_prompts_of_another_task_have_no_instruction(tmp_path, monkeypatch, capsys):
    trainer = run_example(monkeypatch, tmp_path / "out", "--model", TINY / "stack", "--max_steps", 1,
                          "--per_device_train_batch_size", 16)
    tokenizer, problems = trainer.processing_class, load_problems(str(TINY / "stack" / "train.jsonl"))
    prompts = [encode_prompt(tokenizer, row["problem"], "") for row in problems]
    assert all(prompt in prompts for prompt, _ in trainer.generations[0][1])
    assert [row[0]["content"] for row in trainer.train_dataset["prompt"]] == [row["problem"] for row in problems]
    assert f"at last; saved to {tmp_path / 'out'}\n" in capsys.readouterr().out


@full
def test_what_is_not_saved_is_not_said_to_be_and_no_log_is_no_fault(tmp_path, monkeypatch, capsys):
    trainer = fixed_trainer(tmp_path, 4)
    trainer.train = trainer.save_model = lambda *_: None                       # as with ZeRO-3, which saves its parts
    monkeypatch.setattr(trl_nthr, "trainer_from_flags", lambda: trainer)
    trl_nthr.main()
    assert capsys.readouterr().out.endswith("success rate: nan% at first, nan% at last; "
                                            f"no weights in {tmp_path}: ZeRO-3 needs --zero3_save_16bit_model true\n")


# What TRL can be set to

LOSSES = [*({"loss_type": name} for name in ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo")),
          {"loss_type": "luspo", "importance_sampling_level": "sequence"}, {"importance_sampling_level": "sequence"},
          {"off_policy_mask_threshold": 0.01}, {"top_entropy_quantile": 0.5}]


def test_every_loss_of_trl_takes_an_advantage_per_token(tmp_path):
    """What this example stands on, and TRL does not promise: cÂ instead of Â multiplies the gradient of a token by c.

    The gradient is that of the log-probabilities. With one ratio for a response, its tokens share the mean of c."""
    failures = []
    for options in LOSSES:
        trainer = fixed_trainer(tmp_path, 4, kind=GRPOTrainer,
                                options={"per_device_train_batch_size": ROWS, **options})
        trainer.current_gradient_accumulation_steps = 1
        batch = first_batch(trainer)
        mask, A = batch["completion_mask"].bool(), batch["advantages"][:, None]                # (n, T), (n, 1)
        noise = 0.1 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logprobs, *others = trainer._get_per_token_logps_and_entropies(
                trainer.model, torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), mask.shape[1], compute_entropy=True)
        batch["old_per_token_logps"] = batch["sampling_per_token_logps"] = logprobs + noise

        def loss(advantages):
            leaf = logprobs.clone().requires_grad_()
            with patch.object(trainer, "_get_per_token_logps_and_entropies", return_value=(leaf, *others)):
                loss = trainer._compute_loss(trainer.model, batch | {"advantages": advantages})
            loss.backward()
            return loss.item(), leaf.grad

        with case(options, failures):
            (plain, gradient), (same, same_gradient) = loss(batch["advantages"]), loss(A.expand(mask.shape))
            assert plain == pytest.approx(same, abs=1e-6) and gradient.abs().max() > 0
            torch.testing.assert_close(same_gradient, gradient, atol=1e-7, rtol=1e-4)
            c = torch.where((A < 0) & (torch.arange(mask.shape[1]) % 3 > 0), 0.25, 1.0)        # (n, T)
            found = loss(c * A)[1]
            if options.get("importance_sampling_level") == "sequence":
                c = ((c * mask).sum(1) / mask.sum(1))[:, None]                 # (n, 1)
            torch.testing.assert_close(found, c * gradient, atol=1e-7, rtol=1e-4)
            assert not torch.equal(found, gradient)
    assert not failures, "\n".join(failures)


@full
def test_tokens_that_the_model_did_not_write_are_not_scored(tmp_path):
    rows, verdicts = rollouts(4), [verdict(row) for row in range(ROWS)]
    mask = [[k % 4 != 2 for k in range(len(answer))] for _, answer in rows]
    trainer = fixed_trainer(tmp_path, 4, rows=rows, extra={"env_mask": [[int(x) for x in row] for row in mask]},
                            options={"per_device_train_batch_size": ROWS}, nthr_beta=0.1)
    wanted = expected(tiny_model().state_dict(), rows, verdicts, 4, beta=0.1, valid=mask)
    assert wanted != expected(tiny_model().state_dict(), rows, verdicts, 4, beta=0.1)
    check(first_batch(trainer)["advantages"], wanted)


@full
def test_a_wrong_answer_with_a_positive_advantage_keeps_it(tmp_path):
    def style(row):
        return 5.0 * (row % 4 == 1)
    rows, verdicts = rollouts(4), [verdict(row) for row in range(ROWS)]
    trainer = fixed_trainer(tmp_path, 4, rewards=[style, verdict], correctness="verdict", nthr_beta=-math.inf, eta=0.0,
                            options={"per_device_train_batch_size": ROWS})
    found, count = first_batch(trainer)["advantages"], 0
    for first in range(0, ROWS, 4):
        sums = [style(row) + verdict(row) for row in range(first, first + 4)]
        for row, A in zip(range(first, first + 4), standardised(sums)):
            weak = 0 < sum(verdicts[first:first + 4]) < 4 and not verdicts[row] and A < 0
            T = len(rows[row][1])
            count += weak * T
            torch.testing.assert_close(found[row, :T], torch.full((T,), 0.0 if weak else A), atol=1e-5, rtol=0)
    assert trainer._metrics["train"]["nthr/weakened"] == [count]


@full
def test_an_evaluation_is_that_of_trl(tmp_path):
    trainer = fixed_trainer(tmp_path, 4, options={"num_generations_eval": 3})
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    assert trainer._generate_and_score_completions(inputs)["advantages"].shape == (12,)
    assert not trainer.model.training


@full
def test_bfloat16_keeps_the_scores_in_float32(tmp_path):
    rows, verdicts = rollouts(4), [verdict(row) for row in range(ROWS)]
    trainer = fixed_trainer(tmp_path, 4, options={"per_device_train_batch_size": ROWS, "bf16": True}, eta=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = first_batch(trainer)["advantages"]
    wanted = expected(tiny_model().state_dict(), rows, verdicts, 4, eta=0.0)
    agree = [abs(a - b) < 1e-5 for row, values in zip(found.tolist(), wanted) for a, b in zip(row, values)]
    assert found.dtype == torch.float32 and sum(agree) > 0.95 * len(agree)     # states are rounded to 3 digits


@full
def test_settings_that_cannot_work_are_refused_in_one_line(tmp_path):
    def half(row):
        return 0.5

    def other(row):
        return 1.0
    with pytest.raises(ValueError, match="half must return 1 .right., 0 .wrong. or None"):
        first_batch(fixed_trainer(tmp_path, 4, rewards=[half]))
    for correctness in (None, "missing"):
        with pytest.raises(ValueError, match=f"one of the reward functions verdict, other, got {correctness}"):
            fixed_trainer(tmp_path, 4, rewards=[verdict, other], correctness=correctness)
    with pytest.raises(ValueError, match="eta must be one of"):
        fixed_trainer(tmp_path, 4, eta="q")
    for correctness in (None, "verdict"):
        with pytest.raises(ValueError, match=f"one of the reward functions verdict, verdict, got {correctness}"):
            fixed_trainer(tmp_path, 4, rewards=[verdict, verdict], correctness=correctness)
    packed = tiny_model()
    packed.lm_head.weight = torch.nn.Parameter(torch.zeros(6400, 1, dtype=torch.uint8), requires_grad=False)   # 4 bits
    with pytest.raises(ValueError, match="a head without bias or quantisation"):
        fixed_trainer(tmp_path, 4, model=packed)
    with pytest.raises(ValueError, match="no torch_compile"):
        fixed_trainer(tmp_path, 4, options={"torch_compile": True})
    with pytest.raises(ValueError, match="NTHR refuses use_transformers_continuous_batching"):
        fixed_trainer(tmp_path, 4, options={"use_transformers_continuous_batching": True})
    biased = tiny_model()
    biased.lm_head = torch.nn.Linear(128, 100)
    with pytest.raises(ValueError, match="a head without bias"):
        fixed_trainer(tmp_path, 4, model=biased)
    capped = tiny_model()
    capped.config.logits_scaling = 2.0
    with pytest.raises(ValueError, match="logits_scaling = 2.0"):
        fixed_trainer(tmp_path, 4, model=capped)
    adapter = LoraConfig("CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is no torch.nn.Linear"):
        fixed_trainer(tmp_path, 4, model=get_peft_model(tiny_model(), adapter))


# Against train.py

def sampled(cuts):
    """4 sampled rows for each of len(cuts) questions, cut off at so many tokens: a Rollout, and rows of two lists."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    problems = load_problems(str(TINY / "train.jsonl"))[:len(cuts)]
    rollout = generate(tiny_model(), tokenizer, [encode_prompt(tokenizer, row["problem"]) for row in problems], 4,
                       max(cuts), seed=0)
    rollout.response_mask &= torch.arange(max(cuts)) < torch.tensor(cuts).repeat_interleave(4)[:, None]
    return rollout, [(x[m].tolist(), y[n].tolist()) for x, m, y, n in zip(
        rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)]


def ours(folder, rollout, rewards, updates=1, kl_coef=0.0):
    """The change of the weights and the losses of train.py's updates by SGD, with advantages in TRL's scale.

    All updates are on the same rows, as with TRL's num_iterations: the mini-batches of the step are copies."""
    questions, losses = len(rewards), []
    args = parse_args("", ["--group-size", "4", "--batch-size", str(updates * questions), "--kl-coef", str(kl_coef),
                           "--minibatch-size", str(questions), "--beta", "0.1", "--out", str(folder / "unused")])
    rollout = rollout.select(torch.arange(4 * questions).repeat(updates))
    model, correct, train = tiny_model().eval(), rewards.bool().repeat(updates, 1), train_functions()
    advantages, metrics = train["token_advantages"](model, rollout, correct, args, 1)
    assert metrics["selected_share"] > 0
    scale = rewards.std(1, correction=0) / (rewards.std(1) + 1e-4)
    advantages *= scale.repeat(updates).repeat_interleave(4)[:, None]
    run = train["Run"](model, tiny_model().eval() if kl_coef else None, torch.optim.SGD(model.parameters(), lr=0.1),
                       None, [], [], [], [], Progress())
    original, scope = train["grpo_loss"], train["update"].__globals__

    def kept(*loss_args):                                                      # a mini-batch is one micro-batch here
        loss, values = original(*loss_args)
        losses.append(values["loss"].item())
        return loss, values
    with patch.dict(scope, grpo_loss=kept):
        train["update"](run, rollout, correct, advantages, args, Timer())
    assert len(losses) == updates
    return change(model), losses


def theirs(folder, rows, rewards, updates=1, kl_coef=0.0, **options):
    """The same by `NTHRTrainer`, which is given the rows (`sampled`) and their rewards."""
    flat, model = rewards.flatten().tolist(), tiny_model()

    def given(row):
        return flat[row]
    trainer = fixed_trainer(folder, 4, rows=rows, rewards=[given], nthr_beta=0.1, model=model, options={
        "per_device_train_batch_size": len(rows), "num_iterations": updates, "max_steps": updates, "learning_rate": 0.1,
        "beta": kl_coef, "use_bias_correction_kl": False, **options},
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    trainer.train()
    return change(model), [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def change(model):
    """What training added to the weights of the embedded model, as one vector."""
    with torch.no_grad():
        return torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), tiny_model().parameters())])


MIXED = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]])


@full
def test_three_updates_are_those_of_train_py_where_the_normalisers_agree(tmp_path):
    failures = []
    for cuts, kl_coef in (([32], 0.1), ([18, 18], 0.0)):
        (rollout, rows), rewards = sampled(cuts), MIXED[:len(cuts)]
        a, losses = ours(tmp_path, rollout, rewards, 3, kl_coef)
        assert a.norm() > 0.02
        for loss_type in ("dapo", "bnpo"):
            with case((cuts, kl_coef, loss_type), failures):
                b, other = theirs(tmp_path, rows, rewards, 3, kl_coef, loss_type=loss_type)
                assert (a - b).norm() < 1e-3 * a.norm()                        # weights are rounded to 1e-8 or so
                torch.testing.assert_close(torch.tensor(losses), torch.tensor(other), atol=1e-4, rtol=1e-3)
    assert not failures, "\n".join(failures)


@full
def test_dapo_weighs_questions_by_their_tokens_and_counts_those_without_signal(tmp_path):
    rollout, rows = sampled([12, 18, 24])
    tokens = rollout.response_mask.view(3, -1).sum(1).tolist()
    assert tokens[0] < tokens[1] < tokens[2]
    each = [ours(tmp_path, rollout.select(torch.arange(4 * q, 4 * q + 4)), MIXED[q:q + 1])[0] for q in (0, 1)]
    found, _ = theirs(tmp_path, rows, MIXED, max_grad_norm=0.0)
    wanted = sum(tokens[q] / sum(tokens) * each[q] for q in (0, 1))
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
