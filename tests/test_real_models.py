"""What real models need: memory that is known beforehand, running out of it, precision, and model families."""
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, BertConfig, BloomConfig, DynamicCache, FalconH1Config,
                          Gemma2Config, Gemma3TextConfig, LlamaConfig, MambaConfig, OPTConfig, PhiConfig, Qwen2Config,
                          Qwen3Config, T5Config)

import grpo
import rollout
import train
from test_train import (error_of, metrics_of, run_here, same_weights, trainer_state, weights_of,
                        without_wall_clock)

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "tiny")
SIZES = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0)
FAMILIES = {
    "Qwen2": Qwen2Config(tie_word_embeddings=True, **SIZES),
    "Qwen3": Qwen3Config(head_dim=16, tie_word_embeddings=True, **SIZES),                   # norms on queries and keys
    "Llama": LlamaConfig(tie_word_embeddings=False, **SIZES),
    "Gemma 3": Gemma3TextConfig(head_dim=16, sliding_window=16, sliding_window_pattern=2, **SIZES)}   # scaled embedding


def save(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.2)                    # some tokens likelier than others
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coin(tmp_path_factory):
    """A reward that is right about half of the time, whatever the model says."""
    file = tmp_path_factory.mktemp("reward") / "coin.py"
    file.write_text("import zlib\n\n\ndef coin(response, answer):\n    return zlib.crc32(response.encode()) % 2\n")
    return f"{file}:coin"


def flags_for(folder, coin, steps=1):
    return ["--model", folder, "--data", ROOT / "tiny" / "train.jsonl", "--eval-data", ROOT / "tiny" / "test.jsonl",
            "--eval-size", 2, "--reward", coin, "--batch-size", 4, "--minibatch-size", 2, "--group-size", 4,
            "--max-new-tokens", 12, "--micro-batch-tokens", 400, "--lr", 1e-3, "--kl-coef", 0, "--steps", steps,
            "--delta-every", 1, "--eval-every", 0, "--save-every", 1, "--device", "cpu", "--dtype", "float32"]


# ----------------------------------------------------------------------------------------------------- 1. families

@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_each_family_makes_a_training_step_with_nthr(family, coin, tmp_path):
    folder = save(FAMILIES[family], tmp_path / "model")
    run_here(*flags_for(folder, coin), "--out", tmp_path / "run")
    row = metrics_of(tmp_path / "run")[1]
    assert row["groups_kept"] >= 2 and row["updates"] == 2 and row["selected_share"] is not None
    before, after = load_file(folder / "model.safetensors"), weights_of(tmp_path / "run")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)
    # the likelihoods are those of the model's own logits
    model = train.load_model(tmp_path / "run" / "checkpoint", "cpu")
    sampled = rollout.generate(model, TOKENIZER, [[5, 6, 7], [8, 9]], 2, 12, seed=0)
    ids, mask, P = sampled.inputs(torch.arange(4))
    with torch.no_grad():
        scored = grpo.response_logprobs(model, ids, mask, P)
        for i in range(4):
            tokens = ids[i][mask[i]][None]
            own = torch.log_softmax(model(tokens).logits[0, :-1], -1).gather(1, tokens[0, 1:, None])[:, 0]
            n = int(sampled.response_mask[i].sum())
            torch.testing.assert_close(scored[i, :n], own[-n:], atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(sampled.logprobs[i, :n], own[-n:], atol=2e-4, rtol=1e-4)


def test_soft_capped_logits_and_a_head_bias_are_refused_by_name(coin, tmp_path, capsys):
    capped = save(Gemma2Config(head_dim=16, **SIZES), tmp_path / "capped")      # Gemma 2 caps at 30 by default
    assert "final_logit_softcapping = 30.0" in error_of(*flags_for(capped, coin), "--out", tmp_path / "a", starts=True)
    uncapped = save(Gemma2Config(head_dim=16, final_logit_softcapping=None, attn_logit_softcapping=None, **SIZES),
                    tmp_path / "uncapped")
    run_here(*flags_for(uncapped, coin), "--out", tmp_path / "b")
    biased = save(PhiConfig(**SIZES), tmp_path / "biased")
    assert "bias" in error_of(*flags_for(biased, coin), "--out", tmp_path / "c", starts=True)
    run_here(*flags_for(biased, coin), "--method", "grpo", "--out", tmp_path / "d")
    assert metrics_of(tmp_path / "d")[1]["updates"] == 2


@pytest.mark.parametrize("config, words", [
    (MambaConfig(**SIZES), "LinearAttentionLayer"),
    (FalconH1Config(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, **SIZES), "keep keys and values only"),
    (T5Config(vocab_size=100), "cannot load the model"),
    (BertConfig(is_decoder=True, **SIZES), "its logits are not lm_head(base_model(ids))")])
def test_models_of_other_kinds_are_refused_with_one_line_before_anything_is_written(config, words, coin, tmp_path):
    folder = tmp_path / "model"
    if isinstance(config, T5Config):
        config.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    else:
        save(config, folder)
    for extra in ([], ["--eval-only"]):
        message = error_of(*flags_for(folder, coin), "--kl-coef", 0, "--out", tmp_path / "run", *extra, starts=True)
        assert words in message and str(folder) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [
    OPTConfig(dropout=0.5, attention_dropout=0.5, ffn_dim=48, word_embed_proj_dim=32, **SIZES),
    BloomConfig(hidden_dropout=0.5, attention_dropout=0.5, n_layer=2, n_head=4, **SIZES)])
