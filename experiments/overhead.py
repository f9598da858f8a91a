"""What NTHR, sampling and the loss cost, as ratios measured in one run on this machine.

python experiments/overhead.py                             # all five benchmarks on the embedded model
python experiments/overhead.py step sampling               # some of them
python experiments/overhead.py step --shape 135M --prompt-tokens 200 --max-new-tokens 200 --batch-size 2
python experiments/overhead.py --shape 0.5B --device cuda  # random weights in the shape of Qwen2.5-0.5B

    step      a step of `python train.py`, with NTHR and without, against one of TRL's GRPOTrainer (pip install trl);
              seconds by phase (Table 3), and NTHR's share of them
    sampling  `rollout.generate` against `model.generate` and `model.generate_batch` of transformers
    scores    NTHR's scores alone over the tokens of a group (App. 7.4): seconds, peak memory, growth
    loss      `grpo.response_logprobs` and Eq. 1 against full logits, at V = 151936: seconds and peak memory
    growth    seconds and peak memory of a step over questions, G, response length and V, on a small random model

What is compared runs in turn in every repetition, in the opposite order every second time, after one run each that is
not counted. A ratio is formed within each repetition. Its median is printed with a 95% interval from a bootstrap over
the repetitions: with fewer than six of them it is their range. Time is the CPU time of the whole process on one thread,
which other programs disturb little, and wall-clock time beside it. The median decides whether a goal is met, by CPU
time, on a GPU by wall-clock time. A ratio is marked "busy" if the load at the start left less than half a core free, or
if a process got less than 90% of a core. Memory is measured in runs of its own. No step uses activation checkpointing.
The reward calls every second response right. --out gets tables.md, growth.png and overhead.json with every measurement.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import runpy
import statistics
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

import common
import files
from grpo import grpo_loss, response_logprobs
from nthr import nthr_scores, nthr_scores_pairwise
from rollout import generate, stop_token_ids
from support import flags
from support.data import EMBEDDED, TINY, encode_prompt, encode_prompts, load_problems
from support.errors import fail
from support.help import DocFormatter
from support.memory import PHASES
from support.models import choose_device, load_config, load_model, load_pretrained, precision

matplotlib.use("Agg")                                                          # files only, no window
# Shapes: G responses of a question, B rows, P prompt tokens, T response tokens, V vocabulary, d hidden size,
#         N tokens of a group
SHAPES = {    # tied: V, layers, d, heads, key-value heads, intermediate size
    "135M": (LlamaConfig, 49152, 30, 576, 9, 3, 1536),                         # SmolLM2-135M
    "0.5B": (Qwen2Config, 151936, 24, 896, 14, 2, 4864),                       # Qwen2.5-0.5B
    "head": (Qwen2Config, 151936, 2, 896, 14, 2, 4864),                        # the same with 2 layers
    "small": (Qwen2Config, 1000, 2, 64, 4, 2, 128)}
PAPER = {"data_generation": 250, "nthr": 22, "old_probabilities": 55, "reference": 55, "model_update": 140}  # Table 3
CHUNK = 512             # tokens at a time in `nthr_scores`, its default
PAIRWISE = 512          # the largest group that is also scored pair by pair
SCORE_TOKENS = [256 * 2 ** i for i in range(7)]                                # sizes of a group, N
LOSS_ROWS, LOSS_TOKENS = 8, 512                                                # B and T of the loss
DISTINCT = 512          # token ids that the responses of one group are drawn from, at most
NO_CHANGE = 1e-30       # learning rate: AdamW's work is done, and the model of every contender stays the same
SCRATCH = Path("runs/overhead-scratch")                                        # models of random weights
REWARD = f"{Path(__file__).resolve()}:alternating"
GROWTH = {              # axis: what varies, its sizes, the largest exponent of seconds and of bytes
    "questions per step": ("batch_size", (4, 8, 16, 32, 64), 1.1),
    "G, responses per question": ("group_size", (4, 8, 16, 32), 1.1),
    "tokens per response": ("max_new_tokens", (32, 64, 128, 256, 512, 1024), 2),          # attention is quadratic
    "V, vocabulary": ("vocabulary", (1000, 4000, 16000, 64000, 152000), 1.1)}
BASE = {"batch_size": 4, "group_size": 8, "max_new_tokens": 32, "vocabulary": 1000}       # what does not vary
TIMES = ("CPU s", "wall s", "CPU / wall")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")                                 # the profiler's start is not news


def alternating(response, answer, turns=itertools.cycle((1.0, 0.0))):
    """A reward that calls every second response right, whatever it says: every group is mixed, none is dropped, and
    all contenders do the same work. The boxed answer is right, with which train.py checks a --reward at the start."""
    return 1.0 if response == f"\\boxed{{{answer}}}" else next(turns)


def interval(values):
    """95% interval of the median of `values`: percentiles of the medians of 10000 resamples (seeded bootstrap)."""
    draws = np.random.default_rng(0).choice(values, (10000, len(values)))
    return np.quantile(np.median(draws, axis=1), (0.025, 0.975)).tolist()


def ratio(name, values, at_least=None, at_most=None, **measured):
    """A ratio with one value per repetition: its median, the interval, and whether the median reaches the goal."""
    median = statistics.median(values)
    goal, met = (f"<= {at_most:g}", median <= at_most) if at_least is None else (f">= {at_least:g}", median >= at_least)
    return {"ratio": name, "median": median, "interval": interval(values), "goal": goal, "met": met,
            "values": list(values), "busy": False, **measured}


def compare(name, above, below, clock, per=None, **goal):
    """`ratio` of the seconds of the runs `above` to those of the runs `below`, pair by pair.

    clock: the one that counts; per: a key of the runs, to compare seconds for each of that many."""
    values, wall = ([(a[key] / a.get(per, 1)) / (b[key] / b.get(per, 1)) for a, b in zip(above, below)]
                    for key in (clock, "wall"))
    return ratio(name, values, wall=wall, busy=is_busy(above) or is_busy(below), **goal)


def is_busy(runs):
    """Whether these runs got less than 90% of a core, in the median."""
    return statistics.median(run["cpu"] / run["wall"] for run in runs) < 0.9


def exponent(sizes, values):
    """The exponent of values ~ sizes^exponent: the least-squares slope in logarithms over the larger half of the sizes,
    where fixed costs weigh least. sizes ascending, at least two. 1 is linear, 2 quadratic."""
    half = max(2, math.ceil(len(sizes) / 2))
    return statistics.linear_regression([math.log(x) for x in sizes[-half:]],
                                        [math.log(y) for y in values[-half:]]).slope


def interleaved(runs, repetitions):
    """{name: function without arguments} -> {name: its results, one per repetition}.

    Each runs once as a warm-up, then in every repetition, every second one backwards."""
    order = [name for r in range(repetitions + 1) for name in (list(runs)[::-1] if r and r % 2 == 0 else runs)]
    results = {name: [] for name in runs}
    for name in tqdm(order, desc=" / ".join(map(str, runs)), leave=False):
        results[name].append(runs[name]())
    return {name: found[1:] for name, found in results.items()}


def clocks():
    """CPU seconds of all threads of this process, and wall-clock seconds, read once a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {"cpu": time.process_time(), "wall": time.perf_counter()}


