"""What NTHR, sampling and the loss cost, as ratios measured in one run on this machine.

python experiments/overhead.py                              # all five benchmarks on the embedded model
python experiments/overhead.py step scores                  # some of them
python experiments/overhead.py --shape 0.5B --device cuda   # random weights in the shape of Qwen2.5-0.5B

    step      seconds by phase of a step of `python train.py` (Table 3), and NTHR's share of it
    scores    NTHR's scores alone over the tokens of a group (App. 7.4): seconds, peak memory, growth
    sampling  `rollout.generate` against `model.generate` of transformers, in tokens per second
    loss      `grpo.response_logprobs` and Eq. 1 against full logits, at V = 151936: peak memory and seconds
    trl       a step of `python train.py`, with NTHR and without, against one of TRL's GRPOTrainer (pip install trl)

What is compared runs in turn in every repetition, in the opposite order every second time, after one run each that is
not counted. A ratio is formed within each repetition; its median, smallest and largest value are printed. Time is
wall-clock time. Memory is measured in runs of its own. The reward calls every second response right. --out gets
overhead.json with every single measurement, the logs of train.py, and the folders of random models.
"""
import argparse
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import common
from grpo import grpo_loss, response_logprobs
from nthr import nthr_scores, nthr_scores_pairwise
from rollout import generate, stop_token_ids
from support.data import EMBEDDED, TINY, encode_prompts, load_problems
from support.errors import fail
from support.flags import DEFAULTS, flag_adder, model_defaults
from support.memory import PHASES
from support.models import choose_device, load_config, load_model, load_pretrained, precision

# Shapes: G responses of a question, B rows, P prompt tokens, T response tokens, V vocabulary, d hidden size,
#         N tokens of a group
VOCABULARY = 151936
SHAPES = {    # of Qwen2.5, tied: layers, d, heads, key-value heads, intermediate size; "head" is 0.5B with 2 layers
    "0.5B": (24, 896, 14, 2, 4864), "1.5B": (28, 1536, 12, 2, 8960), "3B": (36, 2048, 16, 2, 11008),
    "head": (2, 896, 14, 2, 4864)}
PAPER = {"data_generation": 250, "nthr": 22, "old_probabilities": 55, "reference": 55, "model_update": 140}  # Table 3
CHUNK = 512             # tokens at a time in `nthr_scores`, its default
PAIRWISE = 512          # the largest group that is also scored pair by pair
DISTINCT = 512          # token ids that the responses of one group are drawn from, at most
REWARD = f"{Path(__file__).resolve()}:alternating"
os.environ.setdefault("KINETO_LOG_LEVEL", "6")                                 # the profiler's start is not news


def alternating(response, answer, turns=itertools.cycle((1.0, 0.0))):
    """A reward that calls every second response right, whatever it says: every group is mixed, none is dropped, and
    no two programs do a different amount of work. Also called by train.py, as its --reward."""
    return next(turns)


def ratio(name, values, at_least=None, at_most=None):
    """A ratio with one value per repetition: median, smallest, largest, and whether the median reaches the goal."""
    median = statistics.median(values)
    goal, met = (f"<= {at_most:g}", median <= at_most) if at_least is None else (f">= {at_least:g}", median >= at_least)
    return {"ratio": name, "median": median, "min": min(values), "max": max(values), "goal": goal, "met": met,
            "values": list(values)}


def cells(values, form):
    """Two cells of a table: the median, and the smallest and largest value."""
    return [format(statistics.median(values), form), f"{min(values):{form}} – {max(values):{form}}"]


def growth(sizes, values):
    """The exponent of values ~ sizes^exponent: the least-squares slope in logarithms over the larger half of the sizes,
    where fixed costs weigh least. sizes ascending, at least two. 1 is linear, 2 quadratic."""
    half = max(2, math.ceil(len(sizes) / 2))
    return statistics.linear_regression([math.log(x) for x in sizes[-half:]],
                                        [math.log(y) for y in values[-half:]]).slope


def schedule(names, repetitions):
    """The names in the order of running: each once as a warm-up, then every repetition, every second one backwards."""
    return [name for r in range(repetitions + 1) for name in (list(names)[::-1] if r % 2 == 0 and r else names)]


