"""Ablations of NTHR (Tables 2, 4, 5, App. 7.8) and what the paper leaves open: clipping, KL, learning rate, group size.

python experiments/ablations.py                     # embedded model: 52 settings x 5 seeds, over 2 hours on 2 cores
python experiments/ablations.py --quick             # the paper's four tables, 3 seeds, 25 steps: 42 runs
python experiments/ablations.py --tables methods kl --seeds 8
python experiments/ablations.py --tables methods --rules my.py:rule                  # a credit rule of your own
python experiments/ablations.py --model tiny/stack --tables methods beta eta         # programs, 60 runs
python experiments/ablations.py --model Qwen/Qwen2.5-0.5B --tables methods --max-new-tokens 1024     # one GPU

Every run is `python train.py` with a setting's flags and a seed: the same questions in the same order for each setting.
Settings that tables share are run once; a second start keeps finished runs and continues half-finished ones from their
checkpoint. Flags that are not listed below go to train.py unchanged. --out gets runs/ (config.json, metrics.jsonl,
samples.jsonl and log.txt of each run; its checkpoint goes when it is finished), results.csv (one row per run), and made
from results.csv alone: results.json, tables.md, ablations.png.

It shows whether a setting ends above or below plain GRPO: the difference is taken seed by seed, and a 95% interval
(Student's t over the seeds, on the same test problems) that holds 0 is no evidence of a difference. Of twenty intervals
without a difference, one excludes 0 by chance: believe a pattern over several rows, not one row. The embedded model is
trained for 60 steps of 16 questions, which ends before its greedy accuracy levels off. Runs share the machine, so that
no seconds are stated: overhead.py measures time.
"""
import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

import common
import files
import matplotlib
from matplotlib import pyplot as plt
from support.checkpoint import checkpoints
from support.data import EMBEDDED, TINY
from support.errors import fail, printable
from support.flags import is_user_code, parse_args as parse_train_flags
from support.help import DocFormatter

matplotlib.use("Agg")                                                          # files only, no window
TRAIN = files.ROOT / "train.py"
SHORT = ["--steps=60", "--batch-size=16", "--minibatch-size=16", "--micro-batch-tokens=2048", "--eval-every=0",
         "--eval-size=600", "--delta-every=5"]                                 # of an embedded model
QUICK = {"steps": 25, "seeds": 3, "tables": ["methods", "beta", "eta", "nll"]}
METHODS = {"grpo": "GRPO", "pos-only": "Pos Only", "random": "GRPO + Random", "nthr": "NTHR"}
NLL_COEF = 0.1                                                                 # App. 7.8
SETTINGS = ("method", "beta", "eta", "tau_over", "nll_coef", "clip_eps", "kl_coef", "lr", "group_size", "batch_size",
            "minibatch_size")                                                  # flags of train.py that tables vary
MEANS = ("delta_mean", "delta_nonpositive_share", "selected_share", "clip_share")   # over all steps that measured them
MEASURES = ("eval_accuracy", "success_rate", *MEANS)
TITLES = {
    "methods": "Table 2: methods", "beta": "Table 4: β of the threshold τ, and both readings of τ",
    "rules": "Other rules", "eta": "Table 5: η",
    "nll": f"App. 7.8: NLL of the correct responses, coefficient {NLL_COEF}. GRPO with it is compared with plain GRPO",
    "clip": "Clipping and updates per step. With 1 update the ratio of Eq. 1 is exactly 1 and no clip acts: it is run "
            "once, with the default ε", "kl": "KL penalty", "lr": "Learning rate", "group-size": "Group size G"}
SHOWN = (("success_rate", 1, 100), ("delta_mean", 4, 1), ("delta_nonpositive_share", 1, 100),   # digits, factor
         ("selected_share", 2, 100), ("clip_share", 3, 100))
HEADER = ("setting", "greedy accuracy ± standard error, %", "seeds", "difference to GRPO, points [95% interval]",
          "p (Holm)", "success rate, last 10 steps, %", "Δ, nats", "Δ ≤ 0, %", "tokens selected, %",
          "tokens clipped, %")


# ------------------------------------------------------------------------------------------- settings, tables, numbers

