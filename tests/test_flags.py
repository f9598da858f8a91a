"""The flags of train.py: help, defaults, what cannot work, --eval-only, and the flags that a run recorded."""
import json
import math
import re
import shlex
import sys
from types import SimpleNamespace

import pytest

from helpers import ROOT, error_of, not_json, run_here, small_flags, train_functions, write
from support import flags
from support.flags import build_parser, default_folder, recordable_flags, resume_command

GROUPS = {   # title: its flags and the defaults that the help must show; None where there is none to show
    "model and data": {
        "model": "the embedded model in tiny/", "data": "embedded model its train.jsonl, real model math",
        "eval-data": "embedded model its test.jsonl, real model a tenth of --data, held out, or with --eval-only the "
                     "five benchmarks",
        "reward": "embedded model its own, real model math",
        "instruction": 'for the reward "math" "Please reason step by step, and put your final answer within '
                       '\\boxed{}.", for others nothing',
        "eval-size": "embedded model 500, real model 200"},
    "method (Eq. 7, Eq. 8, Algorithm 1)": {
        "method": "nthr", "beta": "1.0", "eta": "2|0.5-p|", "nthr-vocab": "responses",
        "tau-over": "all"},
    "sampling (§2, App. 7.3)": {
        "group-size": "8", "batch-size": "embedded model 32, real model 32", "temperature": "1.0",
        "max-new-tokens": "embedded model 64, real model 2500", "sampling-rounds": "1",
        "max-sequences": "embedded model 1024, real model 128"},
    "objective and update (Eq. 1, App. 7.3, App. 7.8)": {
        "minibatch-size": "embedded model 32, real model 16", "micro-batch-size": "256",
        "micro-batch-tokens": "embedded model 2048, real model 16384", "clip-eps": "0.2", "nll-coef": "0.0",
        "lr": "embedded model 0.0001, real model 5e-07", "steps": "embedded model 150, real model 105",
        "kl-coef": "embedded model 0.0, real model 0.0001", "max-grad-norm": "1.0"},
    "running": {
        "out": "runs/MODEL-METHOD-seedSEED, or runs/MODEL-eval", "eval-only": None, "resume": None,
        "eval-every": "embedded model 50, real model 20", "save-every": "embedded model 25, real model 5",
        "keep-checkpoints": "2", "delta-every": "embedded model 1, real model 10", "seed": "0", "device": "auto",
        "dtype": "auto, bfloat16 on a CUDA GPU", "gradient-checkpointing": "embedded model False, real model True"}}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(*argv):
    return flags.parse_args("train.py", [*map(str, argv), "--device", "cpu"])


def refusal(*argv):
    """The one line with which these flags are refused."""
    with pytest.raises(SystemExit) as caught:
        flags.parse_args("train.py", [*map(str, argv)])
    message = caught.value.code
    assert str(message).startswith("error: ") and message.isprintable() and len(message) < 700, message
    return message


# ------------------------------------------------------------------------------------------------- 1. help and commands

def test_help_shows_each_flag_in_its_group_with_its_default_on_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as caught:
        run_here("--help")
    printed = capsys.readouterr()
    assert caught.value.code in (0, None) and printed.err == ""
    for line in train_functions()["__doc__"].splitlines()[2:]:                 # the comment above its command
        command, _, comment = line.partition("  # ")
        assert f"{'# ' * bool(comment)}{comment}\n{command.strip()}\n" in printed.out.replace(" \\\n    ", " "), line
    wrong = [line for line in printed.out.splitlines() if len(line) > 80]
    for title, defaults in GROUPS.items():
        section = re.search(rf"^{re.escape(title)}:\n((?:  .*\n|\n)*)", printed.out, re.MULTILINE)
        texts = dict(re.findall(r"^  --([a-z-]+)\b(.*\n(?: {10}.*\n)*)", section[1], re.MULTILINE)) if section else {}
        if sorted(texts) != sorted(defaults):
            wrong.append((title, sorted(texts)))
        for name, default in defaults.items():
            text = " ".join(texts.get(name, "").split())
            shown = text.endswith(f"(default: {default})") if default else "default" not in text
            if not shown or text.count("default:") > 1:
                wrong.append((name, text))
    assert wrong == []
    assert len(printed.out.splitlines()) <= 150                                # three screens