def interleaved(contenders, repetitions):
    """{name: function without arguments} -> {name: its results, one per repetition}, run as `schedule` says."""
    results = {name: [] for name in contenders}
    for name in tqdm(schedule(contenders, repetitions), desc=" / ".join(contenders), leave=False):
        results[name].append(contenders[name]())
    return {name: found[1:] for name, found in results.items()}


def on_gpu(args):
    return args.device.startswith("cuda")


def seconds_now():
    """A clock in seconds, read once a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function):
    """(what the function returns, the seconds it took)."""
    start = seconds_now()
    result = function()
    return result, seconds_now() - start


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


def make_model(folder, shape, seed):
    """A Qwen2 model of random weights as an ordinary model folder, with the embedded model's tokenizer; kept if it is
    there already. shape: a key of SHAPES. Returns the folder."""
    if not folder.is_dir():
        layers, hidden, heads, key_value_heads, intermediate = SHAPES[shape]
        print(f"making {folder}: random weights in the shape of {shape}")
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_value_heads, tie_word_embeddings=True,
            max_position_embeddings=32768, eos_token_id=1, pad_token_id=0))
        part = folder.with_name(folder.name + ".tmp")                          # a folder under its name is complete
        model.to(torch.bfloat16).save_pretrained(part)
        load_pretrained(AutoTokenizer, str(TINY)).save_pretrained(part)
        part.rename(folder)
    return folder


def train_metrics(args, method, steps, *flags):
    """Metrics of `steps` steps of `python train.py` with this model and these sizes, after one that is not counted.

    One AdamW update a step, no Δ(x); no evaluation but of one problem before and after all steps. `flags` are added."""
    folder = Path(args.out) / f"train-{method}"
    shutil.rmtree(folder, ignore_errors=True)
    names = ("model", "data", "batch_size", "group_size", "max_new_tokens", "max_sequences", "seed", "device", "dtype")
    given = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    fixed = ["--eval-size=1", "--eval-every=0", "--save-every=0", "--keep-checkpoints=1", "--delta-every=0"]
    result = subprocess.run(
        [sys.executable, str(common.ROOT / "train.py"), *given, *fixed, f"--minibatch-size={args.batch_size}",
         f"--eval-data={args.data}", f"--reward={REWARD}", f"--method={method}", f"--steps={steps + 1}",
         f"--out={folder}", *flags], stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TQDM_DISABLE": "1"})
    if result.returncode:
        fail(f"train.py ended with: {(result.stderr.splitlines() or ['nothing'])[-1].removeprefix('error: ')}")
    shutil.rmtree(folder / "checkpoint")                                       # gigabytes for a real model
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row) for row in rows[2:]]                               # step 0 has no seconds, step 1 warms up


def step_seconds(metrics):
    """Seconds of a step of train.py, all phases together; the evaluation after the last step is none of them."""
    return sum(metrics["seconds"][phase] for phase in PHASES)


def benchmark_step(args):
    """Table 3: seconds by phase of a training step.

    With one update a step nothing is spent on old probabilities: sampling keeps what the paper computes there."""
    steps = train_metrics(args, "nthr", args.repetitions)
    totals, rows = [step_seconds(step) for step in steps], []
    for phase, paper in PAPER.items():
        seconds = [step["seconds"][phase] for step in steps]
        share = statistics.median(s / total for s, total in zip(seconds, totals))
        rows.append([phase, *cells(seconds, ".4f"), f"{share:.2%}", paper, f"{paper / sum(PAPER.values()):.1%}"])
    rows.append(["total", *cells(totals, ".4f"), "", sum(PAPER.values()), ""])
    shares = [step["seconds"]["nthr"] / total for step, total in zip(steps, totals)]
    return {"header": ["phase", "seconds", "min – max", "share", "paper: seconds", "share"], "rows": rows,
            "measured": [{phase: step["seconds"][phase] for phase in PHASES} for step in steps],
            "ratios": [ratio("NTHR / step", shares, at_most=0.005 if on_gpu(args) else 0.03)]}


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
    measured, rows, ratios = [], [], []
    for names, sizes in ((list(variants)[:3], args.score_tokens),
                         (["pairwise"], [size for size in args.score_tokens if size <= PAIRWISE])):
        for size in sizes:
            group, logprobs = random_group(size, lm_head, args)
            U, chunk = len(group[1].unique()), min(size, CHUNK)
            runs = {name: lambda name=name: variants[name](group, logprobs) for name in names}
            seconds = interleaved({name: lambda run=run: timed(run)[1] for name, run in runs.items()}, args.repetitions)
            numbers = {"all": chunk * V + V * d + size * d, "responses": chunk * V + U * d + size * d,
                       "responses, logprobs": (chunk + d) * U + size * d, "pairwise": size * V}
            measured += [{"variant": name, "tokens": size, "ids": U, "seconds": seconds[name],
                          "peak_bytes": peak_bytes(run, args.device), "bound_bytes": 4 * numbers[name]}
                         for name, run in runs.items()]
    for name in variants:
        found = [row for row in measured if row["variant"] == name]
        sizes, shares = [row["tokens"] for row in found], [row["peak_bytes"] / row["bound_bytes"] for row in found]
        exponents = [growth(sizes, times) for times in zip(*(row["seconds"] for row in found))] if found[1:] else []
        rows += [[name, row["tokens"], row["ids"], *cells(row["seconds"], ".5f"), f"{row['peak_bytes'] / 2 ** 20:.1f}",
                  f"{share:.2f}", f"{statistics.median(exponents):.2f}" if exponents else ""]
                 for row, share in zip(found, shares)]
        if name != "pairwise":
            ratios += [ratio(f"growth with N, {name}", exponents, at_most=1.2)] if exponents else []
            ratios.append(ratio(f"peak / bound at any N, {name}", [max(shares)], at_most=4))
    return {"header": ["variant", "N", "ids in use", "seconds", "min – max", "peak, MiB", "peak / bound", "growth"],
            "rows": rows, "measured": measured, "ratios": ratios}


def lengths_until(responses, stop_ids):
    """(B, T) tokens -> the tokens of each response up to and including its first stop token. (B,)."""
    stops = torch.isin(responses, torch.tensor(stop_ids, dtype=torch.long, device=responses.device))
    return torch.where(stops.any(1), stops.int().argmax(1) + 1, responses.shape[1])


def library_generate(model, tokenizer, prompts, stop_ids, args):
    """Tokens that transformers' own `model.generate` samples: the same distribution, stop ids and rows at a time.

    The model's generation_config must be set aside by the caller: its values fill whatever is None here."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens,
                              num_return_sequences=args.group_size, eos_token_id=stop_ids or None, pad_token_id=pad_id)
    tokens, at_once = 0, max(1, args.max_sequences // args.group_size)
    for part in (prompts[i:i + at_once] for i in range(0, len(prompts), at_once)):
        width = max(map(len, part))
        ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in part], device=args.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part], device=args.device)
        sequences = model.generate(ids, attention_mask=mask, generation_config=config)
        tokens += int(lengths_until(sequences[:, width:], stop_ids).sum())
    return tokens