def seconds_since(start):
    return {clock: now - start[clock] for clock, now in clocks().items()}


def measured(function):
    """{"cpu": seconds of function(), "wall": seconds}, and what it returns if that is a dict."""
    start = clocks()
    found = function()
    return seconds_since(start) | (found if isinstance(found, dict) else {})


def times(runs):
    """The cells of a table under TIMES: medians of these runs."""
    cpu, wall, share = (statistics.median(values) for values in zip(
        *((run["cpu"], run["wall"], run["cpu"] / run["wall"]) for run in runs)))
    return [f"{cpu:.4g}", f"{wall:.4g}", f"{share:.2f}"]


def peak_bytes(function, device):
    """The most bytes that torch's allocator held at one time during function(), beyond what it held before.

    On a GPU the allocator's own statistics; elsewhere every allocation and release on the CPU as torch.profiler lists
    them, the temporary tensors inside an operation included. Not counted: Python's memory, and scratch space that
    BLAS and oneDNN allocate for themselves."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate((event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(held, default=0)


def make_model(shape, seed, vocabulary=None):
    """A folder in SCRATCH with a model of random weights and the embedded model's tokenizer; kept if it is there.

    shape: a key of SHAPES; vocabulary: instead of its V. "small" has no stop token. Returns the folder's path."""
    config_class, V, layers, hidden, heads, key_value_heads, intermediate = SHAPES[shape]
    folder = SCRATCH / f"{shape}-{vocabulary or V}-seed{seed}"
    if not folder.is_dir():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(
            vocab_size=vocabulary or V, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_value_heads, tie_word_embeddings=True,
            max_position_embeddings=32768, bos_token_id=None, eos_token_id=None if shape == "small" else 1,
            pad_token_id=0))
        tokenizer, part = load_pretrained(AutoTokenizer, str(TINY)), folder.with_name(folder.name + ".tmp")
        if shape == "small":
            tokenizer.eos_token = None
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)                                                    # a folder under its name is complete
    return str(folder)