def test_dropout_of_any_kind_is_off_while_training(config, coin, tmp_path):
    """Gradient checkpointing trains in train mode: with dropout, γ would be far from 1 before the first update."""
    folder = save(config, tmp_path / "model")
    run_here(*flags_for(folder, coin), "--gradient-checkpointing", "--out", tmp_path / "run")
    row = metrics_of(tmp_path / "run")[1]
    assert row["updates"] == 2 and row["ratio_deviation"] < 1e-5


# ---------------------------------------------------------------------------------------------------- 2. precision

def test_float32_weights_move_at_a_learning_rate_of_1e_6_and_bfloat16_weights_do_not():
    """AdamW's first step moves each weight by lr; a bfloat16 of 1e-3 and more is 4e-6 and more from the next one."""
    args = train.parse_args(["--dtype", "bfloat16", "--device", "cpu", "--lr", "1e-6", "--batch-size", "4",
                             "--minibatch-size", "4", "--out", "none"])
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = train.load_model(ROOT / "tiny", "cpu", dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        prompts = [train.encode_prompt(TOKENIZER, problem) for problem in ("1+2", "17+4*3", "(9-2)*8+5", "8*7")]
        sampled = rollout.generate(train.load_model(ROOT / "tiny", "cpu"), TOKENIZER, prompts, 8, 48, seed=0)
        rewards = torch.tensor([[1.0, 0.0] * 4] * 4)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        old, ref, advantages, _ = train.old_policy_pass(model, None, sampled, rewards, args, 1, train.Timer())
        assert train.update(model, optimizer, sampled, rewards, old, ref, advantages, args, {"nonfinite": 0})["updates"]
        large = {name: (p != before[name])[before[name].abs() >= 1e-3] for name, p in model.named_parameters()
                 if "embed" not in name}                                        # ids that do not occur have no gradient
        moved, count = sum(int(x.sum()) for x in large.values()), sum(x.numel() for x in large.values())
        shares[dtype] = moved / count
    assert count > 300000
    assert shares[torch.float32] > 0.95 and shares[torch.bfloat16] == 0


# ------------------------------------------------------------------------------------------- 3. the memory estimate

def arguments(*flags):
    return train.parse_args([*map(str, flags), "--device", "cpu", "--out", "none"])


def test_the_estimate_of_what_is_kept_and_cached_is_that_of_real_tensors():
    for family, config in FAMILIES.items():
        model = AutoModelForCausalLM.from_config(config)
        args = arguments("--batch-size", 2, "--minibatch-size", 1, "--group-size", 3, "--max-sequences", 4, "--eval-size",
                         9, "--max-new-tokens", 12, "--kl-coef", 1, "--dtype", "bfloat16")
        parts, phases = train.estimate_memory(config, args, 20)
        weights = sum(p.numel() * 4 for p in model.parameters())
        assert parts["weights"] == parts["gradients"] == parts["AdamW"] / 2 == weights
        assert parts["reference"] == parts["bfloat16 copy"] == weights / 2
        cache = DynamicCache()
        model.bfloat16()(torch.ones(4, 20 + 12 + rollout.BUCKET, dtype=torch.long), past_key_values=cache)
        stored = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        assert parts["KV cache"] == stored, family
        assert parts["hidden states"] == 3 * 12 * 32 * 2                        # a mini-batch, in bfloat16
        kept = 4 * weights + train.RUNTIME                                      # 1 + 2 + 1/2 + 1/2 times the weights
        assert phases["sampling"] == kept + stored + parts["prefill"] + parts["sampling logits"]
        assert phases["update"] == kept + weights + parts["activations"] + parts["head"]
    args = arguments("--batch-size", 2, "--minibatch-size", 1, "--dtype", "float32", "--method", "grpo")
    parts, _ = train.estimate_memory(FAMILIES["Qwen2"], args, 20)
    assert parts["reference"] == parts["bfloat16 copy"] == parts["hidden states"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_near_what_autograd_saves(dtype, checkpointing):
    """Saved tensors are counted once per storage while a batch of 16 rows x 64 tokens goes through the layers."""
    config = Qwen2Config(**SIZES | dict(hidden_size=128, intermediate_size=640, num_hidden_layers=6, vocab_size=100))
    model = AutoModelForCausalLM.from_config(config)
    args = arguments("--batch-size", 4, "--minibatch-size", 4, "--group-size", 4, "--max-new-tokens", 44, "--dtype", dtype,
                     "--micro-batch-tokens", 1024, *["--gradient-checkpointing"] * checkpointing)
    parts, _ = train.estimate_memory(config, args, 20)
    weights = {p.data_ptr() for p in model.parameters()}
    storages = {}

    def count(x):
        if x.data_ptr() not in weights and x.is_floating_point():
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    layers = model.model.layers[:1] if checkpointing else model.model.layers
    hidden = torch.randn(16, 64, 128, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(64)[None])
    with train.precision(args), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        output = hidden
        for layer in layers:
            output = layer(output, attention_mask=None, position_embeddings=positions)
    saved = sum(storages.values()) + (6 * hidden.numel() * 4 if checkpointing else 0)
    copies = sum(p.numel() * 2 for layer in layers for p in layer.parameters()) if dtype == "bfloat16" else 0
    assert parts["activations"] == pytest.approx(saved - copies, rel=0.3)


def test_the_estimate_is_printed_before_loading_and_warns_where_the_device_is_too_small(coin, tmp_path, monkeypatch,
                                                                                       capsys):
    folder = save(FAMILIES["Llama"], tmp_path / "model")
    monkeypatch.setattr(train, "device_memory", lambda device: 2 ** 20)
    monkeypatch.setattr(train, "load_model", lambda *args: train.fail("loading"))
    assert error_of(*flags_for(folder, coin), "--out", tmp_path / "run", starts=True) == "error: loading"
    printed = capsys.readouterr()
    assert re.search(r"memory, estimated for responses of 12 tokens: \d\.\d GiB in sampling, .* in update\n", printed.out)
    assert re.fullmatch(r"warning: cpu has 0\.0 GiB; lower --max-sequences .*\n", printed.err)
    monkeypatch.setattr(train, "device_memory", lambda device: 2 ** 50)
    error_of(*flags_for(folder, coin), "--out", tmp_path / "run", starts=True)
    assert capsys.readouterr().err == ""


def test_the_memory_of_this_machine_is_that_of_proc_meminfo():
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert train.device_memory("cpu") == pytest.approx(int(total[1]) * 1024, rel=0.01)
    assert train.device_memory("mps") is None


# --------------------------------------------------------------------------------------------- 4. running out of it

PHASES = {   # phase: (what it calls, the flag that its message must name)
    "data_generation": ("sample_groups", "--max-sequences"), "old_probabilities": ("policy_logprobs", "--micro-batch-tokens"),
    "nthr": ("nthr_advantages", "--micro-batch-tokens"), "model_update": ("grpo_loss", "--gradient-checkpointing"),
    "likelihood_change": ("step_likelihood_change", "--micro-batch-tokens"), "evaluation": ("evaluate", "--max-sequences")}


@pytest.mark.parametrize("phase", PHASES)
def test_out_of_memory_names_the_phase_and_the_flags_and_the_run_goes_on_as_if_nothing_was(phase, coin, tmp_path,
                                                                                           monkeypatch):
    """It strikes in the third step; the checkpoints would be those of steps 0 and 4. Before that step's first update
    the state after the second is saved; after it, there is no state that could be continued exactly but the last saved."""
    name, flag = PHASES[phase]
    reached = 0 if phase in ("likelihood_change", "evaluation") else 2
    folder = save(FAMILIES["Llama"], tmp_path / "model")
    flags = [*flags_for(folder, coin, steps=4), "--save-every", 0, "--eval-every", 1, "--out", tmp_path / "run"]
    original, seeds = getattr(train, name), train.step_seed
    now = []
    monkeypatch.setattr(train, "step_seed", lambda args, step, *rest: now.append(step) or seeds(args, step, *rest))

    def short(*args, **kwargs):
        if now and now[-1] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args, **kwargs)

    if phase == "data_generation":                                              # it asks for the step's seed itself
        generate = train.generate
        monkeypatch.setattr(train, "generate", lambda *a, **k: short() if now and now[-1] == 3 else generate(*a, **k))
    else:
        monkeypatch.setattr(train, name, short)
    message = error_of(*flags, starts=True)
    assert f"out of memory in {phase}" in message and flag in message and f"--resume {tmp_path / 'run'}" in message
    assert f"continue with step {reached + 1} by" in message and f"--reward {coin}" in message
    assert trainer_state(tmp_path / "run")["state"]["step"] == reached
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2]
    at_shortage = weights_of(tmp_path / "run")
    moved = [key for key, value in load_file(folder / "model.safetensors").items() if not at_shortage[key].equal(value)]
    assert bool(moved) == (reached > 0)
    monkeypatch.undo()
    shutil.copytree(tmp_path / "run", tmp_path / "lower")
    run_here("--resume", tmp_path / "run", "--reward", coin)
    run_here(*flags[:-2], "--out", tmp_path / "whole")
    assert without_wall_clock(metrics_of(tmp_path / "run")) == without_wall_clock(metrics_of(tmp_path / "whole"))
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    run_here("--resume", tmp_path / "lower", "--reward", coin, "--max-sequences", 3, "--micro-batch-tokens", 90,
             "--gradient-checkpointing")
    assert [row["step"] for row in metrics_of(tmp_path / "lower")] == [0, 1, 2, 3, 4]


