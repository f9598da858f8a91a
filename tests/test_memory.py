"""What a run takes: memory, estimated before it is loaded, bounded and measured; running out of it; seconds by phase.

The estimate is compared with real tensors, with what autograd saves, and with the bytes of all tensors that live."""
import re
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, Gemma3TextConfig, LlamaConfig, Qwen2Config,
                          Qwen3Config)

import grpo
import nthr
import rollout
from helpers import ROOT, SIZES, assert_same_run, error_of, metrics_of, run_here, weights_of
from support import errors, evaluate, flags, memory, models
from support.checkpoint import checkpoints, read_progress
from test_checkpoint import act_at, coin_flags, continue_as_printed, reward_of

FAMILIES = {
    "Qwen2": Qwen2Config(tie_word_embeddings=True, **SIZES),
    "Qwen3": Qwen3Config(head_dim=16, tie_word_embeddings=True, **SIZES),                   # norms on queries and keys
    "Llama": LlamaConfig(tie_word_embeddings=False, **SIZES),
    "Gemma 3": Gemma3TextConfig(head_dim=16, sliding_window=16, sliding_window_pattern=2, **SIZES)}


# ------------------------------------------------------------------------------------------------ 1. running out of it

OUT_OF_MEMORY = {   # phase: where it is injected, in which call of the step, and the flag that the message must name
    "data_generation": (rollout, "generate", 1, "--max-sequences"),
    "nthr": (nthr, "nthr_advantages", 1, "--batch-size"),
    "old_probabilities": (grpo, "response_logprobs", 1, "--micro-batch-tokens"),           # of the second mini-batch
    "reference": (grpo, "response_logprobs", 2, "--micro-batch-tokens"),
    "model_update": (grpo, "grpo_loss", 2, "--gradient-checkpointing"),
    "likelihood_change": (grpo, "likelihood_change", 1, "--micro-batch-tokens"),
    "evaluation": (evaluate, "generate", 1, "--max-sequences")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return [*coin_flags(tmp_path_factory.mktemp("data")), "--eval-every", 1]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The folder of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(*small, "--out", folder)
    assert all(row["updates"] == 2 for row in metrics_of(folder)[1:])
    return folder


def run_out(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def assert_ends_well(phase, small, whole, folder):
    """In the third step; then the run goes on from the second, with the printed command, and with the named flags."""
    module, name, call, flag = OUT_OF_MEMORY[phase]
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, module, name, 3, run_out, call)
        message = error_of(*small, "--out", folder)                            # one line
    assert message.startswith(f"error: out of memory in {phase}: ") and flag in message, message
    assert f"the last checkpoint is intact: python train.py --resume {folder} --reward " in message, message
    assert read_progress(folder / "checkpoint").step == 2, phase
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2], phase
    continue_as_printed(message)
    assert_same_run(folder, whole)


def test_out_of_memory_names_phase_and_flags_and_the_run_goes_on_as_if_nothing_was(small, whole, tmp_path):
    assert_ends_well("model_update", small, whole, tmp_path / "run")


@pytest.mark.full
def test_out_of_memory_in_any_other_phase(small, whole, tmp_path):
    for phase in OUT_OF_MEMORY.keys() - {"model_update"}:
        assert_ends_well(phase, small, whole, tmp_path / phase)


@pytest.mark.full
def test_a_run_that_ran_out_of_memory_goes_on_with_the_flags_that_were_named(small, tmp_path, monkeypatch):
    act_at(monkeypatch, grpo, "grpo_loss", 3, run_out)
    error_of(*small, "--out", tmp_path / "run")
    monkeypatch.undo()
    run_here("--resume", tmp_path / "run", *reward_of(small), "--max-sequences", 3, "--micro-batch-tokens", 40,
             "--gradient-checkpointing")
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == list(range(6))


def test_half_made_moments_of_adamw_are_not_saved(small, whole, tmp_path, monkeypatch):
    """Out of memory while AdamW makes its moments, in the first update of all: on a CPU that is a MemoryError."""
    step = torch.optim.AdamW.step

    def short(self, closure=None):
        step(self)
        del next(iter(self.state.values()))["exp_avg_sq"]
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", short)
    assert "out of memory in model_update" in error_of(*small, "--out", tmp_path / "run")
    start = load_file(small[small.index("--model") + 1] / "model.safetensors")
    assert all(torch.equal(value, start[name]) for name, value in weights_of(tmp_path / "run").items())
    monkeypatch.undo()
    run_here("--resume", tmp_path / "run", *reward_of(small))
    assert_same_run(tmp_path / "run", whole)