def write_problems(args):
    """The first --batch-size problems of --data as a file, from which every step then takes the same questions; with
    --prompt-tokens, each continued by those after it. Returns the file's path."""
    problems, size, path = load_problems(args.data), args.batch_size, Path(args.out) / "problems.jsonl"
    if len(problems) < size:
        fail(f"{args.data} has {len(problems)} problems only: lower --batch-size {size}")
    rows = problems[:size]
    if args.prompt_tokens:
        texts = [row["problem"] for row in problems]
        length = args.prompt_tokens - len(encode_prompt(load_pretrained(AutoTokenizer, args.model), "", ""))
        rows = [row | {"problem": "+".join(texts[i:] + texts)[:length]} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def our_steps(args):
    """{method: a measured training step of train.py}, of NTHR and GRPO on one model: one update, no KL, no Δ(x).

    train.py is read as the program that it is, because nothing imports it."""
    program = runpy.run_path(str(files.ROOT / "train.py"))
    names = ("model", "data", "batch_size", "group_size", "max_new_tokens", "max_sequences", "micro_batch_size",
             "micro_batch_tokens", "seed", "device", "dtype")
    given = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):     # its announcements
        train_args = flags.parse_args("", [
            *given, f"--eval-data={args.data}", "--instruction=", f"--reward={REWARD}", "--no-gradient-checkpointing",
            f"--minibatch-size={args.batch_size}", "--kl-coef=0", f"--lr={NO_CHANGE}", f"--out={SCRATCH}/train"])
        run = program["load_run"](train_args, None)
    prompt_tokens = statistics.mean(map(len, run.prompts))
    numbers = {"nthr": itertools.count(1), "grpo": itertools.count(1)}

    def step(method):
        method_args = argparse.Namespace(**vars(train_args) | {"method": method, "delta_every": 0})
        run.progress.position = 0                                              # both methods sample the same responses
        metrics = program["train_step"](run, method_args, next(numbers[method]))
        return {"questions": metrics["groups_kept"], "prompt_tokens": prompt_tokens,
                "response_tokens": metrics["response_length"], "updates": metrics["updates"],
                "seconds": metrics["seconds"]}

    return {method: lambda method=method: measured(lambda: step(method)) for method in numbers}


