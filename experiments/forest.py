"""One picture and one table of training runs: rule × task, the difference to GRPO with its 95% interval.

python experiments/forest.py experiments/results/ablations-sums experiments/results/ablations-stack
python experiments/forest.py FOLDER ... --compare nthr nthr-tau_over=others      # also two runs, all folders pooled

Each folder is the --out of ablations.py; only its results.csv is read. Differences are taken seed by seed, intervals
are Student's t, and p is corrected by Holm's method over the rows of a folder. --compare pools the seeds of all
folders: one test, not corrected. Writes forest.png and forest.md to --out.
"""
import argparse
import shlex
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

import ablations
import common
from support.errors import fail

matplotlib.use("Agg")                                                          # files only, no window


def read_folder(folder):
    """Rows of results.csv in an --out of ablations.py; one line if there are none."""
    path = Path(folder) / "results.csv"
    if not path.is_file():
        fail(f"{folder} has no results.csv: name a folder that ablations.py has written")
    return ablations.read_results(path)


def rows_by_run(results):
    """{run: its row of `ablations.tables`} of every run that is compared with another."""
    return {row["run"]: row for rows in ablations.tables(results).values() for row in rows
            if row["difference"] is not None}


def pooled(folders, first, second):
    """`ablations.paired` of the accuracies second − first over the seeds of all folders, and the number of pairs."""
    differences = []
    for results in folders:
        accuracy = {(row["run"], row["seed"]): row["eval_accuracy"] for row in results}
        pairs = [(accuracy[run, seed], accuracy.get((first, seed))) for run, seed in accuracy if run == second]
        differences += [b - a for b, a in pairs if None not in (a, b)]
    if not differences:
        fail(f"--compare: no seed of any folder has both {first} and {second}; the runs are "
             f"{', '.join(dict.fromkeys(row['run'] for results in folders for row in results))}")
    return ablations.paired(differences), len(differences)


def labels_of(tasks):
    """{run: label} of all tasks, in the order of their tables."""
    return {run: row["setting"] for rows in tasks.values() for run, row in rows.items()}


def to_markdown(tasks):
    """tasks: {name: rows_by_run}. One row per run, a column of differences and one of p per task."""
    header, lines = ["difference to GRPO, points"], []
    for name in tasks:
        header += [name, f"{name}: seeds", f"{name}: p (Holm)"]
    for run, label in labels_of(tasks).items():
        cells = [rows.get(run) for rows in tasks.values()]
        lines.append([label] + [text for row in cells for text in (
            ("–", "–", "–") if row is None else
            (ablations.interval(row), row["pairs"], "–" if row["p"] is None else f"{row['p']:.3f}"))])
    return common.markdown(header, lines)


def plot(tasks, path):
    """One panel per task, the same rows in each; an interval beside 0 is drawn dark."""
    labels = labels_of(tasks)
    figure, axes = plt.subplots(1, len(tasks), sharey=True, squeeze=False, layout="constrained",
                                figsize=(3.2 + 3.6 * len(tasks), 1 + 0.3 * len(labels)))
    for axis, (name, rows) in zip(axes.flat, tasks.items()):
        axis.axvline(0, color="0.6", linewidth=1)
        for y, run in enumerate(labels):
            row = rows.get(run)
            if row is None:
                continue
            low, high = (row[end] if row[end] is not None else row["difference"] for end in ("low", "high"))
            axis.plot([100 * low, 100 * high], [y, y], linewidth=2, color="#b2abd2" if low <= 0 <= high else "#542788")
            axis.plot(100 * row["difference"], y, "o", color="#542788", markersize=5)
        seeds = sorted({row["pairs"] for row in rows.values()})
        axis.set(xlabel="greedy accuracy − GRPO's, points", ylim=(len(labels) - 0.5, -0.5), axisbelow=True)
        axis.set_title(f"{name}, {'–'.join(map(str, seeds[::max(1, len(seeds) - 1)]))} seeds", fontsize=10)
        axis.grid(axis="x", color="0.92")
    axes[0, 0].set_yticks(range(len(labels)), labels.values())
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="--out of ablations.py, one per task")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="two runs, as results.csv names them: second − first")
    parser.add_argument("--out", default="runs/forest", help="output folder (default: runs/forest)")
    args = parser.parse_args(argv)
    results = [read_folder(folder) for folder in args.folders]
    names = [Path(folder).resolve().name.removeprefix("ablations-") for folder in args.folders]
    tasks, out = dict(zip(names, map(rows_by_run, results))), common.make_folder(args.out)
    text = [f"`{shlex.join(['python', 'experiments/forest.py', *(argv or sys.argv[1:])])}`", to_markdown(tasks)]
    if args.compare:
        found, pairs = pooled(results, *args.compare)
        p = "" if found["p"] is None else f", p = {found['p']:.3f}"
        text.append(f"{args.compare[1]} minus {args.compare[0]}: {ablations.interval(found)} points, {pairs} pairs of "
                    f"{len(results)} tasks{p}")
    (out / "forest.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    plot(tasks, out / "forest.png")
    print("\n\n".join(text), f"written to {out}: forest.md, forest.png", sep="\n\n")


if __name__ == "__main__":
    main()