def benchmark_sampling(args):
    """Tokens per second, each counted up to its stop. Ours also returns log-probabilities, the hidden states that NTHR
    reads, and decoded texts.

    "stops": at the model's stop ids, for random weights at every 64th id of the vocabulary, which gives lengths with a
    mean of about 64; "fixed length": no stop id, every response has --max-new-tokens."""
    tokenizer, model = load_pretrained(AutoTokenizer, args.model), load_model(args.model, args.device, "nthr")
    problems = load_problems(args.data)[:args.batch_size]
    prompts = encode_prompts(problems, tokenizer, model.config, args.max_new_tokens, "")
    stops = list(range(0, VOCABULARY, 64)) if args.shape else stop_token_ids(model, tokenizer)
    model.generation_config = GenerationConfig()                               # no repetition penalty, top-p or EOS
    rows, ratios, measured = [], [], {}
    for name, stop_ids in (("stops", stops), ("fixed length", [])):

        def ours():
            with precision(args.device, args.dtype):
                rollout = generate(model, tokenizer, prompts, args.group_size, args.max_new_tokens,
                                   max_sequences=args.max_sequences, stop_ids=stop_ids)
            return int(rollout.response_mask.sum())

        def theirs():
            with precision(args.device, args.dtype):
                return library_generate(model, tokenizer, prompts, stop_ids, args)

        found = interleaved({"rollout.generate": lambda: timed(ours), "model.generate": lambda: timed(theirs)},
                            args.repetitions)
        speeds = {who: [tokens / seconds for tokens, seconds in runs] for who, runs in found.items()}
        rows += [[name, who, *cells(speeds[who], ".0f"), f"{statistics.median(tokens for tokens, _ in runs):.0f}"]
                 for who, runs in found.items()]
        ratios.append(ratio(f"rollout.generate / model.generate, {name}",
                            [a / b for a, b in zip(*speeds.values())], at_least=2 if on_gpu(args) else 1.5))
        measured[name] = found                                                 # who: [(tokens, seconds)]
    return {"header": ["lengths", "sampler", "tokens/s", "min – max", "tokens"], "rows": rows, "measured": measured,
            "ratios": ratios}


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
        folder = str(make_model(Path(args.out) / "head", "head", args.seed))
    model = load_model(folder, args.device, "nthr")
    P, generator = 8, torch.Generator().manual_seed(args.seed)
    ids = torch.randint(model.config.vocab_size, (args.loss_rows, P + args.loss_tokens), generator=generator)
    ids = ids.to(args.device)
    check_equal(model, ids[:2], P)

    def run(logprobs_of):
        with precision(args.device, args.dtype):
            forward_backward(logprobs_of, model, ids, P, len(ids))

    contenders = {"grpo.response_logprobs": lambda: run(response_logprobs), "full logits": lambda: run(naive_logprobs)}
    seconds = interleaved({name: lambda f=f: timed(f)[1] for name, f in contenders.items()}, args.repetitions)
    peaks = {}
    for name, f in contenders.items():
        model.zero_grad(set_to_none=True)                                      # gradients count for both
        peaks[name] = peak_bytes(f, args.device)
    ours, naive = contenders
    rows = [[name, *cells(seconds[name], ".3f"), f"{peaks[name] / 2 ** 20:.0f}"] for name in contenders]
    return {"header": [f"B = {args.loss_rows}, T = {args.loss_tokens}, V = {model.config.vocab_size}", "seconds",
                       "min – max", "peak, MiB"], "rows": rows, "measured": {"seconds": seconds, "peak_bytes": peaks},
            "ratios": [ratio("peak memory, ours / full logits", [peaks[ours] / peaks[naive]], at_most=0.25),
                       ratio("seconds, full logits / ours",
                             [b / a for a, b in zip(seconds[ours], seconds[naive])], at_least=1)]}