def trl_steps(args):
    """{"TRL": a measured training step of TRL's GRPOTrainer}, from the start to the end of it as its callbacks tell.

    As in `our_steps`: model, questions, rows, rows per pass, longest response, reward, AdamW, dtype, one update, no KL,
    no checkpointing. What differs: ours keeps hidden states while sampling, TRL computes the entropy of each token."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    tokenizer, rows = load_pretrained(AutoTokenizer, args.model), args.batch_size * args.group_size
    prompts = encode_prompts(load_problems(args.data), tokenizer, load_config(args.model), args.max_new_tokens, "")
    texts, lengths, step = [tokenizer.decode(prompt) for prompt in prompts], [], {}
    if tokenizer(texts).input_ids != prompts:
        fail(f"the tokenizer of {args.model} does not turn the text of a prompt into the same ids again, so that "
             f"TRL would train on others: choose another model")

    def reward(completions, completion_ids, **_):
        lengths[:] = map(len, completion_ids)
        return [alternating(text, None) for text in completions]

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = clocks()

        def on_step_end(self, *_, **__):
            step.update(seconds_since(self.start))

    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)       # TRL 1.16 uses the old names
    checkpointing = ("activation_checkpointing" if hasattr(GRPOConfig, "activation_checkpointing")
                     else "gradient_checkpointing")                            # before transformers 5.24
    config = GRPOConfig(
        output_dir=SCRATCH / "trl", max_steps=1, per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=rows // args.micro_batch_size, num_generations=args.group_size,
        max_completion_length=args.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, num_iterations=1,
        learning_rate=NO_CHANGE, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=1.0, bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", disable_dropout=True,
        use_vllm=False, report_to="none", logging_strategy="no", save_strategy="no", eval_strategy="no",
        disable_tqdm=True, seed=args.seed, shuffle_dataset=False, dataloader_pin_memory=args.device != "cpu",
        **{checkpointing: False})
    model = load_model(args.model, args.device, "grpo")
    model.generation_config.eos_token_id = stop_token_ids(model, tokenizer)    # TRL reads them here
    trainer = GRPOTrainer(model, reward, config, Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
                          callbacks=[Stopwatch()])
    trainer.remove_callback(PrinterCallback)

    def one_step():
        trainer.train()                                                        # keeps the state of AdamW
        return step | {"questions": len(lengths) // args.group_size, "updates": trainer.state.global_step,
                       "prompt_tokens": statistics.mean(map(len, prompts)), "response_tokens": statistics.mean(lengths)}

    return {"TRL": one_step}


def benchmark_step(args):
    """A training step of each contender, whose lr leaves the model as it is; Table 3 from ours.

    With one update a step nothing is spent on old probabilities: sampling keeps what the paper computes there."""
    steps, notes = our_steps(args), []
    try:
        steps |= trl_steps(args)
    except ImportError as error:
        notes.append(f"TRL was not run ({error}), so that only our steps were measured: pip install trl")
    found = interleaved(steps, args.repetitions)
    work, rows, phases = ("questions", "prompt_tokens", "response_tokens", "updates"), [], []
    for name, runs in found.items():
        sizes = [f"{statistics.median(run[key] for run in runs):.4g}" for key in work]
        rows.append([f"train.py, {name}" if name in ("nthr", "grpo") else "TRL's GRPOTrainer", sizes[0],
                     args.group_size, *sizes[1:], args.micro_batch_size, args.dtype, args.threads, *times(runs)])
    totals = [sum(run["seconds"][phase] for phase in PHASES) for run in found["nthr"]]
    for phase, paper in PAPER.items():
        seconds = [run["seconds"][phase] for run in found["nthr"]]
        share = statistics.median(s / total for s, total in zip(seconds, totals))
        phases.append([phase, f"{statistics.median(seconds):.4f}", f"{share:.2%}", paper,
                       f"{paper / sum(PAPER.values()):.1%}"])
    ratios = [compare(f"step, TRL / train.py {name}", found["TRL"], found[name], args.clock, at_least=args.goal)
              for name in ("nthr", "grpo") if "TRL" in found]
    ratios.append(compare("step, train.py nthr / grpo", found["nthr"], found["grpo"], args.clock, at_most=1.02))
    ratios.append(ratio("NTHR phase / step", [run["seconds"]["nthr"] / run["wall"] for run in found["nthr"]],
                        at_most=0.02, busy=is_busy(found["nthr"])))
    header = ["contender", "questions", "G", "prompt tokens", "response tokens", "updates", "rows per pass", "dtype",
              "threads", *TIMES]
    return {"tables": [(header, rows), (["phase", "seconds", "share", "paper: seconds", "share"], phases)],
            "notes": notes, "measured": found, "ratios": ratios}


def lengths_until(responses, stop_ids):
    """(B, T) tokens -> the tokens of each response up to and including its first stop token. (B,)."""
    stops = torch.isin(responses, torch.tensor(stop_ids, dtype=torch.long, device=responses.device))
    return torch.where(stops.any(1), stops.int().argmax(1) + 1, responses.shape[1])


def sampling_config(args, stop_ids):
    """Tokens from softmax(logits) and nothing else. The model's own generation_config must be set aside by the caller:
    its values fill whatever is None here."""
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens,
                            num_return_sequences=args.group_size, eos_token_id=stop_ids or None, pad_token_id=0)


def library_generate(model, prompts, stop_ids, args):
    """Tokens that transformers' own `model.generate` samples: the same distribution, stop ids and rows at a time."""
    tokens, at_once = 0, max(1, args.max_sequences // args.group_size)
    for part in (prompts[i:i + at_once] for i in range(0, len(prompts), at_once)):
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in part], device=args.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part], device=args.device)
        sequences = model.generate(ids, attention_mask=mask, generation_config=sampling_config(args, stop_ids))
        tokens += int(lengths_until(sequences[:, width:], stop_ids).sum())
    return tokens


def library_generate_batch(model, prompts, stop_ids, args):
    """The same by transformers' continuous batching, `model.generate_batch`. RuntimeError if responses are missing.

    On a CPU its cache is given the size that the rows need: by default it would take 90% of the memory."""
    from transformers import ContinuousBatchingConfig                          # newer than the oldest transformers
    rows, page, sizes = len(prompts) * args.group_size, 32, {}
    if args.device == "cpu":
        slots, longest = min(rows, args.max_sequences), max(map(len, prompts)) + args.max_new_tokens
        sizes = {"page_size": page, "num_blocks": slots * math.ceil(longest / page),
                 "max_batch_tokens": max(slots, longest), "max_requests_per_batch": slots}
    found = model.generate_batch(prompts, generation_config=sampling_config(args, stop_ids or -1),
                                 continuous_batching_config=ContinuousBatchingConfig(**sizes))
    if len(found) < rows:
        raise RuntimeError(f"{rows - len(found)} of {rows} responses are missing")
    return sum(len(output.generated_tokens) for output in found.values())