def test_out_of_memory_before_the_first_checkpoint_is_named_and_the_run_can_be_resumed(small, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(torch.nn.Module, "to", run_out)
    assert re.fullmatch("error: out of memory in loading: .*--kl-coef 0", error_of(*small, "--out", folder))
    assert not folder.exists()
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "generate", run_out)
    message = error_of(*small, "--steps", 1, "--out", folder)
    assert re.fullmatch("error: out of memory in evaluation: lower --max-sequences", message)
    assert not checkpoints(folder)
    monkeypatch.undo()
    run_here("--resume", folder, *reward_of(small), "--max-sequences", 1)
    assert [row["step"] for row in metrics_of(folder)] == [0, 1]


def test_a_failed_allocation_counts_and_other_errors_do_not():
    with pytest.raises(errors.OutOfMemory, match="out of memory in reference: lower --micro-batch-tokens"):
        with errors.memory_for("reference"):
            torch.empty(2 ** 46, dtype=torch.uint8)                            # 64 TiB
    for text in ("MPS backend out of memory (MPS allocated: 8 GB)", "CUDA error: out of memory",
                 "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        with pytest.raises(errors.OutOfMemory), errors.memory_for("reference"):
            raise RuntimeError(text)
    with pytest.raises(errors.OutOfMemory), memory.Timer()("nthr"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="must match"), errors.memory_for("reference"):
        torch.ones(2) + torch.ones(3)
    assert {*memory.PHASES, "loading", "evaluation"} == errors.LOWERS_MEMORY.keys()
    for phase, (*_, flag) in {**OUT_OF_MEMORY, "loading": ("--kl-coef 0",)}.items():
        with pytest.raises(errors.OutOfMemory, match=f"out of memory in {phase}: .*{flag}"), errors.memory_for(phase):
            raise MemoryError


# ---------------------------------------------------------------------------------------------------- 2. micro-batches

def test_micro_batches_are_sorted_by_length_and_hold_as_many_rows_as_the_budget_allows():
    """By hand: a row costs as many tokens as the longest prompt and the longest response of its part together."""
    prompts, responses = torch.tensor([2, 4, 2, 2, 2]), torch.tensor([5, 1, 3, 1, 30])
    sampled = SimpleNamespace(prompt_mask=torch.arange(4) >= 4 - prompts[:, None],
                              response_mask=torch.arange(30) < responses[:, None])
    for tokens, most, expected in ((10, 9, [[1, 3], [2], [0], [4]]),           # (4+1)·2 = 10; 2+3, with 5: 7·2 = 14
                                   (14, 9, [[1, 3], [2, 0], [4]]),             # (4+3)·3 = 21; then 7·2 = 14
                                   (1, 9, [[1], [3], [2], [0], [4]]), (1000, 9, [[1, 3, 2, 0, 4]]),
                                   (1000, 3, [[1, 3, 2], [0, 4]]), (1000, 1, [[1], [3], [2], [0], [4]])):
        parts = memory.micro_batches(sampled, torch.arange(5), tokens, most)
        assert [part.tolist() for part in parts] == expected, (tokens, most)
    assert [part.tolist() for part in memory.micro_batches(sampled, torch.tensor([4, 2]), 64, 2)] == [[2, 4]]
    assert memory.micro_batches(sampled, torch.arange(5), 64, 2)[0].dtype == torch.long


# ------------------------------------------------------------------------------------------------------ 3. the estimate

def arguments(*given):
    """The flags of a real model, for a CPU."""
    return flags.parse_args("", [*map(str, ("--model", "x/y", *given)), "--device", "cpu", "--out", "none"])


def test_the_estimate_of_what_is_kept_and_cached_is_that_of_real_tensors():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    for family, config in FAMILIES.items():
        model = AutoModelForCausalLM.from_config(config)
        args = arguments("--batch-size", 2, "--minibatch-size", 1, "--group-size", 3, "--max-sequences", 4,
                         "--eval-size", 9, "--max-new-tokens", 12, "--kl-coef", 1, "--dtype", "bfloat16")
        parts, phases = memory.estimate_memory(config, args, 20)
        weights = sum(p.numel() * 4 for p in model.parameters())
        assert parts["weights"] == parts["gradients"] == parts["AdamW"] / 2 == weights, family
        assert parts["reference"] == parts["bfloat16 copy"] == weights / 2, family
        cache = DynamicCache()
        model.bfloat16()(torch.ones(4, 20 + 12 + rollout.BUCKET, dtype=torch.long),
                         **grpo.cache_argument(model, cache))
        stored = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        assert parts["KV cache"] == stored, family
        sampled = rollout.generate(model, tokenizer, [[5] * 20, [6] * 20], 3, 12, max_sequences=4)
        assert parts["hidden states"] == sampled.hidden.untyped_storage().nbytes(), family
        kept = 4 * weights + memory.RUNTIME                                    # 1 + 2 + 1/2 + 1/2 times the weights
        sampling = sum(parts[name] for name in ("KV cache", "prefill", "sampling logits", "hidden states"))
        assert phases == {"sampling": kept + sampling, "update": kept + weights + parts["activations"] + parts["head"]}


def test_the_estimate_leaves_out_what_a_run_does_not_have():
    config, given = FAMILIES["Qwen2"], ("--batch-size", 4, "--minibatch-size", 2, "--kl-coef", 1, "--eval-size", 9,
                                        "--max-new-tokens", 12)
    both = memory.estimate_memory(config, arguments(*given, "--dtype", "float32"), 20)
    for extra, gone in ((["--kl-coef", 0], "reference"), (["--method", "grpo"], "hidden states"),
                        (["--method", "pos-only"], "hidden states")):
        parts, phases = memory.estimate_memory(config, arguments(*given, "--dtype", "float32", *extra), 20)
        assert both[0][gone] > 0 and parts == both[0] | {gone: 0}, extra
        assert both[1]["sampling"] - phases["sampling"] == both[0][gone], extra
        assert both[1]["update"] - phases["update"] == (both[0][gone] if gone == "reference" else 0), extra
    assert both[0]["bfloat16 copy"] == 0
    args = arguments(*given)
    args.device = "cuda:1"                                                     # the CPU's libraries do not count there
    assert both[1]["sampling"] - memory.estimate_memory(config, args, 20)[1]["sampling"] == memory.RUNTIME
    args = arguments("--eval-only", "--eval-data", ROOT / "tiny" / "test.jsonl", "--eval-size", 9, "--kl-coef", 1,
                     "--max-new-tokens", 12)
    parts, phases = memory.estimate_memory(config, args, 20)
    assert phases.keys() == {"sampling"} and "activations" not in parts
    assert parts["gradients"] == parts["AdamW"] == parts["reference"] == parts["hidden states"] == 0
    assert parts["KV cache"] == 9 * (20 + 12 + rollout.BUCKET) * 2 * 2 * 16 * 4    # rows, columns, layers, K and V


def test_the_estimate_of_activations_is_near_what_autograd_saves():
    """Saved tensors are counted once per storage while a batch of 16 rows x 64 tokens goes through the layers."""
    config = Qwen2Config(**SIZES | dict(hidden_size=128, intermediate_size=640, num_hidden_layers=6, vocab_size=100))
    model = AutoModelForCausalLM.from_config(config)
    weights = {p.data_ptr() for p in model.parameters()}
    for dtype in ("float32", "bfloat16"):
        for checkpointing in (False, True):
            args = arguments("--batch-size", 4, "--minibatch-size", 4, "--group-size", 4, "--max-new-tokens", 44,
                             "--dtype", dtype, "--micro-batch-tokens", 1024,
                             "--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing")
            parts, storages = memory.estimate_memory(config, args, 20)[0], {}

            def count(x):
                if x.data_ptr() not in weights and x.is_floating_point():
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            layers = model.model.layers[:1] if checkpointing else model.model.layers
            hidden = torch.randn(16, 64, 128, requires_grad=True)
            positions = model.model.rotary_emb(hidden, torch.arange(64)[None])
            with models.precision("cpu", dtype), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
                output = hidden
                for layer in layers:
                    output = layer(output, attention_mask=None, position_embeddings=positions)
            saved = sum(storages.values()) + (6 * hidden.numel() * 4 if checkpointing else 0)
            copies = sum(p.numel() * 2 for layer in layers for p in layer.parameters()) if dtype == "bfloat16" else 0
            assert parts["activations"] == pytest.approx(saved - copies, rel=0.3), (dtype, checkpointing)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that torch's operations make, and how many lived at most at one time."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return output

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


SHAPES = {   # each makes another part of the estimate the largest; responses of 32 tokens to prompts of 20
    "layers": dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4),
    "vocabulary": dict(hidden_size=32, num_hidden_layers=1, vocab_size=30000),
    "keys and values": dict(hidden_size=32, num_hidden_layers=4, num_key_value_heads=4, head_dim=64)}


