"""What the scripts share that work on a model: flags, groups of sampled responses, and where a result comes from."""
import argparse
import math
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer

from files import ROOT
from rollout import Rollout, generate
from support.data import EMBEDDED, TINY, encode_prompts, load_function, load_problems, load_reward, step_seed
from support.errors import fail
from support.flags import flag_adder, model_defaults, model_folder
from support.help import DocFormatter
from support.models import choose_device, load_model, load_pretrained

RULES = [f"{os.path.relpath(ROOT / 'experiments' / 'multipliers.py')}:{name}" for name in (
    "lowest_entropy", "highest_entropy", "highest_probability", "lowest_probability", "errors_alone", "states_alone",
    "top_10_percent", "top_20_percent", "top_50_percent", "ar", "resrl")]
SMALL = 1e8        # parameters: models of up to so many are studied in float64


@dataclass
class Group:
    """G responses to one question, some right and some wrong."""
    index: int               # of the question in --data
    problem: str
    answer: str
    rollout: Rollout         # G rows
    correct: torch.Tensor    # (G,) bool


def build_parser(doc, script, questions, eta):
    """The flags of an experiment that scores groups of responses from one model; `questions`: (embedded, real)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=DocFormatter, usage="%(prog)s [--flag value ...]")
    add = flag_adder(parser.add_argument_group("model, data and sampling"))
    add("--model", default=str(TINY),
        help="Hugging Face id or local folder (default: the embedded model in tiny/)")
    add("--data", help='JSON or JSONL file, or "math": MATH without MATH-500, levels 3-5; or "gsm8k"')
    add("--reward", help='"math", or FILE.py:FUNCTION')
    add("--instruction", metavar="TEXT", help="what follows each problem, as for train.py")
    add("--questions", type=int, help=f"groups with both right and wrong responses to collect (default: embedded model "
        f"{questions[0]}, real model {questions[1]})")
    add("--group-size", type=int, default=8, help="G, responses per question")
    add("--temperature", type=float, default=1.0, help="of sampling, and of π everywhere")
    add("--max-new-tokens", type=int, help="longest response, in tokens")
    add("--max-sequences", type=int, help="responses sampled together: bounds the KV cache")
    add("--micro-batch-size", type=int, help="responses per forward pass: bounds memory (default: embedded model "
        "--group-size, real model 4)")
    add("--seed", type=int, default=0, help="of the questions, of sampling and of GRPO + Random")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--out", help=f"output folder (default: runs/{script}-MODEL)")
    add = flag_adder(parser.add_argument_group("NTHR (Eq. 7, Eq. 8)"))
    add("--beta", type=float, default=1.0, help="β of the threshold τ")
    add("--tau-over", default="all", choices=["all", "others"], help="the right responses that s̄⁺ of τ sums over")
    add("--eta", default=eta, help="η: a rule of Table 5 or a number in [0, 1]")
    add("--nthr-vocab", default="responses", choices=["responses", "all"], help="V*_x (App. 7.4), or Eq. 7 exactly")
    parser.set_defaults(script=script, questions_by_model=questions)
    return parser


def parse_flags(parser, argv):
    """Flags -> Namespace, with the defaults of --model; one line for values that cannot work."""
    args = parser.parse_args(argv)
    embedded = Path(args.model).resolve() in EMBEDDED
    defaults = model_defaults(args.model, args.reward)
    defaults["micro_batch_size"] = args.group_size if embedded else 4
    for name in ("data", "reward", "instruction", "max_new_tokens", "max_sequences", "micro_batch_size"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    if args.questions is None:
        args.questions = args.questions_by_model[not embedded]
    for name, least in (("questions", 1), ("group_size", 2), ("max_new_tokens", 1), ("max_sequences", 1),
                        ("micro_batch_size", 1), ("seed", 0)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not 0 < args.temperature < math.inf:
        fail(f"--temperature must be finite and above 0, got {args.temperature}")
    args.device = choose_device(args.device)
    load_reward(args.reward)
    args.out = args.out or f"runs/{args.script}-{Path(args.model).resolve().name}"
    args.model = model_folder(args.model)
    return args


def load_rules(sources, taken):
    """{name: function} of FILE.py:FUNCTION each, as of train.py's --method; one line if two have one name."""
    names = [source.rpartition(":")[2] for source in sources]
    if len({*names} - {*taken}) < len(names):
        fail(f"--rules must be functions of different names, none of {', '.join(taken)}, got {' '.join(names)}")
    return {name: load_function("--rules", source) for name, source in zip(names, sources)}


def load_model_and_prompts(args):
    """(model, tokenizer, problems, prompts): weights and compute in float32, since bfloat16 would drown Δ(x)."""
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    problems = load_problems(args.data)
    model = load_model(args.model, args.device, "nthr")
    prompts = encode_prompts(problems, tokenizer, model.config, args.max_new_tokens, args.instruction)
    return model, tokenizer, problems, prompts


def to_float64(model):
    """A model of up to SMALL parameters in float64 throughout, in place; a larger one as it is.

    transformers' RMS norms compute in float32 whatever they are given, so they are replaced."""
    if model.num_parameters() > SMALL:
        return model
    for module in model.double().modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, norm=module: F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return model


def mixed_groups(model, tokenizer, problems, prompts, args):
    """Sample until `args.questions` questions have both right and wrong responses: a list of that many `Group`s.

    Also returns how many questions were sampled, and the share of right responses to them. Questions come in an order
    drawn with --seed, none twice. Sampling keeps no states: the scripts compute theirs in float64. Ends with one line
    if no group is mixed, and with what there is (a line says so) if the data runs out."""
    order = np.random.default_rng(args.seed).permutation(len(problems)).tolist()
    reward, G, groups, sampled, right = load_reward(args.reward), args.group_size, [], 0, 0
    at_once = max(1, args.max_sequences // G)
    with tqdm(total=args.questions, desc="sampling mixed groups", unit=" questions") as bar:
        while len(groups) < args.questions and sampled < len(order):
            batch = order[sampled:sampled + at_once]
            rollout = generate(model, tokenizer, [prompts[q] for q in batch], G, args.max_new_tokens, args.temperature,
                               step_seed(args.seed, sampled), args.max_sequences, keep_hidden=False)
            for i, q in enumerate(batch):
                sampled += 1
                rows, gold = torch.arange(i * G, (i + 1) * G), problems[q]["answer"]
                correct = torch.tensor([reward(rollout.texts[row], gold) == 1 for row in rows.tolist()])
                right += int(correct.sum())
                if 0 < correct.sum() < G:
                    groups.append(Group(q, problems[q]["problem"], gold, rollout.select(rows), correct.to(args.device)))
                    bar.update()
                    if len(groups) == args.questions:
                        break
    if not groups:
        fail(f"none of {sampled} questions got both right and wrong responses: use other --data, a larger "
             f"--group-size or a longer --max-new-tokens")
    if len(groups) < args.questions:
        print(f"the data has no more questions: {len(groups)} mixed groups instead of {args.questions}")
    return groups, sampled, right / (G * sampled)


def provenance(args, seconds=None):
    """Where a result comes from: the command, the settings, the machine and, where it means something, the time."""
    on_gpu, threads = args.device.startswith("cuda"), torch.get_num_threads()
    device = torch.cuda.get_device_name(args.device) if on_gpu else f"CPU threads: {threads}"
    return {"command": shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "seed": args.seed, "machine": f"{platform.machine()}, {device}", "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({} if seconds is None else {"seconds": round(seconds, 1)})}
