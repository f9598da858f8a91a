"""The flags of train.py: what they mean, their defaults for the embedded and for a real model, and what cannot work."""
import argparse
import json
import math
import shlex
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch

from nthr import nthr_eta
from support.checkpoint import checkpoints, read_progress
from support.data import BENCHMARKS, EMBEDDED, INSTRUCTION, TABLE_2, TINY, load_function, load_reward
from support.errors import fail, printable
from support.help import DocFormatter
from support.models import choose_device

METHODS = ("nthr", "grpo", "pos-only", "random")
DEFAULTS = {   # flag: (embedded model, real model = the paper's 0.5B settings, App. 7.3)
    "data": ("its train.jsonl", "math"), "reward": ("its own", "math"),
    "eval_data": ("its test.jsonl", "a tenth of --data, held out, or with --eval-only the five benchmarks"),
    "eval_size": (500, 200), "steps": (150, 105), "batch_size": (32, 32),
    "minibatch_size": (32, 16), "micro_batch_tokens": (2048, 16384), "lr": (1e-4, 5e-7),
    "max_new_tokens": (64, 2500), "kl_coef": (0.0, 1e-4), "max_sequences": (1024, 128), "eval_every": (50, 20),
    "save_every": (25, 5), "delta_every": (1, 10), "gradient_checkpointing": (False, True)}
NOT_INHERITED = ("model", "method", "seed", "out", "device", "dtype", "eval_only")     # by a run from another's model
MAY_CHANGE_ON_RESUME = ("steps", "eval_every", "save_every", "keep_checkpoints", "device", "out", "micro_batch_tokens",
                        "micro_batch_size", "max_sequences", "gradient_checkpointing")


def run_folder(model):
    """The output folder of the run that this --model belongs to, as that folder or a checkpoint in it; else None."""
    folder = Path(model)
    out = folder.parent if (folder / "progress.json").is_file() else folder
    return out if checkpoints(out) and "method" in read_flags(out) else None


def model_folder(model):
    """--model, or its newest checkpoint where it is the folder of a run."""
    return str(checkpoints(model)[0]) if run_folder(model) == Path(model) else model


def read_flags(out):
    """What config.json in the output folder of a run records; {} if it cannot be read."""
    try:
        recorded = json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def model_defaults(model, reward=None):
    """{flag: default} for this --model; reward: the --reward that was given.

    An embedded model brings its data and reward. The model of a run brings what its config.json records, without
    NOT_INHERITED; a line says so. A --reward file that only config.json names is not run."""
    folder, run = Path(model).resolve(), run_folder(model)
    values = {name: pair[folder not in EMBEDDED] for name, pair in DEFAULTS.items()} | {"eval_data": None}
    if folder in EMBEDDED:
        values |= {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "test.jsonl"),
                   "reward": EMBEDDED[folder]}
    if run:
        values |= {name: value for name, value in read_flags(run).items() if name not in NOT_INHERITED}
        if not reward and is_user_code(values["reward"]):
            fail(f"{model} is a model of the run {run}, whose config.json names {values['reward']}: add --reward "
                 f"{values['reward']} if you trust it")
        print(printable(f"{model} is a model of the run {run}: its flags, not --method and --seed, are the defaults "
                        f"(--data {values['data']} --reward {values['reward']} --lr {values['lr']} ...)"))
    if "instruction" not in values or reward not in (None, values["reward"]):
        values["instruction"] = INSTRUCTION if (reward or values["reward"]) == "math" else ""      # it reads the box
    return values


def flag_adder(group):
    """group.add_argument that ends the help with the default, or with the two of `DEFAULTS`."""
    def add(flag, help, **options):
        default = options.get("default")
        if flag[2:].replace("-", "_") in DEFAULTS and "(default" not in help:
            default = "embedded model {}, real model {}".format(*DEFAULTS[flag[2:].replace("-", "_")])
        shown = "" if default is None or "(default" in help else f" (default: {default})"
        group.add_argument(flag, help=help + shown, **options)
    return add