def test_out_of_memory_in_the_first_step_keeps_the_first_checkpoint(coin, tmp_path, monkeypatch):
    folder = save(FAMILIES["Llama"], tmp_path / "model")

    def short(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", short)
    message = error_of(*flags_for(folder, coin), "--out", tmp_path / "run", starts=True)
    assert "out of memory in model_update" in message and "continue with step 1" in message
    assert all(torch.equal(value, load_file(folder / "model.safetensors")[name]) for name, value in weights_of(tmp_path / "run").items())


def test_out_of_memory_in_the_first_evaluation_can_be_resumed(coin, tmp_path, monkeypatch):
    folder, evaluate = save(FAMILIES["Llama"], tmp_path / "model"), train.evaluate

    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "evaluate", short)
    message = error_of(*flags_for(folder, coin), "--out", tmp_path / "run", starts=True)
    assert "out of memory in evaluation" in message and f"--resume {tmp_path / 'run'}" in message
    monkeypatch.setattr(train, "evaluate", evaluate)
    run_here("--resume", tmp_path / "run", "--reward", coin, "--max-sequences", 1)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1]


def test_half_made_moments_of_adamw_are_not_saved(coin, tmp_path, monkeypatch):
    """Out of memory while AdamW makes its moments, in the first step that has an update."""
    folder, step = save(FAMILIES["Llama"], tmp_path / "model"), torch.optim.AdamW.step

    def short(self, closure=None):
        step(self)
        del next(iter(self.state.values()))["exp_avg_sq"]
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", short)
    error_of(*flags_for(folder, coin), "--out", tmp_path / "run", starts=True)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run_here("--resume", tmp_path / "run", "--reward", coin)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1]