@pytest.mark.full
def test_the_estimate_is_near_the_bytes_of_all_tensors_that_live_at_a_time():
    tokenizer, failures = AutoTokenizer.from_pretrained(ROOT / "tiny"), []
    for name, sizes in SHAPES.items():
        for dtype, checkpointing in (("float32", False), ("bfloat16", True)):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "head_dim": 16, **sizes})).eval()
            args = arguments("--batch-size", 16, "--minibatch-size", 8, "--group-size", 2, "--max-new-tokens", 32,
                             "--dtype", dtype, "--micro-batch-tokens", 832, "--kl-coef", 0, "--eval-size", 2,
                             "--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing")
            parts, phases = memory.estimate_memory(model.config, args, 20)
            fixed = parts["weights"] + parts["AdamW"] + memory.RUNTIME         # they are there before
            prompts = [list(range(5 + q, 25 + q)) for q in range(16)]          # two rows share each
            with LiveBytes() as sampling, models.precision("cpu", dtype):
                sampled = rollout.generate(model, tokenizer, prompts, 2, 32, seed=0, max_sequences=32,
                                           stop_ids=[10 ** 6])
            sampled.hidden = None
            if checkpointing:
                models.checkpoint_activations(model)
                model.train()
            rows, = memory.micro_batches(sampled, torch.arange(16), args.micro_batch_tokens, 256)
            ids, mask, prompt_length = sampled.inputs(rows)
            with LiveBytes() as update:
                with models.precision("cpu", dtype):
                    logprobs = grpo.response_logprobs(model, ids, mask, prompt_length)
                logprobs.sum().backward()
            del logprobs
            model.eval()
            with LiveBytes() as reference, models.precision("cpu", dtype), torch.no_grad():
                grpo.response_logprobs(model, ids, mask, prompt_length)
            reference.peak += 4 * model.num_parameters()                       # the gradients are there before
            for phase, measured in (("sampling", sampling.peak), ("update", max(update.peak, reference.peak))):
                share = measured / (phases[phase] - fixed)
                if not 0.3 < share < 1:                                        # 0.34 to 0.87 were measured
                    failures.append((name, dtype, phase, round(share, 3), measured, parts))
    assert not failures, failures