def benchmark_sampling(args):
    """Seconds per token, each counted up to its stop. Ours also returns log-probabilities, the hidden states that NTHR
    reads, and decoded texts; for bfloat16, transformers gets weights in bfloat16.

    "stops": at the model's stop ids, for random weights at every 64th id of the vocabulary, which gives lengths with a
    mean of about 64; "fixed length": no stop id, every response has --max-new-tokens."""
    tokenizer, model = load_pretrained(AutoTokenizer, args.model), load_model(args.model, args.device, "nthr")
    library = load_model(args.model, args.device, "grpo", getattr(torch, args.dtype))
    prompts = encode_prompts(load_problems(args.data), tokenizer, model.config, args.max_new_tokens, "")
    stops = list(range(0, model.config.vocab_size, 64)) if args.shape else stop_token_ids(model, tokenizer)
    library.generation_config = GenerationConfig()                             # no repetition penalty, top-p or EOS
    rows, ratios, notes, all_runs = [], [], [], {}
    for name, stop_ids, goal in (("stops", stops, 1.5), ("fixed length", [], 1)):

        def our_tokens():
            with precision(args.device, args.dtype):
                rollout = generate(model, tokenizer, prompts, args.group_size, args.max_new_tokens,
                                   max_sequences=args.max_sequences, stop_ids=stop_ids)
            return int(rollout.response_mask.sum())

        samplers = {"rollout.generate": our_tokens,
                    "model.generate": lambda: library_generate(library, prompts, stop_ids, args),
                    "model.generate_batch": lambda: library_generate_batch(library, prompts, stop_ids, args)}
        try:
            samplers["model.generate_batch"]()
        except Exception as error:                                             # whatever this version raises here
            del samplers["model.generate_batch"]
            notes.append(f"{name}: model.generate_batch did not run ({type(error).__name__}: {error})")
        found = interleaved({who: lambda sample=sample: measured(lambda: {"tokens": sample()})
                             for who, sample in samplers.items()}, args.repetitions)
        rows += [[name, who, len(prompts), args.group_size, f"{statistics.mean(map(len, prompts)):.4g}",
                  f"{statistics.median(run['tokens'] for run in runs) / len(prompts) / args.group_size:.4g}",
                  args.dtype, args.threads, *times(runs)] for who, runs in found.items()]
        ours = found["rollout.generate"]
        ratios += [compare(f"seconds per token, {who} / rollout.generate, {name}", found[who], ours, args.clock,
                           per="tokens", at_least=goal) for who in list(found)[1:]]
        all_runs[name] = found
    header = ["lengths", "sampler", "prompts", "G", "prompt tokens", "response tokens", "dtype", "threads", *TIMES]
    return {"tables": [(header, rows)], "notes": notes, "measured": all_runs, "ratios": ratios}