def build_parser(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=DocFormatter,
                                     usage="%(prog)s [--flag value ...]")
    add = flag_adder(parser.add_argument_group("model and data"))
    add("--model", default=str(TINY), help="Hugging Face id or local folder (default: the embedded model in tiny/)")
    add("--data", help='JSON or JSONL file; "math": MATH without MATH-500, levels 3-5; or "gsm8k"')
    add("--eval-data", help=f"files or benchmarks ({', '.join(BENCHMARKS)}) for greedy evaluation, with commas "
        "between them; with --data alone, a tenth of it is held out")
    add("--reward", help='"math" (reward.py), or FILE.py:FUNCTION, called with the response and the answer, 1 if right')
    add("--instruction", metavar="TEXT", help="what follows each problem in its prompt (default: for the reward "
        f'"math" "{INSTRUCTION}", for others nothing)')
    add("--eval-size", type=int, help="most problems per evaluation: the first of each file of --eval-data; with "
        "--eval-only all, unless the flag is given")
    add = flag_adder(parser.add_argument_group("method (Eq. 7, Eq. 8, Algorithm 1)"))
    add("--method", default="nthr", metavar=f"{{{','.join(METHODS)},FILE.py:FUNCTION}}", help="nthr: Algorithm 1; "
        "grpo: Eq. 1 alone; pos-only: no negative advantages (§3); random: as many random tokens as NTHR selects "
        "(§5.3); or a function of yours (advantages, hidden, tokens, mask, correct, lm_head, logprobs) -> advantages")
    add("--beta", type=float, default=1.0, help="β of the threshold τ (§5); --beta=-inf selects every negative token")
    add("--tau-over", default="all", choices=["all", "others"], help="s̄⁺ of τ sums over "
        "all right responses, as §5 prints, or over the others, as its words say")
    add("--eta", default="2|0.5-p|", help='η of Algorithm 1: "2|0.5-p|", "p", "1-p" (Table 5) or a number in [0, 1]')
    add("--nthr-vocab", default="responses", choices=["responses", "all"], help="V*_x (App. 7.4), or Eq. 7 exactly")
    add = flag_adder(parser.add_argument_group("sampling (§2, App. 7.3)"))
    add("--group-size", type=int, default=8, help="G, responses per question")
    add("--batch-size", type=int, help="questions per step")
    add("--max-new-tokens", type=int, help="longest response, in tokens")
    add("--temperature", type=float, default=1.0, help="π is softmax(logits / temperature) everywhere")
    add("--sampling-rounds", type=int, default=1, help="draw more questions up to this often until --batch-size groups "
        "have both right and wrong answers (dynamic sampling); groups without both are dropped in any case")
    add("--max-sequences", type=int, help="responses sampled together: bounds the KV cache")
    add = flag_adder(parser.add_argument_group("objective and update (Eq. 1, App. 7.3, App. 7.8)"))
    add("--minibatch-size", type=int, help="questions per AdamW update: batch-size / minibatch-size updates a "
        "step; never more than --batch-size by default")
    add("--micro-batch-tokens", type=int, help="most tokens per forward pass, padding included (a longer row goes "
        "alone): bounds memory")
    add("--micro-batch-size", type=int, default=256, help="most responses per forward pass")
    add("--lr", type=float, help="AdamW learning rate")
    add("--steps", type=int, help="sampling steps")
    add("--clip-eps", type=float, default=0.2, help="ε of Eq. 1")
    add("--kl-coef", type=float, help="weight of the KL penalty to the initial model (loaded a second time if > 0)")
    add("--nll-coef", type=float, default=0.0, help="weight of the NLL of correct responses (App. 7.8)")
    add("--max-grad-norm", type=float, default=1.0, help="gradient norm is clipped to this")
    add = flag_adder(parser.add_argument_group("running"))
    add("--out", help="output folder (default: runs/MODEL-METHOD-seedSEED, or runs/MODEL-eval)")
    add("--eval-only", action="store_true", help="no training: evaluate --model, print a table like Table 2 and write "
        "answers.jsonl")
    add("--resume", nargs="?", const=True, help="continue the run in this folder (or in --out) with its own flags")
    add("--eval-every", type=int, help="steps between greedy evaluations (0: only first and last)")
    add("--save-every", type=int, help="steps between checkpoints (0: only first and last)")
    add("--keep-checkpoints", type=int, default=2, help="how many: the newest, and older ones as checkpoint-STEP")
    add("--delta-every", type=int, help="steps between measurements of Δ(x), Eq. 2: one more forward pass (0: never)")
    add("--seed", type=int, default=0, help="of data order and sampling")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="compute type, weights are float32 "
        "(default: auto, bfloat16 on a CUDA GPU)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations: less memory")
    return parser


