"""Models of any family and of strangers: what is trained, what is refused, and models that say one thing only."""
import io
import json
import logging
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (AutoModelForCausalLM, AutoTokenizer, BertConfig, BloomConfig, CohereConfig, FalconH1Config,
                          Gemma2Config, Gemma3TextConfig, GraniteConfig, LlamaConfig, MambaConfig, OPTConfig, PhiConfig,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, T5Config)
from transformers.utils import logging as transformers_logging

import grpo
import rollout
from helpers import (ENVIRONMENT, ROOT, SIZES, command, error_of, metrics_of, run, run_here, save_random_model,
                     tiny_rows, weights_of, write)
from support import models
from support.data import encode_prompt
from support.models import load_config, load_model

METHODS = ("nthr", "grpo", "pos-only", "random")
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "tiny")
FAMILIES = {
    "Qwen2": Qwen2Config(tie_word_embeddings=True, **SIZES),
    "Qwen3": Qwen3Config(head_dim=16, tie_word_embeddings=True, **SIZES),      # norms on queries and keys
    "Llama": LlamaConfig(tie_word_embeddings=False, **SIZES),
    "Gemma 3": Gemma3TextConfig(head_dim=16, sliding_window=16, sliding_window_pattern=2, **SIZES)}   # scaled embedding
SAMPLE_METRICS = {"questions", "groups_kept", "success_rate", "response_length", "truncated_share"}
NTHR_METRICS = {"tau", "eta", "selected_share"}
UPDATE_METRICS = NTHR_METRICS | {"updates", "skipped_updates", "loss", "clip_share", "kl", "nll", "grad_norm",
                                 "ratio_deviation", "delta_mean", "delta_nonpositive_share"}
METRICS = SAMPLE_METRICS | UPDATE_METRICS | {"step", "eval_accuracy", "seconds", "tokens_per_second", "peak_memory_gib"}
LONGEST = 6                                                                    # --max-new-tokens
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\u202egpj\u2066\u200b\x7f"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\x08\\u202egpj\\u2066\\u200b\\x7f"


def reward_file(folder, rule):
    """--reward for a function of n, how many responses were rewarded before this one, and of the response.

    The call at the start of a run, on a gold answer in its box, is none of them: it is right."""
    file = write(folder / f"reward{len(list(folder.glob('reward*')))}.py",
                 f"import itertools\nimport zlib\n\ncounter = itertools.count()\n\n\ndef reward(response, answer):\n"
                 f"    if response == '\\\\boxed{{' + answer + '}}':\n        return 1\n"
                 f"    n = next(counter)\n    return {rule}\n")
    return f"{file}:reward"


def flags_for(folder, reward, out, steps=2):
    """4 questions of 24 in 2 mini-batches, 4 responses each; evaluations reward 2 responses."""
    data = write(out.parent / "data.jsonl", "".join(json.dumps(row) + "\n" for row in tiny_rows("train.jsonl", 24)))
    return ["--model", folder, "--data", data, "--eval-data", ROOT / "tiny" / "test.jsonl",
            "--eval-size", 2, "--reward", reward, "--batch-size", 4, "--minibatch-size", 2, "--group-size", 4,
            "--max-new-tokens", LONGEST, "--micro-batch-tokens", 200, "--lr", 1e-3, "--kl-coef", 0.1, "--nll-coef", 0.1,
            "--steps", steps, "--delta-every", 1, "--eval-every", 0, "--save-every", 0, "--device", "cpu",
            "--dtype", "float32", "--out", out]


COIN = "zlib.crc32(response.encode()) % 2"                                     # right about half of the time


# ----------------------------------------------------------------------------------------------------- 1. families

@pytest.mark.parametrize("family", ["Qwen2", *(pytest.param(name, marks=pytest.mark.full) for name in FAMILIES
                                               if name != "Qwen2")])