def random_group(size, lm_head, args):
    """Arguments of `nthr_scores` for a group of `size` tokens, all valid, half of the responses right; and logprobs.

    Hidden states are normal; ids repeat as words do (the r-th most frequent with probability ~ 1/r)."""
    G, (V, d) = args.group_size, lm_head.shape
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randperm(V, generator=generator)[:DISTINCT]
    drawn = torch.multinomial(1 / torch.arange(1.0, len(ids) + 1), size, replacement=True, generator=generator)
    tokens = ids[drawn].view(G, size // G).to(lm_head.device)
    hidden = torch.randn(G, size // G, d, generator=generator).to(lm_head.device)
    with torch.no_grad():
        logprobs = torch.cat([torch.log_softmax(h @ lm_head.T, -1).gather(1, y[:, None])[:, 0]
                              for h, y in zip(hidden.view(-1, d).split(CHUNK), tokens.view(-1).split(CHUNK))])
    mask, correct = torch.ones_like(tokens, dtype=torch.bool), torch.arange(G, device=lm_head.device) < G // 2
    return (hidden, tokens, mask, correct, lm_head), logprobs.view_as(tokens)


def benchmark_scores(args):
    """NTHR's scores of one group over its number of tokens N, on random states and the model's lm_head (float32).

    Bound: bytes of a copy of the states, a chunk of logits (with logprobs: of the columns in V*_x alone), and M⁺. The
    peak is a small multiple, as a few tensors of that size exist at once. Only the copy of the states grows with N.
    Pair by pair: the prediction errors of all tokens."""
    lm_head = load_model(args.model, args.device, "nthr").get_output_embeddings().weight.detach()
    V, d = lm_head.shape
    variants = {"all": lambda group, _: nthr_scores(*group, vocabulary="all"),
                "responses": lambda group, _: nthr_scores(*group),
                "responses, logprobs": lambda group, logprobs: nthr_scores(*group, logprobs),
                "pairwise": lambda group, _: nthr_scores_pairwise(*group)}
    found, rows, ratios = [], [], []
    for names, sizes in ((list(variants)[:3], SCORE_TOKENS),
                         (["pairwise"], [size for size in SCORE_TOKENS if size <= PAIRWISE])):
        for size in sizes:
            group, logprobs = random_group(size, lm_head, args)
            U, chunk = len(group[1].unique()), min(size, CHUNK)
            calls = {name: lambda name=name: variants[name](group, logprobs) for name in names}
            runs = interleaved({name: lambda call=call: measured(call) for name, call in calls.items()},
                               args.repetitions)
            numbers = {"all": chunk * V + V * d + size * d, "responses": chunk * V + U * d + size * d,
                       "responses, logprobs": (chunk + d) * U + size * d, "pairwise": size * V}
            found += [{"variant": name, "tokens": size, "ids": U, "runs": runs[name],
                       "peak_bytes": peak_bytes(call, args.device), "bound_bytes": 4 * numbers[name]}
                      for name, call in calls.items()]
    for name in variants:
        points = [point for point in found if point["variant"] == name]
        sizes, shares = [point["tokens"] for point in points], [p["peak_bytes"] / p["bound_bytes"] for p in points]
        exponents = [exponent(sizes, [run[args.clock] for run in runs])
                     for runs in zip(*(point["runs"] for point in points))] if points[1:] else []
        rows += [[name, point["tokens"], point["ids"], *times(point["runs"]), f"{point['peak_bytes'] / 2 ** 20:.1f}",
                  f"{share:.2f}", f"{statistics.median(exponents):.2f}" if exponents else ""]
                 for point, share in zip(points, shares)]
        if name != "pairwise":
            ratios += [ratio(f"exponent of N in seconds, {name}", exponents, at_most=1.2,
                             busy=any(is_busy(point["runs"]) for point in points))] if exponents else []
            ratios.append(ratio(f"peak / bound at any N, {name}", [max(shares)], at_most=4))
    header = ["variant", "N", "ids in use", *TIMES, "peak, MiB", "peak / bound", "exponent"]
    return {"tables": [(header, rows)], "measured": found, "ratios": ratios}


def naive_logprobs(model, ids, attention_mask, prompt_length):
    """`response_logprobs` as most trainers first wrote it: all logits, then log_softmax. Unpadded rows. (B, T)."""
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, prompt_length - 1:-1]
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, prompt_length:, None])[..., 0]


def forward_backward(logprobs_of, model, ids, prompt_length, group_size):
    """Eq. 1 and its gradient, left in the parameters, with every second response right. Returns the logprobs."""
    model.zero_grad(set_to_none=True)
    logprobs = logprobs_of(model, ids, torch.ones_like(ids), prompt_length)
    advantages = torch.where(torch.arange(len(ids), device=ids.device) % 2 == 0, 1.0, -1.0)[:, None]
    loss, _ = grpo_loss(logprobs, logprobs.detach(), advantages.expand(logprobs.shape),
                        torch.ones_like(logprobs, dtype=torch.bool), group_size)
    loss.backward()
    return logprobs.detach()


def check_equal(model, ids, prompt_length):
    """Ends with one line unless both ways give the same log-probabilities and gradients, to 1e-4 of their norm."""
    found = []
    for logprobs_of in (response_logprobs, naive_logprobs):
        logprobs = forward_backward(logprobs_of, model, ids, prompt_length, len(ids))
        found.append({"logprobs": logprobs} | {name: p.grad for name, p in model.named_parameters()})
    for name, ours in found[0].items():
        error = ((ours - found[1][name]).norm() / found[1][name].norm()).item()
        if not error <= 1e-4:
            fail(f"grpo.response_logprobs and full logits differ by {error:.1e} in {name}, 1e-4 is allowed: one "
                 f"of them is wrong, and comparing their cost means nothing")