def parse_args(description, argv=None):
    """Flags -> Namespace. Defaults depend on --model; --resume takes those that its run recorded in config.json."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    if not args.resume:
        parser.set_defaults(**model_defaults(args.model, args.reward))
    if args.batch_size and isinstance(size := parser.get_default("minibatch_size"), int):          # no --resume
        parser.set_defaults(minibatch_size=min(size, args.batch_size))
    if args.data:
        parser.set_defaults(eval_data=None)                                    # evaluate on the same kind of problems
    if args.eval_only:
        if args.resume:
            fail("--eval-only evaluates a model, not a run: pass --model FOLDER/checkpoint instead of --resume FOLDER")
        if args.data and not args.eval_data:
            fail(f"--eval-only does not read --data: pass --eval-data {args.data}")
        if not args.eval_data and not parser.get_default("eval_data") and parser.get_default("data") != "math":
            fail(f"the run of {args.model} was evaluated on a part of {parser.get_default('data')}: pass --eval-data")
        parser.set_defaults(eval_data=parser.get_default("eval_data") or ",".join(TABLE_2), eval_size=sys.maxsize)
    out = (args.resume if isinstance(args.resume, str) else args.out) or default_folder(args)
    recorded = recorded_flags(out, args, parser) if args.resume else {}
    parser.set_defaults(**recorded)
    args = parser.parse_args(argv)
    args.out = out
    for name in sorted(set(recorded) - set(MAY_CHANGE_ON_RESUME)):
        if str(getattr(args, name)) != str(recorded[name]):
            fail(f"--resume continues with the run's own flags, but --{name.replace('_', '-')} {getattr(args, name)} "
                 f"is not its {recorded[name]}: leave the flag out, or start a new run")
    args.model = model_folder(args.model)
    check_flags(args)
    if args.eval_only and (Path(out) / "answers.jsonl").exists():
        fail(f"{out}/answers.jsonl holds the answers of an earlier evaluation: choose another folder, such as --out "
             f"{free_folder(out)}")
    if not args.resume and not args.eval_only and (checkpoints(out) or (Path(out) / "metrics.jsonl").exists()):
        fail_as_occupied(args)
    return args


def free_folder(out):
    """`out` with the first number at its end that makes it a folder that does not exist."""
    return next(path for path in (f"{out}-{number}" for number in count(2)) if not Path(path).exists())


def fail_as_occupied(args):
    """One line for an --out that holds a run: which of its flags differ, and what to do."""
    recorded, flags = read_flags(args.out), recordable_flags(args)
    differing = [f"--{name.replace('_', '-')} {recorded[name]} instead of {flags[name]}"
                 for name in sorted(flags.keys() & recorded.keys() - set(MAY_CHANGE_ON_RESUME))
                 if str(flags[name]) != str(recorded[name])]
    kind = f" with {', '.join(differing)}" if differing else ""
    resume = ""
    if recorded.keys() >= flags.keys() and not differing:                      # else --resume would refuse
        done = 0
        with suppress(OSError, ValueError, TypeError, IndexError):             # no checkpoint yet, or a damaged one
            done = read_progress(checkpoints(args.out)[0]).step
        steps = args.steps if args.steps > done else done + args.steps         # a finished run needs more of them
        more = f" --steps {steps}" if steps != recorded["steps"] else ""
        resume = f"continue it with {resume_command(args)}{more}, or "
    fail(f"{args.out} already holds a run{kind}: {resume}choose another folder, such as --out {free_folder(args.out)}")


def default_folder(args):
    """The output folder where no flag names one."""
    folder = Path(args.model).resolve()
    name = folder.parent.name if folder.name.startswith("checkpoint") else folder.name
    method = args.method.rpartition(":")[2]                                    # FILE.py:FUNCTION
    return f"runs/{name}-" + ("eval" if args.eval_only else f"{method}-seed{args.seed}")


def is_user_code(value):
    """Whether this --reward or --method is none of the project's own, but a file that would be run."""
    return value not in ("math", *EMBEDDED.values(), *METHODS)