def test_every_flag_is_explained():
    for action in build_parser("")._actions:
        assert action.help and len(action.help) > 10 or action.dest == "seed", action.option_strings


def test_the_commands_of_the_docstring_parse(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^python train\.py([^#\n]*)#", train_functions()["__doc__"], re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        words = shlex.split(command)
        args = build_parser("").parse_args(words)
        if args.resume:
            assert args.resume == "runs/tiny-nthr-seed0"                       # what the first command writes
        else:
            parse(*words, "--out", tmp_path / "run")


# --------------------------------------------------------------------------------------------------------- 2. defaults

def test_defaults_for_a_real_model_are_the_papers():
    args = parse("--model", "x/y")
    paper = {"batch_size": 32, "minibatch_size": 16, "lr": 5e-7, "max_new_tokens": 2500, "kl_coef": 1e-4,
             "clip_eps": 0.2, "steps": 105, "group_size": 8, "temperature": 1.0, "beta": 1.0, "eta": "2|0.5-p|",
             "nthr_vocab": "responses", "data": "math", "method": "nthr", "nll_coef": 0.0, "reward": "math"}
    assert {name: getattr(args, name) for name in paper} == paper
    assert args.eval_data is None and args.gradient_checkpointing and args.out == "runs/y-nthr-seed0"


def test_the_embedded_models_bring_their_data_and_reward(monkeypatch):
    monkeypatch.chdir(ROOT)
    for argv, folder in (([], "tiny"), (["--model", "tiny"], "tiny"), (["--model", "tiny/stack/"], "tiny/stack"),
                         (["--model", ROOT / "tiny" / "stack"], "tiny/stack")):
        args = parse(*argv, "--out", "none")
        assert args.data == str(ROOT / folder / "train.jsonl") and args.eval_data == str(ROOT / folder / "test.jsonl")
        reward = "math" if folder == "tiny" else f"{ROOT / 'tiny' / 'stack_machine.py'}:program_reward"
        assert args.reward == reward and (args.steps, args.lr, args.kl_coef) == (150, 1e-4, 0.0)
        assert not args.gradient_checkpointing
    assert parse("--data", "mine.jsonl", "--out", "none").eval_data is None    # its own problems are held out
    assert parse("--data", "mine.jsonl", "--eval-data", "b.jsonl", "--out", "none").eval_data == "b.jsonl"


def test_a_flag_overrides_the_default_of_either_model():
    for model in ([], ["--model", "x/y"]):
        args = parse(*model, "--lr", "3e-6", "--steps", 9, "--no-gradient-checkpointing", "--seed", 4,
                     "--method", "grpo")
        assert (args.lr, args.steps, args.gradient_checkpointing) == (3e-6, 9, False)
        assert args.out == f"runs/{'y' if model else 'tiny'}-grpo-seed4"
    assert parse("--gradient-checkpointing").gradient_checkpointing and parse("--beta=-inf").beta == -math.inf


def test_bfloat16_computes_on_a_cuda_gpu_only(monkeypatch):
    for device, dtype, expected in (
            ("cpu", "auto", "float32"), ("cuda", "auto", "bfloat16"), ("mps", "auto", "float32"),
            ("cuda", "float32", "float32"), ("cpu", "bfloat16", "bfloat16")):
        monkeypatch.setattr(flags, "choose_device", lambda name: device)
        args = flags.parse_args("", ["--dtype", dtype])
        assert (args.device, args.dtype) == (device, expected)


def test_the_default_folder_is_named_after_model_method_and_seed(tmp_path):
    for model, method, eval_only, folder in (
            ("Qwen/Qwen2.5-0.5B", "nthr", False, "runs/Qwen2.5-0.5B-nthr-seed3"), (".", "grpo", False, "grpo-seed3"),
            ("runs/mine/checkpoint", "nthr", False, "runs/mine-nthr-seed3"),
            ("a/b/", "x.py:rule", False, "runs/b-rule-seed3"),
            ("runs/mine/checkpoint", "nthr", True, "runs/mine-eval"), ("x/y", "nthr", True, "runs/y-eval"),
            ("runs/mine/checkpoint-20", "nthr", True, "runs/mine-eval")):
        args = SimpleNamespace(model=model, method=method, eval_only=eval_only, seed=3)
        found = default_folder(args)
        assert folder in found and found.startswith("runs/") and found.count("/") == 1, found
    assert default_folder(SimpleNamespace(model=".", method="grpo", eval_only=False, seed=3)) == (
        f"runs/{tmp_path.name}-grpo-seed3")


# ------------------------------------------------------------------------------------------------ 3. what cannot work

def test_a_flag_that_cannot_work_is_named_with_its_value_and_what_was_expected(tmp_path):
    cases = [   # (flags, what the message must say)
        (["--group-size", 1], ["--group-size", "at least 2", "got 1"]),
        (["--batch-size", 10, "--minibatch-size", 4], ["--batch-size 10", "--minibatch-size 4", "multiple"]),
        (["--eta", "half"], ["--eta half", "2|0.5-p|", "[0, 1]"]), (["--eta", 1.5], ["--eta 1.5", "[0, 1]"]),
        (["--eta", "nan"], ["--eta nan", "[0, 1]"]), (["--eta=-0.5"], ["--eta -0.5", "[0, 1]"]),
        *((["--beta", value], ["--beta", "real number or -inf", f"got {value}"]) for value in ("nan", "inf")),
        *((["--device", device], [f"--device {device} cannot be used"]) for device in (
            "toaster", "cuda:99", "xla", "meta", "hpu", "privateuseone", "vulkan")),
        *(([f"--{name}={value}"], [f"--{name}", "at least 1", f"got {value}"]) for value in (0, -1) for name in (
            "steps", "batch-size", "minibatch-size", "micro-batch-tokens", "micro-batch-size", "max-new-tokens",
            "max-sequences", "sampling-rounds", "eval-size", "keep-checkpoints")),
        *(([f"--{name}={value}"], [f"--{name}", "finite and above 0", f"got {value}"]) for name in ("lr", "temperature")
          for value in ("-1.0", "0.0", "inf", "nan")),
        *(([f"--{name}={value}"], [f"--{name}", "0 or more", f"got {value}"]) for name in ("kl-coef", "nll-coef")
          for value in ("-0.1", "nan", "inf")),
        *(([f"--{name}=-1"], [f"--{name}", "0 or more", "got -1"]) for name in ("seed", "eval-every", "save-every",
                                                                              "delta-every")),
        *(([f"--{name}={value}"], [f"--{name}", "above 0", f"got {value}"]) for name in ("clip-eps", "max-grad-norm")
          for value in ("0.0", "nan")),
        (["--method", "ntrh"], ["--method", "a name that --help lists or FILE.py:FUNCTION", "got ntrh"]),
        (["--reward", "grader"], ["--reward", "FILE.py:FUNCTION", "got grader"]),
        (["--method", "none.py:f"], ["--method", "none.py cannot be run", "FileNotFoundError"]),
        (["--reward", f"{ROOT}/reward.py:grade"], ["--reward", "reward.py defines no function grade"])]
    wrong = []
    for argv, expected in cases:
        message = refusal("--device", "cpu", *argv)
        wrong += [(argv, message)] * any(part not in message for part in expected)
    assert wrong == [] and list(tmp_path.iterdir()) == []


def test_values_at_the_edge_work():
    for argv in (["--group-size", 2], ["--seed", 0], ["--eval-every", 0], ["--save-every", 0], ["--delta-every", 0],
                 ["--kl-coef", 0], ["--clip-eps", "inf"], ["--max-grad-norm", "inf"], ["--batch-size", 1,
                 "--minibatch-size", 1], ["--eta", 0], ["--eta", 1], ["--eta", "p"], ["--eta", "1-p"], ["--beta", -5],
                 ["--temperature", 1e-30], ["--keep-checkpoints", 1], ["--method", "random"], ["--steps", 1]):
        parse(*argv)


def test_what_the_parser_cannot_read_ends_with_its_usage(capsys):
    for argv in (["--steps", "many"], ["--dtype", "float16"], ["--nthr-vocab", "some"], ["--learning-rate", 1],
                 ["tiny"]):
        with pytest.raises(SystemExit) as caught:
            parse(*argv)
        assert caught.value.code == 2 and str(argv[0]) in capsys.readouterr().err, argv


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path):
    """Whatever is wrong: flags, data, the model or the length of a prompt."""
    usual, out = small_flags(tmp_path), tmp_path / "run"
    context = json.loads((ROOT / "tiny" / "config.json").read_text())["max_position_embeddings"]
    one = write(tmp_path / "one.jsonl", '{"problem": "1", "answer": 1}')
    for argv, expected in (
            (["--batch-size", 12, "--minibatch-size", 8], "--batch-size 12"),
            (["--model", "no/such/model"], "no/such/model"),
            (["--data", tmp_path / "none.jsonl"], "none.jsonl"), (["--eval-data", "none.jsonl"], "none.jsonl"),
            (["--max-new-tokens", context], f"context of {context}"), (["--steps", 0], "--steps")):
        for extra in ([], ["--eval-only"]):
            if extra and argv[0] in ("--data", "--batch-size", "--steps"):
                continue
            usual_here = usual[2:] if extra else usual                         # --eval-only reads no --data
            assert expected in error_of(*usual_here, *argv, *extra, "--out", out), (argv, extra)
            assert not out.exists(), (argv, extra)
    message = error_of("--data", one, "--device", "cpu", "--out", out)         # no --eval-data
    assert "--eval-data" in message and str(one) in message and not out.exists()


def test_an_output_path_that_cannot_be_a_folder_is_refused(tmp_path):
    path = write(tmp_path / "file", "mine")
    for extra in ([], ["--eval-only"]):
        usual = small_flags(tmp_path)
        assert str(path) in error_of(*usual[2 * bool(extra):], "--steps", 1, *extra, "--out", path)
    assert path.read_text() == "mine"


# ------------------------------------------------------------------------------------------------------- 4. --eval-only

def test_eval_only_takes_the_five_benchmarks_and_all_problems_unless_told_otherwise():
    args = parse("--eval-only", "--model", "x/y")
    assert args.eval_data == "aime24,amc23,math500,minerva,olympiadbench" and args.eval_size >= 10**6
    assert args.out == "runs/y-eval"
    assert parse("--eval-only", "--model", "x/y", "--eval-size", 7).eval_size == 7
    assert parse("--eval-only", "--model", "x/y", "--eval-data", "amc23").eval_data == "amc23"
    for folder in (ROOT / "tiny", ROOT / "tiny" / "stack"):
        args = parse("--eval-only", "--model", folder)
        assert args.eval_data == str(folder / "test.jsonl") and args.out == f"runs/{folder.name}-eval"


def test_eval_only_with_what_it_cannot_use_is_refused(tmp_path):
    message = refusal("--eval-only", "--resume", tmp_path)
    assert "--eval-only" in message and "instead of --resume" in message
    message = refusal("--eval-only", "--data", "mine.jsonl", "--out", tmp_path)
    assert "does not read --data" in message and "--eval-data mine.jsonl" in message
    parse("--eval-only", "--data", "mine.jsonl", "--eval-data", "b.jsonl")     # ignored, as its evaluation is named
    write(tmp_path / "answers.jsonl", "mine")
    message = refusal("--eval-only", "--out", tmp_path, "--device", "cpu")
    assert str(tmp_path / "answers.jsonl") in message and "--out" in message
    parse("--out", tmp_path)                                                   # a training run does not write them


# ----------------------------------------------------------------------------------------------- 5. flags of a past run

def recorded_run(folder, *argv, **changes):
    """A folder with the config.json of a run with these flags."""
    folder.mkdir()
    args = parse(*argv, "--out", folder)
    config = {name: value for name, value in vars(args).items() if name != "resume"} | changes
    write(folder / "config.json", json.dumps(config).replace("-Infinity", '"-inf"').replace("Infinity", '"inf"'))
    return folder


def test_a_resumed_run_keeps_its_flags_but_for_those_that_do_not_change_its_result(tmp_path):
    folder = recorded_run(tmp_path / "run", "--batch-size", 8, "--minibatch-size", 4, "--lr", 2e-3, "--seed", 5)
    args = flags.parse_args("", ["--resume", str(folder), "--steps", "7"])
    assert (args.batch_size, args.minibatch_size, args.lr, args.seed, args.steps) == (8, 4, 2e-3, 5, 7)
    assert args.out == str(folder) and args.device == "cpu"
    for name, value in (("eval-every", 2), ("save-every", 3), ("keep-checkpoints", 4), ("micro-batch-tokens", 99),
                        ("micro-batch-size", 3), ("max-sequences", 5)):
        args = flags.parse_args("", ["--resume", str(folder), f"--{name}", str(value)])
        assert getattr(args, name.replace("-", "_")) == value, name
    assert flags.parse_args("", ["--resume", str(folder), "--gradient-checkpointing"]).gradient_checkpointing
    assert flags.parse_args("", ["--resume", "--out", str(folder)]).lr == 2e-3
    flags.parse_args("", ["--resume", str(folder), "--lr", "0.002"])           # the same value
    for name, value in (("lr", 0.5), ("method", "grpo"), ("seed", 6), ("group-size", 4), ("data", "x.jsonl"),
                        ("model", "x/y"), ("temperature", 0.5), ("max-new-tokens", 3), ("reward", "math2")):
        message = refusal("--resume", folder, f"--{name}", value)
        assert "--resume" in message and f"--{name} {value}" in message, name
    assert "is not its 0.002" in refusal("--resume", folder, "--lr", 0.5)


def test_an_infinite_flag_is_recorded_in_strict_json_and_read_again(tmp_path):
    recorded = json.dumps(recordable_flags(parse("--clip-eps", "inf", "--beta=-inf")), allow_nan=False)
    values = json.loads(recorded, parse_constant=not_json)
    assert (values["clip_eps"], values["beta"], values["lr"]) == ("inf", "-inf", 1e-4) and "resume" not in values
    folder = recorded_run(tmp_path / "run", "--clip-eps", "inf", "--beta=-inf")
    args = flags.parse_args("", ["--resume", str(folder)])
    assert (args.clip_eps, args.beta) == (math.inf, -math.inf)


def test_a_folder_without_a_run_or_with_a_strange_config_is_named(tmp_path):
    for argv in (["--resume", tmp_path / "none"], ["--resume", "--out", tmp_path / "none"]):
        assert f"{tmp_path / 'none'} holds no run" in refusal(*argv)
    assert "runs/tiny-nthr-seed0 holds no run" in refusal("--resume")
    folder = recorded_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    for changed, words in (([1], "lacks"), ({"steps": 3}, "lacks"), (5, "damaged"), ("{", "damaged"), (None, "damaged"),
                           ({name: value for name, value in config.items() if name != "lr"}, "lacks lr"),
                           ({**config, "lr": None}, "--lr must be"), ({**config, "steps": [3]}, "--steps must be")):
        write(folder / "config.json", changed if changed == "{" else json.dumps(changed))
        message = refusal("--resume", folder)
        assert words in message and ("must be" in words or str(folder / "config.json") in message), changed


def test_code_that_only_a_runs_folder_names_is_not_run(tmp_path):
    for name in ("reward", "method"):
        folder, ran = tmp_path / name, tmp_path / f"ran {name}"
        file = write(tmp_path / f"my {name}.py", f"open({str(ran)!r}, 'w')\n\n\ndef f(*args):\n    return 1\n")
        recorded_run(folder, **{name: f"{file}:f"})
        for argv in ([], [f"--{name}", "mine.py:f"]):
            message = refusal("--resume", folder, *argv)
            assert f"would run {file}:f" in message and f"add --{name} {file}:f if you trust it" in message
        assert not ran.exists()
        args = flags.parse_args("", ["--resume", str(folder), f"--{name}", f"{file}:f"])
        assert ran.exists()
        words = shlex.split(resume_command(args))
        assert words == ["python", "train.py", "--resume", str(folder), f"--{name}", f"{file}:f"]
    assert resume_command(parse("--model", ROOT / "tiny" / "stack")) == "python train.py --resume runs/stack-nthr-seed0"


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    logged, saved = tmp_path / "logged", tmp_path / "saved"
    (saved / "checkpoint").mkdir(parents=True)
    logged.mkdir()
    write(logged / "metrics.jsonl", '{"step": 0}\n')
    write(saved / "checkpoint" / "progress.json", "{}")
    for folder in (logged, saved):
        message = refusal("--out", folder, "--device", "cpu")
        assert "already holds a run: choose another folder, such as --out" in message and "--resume" not in message
    parse("--eval-only", "--out", logged)                        # answers.jsonl may be put beside it


def test_what_differs_from_the_run_in_the_folder_is_named_and_resume_is_advised_where_it_works(tmp_path):
    """The advised command is read by the parser; where there is none, --resume with these flags is refused, too."""
    file = write(tmp_path / "mine.py", "def f(*args):\n    return 1\n")
    given = {   # flags after those of the run, and what the message says of them; None: they do not differ
        (): None, ("--steps", 9): None, ("--device", "cpu", "--save-every", 3): None, ("--lr", "0.002"): None,
        ("--lr", 0.5): "--lr 0.002 instead of 0.5", ("--method", "grpo"): "--method nthr instead of grpo",
        ("--beta=-inf",): "--beta 1.0 instead of -inf",
        ("--instruction", "Be brief."): "--instruction  instead of Be brief.",
        ("--seed", 4, "--eta", "p"): "--eta 2|0.5-p| instead of p, --seed 3 instead of 4"}
    usual = ["--reward", f"{file}:f", "--lr", 2e-3, "--seed", 3]
    for number, (flags_given, words) in enumerate(given.items()):
        folder = recorded_run(tmp_path / str(number), *usual)
        write(folder / "metrics.jsonl", '{"step": 0}\n')
        (tmp_path / f"{number}-2").mkdir()
        message = refusal(*usual, *flags_given, "--out", folder)
        assert f"{folder} already holds a run{f' with {words}' if words else ''}: " in message, message
        assert message.endswith(f"choose another folder, such as --out {folder}-3"), message
        resumed = [str(flag) for flag in ("--resume", folder, *usual, *flags_given)]
        if words:
            assert "--resume" not in message and "leave the flag out" in refusal(*resumed), message
        else:
            advised = shlex.split(re.search(r"python train\.py (.*), or choose", message)[1])
            args = flags.parse_args("", advised)
            assert args.out == str(folder) and args.steps == flags.parse_args("", resumed).steps
    older = json.loads((folder / "config.json").read_text())
    del older["instruction"]                                                   # of a run before that flag
    write(folder / "config.json", json.dumps(older))
    assert "--resume" not in refusal(*usual, "--out", folder) and "lacks" in refusal("--resume", folder)
    folder = recorded_run(tmp_path / "finished", *usual)                       # more steps are left to advise
    (folder / "checkpoint").mkdir()
    write(folder / "checkpoint" / "progress.json", '{"step": 150}')
    assert "--steps 300, or choose" in refusal(*usual, "--out", folder)


# -------------------------------------------------------------------------------------------- 6. a model of a run

def test_the_box_is_asked_for_where_the_math_reward_reads_it(tmp_path):
    file, box = write(tmp_path / "mine.py", "def f(*args):\n    return 1\n"), "put your final answer within \\boxed{}."
    for model, reward, instruction in (
            (ROOT / "tiny", None, box), (ROOT / "tiny", "math", box), (ROOT / "tiny", f"{file}:f", ""),
            ("x/y", None, box), ("x/y", f"{file}:f", ""), (ROOT / "tiny" / "stack", None, ""),
            (ROOT / "tiny" / "stack", "math", box)):
        argv = ["--model", model, *(["--reward", reward] if reward else [])]
        found = parse(*argv).instruction
        assert found.endswith(instruction) and bool(instruction) == bool(found), argv
        for text in ("Be brief.", ""):
            assert parse(*argv, "--instruction", text).instruction == text


def test_a_default_mini_batch_is_at_most_the_batch_and_an_explicit_one_must_divide_it():
    for model, default in ([], 32), (["--model", "x/y"], 16):
        for size, expected in ((1, 1), (2, 2), (default - 1, default - 1), (default, default), (96, default)):
            args = parse(*model, "--batch-size", size)
            assert (args.batch_size, args.minibatch_size) == (size, expected)
        assert "--batch-size 2 must be a multiple of --minibatch-size 32" in refusal(
            *model, "--device", "cpu", "--batch-size", 2, "--minibatch-size", 32)
        assert parse(*model, "--batch-size", 8, "--minibatch-size", 4).minibatch_size == 4


SETTINGS = ["--data", "its.jsonl", "--eval-data", "its test.jsonl", "--eval-size", 7, "--instruction", "Be brief.",
            "--lr", 3e-3, "--group-size", 5, "--temperature", 0.7, "--max-new-tokens", 33, "--steps", 12,
            "--batch-size", 6, "--kl-coef", 0.25,
            "--max-sequences", 9, "--micro-batch-tokens", 77, "--eval-every", 4, "--save-every", 3, "--delta-every", 2,
            "--no-gradient-checkpointing"]


def saved_run(folder, *argv):
    """The folder of a run with these flags and two checkpoints."""
    recorded_run(folder, *argv)
    for name in ("checkpoint-4", "checkpoint"):
        (folder / name).mkdir()
        write(folder / name / "progress.json", "{}")
        write(folder / name / "config.json", '{"model_type": "qwen2"}')
    return folder


def test_a_model_of_a_run_brings_the_data_the_reward_and_the_defaults_of_that_run(tmp_path, capsys):
    file = write(tmp_path / "mine.py", "def f(*args):\n    return 1\n")
    folder, real = saved_run(tmp_path / "mine", *SETTINGS, "--reward", f"{file}:f"), parse("--model", "x/y")
    names = [flag[2:].removeprefix("no-").replace("-", "_") for flag in SETTINGS if str(flag).startswith("--")]
    for model, newest in ((folder, "checkpoint"), (f"{folder}/", "checkpoint"), (folder / "checkpoint", "checkpoint"),
                          (f"{folder}/checkpoint/", "checkpoint"), (folder / "checkpoint-4", "checkpoint-4")):
        capsys.readouterr()
        args = parse("--model", model, "--reward", f"{file}:f", "--out", "new")
        printed = capsys.readouterr().out
        assert args.model.rstrip("/") == str(folder / newest) and args.reward == f"{file}:f"
        recorded = json.loads((folder / "config.json").read_text())
        assert {name: getattr(args, name) for name in names} == {name: recorded[name] for name in names}
        assert all(recorded[name] != getattr(real, name) for name in names)    # each of them would be another
        assert printed.count("\n") == 1 and f"is a model of the run {folder}: " in printed
        assert "--data its.jsonl" in printed and f"--reward {file}:f" in printed
        args = parse("--model", model, "--reward", "math", "--lr", 1e-6, "--steps", 2, "--data", "b.jsonl",
                     "--out", "new")
        assert (args.lr, args.steps, args.data, args.reward, args.batch_size) == (1e-6, 2, "b.jsonl", "math", 6)
        assert args.eval_data is None and args.instruction.endswith("boxed{}.")     # of that data, for that reward
        args = parse("--eval-only", "--model", model, "--reward", f"{file}:f", "--out", "new")
        assert args.eval_data == "its test.jsonl" and args.eval_size > 10 ** 6 and args.instruction == "Be brief."
    assert default_folder(parse("--model", folder, "--reward", "math")) == "runs/mine-nthr-seed0"
    tiny = saved_run(tmp_path / "tiny run")
    args = parse("--model", tiny / "checkpoint", "--out", "new")
    assert (args.data, args.lr, args.max_new_tokens) == (str(ROOT / "tiny" / "train.jsonl"), 1e-4, 64)


def test_an_experiment_on_the_model_of_a_run_takes_its_data_reward_and_instruction(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "experiments"))
    import common
    import lld

    folder = saved_run(tmp_path / "mine", *SETTINGS, "--reward", "math")
    for model in (folder, folder / "checkpoint"):
        capsys.readouterr()
        args = common.parse_flags(lld.build_parser(), ["--model", str(model), "--device", "cpu"])
        assert args.model == str(folder / "checkpoint")
        assert f"is a model of the run {folder}: " in capsys.readouterr().out
        assert (args.data, args.reward, args.instruction, args.max_new_tokens, args.max_sequences) == (
            "its.jsonl", "math", "Be brief.", 33, 9)
        args = common.parse_flags(lld.build_parser(), ["--model", str(model), "--device", "cpu", "--data", "b.jsonl",
                                                       "--max-new-tokens", "5", "--instruction", ""])
        assert (args.data, args.max_new_tokens, args.instruction) == ("b.jsonl", 5, "")


def test_an_evaluation_of_a_run_that_held_problems_out_asks_for_others(tmp_path):
    folder = saved_run(tmp_path / "run", "--data", "mine.jsonl")
    assert "on a part of mine.jsonl: pass --eval-data" in refusal("--eval-only", "--model", folder)
    assert parse("--eval-only", "--model", folder, "--eval-data", "b.jsonl").eval_data == "b.jsonl"
    folder = saved_run(tmp_path / "math", "--model", "x/y")
    assert parse("--eval-only", "--model", folder).eval_data == ",".join(flags.TABLE_2)


def test_a_reward_file_that_only_the_run_of_the_model_names_is_not_run(tmp_path):
    ran = tmp_path / "ran"
    file = write(tmp_path / "my reward.py", f"open({str(ran)!r}, 'w')\n\n\ndef f(*args):\n    return 1\n")
    folder = recorded_run(tmp_path / "stranger", reward=f"{file}:f", method=f"{file}:f")
    (folder / "checkpoint").mkdir()
    for model in (folder, folder / "checkpoint"):
        write(folder / "checkpoint" / "progress.json", "{}")
        for extra in ([], ["--eval-only"]):
            message = refusal("--model", model, *extra, "--out", "new")
            assert f"whose config.json names {file}:f: add --reward {file}:f if you trust it" in message
        assert parse("--model", model, "--reward", "math", "--out", "new").method == "nthr"
        assert not ran.exists()
    parse("--model", folder, "--reward", f"{file}:f", "--out", "new")
    assert ran.exists()


def test_a_folder_with_a_damaged_or_another_config_is_a_plain_model(tmp_path, capsys):
    """The folder of a Hugging Face model, or of its Trainer, too: their config.json has no --method."""
    folder, real = saved_run(tmp_path / "mine", "--lr", 3e-3), parse("--model", "x/y", "--out", "new")
    capsys.readouterr()
    for content in ("{", "[1]", "5", "null", b"\xff{}", '{"model_type": "qwen2", "lr": 0.003}', None):
        (folder / "config.json").unlink() if content is None else write(folder / "config.json", content)
        for model in (folder / "checkpoint", folder):
            args = parse("--model", model, "--out", "new")
            assert (args.data, args.lr, args.model) == ("math", real.lr, str(model)), (content, model)
    assert capsys.readouterr().out == ""