def benchmark_loss(args):
    """Log-probabilities, Eq. 1 and backward, against the same with full logits. Without --shape or --model: a body of 2
    layers, so that the head dominates. Equality is checked in float32 on the first two rows."""
    folder = args.model
    if Path(args.model).resolve() in EMBEDDED:
        folder = make_model("head", args.seed)
    model = load_model(folder, args.device, "nthr")
    P, generator = 8, torch.Generator().manual_seed(args.seed)
    ids = torch.randint(model.config.vocab_size, (LOSS_ROWS, P + LOSS_TOKENS), generator=generator)
    ids = ids.to(args.device)
    check_equal(model, ids[:2], P)

    def run(logprobs_of):
        with precision(args.device, args.dtype):
            forward_backward(logprobs_of, model, ids, P, len(ids))

    calls = {"grpo.response_logprobs": lambda: run(response_logprobs), "full logits": lambda: run(naive_logprobs)}
    runs = interleaved({name: lambda call=call: measured(call) for name, call in calls.items()}, args.repetitions)
    peaks = {}
    for name, call in calls.items():
        model.zero_grad(set_to_none=True)                                      # gradients count for both
        peaks[name] = peak_bytes(call, args.device)
    ours, naive = calls
    rows = [[name, LOSS_ROWS, LOSS_TOKENS, model.config.vocab_size, args.dtype, args.threads,
             *times(runs[name]), f"{peaks[name] / 2 ** 20:.0f}"] for name in calls]
    return {"tables": [(["loss", "B", "T", "V", "dtype", "threads", *TIMES, "peak, MiB"], rows)],
            "measured": {"seconds": runs, "peak_bytes": peaks},
            "ratios": [ratio("peak memory, ours / full logits", [peaks[ours] / peaks[naive]], at_most=0.25),
                       compare("loss, full logits / ours", runs[naive], runs[ours], args.clock, at_least=1)]}


def benchmark_growth(args):
    """Seconds and peak bytes of a training step as one size grows and the others stay at BASE: tables, and growth.png.

    An exponent of 1 is linear. A micro-batch has 2048 tokens, as by default in train.py, which bounds memory."""
    points, ratios, rows = [], [], []
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for panel, (axis, (flag, sizes, at_most)) in zip(panels.flat, GROWTH.items()):
        steps = {}
        for size in sizes:
            point = BASE | {flag: size}
            model = make_model("small", args.seed, point["vocabulary"])
            steps[size] = our_steps(argparse.Namespace(**vars(args) | point | {
                "model": model, "data": str(TINY / "train.jsonl"), "max_sequences": 1024, "micro_batch_size": 256,
                "micro_batch_tokens": 2048}))["nthr"]
        found = interleaved(steps, args.repetitions)
        peaks = [peak_bytes(step, args.device) for step in steps.values()]
        seconds = [[run[args.clock] for run in runs] for runs in zip(*found.values())]         # one list per repetition
        for name, values, busy, side, color in (
                ("seconds", seconds, any(map(is_busy, found.values())), panel, "C0"),
                ("peak bytes", [peaks], False, panel.twinx(), "C1")):
            ratios.append(ratio(f"exponent of {axis} in {name}", [exponent(sizes, column) for column in values],
                                at_most=at_most, busy=busy))
            side.loglog(sizes, [statistics.median(column) for column in zip(*values)], "o-", color=color)
            side.set_ylabel(f"{name} ~ size^{ratios[-1]['median']:.2f}", color=color)
        panel.minorticks_off()
        panel.set_xticks(sizes, sizes)
        panel.set_xlabel(axis)
        rows += [[axis, size, *times(found[size]), f"{peak / 2 ** 20:.1f}"] for size, peak in zip(sizes, peaks)]
        points += [{"axis": axis, "size": size, "runs": found[size], "peak_bytes": peak}
                   for size, peak in zip(sizes, peaks)]
    figure.suptitle(f"a training step; what does not grow: {BASE['batch_size']} questions, G = {BASE['group_size']}, "
                    f"{BASE['max_new_tokens']} tokens, V = {BASE['vocabulary']}")
    figure.savefig(Path(args.out) / "growth.png", dpi=120)
    plt.close(figure)
    return {"tables": [(["what grows", "size", *TIMES, "peak, MiB"], rows)], "measured": points, "ratios": ratios}


BENCHMARKS = {"step": benchmark_step, "sampling": benchmark_sampling, "scores": benchmark_scores,
              "loss": benchmark_loss, "growth": benchmark_growth}