def layout(base, rules=()):
    """{table: [(label, settings)]}; settings and `base`, the plain run's, are dicts of the names in SETTINGS.

    rules: FILE.py:FUNCTION each, for the table "rules"."""
    def row(method, label="", **changes):
        return METHODS.get(method, method.rpartition(":")[2]) + label, {**base, "method": method, **changes}

    def both(label, **changes):
        return [row(method, f", {label}", **changes) for method in ("grpo", "nthr")]

    batch = base["batch_size"]
    return {
        "methods": [row(method) for method in METHODS],
        "beta": [row("nthr", f", β = {label}", beta=beta, tau_over="all")
                 for label, beta in (("−∞", -math.inf), ("0", 0.0), ("0.1", 0.1), ("1", 1.0))] + [
            row("nthr", f", β = {beta:g}, τ over the others", beta=beta, tau_over="others") for beta in (0.1, 1.0)],
        "rules": [row("grpo"), row("nthr")] + [
            row(method, ", τ over the others", tau_over="others") for method in ("nthr", "random")] + [
            row(method) for method in rules] if rules else [],
        "eta": [row("nthr", f", η = {eta}", eta=eta) for eta in ("p", "1-p", "2|0.5-p|", "0")],
        "nll": both("no NLL", nll_coef=0.0) + both("NLL", nll_coef=NLL_COEF),
        "clip": both("1 update", minibatch_size=batch) + [
            pair for updates in (2, 4) for eps in (0.1, 0.2, math.inf)
            for pair in both(f"{updates} updates, ε = {'none' if eps == math.inf else eps}",
                             minibatch_size=batch // updates, clip_eps=eps)],
        "kl": [pair for kl in (0.0, 1e-4, 1e-2) for pair in both(f"KL {kl:g}", kl_coef=kl)],
        "lr": [pair for lr in (float(f"{base['lr'] * factor:.3g}") for factor in (1 / 3, 1, 3, 10))
               for pair in both(f"lr {lr:g}", lr=lr)],
        "group-size": [pair for G in (4, 8, 16) for pair in both(f"G = {G}", group_size=G)]}


def run_name(settings, base):
    """The method and what differs from the plain run: "nthr", "grpo-lr=0.0003", ..."""
    values = {name: value if isinstance(value, str) else f"{value:g}" for name, value in settings.items()}
    changed = [f"{name}={values[name]}" for name in SETTINGS[1:] if settings[name] != base[name]]
    return "-".join([settings["method"].rpartition(":")[2], *changed]).replace("|", "")     # no | in Windows' folders


def baseline(settings, base):
    """The settings of the GRPO run to compare with, all else equal; of GRPO with NLL: without; of GRPO: None."""
    grpo = {**settings, "method": "grpo", **{name: base[name] for name in ("beta", "eta", "tau_over")}}
    if settings["method"] == "grpo":
        return {**grpo, "nll_coef": 0.0} if settings["nll_coef"] else None
    return grpo


def t_inside(t, df):
    """P(|T| < t) for Student's T with a whole df >= 1.

    Abramowitz & Stegun 26.7.3 (odd df) and 26.7.4 (even df), with θ = arctan(t / √df)."""
    theta, odd = math.atan(t / math.sqrt(df)), df % 2
    term = total = (math.cos(theta) if df > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def t_quantile(df):
    """t with P(|T| < t) = 0.95, by bisection."""
    low, high = 0.0, 13.0                                                      # df = 1: 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < 0.95 else (low, middle)
    return low


def paired(differences):
    """{"difference": mean of differences seed by seed, "low", "high": its 95% interval, "p"}, two-sided Student's t.

    None where there are too few."""
    difference, error = mean(differences) if differences else None, standard_error(differences)
    low = high = p = None
    if error is not None:
        half = t_quantile(len(differences) - 1) * error
        low, high = difference - half, difference + half
        p = 1 - t_inside(abs(difference) / error, len(differences) - 1) if error else float(not difference)
    return {"difference": difference, "low": low, "high": high, "p": p}


def compare(tasks, run, against):
    """`paired` of run − against over the seeds that both have, and "pairs"; tasks: [{run: {seed: accuracy}}]."""
    differences = [accuracy - task[against][seed] for task in tasks for seed, accuracy in task.get(run, {}).items()
                   if seed in task.get(against, {})]
    return {"pairs": len(differences), **paired(differences)}


def holm(p_values):
    """{name: p} -> {name: p corrected by Holm's step-down method}. None, too few seeds, stays None and is counted."""
    corrected, least = dict.fromkeys(p_values), 0.0
    measured = sorted((p, name) for name, p in p_values.items() if p is not None)
    for k, (p, name) in enumerate(measured):
        corrected[name] = least = max(least, min(1.0, (len(p_values) - k) * p))
    return corrected


def p_text(row):
    return "–" if row["p"] is None else "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"


def standard_error(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def accuracies_of(results):
    """{run: {seed: greedy accuracy}} of the finished runs in the rows of results.csv."""
    found = {}
    for row in results:
        seeds = found.setdefault(row["run"], {})
        if row["eval_accuracy"] is not None:
            seeds[row["seed"]] = row["eval_accuracy"]
    return found


def tables(results):
    """{table: [row]} from the rows of results.csv; a row holds means over its finished seeds, None if not measured.

    accuracy, its standard error, difference (to the baseline run, over the `pairs` seeds that both have), low and high
    (its 95% interval) are shares of 1. p is corrected by Holm's method over all the runs of the file."""
    plain = next(row for row in results if row["run"] == "grpo")
    base = {name: plain[name] for name in SETTINGS}
    accuracies = accuracies_of(results)
    made, p_values, rules = {}, {}, [method for method in dict.fromkeys(row["method"] for row in results)
                                     if method not in METHODS]
    for table, lines in layout(base, rules).items():
        if not lines or not all(run_name(settings, base) in accuracies for _, settings in lines):
            continue                                                           # not among the --tables of this file
        made[table] = []
        for label, settings in lines:
            run, reference = run_name(settings, base), baseline(settings, base)
            against = reference and run_name(reference, base)
            row = {"setting": label, "run": run, "seeds": len(accuracies[run]), "against": against}
            for name in MEASURES:
                values = [line[name] for line in results if line["run"] == run and line[name] is not None]
                row[name] = mean(values) if values else None
            row["standard_error"] = standard_error([*accuracies[run].values()])
            made[table].append({**row, **compare([accuracies], run, against)})
            if reference:
                p_values[run] = made[table][-1]["p"]
    corrected = holm(p_values)
    for row in (row for rows in made.values() for row in rows):
        row["p"] = corrected.get(row["run"])
    return made


def interval(row):
    """"+0.40 [-0.31, +1.11]" in points, or what there is of it."""
    if row["difference"] is None:
        return "–"
    bounds = f" [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]" if row["low"] is not None else ""
    return f"{100 * row['difference']:+.2f}{bounds}"


def verdict(row):
    """One sentence on NTHR against GRPO, from NTHR's row of the table "methods"."""
    if row["p"] is None:
        return f"NTHR against GRPO cannot be judged: that takes two seeds of both ({row['pairs']} finished)."
    judged = ("NTHR does not beat GRPO significantly" if row["p"] >= 0.05 else "NTHR beats GRPO significantly"
              if row["difference"] > 0 else "NTHR is significantly worse than GRPO")
    return (f"{judged}: {interval(row)} points of greedy accuracy, {row['pairs']} seeds, p after Holm's correction "
            f"{p_text(row)}.")


def to_markdown(made):
    """Every table as Markdown, the verdict under the first. A column after p is left out if its cells are equal."""
    def number(value, digits, factor=1):
        return "–" if value is None else f"{factor * value:.{digits}f}"

    parts = []
    for table, rows in made.items():
        lines = [(row["setting"], f"{number(row['eval_accuracy'], 2, 100)} ± {number(row['standard_error'], 2, 100)}",
                  row["seeds"], interval(row), p_text(row),
                  *(number(row[name], digits, factor) for name, digits, factor in SHOWN)) for row in rows]
        shown = [i for i in range(len(HEADER)) if i < 5 or len({line[i] for line in lines}) > 1]
        header, *lines = ([line[i] for i in shown] for line in (HEADER, *lines))
        parts += [f"## {TITLES[table]}", files.markdown(header, lines)]
        if table == "methods":
            parts.append(verdict(rows[-1]))
    return "\n\n".join(parts) + "\n"


def plot(made, path):
    """The paired differences to GRPO with their intervals, one panel per table."""
    columns = min(2, len(made))
    figure, axes = plt.subplots(-(-len(made) // columns), columns, squeeze=False, layout="constrained",
                                figsize=(6.5 * columns, 2.6 * -(-len(made) // columns)))
    for axis in axes.flat[len(made):]:
        axis.remove()
    for axis, (table, rows) in zip(axes.flat, made.items()):
        rows = [row for row in rows if row["difference"] is not None]
        axis.axvline(0, color="0.6", linewidth=1)
        for y, row in enumerate(rows):
            x = 100 * row["difference"]
            ends = [[0], [0]] if row["low"] is None else [[x - 100 * row["low"]], [100 * row["high"] - x]]
            axis.errorbar(x, y, xerr=ends, fmt="o", color="C0", capsize=3)
        axis.set_yticks(range(len(rows)), [f"{row['setting']} ({100 * row['eval_accuracy']:.1f}%)" for row in rows])
        axis.set(ylim=(max(1, len(rows)) - 0.5, -0.5), xlabel="greedy accuracy − GRPO's, points")
        axis.set_title(TITLES[table].split(".")[0] if table == "clip" else TITLES[table], fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_results(path):
    """The rows of results.csv: numbers as floats, what was not measured as None. One line if it is no such file."""
    try:
        columns = path.read_text(encoding="utf-8").partition("\n")[0].split(",")
    except OSError as error:
        fail(f"{path} cannot be read ({error}): name a folder that ablations.py has written")
    if missing := sorted({"run", "seed", *SETTINGS, *MEASURES} - {*columns}):
        fail(f"{path} lacks {', '.join(missing)}: run its ablations again with this version")
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value if name in ("run", "method", "eta", "tau_over") else float(value) if value else None
                 for name, value in row.items()} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------------------- running

def read_metrics(folder):
    """The complete lines of metrics.jsonl; a torn line at its end has no newline."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def is_finished(folder, steps):
    last = (read_metrics(folder) or [{"step": -1}])[-1]
    return last["step"] == steps and last.get("eval_accuracy") is not None


def has_config(folder, wanted):
    """Ends with one line if the folder holds a run with other flags. Returns whether it holds a run with a config."""
    try:
        recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    for name in sorted(set(wanted) - {"out", "resume", "seed", "eval_only"}):
        if str(recorded.get(name)) != str(wanted[name]):
            fail(f"{folder} is a run with --{name.replace('_', '-')} {recorded.get(name)}, but {wanted[name]} is "
                 f"asked for now: choose another --out, or delete that folder")
    return True


def start_run(folder, flags, environment):
    """train.py in the background: a new run, or the rest of one that has a checkpoint."""
    resumed = checkpoints(folder) and (folder / "config.json").is_file()
    if folder.exists() and not resumed:
        shutil.rmtree(folder)                                                  # torn before its first checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    if resumed:
        flags = [flag for flag in flags if flag.startswith(("--reward=", "--method="))
                 and is_user_code(flag.partition("=")[2])]                     # which a resumed run must be given
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *flags, f"--{'resume' if resumed else 'out'}={folder}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True)                                            # a Ctrl-C must not reach it twice


def run_all(waiting, total, steps, jobs, on_cpu):
    """Run [(folder, flags)], `jobs` at a time, with a bar over all `total` runs. Returns the folders that failed."""
    environment = {**os.environ, "TQDM_DISABLE": "1", **({"OMP_NUM_THREADS": "1"} if on_cpu else {})}
    running, failed, waiting = {}, [], list(waiting)
    with tqdm(total=total, initial=total - len(waiting), desc="runs", unit=" runs", smoothing=0) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder, flags = waiting.pop(0)
                    running[folder] = start_run(folder, flags, environment)
                for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                    if running.pop(folder).returncode or not is_finished(folder, steps):
                        failed.append(folder)
                        log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
                        lines = map(printable, log.splitlines()[-3:])
                        tqdm.write("\n    ".join([f"{folder.name} failed:", *lines]))
                    else:
                        for checkpoint in checkpoints(folder):                 # gigabytes a run for a real model
                            shutil.rmtree(checkpoint)
                        bar.update()
                time.sleep(0.02)
        except KeyboardInterrupt:
            tqdm.write("stopping: each run finishes its step and saves; once more stops them at once")
            raise
        finally:
            for process in running.values():
                process.terminate()
            try:
                for process in running.values():
                    process.wait()
            finally:                                                           # Ctrl-C once more
                for process in running.values():
                    process.kill()
    return failed


def summary(folder, steps):
    """The MEASURES of a finished run; of another, None."""
    if not is_finished(folder, steps):
        return dict.fromkeys(MEASURES)
    metrics = read_metrics(folder)[1:]                                         # line 0: the accuracy before training

    def average(name, rows=metrics):
        values = [row[name] for row in rows if row[name] is not None]
        return mean(values) if values else None

    return {"eval_accuracy": metrics[-1]["eval_accuracy"], "success_rate": average("success_rate", metrics[-10:]),
            **{name: average(name) for name in MEANS}}


def parse_args(argv):
    """argv -> (args, flags of train.py for the plain run)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=DocFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="Hugging Face id or local folder (default: the embedded model in tiny/)")
    add("--rules", nargs="+", metavar="FILE.py:FUNCTION", help="the functions of --method in the table rules, which "
        "they add (default: those of experiments/multipliers.py)")
    for flag, help in (("--data", 'JSON or JSONL file, or "math"'), ("--eval-data", "file for greedy evaluation"),
                       ("--reward", '"math", or FILE.py:FUNCTION')):
        add(flag, help=f"{help} (default: that of train.py)")
    add("--steps", type=int, help="of each run (default: embedded model 60, real model train.py's; 25 with --quick)")
    add("--seed", type=int, default=0, help="the first seed (default: 0)")
    add("--seeds", type=int, help="how many (default: 5; 3 with --quick)")
    add("--tables", nargs="+", choices=TITLES, metavar="TABLE", help=f"which of {', '.join(TITLES)} (default: all; "
        "methods beta eta nll with --quick)")
    add("--quick", action="store_true", help="the paper's tables only, fewer seeds and steps")
    add("--jobs", type=int, help="runs at a time (default: one per core on a CPU, 1 on a GPU)")
    add("--out", help="output folder (default: runs/ablations-MODEL, and -quick with --quick)")
    args, rest = parser.parse_known_args(argv)
    for name, value in (QUICK if args.quick else {"seeds": 5, "tables": list(TITLES)}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.rules and "rules" not in args.tables:
        args.tables = [*args.tables, "rules"]
    args.rules = args.rules or common.RULES
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(args, name)}")
    model = Path(args.model or TINY).resolve()
    args.out = args.out or f"runs/ablations-{model.name}" + ("-quick" if args.quick else "")
    given = [f"--{name.replace('_', '-')}={getattr(args, name)}"
             for name in ("model", "data", "eval_data", "reward", "steps", "seed") if getattr(args, name) is not None]
    return args, (SHORT if model in EMBEDDED else []) + given + rest


def main(argv=None):
    args, flags = parse_args(argv)
    plain = parse_train_flags(__doc__, [*flags, f"--out={args.out}"])          # checked as train.py does
    if plain.resume or plain.eval_only or any(flag.split("=")[0] == "--method" for flag in flags):
        fail("--method and --resume are set for each run, and --eval-only trains none: leave them out")
    if "clip" in args.tables and plain.batch_size % 4:
        fail(f"the table clip takes up to 4 updates a step: --batch-size must be a multiple of 4, got "
             f"{plain.batch_size}")
    if "rules" in args.tables:
        common.load_rules(args.rules, METHODS)                                 # one line for what is wrong with them
    base = {name: getattr(plain, name) for name in SETTINGS}
    chosen = [settings for table in args.tables for _, settings in layout(base, args.rules)[table]]
    chosen = [{**base, "method": "grpo"}, *filter(None, (baseline(settings, base) for settings in chosen)), *chosen]
    runs = {run_name(settings, base): settings for settings in chosen}
    seeds, waiting, out = range(args.seed, args.seed + args.seeds), [], files.make_folder(args.out)
    folder_of = {(run, seed): out / "runs" / f"{run}-seed{seed}" for run in runs for seed in seeds}
    for run, settings in runs.items():
        changed = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()
                   if name == "method" or value != base[name]]
        wanted = vars(parse_train_flags(__doc__, [*flags, *changed, f"--out={args.out}"]))
        for seed in seeds:
            folder = folder_of[run, seed]
            if not (has_config(folder, wanted) and is_finished(folder, plain.steps)):
                waiting.append((folder, [*flags, *changed, f"--seed={seed}"]))
    waiting.sort(key=lambda job: int(job[0].name.rpartition("seed")[2]))       # stable: each seed's runs together
    on_cpu = plain.device == "cpu"
    jobs = args.jobs or (os.cpu_count() if on_cpu else 1)
    failed = run_all(waiting, len(folder_of), plain.steps, jobs, on_cpu)

    args.device = plain.device
    files.write_csv(out / "results.csv", [
        {"run": run, "seed": seed, **{name: runs[run][name] for name in SETTINGS}, **summary(folder, plain.steps)}
        for (run, seed), folder in folder_of.items()])
    results = read_results(out / "results.csv")
    made = tables(results)
    text = to_markdown(made)
    record = {**common.provenance(args), "jobs": jobs, "runs": len(folder_of),
              "runs_made": len(waiting) - len(failed), "tables": made}
    files.write_json(out / "results.json", record)
    (out / "tables.md").write_text(
        f"`{record['command']}`: {len(folder_of)} runs, seeds {seeds[0]} to {seeds[-1]}, {jobs} at a time"
        f"{' with one thread each' if on_cpu else ''}, {record['machine']}, torch {record['torch']}\n\n{text}",
        encoding="utf-8")
    plot(made, out / "ablations.png")
    print(f"{text}\nwritten to {out}: results.csv, results.json, tables.md, ablations.png")
    if failed:
        fail(f"{len(failed)} of {len(folder_of)} runs failed (see log.txt in their folders): "
             f"{' '.join(sorted(folder.name for folder in failed))}; run the same command again to retry them")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from here")
        sys.exit(130)