def test_hidden_states_of_several_rounds_are_within_the_estimate(small, tmp_path, monkeypatch):
    """Those of the round before live until the next one has ended, beside the copies of the groups that are kept."""
    generate, select, live, most = rollout.generate, rollout.Rollout.select, {}, [0]

    def counted(function):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            if result.hidden is not None:
                storage = result.hidden.untyped_storage()
                live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, live.pop, storage._cdata, None)
                most[0] = max(most[0], sum(live.values()))
            return result
        return called

    monkeypatch.setattr(rollout, "generate", counted(generate))
    monkeypatch.setattr(rollout.Rollout, "select", counted(select))
    given = [*small, "--steps", 1, "--sampling-rounds", 4, "--batch-size", 12, "--minibatch-size", 12,
             "--group-size", 2]
    run_here(*given, "--out", tmp_path / "run")
    assert metrics_of(tmp_path / "run")[1]["questions"] >= 24                  # two rounds at least
    config = models.load_config(small[small.index("--model") + 1])
    parts, _ = memory.estimate_memory(config, flags.parse_args("", [*map(str, given), "--out", "none"]), 20)
    assert 0.6 * parts["hidden states"] < most[0] <= parts["hidden states"]


FEW = r"warning: few evaluation problems \(2\)[^\n]*\n"                        # of these small runs