def recorded_flags(out, args, parser):
    """{flag: value} from the config.json of a run. A file that only config.json names is not run."""
    path = Path(out) / "config.json"
    if not path.is_file():
        fail(f"--resume: {out} holds no run (no config.json): name the run's folder, or start without --resume")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        missing = set(vars(parser.parse_args([]))) - {"resume"} - set(recorded)
    except (ValueError, TypeError) as error:
        fail(f"--resume: {path} is damaged ({error}): start a new run with --model {out}/checkpoint")
    if missing:
        fail(f"--resume: {path} lacks {', '.join(sorted(missing))[:200]}: start a new run with --model "
             f"{out}/checkpoint")
    for name in ("reward", "method"):
        if is_user_code(recorded[name]) and getattr(args, name) != recorded[name]:
            fail(f"--resume would run {recorded[name]}, which {path} names: add --{name} {recorded[name]} if you "
                 f"trust it")
    return {name: float(value) if value in ("inf", "-inf") else value for name, value in recorded.items()
            if name != "eval_only"}


def recordable_flags(args):
    """The flags as JSON can hold them, for config.json."""
    return {name: str(value) if value in (math.inf, -math.inf) else value for name, value in vars(args).items()
            if name != "resume"}


def resume_command(args):
    """The command that continues the run. A --reward or --method file is code, which it must name again."""
    files = [f" --{name} {shlex.quote(getattr(args, name))}" for name in ("reward", "method")
             if getattr(args, name) and is_user_code(getattr(args, name))]
    return f"python train.py --resume {shlex.quote(str(args.out))}{''.join(files)}"


def check_flags(args):
    """One line for flags that cannot work, before anything is loaded; settles device and dtype "auto"."""
    for names, expected, valid in (
            ("batch_size minibatch_size micro_batch_tokens micro_batch_size steps max_new_tokens sampling_rounds "
             "max_sequences eval_size keep_checkpoints",
             "at least 1", lambda value: value >= 1),
            ("group_size", "at least 2, because advantages compare responses", lambda value: value >= 2),
            ("kl_coef nll_coef eval_every save_every delta_every seed", "0 or more, and finite",
             lambda value: 0 <= value < math.inf),
            ("lr temperature", "finite and above 0", lambda value: 0 < value < math.inf),
            ("clip_eps max_grad_norm", "above 0", lambda value: value > 0),
            ("beta", "a real number or -inf", lambda value: value < math.inf)):
        for name in names.split():
            value = getattr(args, name)
            if not isinstance(value, (int, float)) or not valid(value):        # a config.json may hold any type
                fail(f"--{name.replace('_', '-')} must be {expected}, got {value}")
    if args.batch_size % args.minibatch_size:
        best = max(size for size in range(1, args.minibatch_size + 1) if args.batch_size % size == 0)
        fail(f"--batch-size {args.batch_size} must be a multiple of --minibatch-size {args.minibatch_size}: try "
             f"--minibatch-size {best}")
    args.device = choose_device(args.device)
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)                                     # what memory and time are measured on
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    load_reward(args.reward)
    if args.method not in METHODS:
        load_function("--method", args.method)
    try:
        nthr_eta(0.5, args.eta)
    except ValueError as error:
        fail(f"--eta {args.eta} cannot be used: {str(error).splitlines()[0][:200]}")