def benchmark_trl(args):
    """A step of `python train.py`, with NTHR and without, against a step of TRL's GRPOTrainer.

    The same on both sides: model, questions, prompts, rows, longest response, reward, AdamW and its learning rate,
    dtype and activation checkpointing; one update a step, no KL.
    Counted: of ours, all phases of the second step of a program of its own, whose first step warms up; of TRL, from the
    start to the end of each step but the first, by a callback that also runs our programs between TRL's steps.
    Neither counts logging, saving and evaluation.
    What differs: ours leaves out what lies between its phases, a few milliseconds; ours has made one update before,
    TRL one more in each repetition, so that lengths differ (hence the ratio per token); ours keeps hidden states while
    sampling, TRL computes the entropy of every token; TRL's rows per forward pass are --trl-rows, ours the default of
    train.py; TRL's process waits, with its memory, while ours runs."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        return {"not_run": f"trl was not run ({error}): pip install trl"}
    rows, on_cpu, defaults = args.batch_size * args.group_size, args.device == "cpu", model_defaults(args.model)
    tokenizer, problems = load_pretrained(AutoTokenizer, args.model), load_problems(args.data)[:args.batch_size]
    prompts = encode_prompts(problems, tokenizer, load_config(args.model), args.max_new_tokens, "")
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    if len(texts) < args.batch_size:
        fail(f"{args.data} has {len(texts)} problems only: lower --batch-size {args.batch_size}")
    if tokenizer(texts).input_ids != prompts:
        fail(f"the tokenizer of {args.model} does not turn the text of a prompt into the same ids again, so that "
             f"TRL would train on others: choose another model")
    data = Path(args.out) / "problems.jsonl"                                   # every step has these questions
    data.write_text("".join(json.dumps(row) + "\n" for row in problems), encoding="utf-8")
    found = {"nthr": [], "grpo": [], "trl": []}                                # who: [(tokens, seconds)]
    order = iter(["trl", *schedule(found, args.repetitions)[len(found):]])     # ours warms up in each of its programs
    sampled = []

    def reward(completions, completion_ids, **_):
        sampled.append(sum(map(len, completion_ids)))
        return [alternating(text, None) for text in completions]

    def ours_until_trl():
        for method in itertools.takewhile(lambda name: name != "trl", order):
            step, = train_metrics(args, method, 1, f"--data={data}", f"--eval-data={data}", "--kl-coef=0")
            tokens = round(step["tokens_per_second"] * step["seconds"]["data_generation"])
            found[method].append((tokens, step_seconds(step)))

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            ours_until_trl()
            self.start = seconds_now()

        def on_step_end(self, *_, **__):
            found["trl"].append((sampled[-1], seconds_now() - self.start))

    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)       # TRL 1.16 uses the old names
    checkpointing = ("activation_checkpointing" if hasattr(GRPOConfig, "activation_checkpointing")
                     else "gradient_checkpointing")                            # before transformers 5.24
    config = GRPOConfig(
        output_dir=f"{args.out}/trl", max_steps=args.repetitions + 1, per_device_train_batch_size=args.trl_rows or rows,
        gradient_accumulation_steps=rows // (args.trl_rows or rows), num_generations=args.group_size,
        max_completion_length=args.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, num_iterations=1,
        learning_rate=defaults["lr"], lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=1.0, bf16=args.dtype == "bfloat16", use_cpu=on_cpu, disable_dropout=True, use_vllm=False,
        report_to="none", logging_strategy="no", save_strategy="no", eval_strategy="no", disable_tqdm=True,
        seed=args.seed, shuffle_dataset=False, dataloader_pin_memory=not on_cpu,
        **{checkpointing: defaults["gradient_checkpointing"]})
    model = load_model(args.model, args.device, "grpo")
    model.generation_config.eos_token_id = stop_token_ids(model, tokenizer)    # TRL reads them here
    trainer = GRPOTrainer(model, reward, config, Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
                          callbacks=[Stopwatch()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    ours_until_trl()                                                           # the end of a last repetition backwards
    del found["trl"][0]                                                        # the warm-up
    table = []
    for name, runs in found.items():
        tokens, seconds = zip(*runs)
        table.append(["TRL GRPOTrainer" if name == "trl" else f"ours, {name}", *cells(seconds, ".3f"),
                      f"{statistics.median(tokens):.0f}", f"{statistics.median(s / t for t, s in runs) * 1e6:.1f}"])
    ratios, goal = [], 1.5 if on_gpu(args) else 1.3
    for method in ("nthr", "grpo"):
        pairs = list(zip(found["trl"], found[method]))
        ratios += [ratio(f"seconds per step, TRL / {method}", [b[1] / a[1] for b, a in pairs], at_least=goal),
                   ratio(f"seconds per token, TRL / {method}", [b[1] / b[0] / (a[1] / a[0]) for b, a in pairs],
                         at_least=goal)]
    return {"header": ["trainer", "seconds per step", "min – max", "tokens per step", "µs per token"], "rows": table,
            "measured": found, "ratios": ratios}


BENCHMARKS = {"step": benchmark_step, "scores": benchmark_scores, "sampling": benchmark_sampling,
              "loss": benchmark_loss, "trl": benchmark_trl}


def parse_args(argv=None):
    """Flags -> Namespace; one line for values that cannot work. Makes --out, and the random model of --shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", help="which of them (default: all)")
    add = flag_adder(parser.add_mutually_exclusive_group())
    add("--model", default=str(TINY), help="Hugging Face id or folder (default: the embedded model in tiny/)")
    add("--shape", choices=["0.5B", "1.5B", "3B"], help="instead of --model: random weights in this shape of Qwen2.5")
    add = flag_adder(parser)
    add("--data", help="JSON or JSONL file of problems (default: the model's, with --shape the embedded model's)")
    add("--batch-size", type=int, help="questions per step or sampling run (default: embedded model 32, other 8)")
    add("--group-size", type=int, default=8, help="G, responses per question")
    add("--max-new-tokens", type=int, help="longest response (default: embedded model 64, other 256)")
    add("--max-sequences", type=int, help="responses sampled together")
    add("--score-tokens", type=int, nargs="+", default=[256 * 2 ** i for i in range(7)], help="sizes of a group, N")
    add("--loss-rows", type=int, default=8, help="B of the loss")
    add("--loss-tokens", type=int, default=512, help="T of the loss")
    add("--trl-rows", type=int, help="rows per forward pass in TRL: bounds its memory (default: all of a step)")
    add("--repetitions", type=int, default=5, help="of every measurement")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="compute type, as in train.py")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--seed", type=int, default=0, help="of weights, data order and sampling")
    add("--out", help="output folder (default: runs/overhead-MODEL)")
    args = parser.parse_args(argv)
    embedded = not args.shape and Path(args.model).resolve() in EMBEDDED
    parser.set_defaults(
        data=str(TINY / "train.jsonl") if args.shape else model_defaults(args.model)["data"],
        batch_size=32 if embedded else 8, max_new_tokens=64 if embedded else 256,
        max_sequences=DEFAULTS["max_sequences"][not embedded],
        out=f"runs/overhead-{args.shape or Path(args.model).resolve().name}")
    args = parser.parse_args(argv)
    unknown = [name for name in args.benchmarks if name not in BENCHMARKS]
    if unknown:
        fail(f"no benchmark is called {unknown[0]}: choose from {', '.join(BENCHMARKS)}")
    args.benchmarks = args.benchmarks or list(BENCHMARKS)
    rows = args.batch_size * args.group_size
    for name, least in (("batch_size", 1), ("group_size", 2), ("max_new_tokens", 1), ("max_sequences", 1), ("seed", 0),
                        ("loss_rows", 2), ("loss_tokens", 1), ("repetitions", 1), ("threads", 1), ("trl_rows", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    args.score_tokens = sorted(set(args.score_tokens))
    if args.score_tokens[0] < 1 or any(size % args.group_size for size in args.score_tokens):
        fail(f"--score-tokens must be multiples of --group-size {args.group_size}, got "
                   f"{' '.join(map(str, args.score_tokens))}")
    if rows % (args.trl_rows or rows):
        fail(f"--trl-rows {args.trl_rows} must divide the {rows} rows of a step (--batch-size x --group-size)")
    args.device = choose_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if on_gpu(args) else "float32"
    torch.set_num_threads(args.threads or torch.get_num_threads())
    common.make_folder(args.out)
    if args.shape:
        args.model = str(make_model(Path(args.out) / args.shape, args.shape, args.seed))
    return args


def processor():
    """The name of the CPU, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main(argv=None):
    args, start, results = parse_args(argv), time.perf_counter(), {}
    for name in args.benchmarks:
        torch.manual_seed(args.seed)
        results[name] = result = BENCHMARKS[name](args)
        print(f"\n## {name}\n")
        if "not_run" in result:
            print(result["not_run"])
        else:
            print(common.markdown(result["header"], result["rows"]), "\n")
            print(common.markdown(["ratio", "median", "min", "max", "goal", "met"], [
                [r["ratio"], *(f"{r[key]:.4g}" for key in ("median", "min", "max")), r["goal"],
                 "yes" if r["met"] else "no"] for r in result["ratios"]]))
        sizes = {key: value for key, value in vars(args).items() if key not in ("model", "data", "out", "benchmarks")}
        record = common.provenance(args, time.perf_counter() - start) | {"processor": processor(), "sizes": sizes}
        common.write_json(Path(args.out) / "overhead.json", record | {"results": results})
    print(f"\nevery measurement: {args.out}/overhead.json")


if __name__ == "__main__":
    main()