def test_a_model_of_each_family_makes_a_training_step_with_nthr(family, tmp_path):
    """All its weights move, and the likelihoods are those of the model's own logits."""
    folder = save_random_model(FAMILIES[family], tmp_path / "model")
    run_here(*flags_for(folder, reward_file(tmp_path, COIN), tmp_path / "run", steps=1), "--max-new-tokens", 12)
    row = metrics_of(tmp_path / "run")[1]
    assert row["groups_kept"] >= 2 and row["updates"] == 2 and 0 <= row["selected_share"] < 1
    before, after = load_file(folder / "model.safetensors"), weights_of(tmp_path / "run")
    assert before.keys() == after.keys() and [name for name in before if before[name].equal(after[name])] == []
    model = load_model(tmp_path / "run" / "checkpoint", "cpu", "nthr")
    sampled = rollout.generate(model, TOKENIZER, [[5, 6, 7], [8, 9]], 2, 12, seed=0)
    ids, mask, prompt_length = sampled.inputs(torch.arange(4))
    with torch.no_grad():
        scored = grpo.response_logprobs(model, ids, mask, prompt_length)
        for i in range(4):
            tokens = ids[i][mask[i]][None]
            own = torch.log_softmax(model(tokens).logits[0, :-1], -1).gather(1, tokens[0, 1:, None])[:, 0]
            n = int(sampled.response_mask[i].sum())
            torch.testing.assert_close(scored[i, :n], own[-n:], atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(sampled.logprobs[i, :n], own[-n:], atol=2e-4, rtol=1e-4)


def chat_model(folder, has_template=True, **config):
    """A random Qwen2 of two layers with a byte-level BPE tokenizer whose pad token is its end, as in Qwen2.5."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(["What is 1+1? The answer is \\boxed{2}.", "Please reason step by step."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    if has_template:
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


def chat_flags(folder):
    return ["--model", folder, "--data", folder / "data.json", "--eval-data", folder / "data.json", "--steps", 2,
            "--batch-size", 2, "--minibatch-size", 1, "--micro-batch-tokens", 40, "--group-size", 2,
            "--max-new-tokens", 8, "--kl-coef", 0.01, "--gradient-checkpointing", "--device", "cpu",
            "--dtype", "float32"]


@pytest.mark.parametrize("has_template", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_local_model_runs_end_to_end_with_and_without_a_chat_template(has_template, tmp_path, capfd):
    """A random model is never right: nothing is learned, nothing is NaN, and the weights are those of the start."""
    folder = chat_model(tmp_path / "model", has_template)
    run_here(*chat_flags(folder), "--out", tmp_path / "run")
    rows, printed = metrics_of(tmp_path / "run"), capfd.readouterr()
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["eval_accuracy"] == 0
    for row in rows[1:]:
        assert set(row) == METRICS and row["success_rate"] == 0 and row["groups_kept"] == 0
        assert all(row[name] is None for name in UPDATE_METRICS)
    weights, initial = weights_of(tmp_path / "run"), load_file(folder / "model.safetensors")
    assert weights.keys() == initial.keys() and all(torch.equal(weights[name], initial[name]) for name in weights)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint").config.tie_word_embeddings
    assert saved.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    assert f"{tmp_path}/run/metrics.jsonl" in printed.out.splitlines()[-1] and "Warning" not in printed.err
    assert "warning: no question had both right and wrong answers in 2 steps" in printed.err


@pytest.mark.full
def test_a_run_warns_of_nothing_that_a_package_will_change(tmp_path):
    """FutureWarning and DeprecationWarning of any package end it; transformers' own messages are looked for."""
    reward = reward_file(tmp_path, "n % 2")
    for extra in ("--gradient-checkpointing", "--no-gradient-checkpointing"):
        flags = [*flags_for(ROOT / "tiny", reward, tmp_path / extra[2:], steps=1), "--eval-size", 20]
        result = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning",
                                 "-W", "error::PendingDeprecationWarning", *command(*flags, extra)[1:]], cwd=tmp_path,
                                env=ENVIRONMENT, text=True, capture_output=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert not re.search("deprecat|warn|ignored|will be removed", result.stderr, re.IGNORECASE), result.stderr
        assert metrics_of(tmp_path / extra[2:])[1]["updates"] == 2


# ----------------------------------------------------------------------------------------------------- 2. refusals