def test_the_estimate_is_printed_before_loading_and_warns_where_the_device_is_too_small(small, tmp_path, monkeypatch,
                                                                                        capsys):
    monkeypatch.setattr(memory, "device_memory", lambda device: 2 ** 20)
    monkeypatch.setattr(models, "load_model", lambda *args: errors.fail("loading"))
    assert error_of(*small, "--out", tmp_path / "run") == "error: loading"
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == (
        "memory, estimated for responses of 12 tokens: 0.6 GiB in sampling, 0.6 GiB in update")
    lower = r"warning: cpu has 0\.0 GiB; lower --max-sequences .*--micro-batch-tokens.*--kl-coef 0\)\n"
    assert re.fullmatch(FEW + lower, printed.err)
    for available in (2 ** 50, None):                                          # enough, and not known
        monkeypatch.setattr(memory, "device_memory", lambda device: available)
        error_of(*small, "--out", tmp_path / "run")
        assert re.fullmatch(FEW, capsys.readouterr().err)
    monkeypatch.setattr(memory, "model_shape", lambda config: config.no_such_thing)
    assert error_of(*small, "--out", tmp_path / "run") == "error: loading"     # it says what is wrong
    assert capsys.readouterr().out.splitlines()[-1] == "memory: no estimate for a model of this kind"


def test_the_memory_of_this_machine_is_that_of_proc_meminfo():
    if not Path("/proc/meminfo").exists():
        pytest.skip("reads /proc")
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert memory.device_memory("cpu") == pytest.approx(int(total[1]) * 1024, rel=0.01)
    assert memory.device_memory("mps") is None


# ------------------------------------------------------------------------------------------------ 4. what is measured

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_that_of_the_process():
    """Pages that are written count, at their peak."""
    def high_water_mark():
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 20

    assert memory.peak_memory() == pytest.approx(high_water_mark(), abs=0.01)
    torch.ones(2 ** 28, dtype=torch.uint8)                                     # 256 MiB, gone at once
    assert memory.peak_memory() == pytest.approx(high_water_mark(), abs=0.01) and memory.peak_memory() > 0.25


def test_seconds_are_summed_by_phase():
    timer = memory.Timer()
    assert timer == dict.fromkeys(memory.PHASES, 0.0)
    for phase in ("nthr", "reference", "nthr", "evaluation"):
        with timer(phase):
            time.sleep(0.02)
    assert 0.04 <= timer["nthr"] and 0.02 <= timer["reference"] and 0.02 <= timer["evaluation"]
    assert timer["nthr"] + timer["reference"] + timer["evaluation"] < 5
    assert timer["model_update"] == timer["data_generation"] == 0


def test_the_memory_table_and_the_sentence_of_the_readme_are_what_the_function_computes():
    parser = flags.build_parser("")
    parser.set_defaults(**flags.model_defaults("Qwen/Qwen2.5-0.5B"))
    args = parser.parse_args(["--device", "cuda", "--dtype", "bfloat16"])
    found = {"sampling": [], "update": []}
    for layers, d, heads, inner in ((24, 896, 14, 4864), (28, 1536, 12, 8960), (36, 2048, 16, 11008)):     # of Qwen2.5
        config = Qwen2Config(vocab_size=151936, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
                             num_key_value_heads=2, intermediate_size=inner, tie_word_embeddings=True)
        for phase, size in memory.estimate_memory(config, args, 200)[1].items():
            found[phase].append(f"{size / 2 ** 30:.1f}")
    for name, words in (("sampling", "GiB in sampling"), ("update", "GiB in the update")):
        rows = (ROOT / "support" / "README.md").read_text().splitlines()
        line = next(row for row in rows if row.startswith(f"| {words}"))
        assert [cell.strip() for cell in line.split("|")[2:5]] == found[name], line
    most = [f"{max(map(float, sizes)):.0f}" for sizes in zip(*found.values())]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "it is {} GiB for Qwen2.5-0.5B, {} for 1.5B and {} for 3B".format(*most) in text, most
