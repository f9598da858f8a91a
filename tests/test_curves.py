"""experiments/curves.py: its averages computed again from the metrics.jsonl files by other code, its plot, errors."""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT, wrong_endings

image = pytest.importorskip("matplotlib.image")
sys.path.insert(0, str(ROOT / "experiments"))

import curves  # noqa: E402

METRICS = ("success_rate", "eval_accuracy", "groups_kept", "truncated_share", "delta_mean", "delta_nonpositive_share",
           "tau", "selected_share", "kl", "response_length")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(name, method, seed, steps, unmeasured=("kl",), **config):
    """A run folder as train.py leaves it, with invented metrics; evaluated at step 0, every third and the last."""
    draw, folder = np.random.default_rng([seed, len(method)]), Path(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"method": method, "seed": seed, "lr": 1e-4, **config}))
    lines = [{"step": 0, "eval_accuracy": float(draw.random())}]
    for step in range(1, steps + 1):
        values = {metric: float(draw.random()) for metric in METRICS} | {"delta_nonpositive_share": float(step % 2)}
        if step % 3 and step != steps:
            values["eval_accuracy"] = None
        lines.append({"step": step, **values, **dict.fromkeys(unmeasured), "seconds": {"data_generation": 1.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def draw(*flags):
    """The rows of the CSV that this call adds."""
    before = set(Path().glob("out/*.csv"))
    curves.main([*map(str, flags), "--out", "out"])
    new, = set(Path().glob("out/*.csv")) - before
    with new.open(newline="") as file:
        return list(csv.DictReader(file))


def expected(groups):
    """{(step, group, metric): values of the group's runs} for {group: folders}, line by line."""
    found = {}
    for group, folders in groups.items():
        for folder in folders:
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                row = json.loads(line)
                for metric in METRICS:
                    if row.get(metric) is not None:
                        found.setdefault((row["step"], group, metric), []).append(row[metric])
    return found


def check(rows, groups):
    values = expected(groups)
    assert [*rows[0]] == ["step", "group", "metric", "mean", "standard_deviation", "n"]
    assert len(rows) == len(values)
    assert {(int(row["step"]), row["group"], row["metric"]) for row in rows} == values.keys()
    for row in rows:
        found = np.array(values[int(row["step"]), row["group"], row["metric"]])
        assert int(row["n"]) == len(found) and float(row["mean"]) == pytest.approx(found.mean(), rel=1e-12)
        if len(found) > 1:
            assert float(row["standard_deviation"]) == pytest.approx(found.std(ddof=1), rel=1e-9)
        else:
            assert row["standard_deviation"] == ""


def test_runs_of_a_method_are_averaged_step_by_step(capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(curves.plt, "close", figures.append)                   # keeps the figure for a look
    nthr = [make_run(f"nthr{seed}", "nthr", seed, steps) for seed, steps in ((0, 7), (1, 5), (2, 7))]  # one is behind
    grpo = [make_run("grpo0", "grpo", 0, 6, unmeasured=("tau", "selected_share", "kl"))]
    rows = draw(nthr[0], grpo[0], nthr[1] / "metrics.jsonl", nthr[2])
    check(rows, {"nthr": nthr, "grpo": grpo})
    assert not any(row["metric"] == "kl" for row in rows)
    assert {row["n"] for row in rows if row["group"] == "nthr"} == {"1", "2", "3"}
    assert "4 runs in 2 groups (nthr; grpo)" in capsys.readouterr().out
    pixels = image.imread("out/curves.png")
    assert pixels[..., :3].std() > 0.05 and all(500 < size < 3000 for size in pixels.shape[:2])
    panels, drawn = figures[0].axes, [metric for metric in METRICS if metric != "kl"]
    for panel, metric in zip(panels, drawn, strict=True):                      # one for each that was measured
        lines = panel.get_lines()
        groups = ["nthr"] if metric in ("tau", "selected_share") else ["nthr", "grpo"]
        assert len(lines) == len(groups) and len({line.get_linestyle() for line in lines}) == len(groups)
        for line, band, group in zip(lines, panel.collections, groups, strict=True):
            mean, spread = (np.array([float(row[name] or 0) for row in rows if (row["metric"], row["group"])
                                      == (metric, group)]) for name in ("mean", "standard_deviation"))
            assert line.get_ydata() == pytest.approx(mean)
            heights = band.get_paths()[0].vertices[:, 1]
            assert (heights.max(), heights.min()) == pytest.approx(((mean + spread).max(), (mean - spread).min()))
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["nthr", "grpo"]


def test_groups_by_other_config_keys(monkeypatch):
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    low = [make_run(f"low{seed}", "nthr", seed, 3, lr=1e-5) for seed in (0, 1)]
    high = [make_run(f"high{seed}", "nthr", seed, 3, lr=0.001) for seed in (0, 1)]
    check(draw(*low, *high), {"nthr": low + high})
    check(draw(*low, *high, "--group-by", "method", "lr"), {"nthr, lr 1e-05": low, "nthr, lr 0.001": high})
    check(draw(*low, *high, "--group-by", "seed"), {"seed 0": [low[0], high[0]], "seed 1": [low[1], high[1]]})


def test_runs_evaluated_on_other_problems_are_told_apart(monkeypatch, capsys):
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    runs = {(data, size): make_run(f"{data}-{size}", "nthr", size, 3, data="d", eval_data=data, eval_size=size)
            for data, size in (("a", 100), ("a", 500), ("b", 500))}
    other = make_run("again", "nthr", 1, 3, data="d", eval_data="a", eval_size=500)
    check(draw(runs["a", 500], other), {"nthr": [runs["a", 500], other]})
    check(draw(runs["a", 100], runs["a", 500], other),
          {"nthr, eval_size 100": [runs["a", 100]], "nthr, eval_size 500": [runs["a", 500], other]})
    assert "2 groups (nthr, eval_size 100; nthr, eval_size 500)" in capsys.readouterr().out
    check(draw(runs["a", 500], runs["b", 500]),
          {"nthr, eval_data a": [runs["a", 500]], "nthr, eval_data b": [runs["b", 500]]})
    held_out = [make_run(f"held{data}", "nthr", 0, 3, data=data, eval_data=None, eval_size=200) for data in "xy"]
    check(draw(*held_out), {"nthr, data x": held_out[:1], "nthr, data y": held_out[1:]})
    check(draw(*runs.values(), "--group-by", "eval_size", "eval_data"),
          {f"eval_size {size}, eval_data {data}": [run] for (data, size), run in runs.items()})


def test_no_earlier_file_is_overwritten(monkeypatch, capsys):
    monkeypatch.setattr(curves, "plot", lambda _, path: path.write_text(str(path)))
    run = make_run("run", "nthr", 0, 3)
    Path("out").mkdir()
    Path("out/curves-2.png").write_text("a picture alone")
    for name in ("curves", "curves-3", "curves-4"):
        before = {path: path.read_bytes() for path in Path("out").iterdir()}
        draw(run)
        after = {path: path.read_bytes() for path in Path("out").iterdir()}
        assert {str(path) for path in after.keys() - before} == {f"out/{name}.csv", f"out/{name}.png"}
        assert before.items() <= after.items()
        assert f"out/{name}.png, out/{name}.csv" in capsys.readouterr().out


def test_a_torn_last_line_is_left_out(monkeypatch):
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    run = make_run("run", "nthr", 0, 3)
    whole = draw(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "success_rate": 0.')
    assert draw(run) == whole


def test_a_run_that_was_only_evaluated_can_be_drawn():
    run = make_run("run", "nthr", 0, 0)
    assert [(row["step"], row["metric"]) for row in draw(run)] == [("0", "eval_accuracy")]


def test_bad_input_ends_with_one_line():
    _, empty, damaged, bare = (make_run(name, "nthr", 0, 3) for name in ("good", "empty", "damaged", "bare"))
    (empty / "metrics.jsonl").write_text("")
    lines = (damaged / "metrics.jsonl").read_text().splitlines(keepends=True)
    (damaged / "metrics.jsonl").write_text(lines[0] + "{not JSON\n" + lines[2])
    (bare / "config.json").unlink()
    assert not wrong_endings(lambda flags: curves.main([*flags, "--out", "out"]), [
        (("good", "missing"), "missing is no run of train.py, a folder with metrics.jsonl"),
        (("bare",), "bare is no run of train.py"), (("good", "empty"), "holds no complete line"),
        (("damaged",), "damaged/metrics.jsonl, line 2: not valid JSON"),
        (("good", "--group-by", "colour"),
         "--group-by colour: not in the config.json of good, which has method, seed, lr")])
    assert not Path("out").exists()


def test_help_and_no_runs(capsys):
    for flags, code in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as caught:
            curves.main(flags)
        assert caught.value.code == code
    printed = capsys.readouterr().out
    assert "--group-by" in printed and "overwritten" in printed