class Harm:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def embedded(folder, config=None, without=()):
    """A copy of the embedded model with changes to its config.json, and without some files."""
    shutil.copytree(ROOT / "tiny", folder, ignore=shutil.ignore_patterns("*.jsonl", "*.py", "stack", *without))
    if config:
        write(folder / "config.json", json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def without_tensor(folder):
    weights = load_file(embedded(folder) / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def pickled(folder, name="pytorch_model.bin"):
    torch.save(Harm(folder.parent / "harm"), embedded(folder, without=["model.safetensors"]) / name)
    return folder


def pickled_beside_another_file(folder):
    """Its weights are a pickle without harm; the safetensors file beside them holds none of the model's."""
    torch.save(load_file(embedded(folder) / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    return folder


def cut_weights(folder):
    path = embedded(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return folder


def t5(folder):
    T5Config(vocab_size=100).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def random_model(config, **changes):
    return lambda folder: save_random_model(config(**{**SIZES, **changes}), folder)


REFUSED = {   # what is wrong: (folder -> the model, what the message must say)
    "no folder": (lambda folder: folder, "there is no folder"),
    "no config": (lambda folder: embedded(folder, without=["config.json"]), "has no config.json"),
    "no tokenizer": (lambda folder: embedded(folder, without=["tokenizer*"]), "has no tokenizer.json"),
    "no weights": (lambda folder: embedded(folder, without=["*.safetensors"]), "safetensors"),
    "cut weights": (cut_weights, "safetensors"),
    "a missing weight": (without_tensor, "has no weights for model.layers.1.mlp.up_proj.weight"),
    "pickled": (pickled, "holds pickled weights only (pytorch_model.bin), and loading a pickle can run any code"),
    "pickled .pt": (lambda folder: pickled(folder, "weights.pt"), "holds pickled weights only (weights.pt)"),
    "pickled beside another file": (pickled_beside_another_file, "cannot load the model"),
    **{f"Hub kernel {key}": (lambda folder, key=key: embedded(folder, {key: "someone/kernel"}),
                             "asks for code from the Hub (someone/kernel), which is not run")
       for key in ("attn_implementation", "experts_implementation", "_attn_implementation")},
    **{f"config {changed}": (lambda folder, changed=changed: embedded(folder, changed), "cannot load the model")
       for changed in ({"hidden_act": "strange"}, {"rope_parameters": {"rope_type": "strange"}},
                       {"num_hidden_layers": "3"}, {"model_type": ["qwen2"]}, {"model_type": "strange"})},
    "soft cap": (random_model(Gemma2Config, head_dim=16), "final_logit_softcapping = 30.0"),    # Gemma 2's default
    "soft cap by hand": (lambda folder: embedded(folder, {"final_logit_softcapping": 20.0}), "softcapping = 20.0"),
    "scaled logits": (random_model(GraniteConfig, logits_scaling=8.0), "logits_scaling = 8.0"),
    "scaled logits of Cohere": (random_model(CohereConfig, logit_scale=0.0625), "logit_scale = 0.0625"),
    "bias": (random_model(PhiConfig), "adds a bias to its logits; Eq. 7 needs softmax(W h)"),
    "no KV cache": (random_model(MambaConfig), "LinearAttentionLayer: choose one whose layers keep keys and values"),
    "mixed cache": (random_model(FalconH1Config, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
                    "keep keys and values only"),
    "encoder and decoder": (t5, "cannot load the model"),
    "a layer before the head": (random_model(BertConfig, is_decoder=True), "logits are not lm_head(base_model(ids))")}


@pytest.fixture
def transformers_log(monkeypatch):
    """() -> what transformers logged in this test. It writes to whatever was sys.stderr when it was imported."""
    handlers = [handler for handler in logging.getLogger("transformers").handlers if hasattr(handler, "stream")]
    for handler in handlers:                                                   # not pytest's own
        monkeypatch.setattr(handler, "stream", io.StringIO())
    return lambda: "".join(handler.stream.getvalue() for handler in handlers)


def test_a_model_that_cannot_be_used_is_refused_with_one_line_before_anything_is_written(tmp_path, capfd,
                                                                                         transformers_log):
    """In training and with --eval-only, which takes a head with a bias, as --method grpo does."""
    wrong = []
    for number, (kind, (make, expected)) in enumerate(REFUSED.items()):
        (tmp_path / str(number)).mkdir()
        folder = make(tmp_path / str(number) / "some-model")
        for extra in [[], *[["--eval-only"]] * (kind != "bias")]:
            start = time.monotonic()
            capfd.readouterr()
            message = error_of(*flags_for(folder, "math", tmp_path / "run"), "--eval-size", 20, *extra)
            if not (str(folder) in message and expected in message):
                wrong.append((kind, extra, message))
            if capfd.readouterr().err:
                wrong.append((kind, extra, "more than one line"))
            if (tmp_path / "run").exists() or (tmp_path / str(number) / "harm").exists():
                wrong.append((kind, extra, "left a file"))
            if time.monotonic() - start > 10:
                wrong.append((kind, extra, "slow"))
    assert wrong == []


def find_error(name):
    """The one line with which --model NAME is refused."""
    models.find_model.cache_clear()
    with pytest.raises(SystemExit) as caught:
        models.find_model(name)
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message and len(message) < 500 and name in message, message
    return message


@contextmanager
def hub(monkeypatch, status, headers=()):
    """A server that answers like the Hub, with this status; for None it takes the connection and never answers."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(b'{"id": "some/model", "siblings": []}')

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if status:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models.model_info.__self__, "endpoint", f"http://127.0.0.1:{server.server_port}")
    try:
        yield server
    finally:
        if status:
            server.shutdown()
        server.server_close()


def test_a_folder_that_cannot_be_a_model_is_named_with_its_cause(tmp_path, capsys):
    """A misspelt folder that could be an id is looked for on the Hub, which says the rest."""
    folder = embedded(tmp_path / "model")
    assert models.find_model(str(folder)) == str(folder)
    for pattern in ("tokenizer.json", "spiece.model", "vocab.json", "qwen.tiktoken"):
        write(embedded(tmp_path / pattern, without=["tokenizer*"]) / pattern, "")
        assert models.find_model(str(tmp_path / pattern)) == str(tmp_path / pattern)
    assert "has no config.json" in find_error(str(tmp_path))
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json: copy the tokenizer's files" in find_error(str(folder))
    for name in (f"{folder}x", "./mdoel", "../a/b", "a/b/c", "my model", "a--b", "-a"):
        message = find_error(name)
        assert "there is no folder" in message and "that is no id of the Hub either: check the spelling" in message
    assert "looking for" not in capsys.readouterr().out


def test_an_id_that_the_hub_does_not_know_or_cannot_be_asked_for_is_named_with_its_cause(tmp_path, monkeypatch, capsys):
    missing = (("X-Error-Code", "RepoNotFound"), ("X-Error-Message", "Repository not found"))
    for status, headers, words in ((404, missing, "the Hub shows no such model: check the spelling (a private one"),
                                   (401, missing, "the Hub shows no such model"),
                                   (500, (), "the Hub cannot be reached (Server error '500"),
                                   (404, (), "the Hub cannot be reached (Client error '404")):
        with hub(monkeypatch, status, headers):
            message = find_error("Qwen/Qwen2.5-O.5B")
            assert "there is no folder Qwen/Qwen2.5-O.5B here" in message and words in message, message
            assert capsys.readouterr().out == "looking for Qwen/Qwen2.5-O.5B on the Hub\n"
    with hub(monkeypatch, 200):
        models.find_model.cache_clear()
        assert models.find_model("some/model") == "some/model"
    message = find_error("some/model")                                         # the server is gone: its port is closed
    assert "the Hub cannot be reached (" in message and "refused" in message and "or the network" in message
    monkeypatch.undo()
    assert "offline" in find_error("some/model")                               # HF_HUB_OFFLINE=1
    message = error_of("--model", "some/model", "--out", tmp_path / "run", "--device", "cpu")
    assert "there is no folder some/model here" in message and not (tmp_path / "run").exists()


def test_a_model_in_the_cache_is_used_where_there_is_no_network(monkeypatch, capsys):
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    models.find_model.cache_clear()
    assert models.find_model("some/model") == "/cache/some/model"
    printed = capsys.readouterr().out
    assert printed == "looking for some/model on the Hub\nthe Hub cannot be reached: the copy on this machine is used\n"
    assert models.find_model("some/model") and capsys.readouterr().out == ""   # it is asked once
    asked = []

    class Auto:
        from_pretrained = staticmethod(lambda name, **options: asked.append((name, options)))

    models.load_pretrained(Auto, "some/model", dtype="float32")
    assert asked == [("/cache/some/model", {"trust_remote_code": False, "dtype": "float32"})]
    models.find_model.cache_clear()


@pytest.mark.full
def test_a_hub_that_never_answers_ends_within_ten_seconds(tmp_path):
    """In a process of its own, whose cache holds nothing, or the model with all its files, which is then evaluated."""
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("a" * 40)
    write(tmp_path / "data.jsonl", json.dumps(tiny_rows("test.jsonl", 1)[0]))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        flags = ["--eval-only", "--model", "some/model", "--eval-data", tmp_path / "data.jsonl",
                 "--out", tmp_path / "run", "--reward", "math", "--max-new-tokens", 4]
        for cached in (False, True):
            if cached:
                embedded(snapshot)
                (snapshot.parent.parent / "refs").mkdir()
                write(snapshot.parent.parent / "refs" / "main", "a" * 40)
            printed_at, errors = {}, tmp_path / "errors"                       # {line: when}
            with errors.open("w") as file, subprocess.Popen(
                    command(*flags), cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=file,
                    stdin=subprocess.DEVNULL) as process:
                hangs = threading.Timer(60, process.kill)
                hangs.start()
                for line in process.stdout:
                    printed_at[line] = time.monotonic()
            hangs.cancel()
            answered = next((at for line, at in printed_at.items() if "the copy on this machine is used" in line),
                            time.monotonic())
            assert answered - printed_at["looking for some/model on the Hub\n"] < 10 + 10     # a busy machine's exit
            if cached:
                assert process.returncode == 0 and answered in printed_at.values(), errors.read_text()
            else:
                assert process.returncode == 1 and "the Hub cannot be reached (timed out)" in errors.read_text()


@pytest.mark.full
def test_their_likes_without_the_obstacle_are_trained(tmp_path):
    """Gemma 2 without soft caps, Granite without scaling, Phi's bias with methods that read no states."""
    reward = reward_file(tmp_path, "n % 2")
    for name, make, extra in (
            ("uncapped", random_model(Gemma2Config, head_dim=16, final_logit_softcapping=None,
                                      attn_logit_softcapping=None), []),
            ("unscaled", random_model(GraniteConfig, logits_scaling=1.0), []),
            ("grpo", random_model(PhiConfig), ["--method", "grpo"]),
            ("pos-only", random_model(PhiConfig), ["--method", "pos-only"])):
        run_here(*flags_for(make(tmp_path / name), reward, tmp_path / f"{name}-run", steps=1), *extra)
        assert metrics_of(tmp_path / f"{name}-run")[1]["updates"] == 2, name
    run_here(*flags_for(tmp_path / "grpo", reward, tmp_path / "eval"), "--eval-only")
    assert (tmp_path / "eval" / "answers.jsonl").exists()


def test_a_head_with_a_bias_does_for_the_methods_that_read_no_states(tmp_path):
    folder = random_model(PhiConfig)(tmp_path / "model")
    for method in ("grpo", "pos-only"):
        assert load_model(folder, "cpu", method).get_output_embeddings().bias is not None
    for method in ("nthr", "random", "mine.py:rule"):
        with pytest.raises(SystemExit, match="adds a bias"):
            load_model(folder, "cpu", method)


def test_no_code_of_a_models_folder_is_run_whatever_is_answered(tmp_path, monkeypatch):
    """Not that of its configuration, of its model or of its tokenizer, of an unknown type or of a known one."""
    asked, ran = [], tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": [None, "code.Words"]}
    for kind in ("strange", "qwen2"):
        folder = embedded(tmp_path / kind, {"model_type": kind, "auto_map": code})
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder / "tokenizer_config.json", json.dumps({**settings, "auto_map": code}))
        for name in ("code.py", "__init__.py", "modeling_qwen2.py", "conftest.py"):
            write(folder / name, f"open({str(ran)!r}, 'w').close()\n")
        flags = [*flags_for(folder, "math", tmp_path / f"{kind}-run", steps=1), "--eval-only"]
        if kind == "strange":
            assert str(folder) in error_of(*flags)
        else:
            run_here(*flags)                                                   # with transformers' own code
        assert not ran.exists() and not asked, kind


# ------------------------------------------------------------------------------------------ 3. what reaches a terminal

def test_what_transformers_says_of_a_model_reaches_the_terminal_with_escapes(tmp_path, transformers_log):
    """It lists weights that it does not know. Lines and their indentation stay."""
    weights = load_file(embedded(tmp_path / "model") / "model.safetensors")
    save_file({**weights, f"model.{EVIL}.weight": torch.zeros(2)}, tmp_path / "model" / "model.safetensors",
              {"format": "pt"})
    load_model(tmp_path / "model", "cpu", "nthr")
    transformers_logging.get_logger("transformers.strange").warning("one\n\t%s is\r new", EVIL)
    said = transformers_log()
    assert f"model.{SHOWN}.weight" in said and f"one\n        {SHOWN} is\\r new" in said
    assert [char for char in said if not char.isprintable() and char != "\n"] == []


@pytest.mark.full
def test_names_of_files_and_weights_reach_the_terminal_of_the_script_with_escapes(tmp_path):
    model, data = embedded(tmp_path / "model"), tmp_path / f"data {EVIL}\r\n\udcff.jsonl"
    weights = load_file(model / "model.safetensors")
    save_file({**weights, f"model.{EVIL}.weight": torch.zeros(2)}, model / "model.safetensors", {"format": "pt"})
    write(data, "".join(json.dumps({**row, EVIL: EVIL}) + "\n" for row in tiny_rows("test.jsonl", 2)))
    result = run("--model", model, "--eval-only", "--max-new-tokens", 4, "--device", "cpu", "--eval-size", 2,
                 "--eval-data", f"{data},{ROOT}/tiny/test.jsonl", "--out", "run", cwd=tmp_path)
    printed = result.stdout + result.stderr
    assert [char for char in printed if not char.isprintable() and char not in "\n\t"] == []
    assert f"model.{SHOWN}.weight" in result.stderr and f"{SHOWN}\\r\\n\\udcff.jsonl" in result.stdout
    assert json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[0])["benchmark"] == str(data)
    write(data, '{"problem": "1", "answer": 1}\n{"problem": "2"}')
    result = run("--data", data, "--out", "other", cwd=tmp_path, check=False)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and f"{SHOWN}\\r" in result.stderr
    assert result.stderr[:-1].isprintable()


@pytest.mark.full
def test_hostile_problems_in_a_training_run_reach_no_terminal(tmp_path, capfd):
    rows = [{"problem": f"{EVIL}\r{row['problem']}", "answer": f"{EVIL}\r{row['answer']}"}
            for row in tiny_rows("train.jsonl", 4)]
    data = write(tmp_path / f"{EVIL}\rnumbers.json", json.dumps(rows))
    flags = ["--data", data, "--eval-data", f"{data},{ROOT}/tiny/test.jsonl", "--eval-size", 2, "--steps", 1,
             "--device", "cpu", "--dtype", "float32", "--batch-size", 2, "--minibatch-size", 2, "--group-size", 2]
    run_here(*flags, "--max-new-tokens", 4, "--out", tmp_path / "run")
    printed = "".join(capfd.readouterr())
    assert f"{SHOWN}\\rnumbers.json" in printed and "\rnumbers" not in printed   # other \r are of tqdm's bar
    printed = printed.replace("\x1b[A", "")                                     # tqdm's, of a bar below another
    assert [char for char in printed if not char.isprintable() and char not in "\n\t\r"] == []
    context = json.loads((ROOT / "tiny" / "config.json").read_text())["max_position_embeddings"]
    message = error_of(*flags, "--max-new-tokens", context, "--out", tmp_path / "other")
    assert SHOWN in message and f"context of {context}" in message and message.isprintable()


# --------------------------------------------------------------------------------------------------- 4. precision

def test_dropout_of_any_name_is_off(tmp_path):
    for number, (config, names) in enumerate((
            (OPTConfig(dropout=0.5, attention_dropout=0.4, layerdrop=0.3, ffn_dim=48, word_embed_proj_dim=32, **SIZES),
             ("dropout", "attention_dropout", "layerdrop")),
            (BloomConfig(hidden_dropout=0.5, attention_dropout=0.5, n_layer=2, n_head=4, **SIZES),
             ("hidden_dropout", "attention_dropout")),
            (PhiConfig(resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5, **SIZES),
             ("resid_pdrop", "embd_pdrop", "attention_dropout")))):
        folder = save_random_model(config, tmp_path / str(number))
        read = json.loads((folder / "config.json").read_text())
        assert all(read[name] >= 0.3 for name in names)                        # what it comes with
        loaded, model = load_config(folder), load_model(folder, "cpu", "grpo").train()
        assert {name: getattr(loaded, name) for name in names} == dict.fromkeys(names, 0.0)
        ids = torch.arange(5)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids).logits)           # train mode is not random
        assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.full
def test_models_with_dropout_sample_and_learn_with_the_same_probabilities(tmp_path):
    """Gradient checkpointing trains in train mode: with dropout, π_θ would be far from the sampler's π_old."""
    for number, config in enumerate((
            OPTConfig(dropout=0.5, attention_dropout=0.5, ffn_dim=48, word_embed_proj_dim=32, **SIZES),
            BloomConfig(hidden_dropout=0.5, attention_dropout=0.5, n_layer=2, n_head=4, **SIZES))):
        folder, out = save_random_model(config, tmp_path / f"model{number}"), tmp_path / f"run{number}"
        run_here(*flags_for(folder, reward_file(tmp_path, "n % 2"), out, steps=1), "--gradient-checkpointing")
        assert metrics_of(out)[1]["updates"] == 2 and metrics_of(out)[1]["ratio_deviation"] < 1e-5


def test_float32_weights_move_at_a_learning_rate_of_1e_6_and_bfloat16_weights_do_not(tmp_path, monkeypatch):
    """AdamW's first step moves each weight by lr; a bfloat16 of 1e-3 and more is 4e-6 and more from the next one."""
    original, reward, shares = models.load_model, reward_file(tmp_path, "n % 2"), {}
    start = load_file(ROOT / "tiny" / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16:
            monkeypatch.setattr(models, "load_model", lambda *args: original(*args, dtype))
        out = tmp_path / str(dtype)
        run_here(*flags_for(ROOT / "tiny", reward, out, steps=1), "--lr", 1e-6, "--dtype", "bfloat16",
                 "--minibatch-size", 4, "--kl-coef", 0)
        after = weights_of(out)
        assert {weight.dtype for weight in after.values()} == {dtype}
        moved = [(after[name] != weight.to(dtype))[weight.abs() >= 1e-3] for name, weight in start.items()
                 if "embed" not in name]                                       # ids that do not occur have no gradient
        shares[dtype] = torch.cat(moved).float().mean().item()
        assert metrics_of(out)[1]["updates"] == 1 and torch.cat(moved).numel() > 300000
    assert shares[torch.float32] > 0.95 and shares[torch.bfloat16] == 0


# --------------------------------------------------------------------------------------------- 5. degenerate models

PAD, EOS, LETTER = 0, 1, 20


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
def degenerate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"end": certain(folder / "end", EOS), "letter": certain(folder / "letter", LETTER),
            "padding": certain(folder / "padding", PAD), "end or letter": certain(folder / "either", EOS, LETTER),
            "any": save_random_model(Qwen2Config(tie_word_embeddings=False, **SIZES), folder / "any")}


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


CASES = [   # (model, --max-new-tokens, the length of each response)
    ("end", LONGEST, 1), ("letter", LONGEST, LONGEST), ("padding", LONGEST, LONGEST), ("end or letter", LONGEST, None),
    ("any", LONGEST, None), ("any", 1, 1)]
ALL = [(*case, method, ("float32", "bfloat16")[(i + j) % 2])                   # all pairs of a model and a method
       for i, case in enumerate(CASES) for j, method in enumerate(METHODS)]
FAST = ALL[0], ALL[5], ALL[10], ALL[15]                                        # four models, each with its method


def assert_one_step(name, longest, length, method, dtype, degenerate, folder):
    """Every second response is right: empty, cut off, one token again and again, decoded as "", one token long, any."""
    folder.mkdir()
    run_here(*flags_for(degenerate[name], reward_file(folder, "n % 2"), folder / "run", steps=1), "--method", method,
             "--dtype", dtype, "--max-new-tokens", longest)
    row, = steps_of(folder / "run")
    assert row["groups_kept"] == 4 and row["success_rate"] == 0.5 and row["updates"] == 2
    for metric in UPDATE_METRICS:
        assert (row[metric] is not None) == (method in ("nthr", "random") or metric not in NTHR_METRICS), metric
    if name == "end or letter":
        assert 1 < row["response_length"] < LONGEST and 0 <= row["truncated_share"] < 1
    if length:
        assert row["response_length"] == length
    if name in ("end", "letter", "padding"):
        assert row["truncated_share"] == (name != "end")
        # π = 1 of what is sampled: no error e_y − π, so no score, no gradient, no likelihood to gain
        assert row["nll"] == row["kl"] == row["delta_mean"] == 0 and row["grad_norm"] < 1e-10
        assert not row["tau"] or abs(row["tau"]) < 1e-10
        assert largest_move(folder / "run", degenerate[name]) < 1e-9
    else:
        assert largest_move(folder / "run", degenerate[name]) > 0.9e-3         # AdamW's first step moves by lr


@pytest.mark.parametrize("case", FAST, ids=str)
def test_rewards_that_have_nothing_to_do_with_the_responses(case, degenerate, tmp_path):
    assert_one_step(*case, degenerate, tmp_path / "case")


@pytest.mark.full
def test_rewards_that_have_nothing_to_do_with_the_responses_of_any_model(degenerate, tmp_path):
    wrong = []
    for number, case in enumerate(ALL):
        try:
            assert_one_step(*case, degenerate, tmp_path / str(number))
        except AssertionError as error:
            wrong.append((case, str(error)[:300]))
    assert wrong == []


def test_the_padding_of_the_model_above_is_decoded_as_nothing(degenerate):
    model = load_model(degenerate["padding"], "cpu", "nthr")
    assert rollout.generate(model, TOKENIZER, [[5, 6]], 3, LONGEST, seed=0).texts == [""] * 3


@pytest.mark.full
@pytest.mark.parametrize("group_size", [2, 64])
def test_identical_responses_to_one_question_half_of_them_right(group_size, degenerate, tmp_path, monkeypatch):
    """With p = 1/2, Â = ±1 and η = 0. At γ = 1 Eq. 1's loss is −(1 − what is left of the wrong ones) / 2.

    What is left: for pos-only nothing, for grpo all, else all but the selected share; the KL penalty is still 0."""
    generate = rollout.generate

    def same(model, tokenizer, prompts, size, *args, **kwargs):
        sampled = generate(model, tokenizer, prompts, size, *args, **kwargs)
        return sampled.select(torch.arange(len(prompts)).repeat_interleave(size) * size)

    monkeypatch.setattr(rollout, "generate", same)
    for method in METHODS:
        out = tmp_path / method
        run_here(*flags_for(degenerate["any"], reward_file(tmp_path, "n % 2"), out), "--method", method,
                 "--batch-size", 1, "--minibatch-size", 1, "--group-size", group_size, "--nll-coef", 0.25)
        first, second = steps_of(out)
        assert first["groups_kept"] == first["updates"] == second["updates"] == 1
        left = {"grpo": 1, "pos-only": 0}.get(method, 1 - (first["selected_share"] or 0))
        if method in ("nthr", "random"):                                       # s⁻ = s⁺, and τ is their mean
            assert first["eta"] == 0 and 0 < first["selected_share"] < 1
        assert first["loss"] == pytest.approx(-(1 - left) / 2 + 0.25 * first["nll"], abs=1e-5), method
        assert abs(first["kl"]) < 1e-6 and second["kl"] > 0 and largest_move(out, degenerate["any"]) > 0


@pytest.mark.full
def test_one_question_per_batch_with_the_smallest_group_and_a_large_one(degenerate, tmp_path):
    """The micro-batches hold only a part of the large group."""
    for group_size in (2, 64):
        for method in METHODS:
            out = tmp_path / f"{group_size}-{method}"
            run_here(*flags_for(degenerate["any"], reward_file(tmp_path, "n % 2"), out), "--method", method,
                     "--batch-size", 1, "--minibatch-size", 1, "--group-size", group_size, "--micro-batch-tokens", 40)
            for row in steps_of(out):
                assert row["questions"] == row["groups_kept"] == row["updates"] == 1 and row["success_rate"] == 0.5
            assert largest_move(out, degenerate["any"]) > 0


@pytest.mark.parametrize("method, right", [("nthr", 0), *(pytest.param(*case, marks=pytest.mark.full) for case in (
    ("nthr", 1), ("grpo", 0), ("grpo", 1)))])
def test_batches_without_a_mixed_group_update_nothing_and_then_training_goes_on(method, right, degenerate, tmp_path,
                                                                                capsys):
    """All wrong, or all right, for three steps with a checkpoint after them; then every second response is right."""
    sampled = 2 + 3 * 2 * 16 + 2                                               # evaluations, three steps of two rounds
    reward = reward_file(tmp_path, f"n % 2 if n >= {sampled} else {right}")
    run_here(*flags_for(degenerate["any"], reward, tmp_path / "run", steps=3), "--method", method,
             "--sampling-rounds", 2)
    assert "warning: no question had both right and wrong answers in 3 steps" in capsys.readouterr().err
    for row in steps_of(tmp_path / "run"):
        assert row["groups_kept"] == 0 and row["success_rate"] == right and row["questions"] == 8
        assert all(row[metric] is None for metric in UPDATE_METRICS)
    assert largest_move(tmp_path / "run", degenerate["any"]) == 0
    state = torch.load(tmp_path / "run" / "checkpoint" / "trainer.pt", weights_only=True)
    assert state["optimizer"]["state"] == {}
    run_here("--resume", tmp_path / "run", "--reward", reward, "--steps", 5)
    assert "no question had" not in capsys.readouterr().err
    for row in steps_of(tmp_path / "run")[3:]:
        assert row["groups_kept"] == 4 and row["updates"] == 2 and row["questions"] == 4
    assert largest_move(tmp_path / "run", degenerate["any"]) > 0


@pytest.mark.full
@pytest.mark.parametrize("family", ["rotary", "learned"])
def test_a_prompt_that_leaves_room_for_the_response_works_and_a_longer_one_is_named(family, tmp_path):
    """Learned positions are rows of a table, so that one position too many would be an index error."""
    problem = "1+2*3-4"
    length = len(encode_prompt(TOKENIZER, problem, ""))
    data = write(tmp_path / "two.jsonl", "".join(json.dumps({"problem": text, "answer": 1}) + "\n"
                                                 for text in ("1", problem)))
    for room, longest in ((LONGEST, LONGEST), (1, 1), (LONGEST - 1, LONGEST), (0, 1), (-1, 1)):
        sizes = SIZES | {"max_position_embeddings": length + room}
        config = Qwen2Config(**sizes) if family == "rotary" else OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **sizes)
        out = tmp_path / f"run{room}"
        flags = [*flags_for(save_random_model(config, tmp_path / f"model{room}"), reward_file(tmp_path, "n % 2"), out,
                            steps=1),
                 "--data", data, "--eval-data", data, "--max-new-tokens", longest, "--group-size", 16]
        if room >= longest:
            run_here(*flags)
            row, = steps_of(out)
            assert row["updates"] == 2 and row["truncated_share"] > 0          # some went on to the end of the context
        else:
            message = error_of(*flags)
            for words in (problem, f"takes {length} tokens", f"--max-new-tokens {longest}", f"of {length + room}"):
                assert words in message
            assert not out.exists()


@pytest.mark.full
def test_temperatures_at_which_every_token_is_certain_or_every_one_as_likely(degenerate, tmp_path):
    for method in ("nthr", "grpo"):
        for temperature in (1e-3, 1e-30, 1e30):
            out = tmp_path / f"{method}{temperature}"
            run_here(*flags_for(degenerate["any"], reward_file(tmp_path, "n % 2"), out), "--method", method,
                     "--temperature", temperature)
            for row in steps_of(out):
                assert row["groups_kept"] == 4 and row["updates"] >= 1
                if temperature == 1e30:                                        # −ln π = ln V, for half of the responses
                    assert row["nll"] == pytest.approx(math.log(SIZES["vocab_size"]) / 2, rel=0.2)


def test_an_infinite_threshold_is_null(degenerate, tmp_path):
    run_here(*flags_for(degenerate["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=1), "--beta=-inf")
    row, = steps_of(tmp_path / "run")
    assert row["tau"] is None and row["selected_share"] == 1                   # every wrong token


@pytest.mark.full
def test_temperatures_that_spoil_the_numbers_are_named_and_not_a_traceback(degenerate, tmp_path):
    """float32 cannot divide by 1e-38. At 1e-3, logits of bfloat16 divided by it are far from those of float32."""
    flags = flags_for(degenerate["any"], reward_file(tmp_path, "n % 2"), tmp_path / "a")
    message = error_of(*flags, "--temperature", 1e-38)
    assert "at temperature 1e-38 are not finite" in message and "too low" in message
    flags = flags_for(degenerate["any"], reward_file(tmp_path, "n % 2"), tmp_path / "b", steps=3)
    message = error_of(*flags, "--temperature", 1e-3, "--dtype", "bfloat16")
    assert "--dtype float32" in message and "--resume" in message