def parse_args(argv=None):
    """Flags -> Namespace; one line for values that cannot work. Makes --out, and the random model of --shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=DocFormatter)
    parser.add_argument("benchmarks", nargs="*", help="which of them (default: all)")
    add = flags.flag_adder(parser.add_mutually_exclusive_group())
    add("--model", default=str(TINY), help="Hugging Face id or folder (default: the embedded model in tiny/)")
    add("--shape", choices=["135M", "0.5B"], help="instead of --model: random weights in the shape of SmolLM2-135M or "
        "Qwen2.5-0.5B")
    add = flags.flag_adder(parser)
    add("--data", help="JSON or JSONL file of problems (default: the model's, with --shape the embedded model's)")
    add("--batch-size", type=int, help="questions per step or sampling run (default: embedded model 32, other 4)")
    add("--group-size", type=int, default=8, help="G, responses per question")
    add("--prompt-tokens", type=int, help="problems are joined to prompts of so many tokens, if a character is one "
        "(default: as they are)")
    add("--max-new-tokens", type=int, help="longest response (default: embedded model 64, other 256)")
    add("--max-sequences", type=int, help="responses sampled together")
    add("--micro-batch-size", type=int, help="responses per forward pass of a step, ours and TRL's (default: embedded "
        "model 8 groups, other one)")
    add("--goal", type=float, default=1.3, help="of a step against TRL's")
    add("--repetitions", type=int, default=5, help="of every measurement")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="compute type, as in train.py")
    add("--threads", type=int, default=1, help="CPU threads of each contender")
    add("--seed", type=int, default=0, help="of weights, data order and sampling")
    add("--out", help="output folder (default: runs/overhead-MODEL)")
    args = parser.parse_args(argv)
    embedded = not args.shape and Path(args.model).resolve() in EMBEDDED
    parser.set_defaults(
        data=str(TINY / "train.jsonl") if args.shape else flags.model_defaults(args.model)["data"],
        batch_size=32 if embedded else 4, max_new_tokens=64 if embedded else 256,
        max_sequences=flags.DEFAULTS["max_sequences"][not embedded],
        out=f"runs/overhead-{args.shape or Path(args.model).resolve().name}")
    args = parser.parse_args(argv)
    unknown = [name for name in args.benchmarks if name not in BENCHMARKS]
    if unknown:
        fail(f"no benchmark is called {unknown[0]}: choose from {', '.join(BENCHMARKS)}")
    args.benchmarks = args.benchmarks or list(BENCHMARKS)
    rows, args.micro_batch_tokens = args.batch_size * args.group_size, 10 ** 9
    if args.micro_batch_size is None:
        args.micro_batch_size = args.group_size * (math.gcd(8, args.batch_size) if embedded else 1)
    for name, least in (("batch_size", 1), ("group_size", 2), ("prompt_tokens", 1), ("max_new_tokens", 1),
                        ("max_sequences", 1), ("micro_batch_size", 1), ("seed", 0), ("repetitions", 1), ("threads", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if rows % args.micro_batch_size:
        fail(f"--micro-batch-size {args.micro_batch_size} must divide the {rows} rows of a step (--batch-size x "
             f"--group-size)")
    args.device = choose_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    args.clock = "wall" if args.device.startswith("cuda") else "cpu"
    torch.set_num_threads(args.threads)
    files.make_folder(args.out)
    if args.shape:
        args.model = make_model(args.shape, args.seed)
    if {"step", "sampling"} & set(args.benchmarks):
        args.data = write_problems(args)
    return args


def processor():
    """The name of the CPU, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def ratio_table(results, busy):
    """Every ratio of every benchmark. busy: whether the machine was, when the program started."""
    return files.markdown(
        ["ratio", "median", "95% interval", "pairs", "by wall clock", "goal", "met", "machine"],
        [[r["ratio"], f"{r['median']:.4g}", "{:.4g} – {:.4g}".format(*r["interval"]), len(r["values"]),
          f"{statistics.median(r['wall']):.4g}" if "wall" in r else "", r["goal"],
          "yes" if r["met"] else "no", "busy" if busy or r["busy"] else "quiet"]
         for result in results.values() for r in result["ratios"]])


def main(argv=None):
    load, cores = os.getloadavg()[0], os.cpu_count()                           # before this program adds to it
    args, start, results = parse_args(argv), time.perf_counter(), {}
    busy = load > cores - 0.5                                                  # the load of a run before this fades
    machine = f"load at the start: {load:.2f} on {cores} cores{', the machine is busy' if busy else ''}"
    print(machine)
    for name in args.benchmarks:
        torch.manual_seed(args.seed)
        results[name] = BENCHMARKS[name](args)
        lines = [machine, "", ratio_table(results, busy)]
        for benchmark, result in results.items():
            lines += [f"\n## {benchmark}", *(f"\n{note}" for note in result.get("notes", ())),
                      *("\n" + files.markdown(*table) for table in result["tables"])]
        (Path(args.out) / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sizes = {key: value for key, value in vars(args).items() if key not in ("model", "data", "out", "benchmarks")}
        record = common.provenance(args, time.perf_counter() - start) | {
            "processor": processor(), "cores": cores, "load": load, "busy": busy, "sizes": sizes, "results": results}
        files.write_json(Path(args.out) / "overhead.json", record)
    print("\n".join(lines), f"\nevery measurement: {args.out}/overhead.json")


if __name__ == "__main__":
    main()
