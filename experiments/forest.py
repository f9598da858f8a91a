"""One picture and one table of training runs: rule × task, the difference to one run with its 95% interval.

python experiments/forest.py experiments/results/ablations-sums experiments/results/ablations-stack
python experiments/forest.py FOLDER ... --against nthr --runs nthr-tau_over=others     # one comparison, not with GRPO

Each folder is the --out of ablations.py; only its results.csv is read. Differences are taken seed by seed. Intervals
are Student's t. p is corrected by Holm's method over the rows of a column: --runs names them, by default all runs.
The last column pools the seeds of all folders. Writes forest.png and forest.md to --out. The picture is dark where the
corrected p is below 0.05.
"""
import argparse
import shlex
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

import ablations
import files
from support.errors import fail
from support.help import DocFormatter

matplotlib.use("Agg")                                                          # files only, no window


def read_folder(folder):
    """({run: {seed: greedy accuracy}}, {run: label}) of a folder that ablations.py has written."""
    results, labels = ablations.read_results(Path(folder) / "results.csv"), {}
    for row in (row for rows in ablations.tables(results).values() for row in rows):
        labels.setdefault(row["run"], row["setting"])                          # the first table's is the plainest
    return ablations.accuracies_of(results), labels


def compare_runs(tasks, runs, against):
    """{task, and "all": {run: its comparison}}; tasks: {name: {run: {seed: accuracy}}}. p is corrected within each."""
    parts = {name: [task] for name, task in tasks.items()} | ({"all": [*tasks.values()]} if len(tasks) > 1 else {})
    compared = {name: {run: ablations.compare(part, run, against) for run in runs} for name, part in parts.items()}
    for rows in compared.values():
        for run, p in ablations.holm({run: row["p"] for run, row in rows.items()}).items():
            rows[run]["p"] = p
    return compared


def title(name, rows):
    """"sums, 24 pairs", or how many at least and at most."""
    pairs = [row["pairs"] for row in rows.values()]
    return f"{name}, {min(pairs)}{f'–{max(pairs)}' if max(pairs) > min(pairs) else ''} pairs"


def to_markdown(compared, labels, against):
    """One row per run: for each task the difference and p."""
    header = [f"difference to {labels[against]}, points"]
    for name, rows in compared.items():
        header += [title(name, rows), "p (Holm)"]
    return files.markdown(header, [
        [labels[run]] + [text for rows in compared.values()
                         for text in (ablations.interval(rows[run]), ablations.p_text(rows[run]))]
        for run in next(iter(compared.values()))])


def plot(compared, labels, against, path):
    """One panel per task, the same rows and scale in each."""
    runs = [*next(iter(compared.values()))]
    figure, axes = plt.subplots(1, len(compared), sharex=True, sharey=True, squeeze=False, layout="constrained",
                                figsize=(3.2 + 3.2 * len(compared), 1 + 0.3 * len(runs)))
    for axis, (name, rows) in zip(axes.flat, compared.items()):
        axis.axvline(0, color="0.6", linewidth=1)
        for y, row in enumerate(rows.values()):
            color = "#542788" if row["p"] is not None and row["p"] < 0.05 else "#998ec3"
            if row["low"] is not None:
                axis.plot([100 * row["low"], 100 * row["high"]], [y, y], color=color, linewidth=2)
            if row["difference"] is not None:
                axis.plot(100 * row["difference"], y, "o", color=color, markersize=5)
        axis.set(ylim=(len(runs) - 0.5, -0.5), axisbelow=True)
        axis.set_title(title(name, rows), fontsize=10)
        axis.grid(axis="x", color="0.92")
    axes[0, 0].set_yticks(range(len(runs)), [labels[run] for run in runs])
    figure.supxlabel(f"greedy accuracy, difference to {labels[against]} in points", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=DocFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="--out of ablations.py, one per task")
    parser.add_argument("--against", default="grpo", metavar="RUN", help="as results.csv names it (default: grpo)")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="the rows, as results.csv names them (default: all)")
    parser.add_argument("--out", default="runs/forest", help="output folder (default: runs/forest)")
    args = parser.parse_args(argv)
    names = [Path(folder).resolve().name.removeprefix("ablations-") for folder in args.folders]
    if len({*names, "all"}) <= len(names):
        fail(f"the folders must have different names, none of them all, got {' '.join(names)}")
    tasks, labels = {}, {}
    for name, folder in zip(names, args.folders):
        tasks[name], found = read_folder(folder)
        labels = found | labels
    runs = args.runs or [run for run in labels if run != args.against]
    if unknown := [run for run in (args.against, *runs) if run not in labels]:
        fail(f"--against and --runs must be runs of the folders, {', '.join(labels)}; got {', '.join(unknown)}")
    if args.against in runs or not runs:
        fail(f"--runs must be other runs than --against {args.against}, got {' '.join(runs) or 'none'}")
    compared, out = compare_runs(tasks, runs, args.against), files.make_folder(args.out)
    text = (f"`{shlex.join(['python', 'experiments/forest.py', *(argv or sys.argv[1:])])}`\n\n"
            f"{to_markdown(compared, labels, args.against)}\n")
    (out / "forest.md").write_text(text, encoding="utf-8")
    plot(compared, labels, args.against, out / "forest.png")
    print(f"{text}\nwritten to {out}: forest.md, forest.png")


if __name__ == "__main__":
    main()