def test_out_of_memory_while_loading_is_named(coin, tmp_path, monkeypatch):
    folder = save(FAMILIES["Llama"], tmp_path / "model")

    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.nn.Module, "to", short)
    with pytest.raises(train.OutOfMemory, match="out of memory in loading: .*--kl-coef 0"):
        run_here(*flags_for(folder, coin), "--out", tmp_path / "run")


def test_a_failed_allocation_on_the_cpu_counts_and_other_errors_do_not():
    with pytest.raises(train.OutOfMemory, match="out of memory in reference: lower --micro-batch-tokens"):
        with train.memory_for("reference"):
            torch.empty(2 ** 46, dtype=torch.uint8)                             # 64 TiB
    for text in ("MPS backend out of memory (MPS allocated: 8 GB)", "CUDA error: out of memory",
                 "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        with pytest.raises(train.OutOfMemory), train.memory_for("reference"):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="must match"):
        with train.memory_for("reference"):
            torch.ones(2) + torch.ones(3)


def test_the_table_of_the_readme_is_what_the_function_computes():
    shapes = {"0.5B": (24, 896, 14, 4864), "1.5B": (28, 1536, 12, 8960), "3B": (36, 2048, 16, 11008)}   # of Qwen2.5
    args = arguments("--model", "x/y", "--dtype", "bfloat16")
    args.device = "cuda"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, (layers, hidden, heads, inner) in shapes.items():
        config = Qwen2Config(vocab_size=151936, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                             num_key_value_heads=2, intermediate_size=inner, tie_word_embeddings=True)
        parts, phases = train.estimate_memory(config, args, 200)
        header, row = (re.search(pattern, text, re.M)[0] for pattern in (r"^\| Qwen2\.5 .*$", rf"^\| {name} \| \d.*$"))
        shown = dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row))))
        assert shown == {"Qwen2.5": name} | {key: f"{value / 2 ** 30:.1f}" for key, value in (parts | phases).items()}
