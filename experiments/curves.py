"""Training curves of one or more runs of train.py; runs of the same method are averaged, with a band over their seeds.

python experiments/curves.py runs/tiny-nthr-seed0 runs/tiny-grpo-seed0 --out runs/curves            # a few seconds
python experiments/curves.py runs/ablations-tiny/runs/nthr* --group-by method lr                     # any config key

Writes curves.png, one panel per metric that the runs measured (the line is the mean of a group's runs, the band ± one
standard deviation of the runs), and curves.csv: step, group, metric, mean, standard deviation (n − 1; empty for one
run), n. Runs that differ in data, eval_data or eval_size are not averaged, since their greedy accuracy is of other
problems: the legend names what differs. No file is overwritten: after curves.png comes curves-2.png.

A healthy run raises success rate and greedy accuracy, keeps groups, and has few cut-off responses and few questions
with Δ ≤ 0.
"""
import argparse
import json
from itertools import count
from pathlib import Path
from statistics import mean, stdev

import files
import matplotlib
from matplotlib import pyplot as plt
from support.errors import fail, printable
from support.help import DocFormatter

matplotlib.use("Agg")                                                          # files only, no window
METRICS = {"success_rate": "success rate of sampled responses", "eval_accuracy": "greedy accuracy",
           "groups_kept": "groups kept, with right and wrong responses",
           "truncated_share": "share of responses cut off",
           "delta_mean": "Δ (Eq. 2), nats per correct response",
           "delta_nonpositive_share": "share of questions with Δ ≤ 0",
           "tau": "threshold τ", "selected_share": "share of negative tokens selected",
           "kl": "KL to the initial model, nats per token", "response_length": "response length, tokens"}
EVALUATION = ("data", "eval_data", "eval_size")                                # which problems greedy accuracy is of
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3)))


def read_run(source):
    """(config, [metrics of a step]) of a run folder or its metrics.jsonl; a torn last line is left out."""
    folder = Path(source).parent if Path(source).name == "metrics.jsonl" else Path(source)
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{source} is no run of train.py, a folder with metrics.jsonl and config.json: {error}")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            if number < len(lines):                                            # only the last line can be torn
                fail(f"{folder / 'metrics.jsonl'}, line {number}: not valid JSON: {error}")
    if not rows:
        fail(f"{folder / 'metrics.jsonl'} holds no complete line: has the run made a step?")
    return config, rows


def group_name(source, config, keys):
    """The values of these config keys: "nthr" for method alone, else "nthr, lr 0.0001"."""
    for key in keys:
        if key not in config:
            fail(f"--group-by {key}: not in the config.json of {source}, which has {', '.join(config)}")
    name = ", ".join(str(config[key]) if key == "method" else f"{key} {config[key]}" for key in keys)
    return printable(name)


def average(runs):
    """[(group, rows)] of the runs -> rows of curves.csv, in the order of METRICS, groups and steps."""
    values = {}                                                                # (metric, group) -> step -> values
    for group, rows in runs:
        for row in rows:
            for metric in METRICS:
                if row.get(metric) is not None:
                    values.setdefault((metric, group), {}).setdefault(row["step"], []).append(row[metric])
    groups = list(dict.fromkeys(group for group, _ in runs))
    return [{"step": step, "group": group, "metric": metric, "mean": mean(found),
             "standard_deviation": stdev(found) if len(found) > 1 else None, "n": len(found)}
            for metric in METRICS for group in groups
            for step, found in sorted(values.get((metric, group), {}).items())]


def plot(curves, path):
    """One panel per metric; groups differ by colour and by line style."""
    metrics, groups = (list(dict.fromkeys(row[name] for row in curves)) for name in ("metric", "group"))
    columns, legend = min(2, len(metrics)), {}
    lines = -(-len(metrics) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained", figsize=(6 * columns, 2.8 * lines))
    for axis in axes.flat[len(metrics):]:
        axis.remove()
    for axis, metric in zip(axes.flat, metrics):
        for i, group in enumerate(groups):
            rows = [row for row in curves if (row["metric"], row["group"]) == (metric, group)]
            if not rows:
                continue
            step, middle, spread = ([row[name] or 0 for row in rows] for name in ("step", "mean", "standard_deviation"))
            legend[group], = axis.plot(step, middle, color=f"C{i % 10}", linestyle=STYLES[i % len(STYLES)],
                                       marker="o" if len(rows) < 10 else None, markersize=4)
            axis.fill_between(step, [m - s for m, s in zip(middle, spread)], [m + s for m, s in zip(middle, spread)],
                              color=f"C{i % 10}", alpha=0.15, linewidth=0)
        axis.set_title(METRICS[metric], fontsize=10)
        axis.set_xlabel("step")
    figure.legend(legend.values(), legend.keys(), loc="outside upper center",
                  ncols=3 if max(map(len, groups)) < 40 else 1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=DocFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or their metrics.jsonl")
    parser.add_argument("--group-by", nargs="+", default=["method"], metavar="KEY",
                        help="config keys whose values name a group (default: method)")
    parser.add_argument("--out", default="runs/curves", help="output folder (default: runs/curves); nothing in it is "
                        "overwritten: after curves.png comes curves-2.png")
    args = parser.parse_args(argv)
    found = [(source, *read_run(source)) for source in args.runs]
    keys = [*args.group_by, *(key for key in EVALUATION if key not in args.group_by
                              and len({str(config.get(key)) for _, config, _ in found}) > 1)]
    curves = average([(group_name(source, config, keys), rows) for source, config, rows in found])
    if not curves:
        fail("none of these runs measured anything yet")
    out = files.make_folder(args.out)
    names = ("curves" if n == 1 else f"curves-{n}" for n in count(1))
    path = next(out / name for name in names if not list(out.glob(f"{name}.*")))
    files.write_csv(path.with_suffix(".csv"), curves)
    plot(curves, path.with_suffix(".png"))
    groups = dict.fromkeys(row["group"] for row in curves)
    print(f"{len(found)} runs in {len(groups)} groups ({'; '.join(groups)}): {path}.png, {path}.csv")


if __name__ == "__main__":
    main()
