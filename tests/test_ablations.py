"""experiments/ablations.py: which runs it starts, what a restart keeps, and its tables computed again from results.csv.

All tests but the last put a stand-in for train.py in its place, which writes invented metrics at once."""
import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import ENVIRONMENT, ROOT, run_here, wrong_endings
from support.flags import parse_args as parse_train_flags

image = pytest.importorskip("matplotlib.image")
sys.path.insert(0, str(ROOT / "experiments"))

import ablations  # noqa: E402

STAND_IN = '''
import json, random, re, sys
from pathlib import Path
here = Path(__file__).parent
flags = {name.replace("-", "_"): value for name, value in re.findall("--([a-z-]+)[= ](\\S+)", " ".join(sys.argv[1:]))}
folder = Path(flags.get("resume") or flags["out"])
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps([folder.name, sys.argv[1:]]) + "\\n")
(folder / "checkpoint").mkdir(parents=True, exist_ok=True)
if (here / "fail").exists() and folder.name in (here / "fail").read_text().split():
    print("first line\\nsecond line\\nlast words of " + folder.name, file=sys.stderr)
    (folder / "checkpoint").rmdir()
    sys.exit(3)
if "resume" not in flags:
    (folder / "config.json").write_text(json.dumps({**json.loads((here / "plain.json").read_text()), **flags}))
draw, steps = random.Random(folder.name), int(json.loads((folder / "config.json").read_text())["steps"])
lines = [{"step": 0, "eval_accuracy": 0.5}]
for step in range(1, steps + 1):
    lines.append({"step": step, "success_rate": draw.random(), "delta_mean": draw.random() if step % 3 else None,
                  "delta_nonpositive_share": draw.random() if step % 3 else None, "clip_share": draw.random(),
                  "selected_share": None if folder.name.startswith(("grpo", "pos")) else draw.random(),
                  "eval_accuracy": draw.random() if step == steps else None,
                  "seconds": {"data_generation": draw.random(), "model_update": draw.random()}})
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
'''
CLIP = [f"{eps}minibatch_size={minibatch}" for minibatch in (8, 4) for eps in ("clip_eps=0.1-", "", "clip_eps=inf-")]
# table: (run, the run that it is compared with), from the paper's tables and this file's own reading of them
ROWS = {
    "methods": [("grpo", ""), ("pos-only", "grpo"), ("random", "grpo"), ("nthr", "grpo")],
    "beta": [("nthr-beta=-inf", "grpo"), ("nthr-beta=0", "grpo"), ("nthr-beta=0.1", "grpo"), ("nthr", "grpo"),
             ("nthr-beta=0.1-tau_over=others", "grpo"), ("nthr-tau_over=others", "grpo")],
    "rules": [("grpo", ""), ("nthr", "grpo"), ("nthr-tau_over=others", "grpo"), ("random-tau_over=others", "grpo"),
              ("half", "grpo"), ("none", "grpo")],
    "eta": [("nthr-eta=p", "grpo"), ("nthr-eta=1-p", "grpo"), ("nthr", "grpo"), ("nthr-eta=0", "grpo")],
    "nll": [("grpo", ""), ("nthr", "grpo"), ("grpo-nll_coef=0.1", "grpo"), ("nthr-nll_coef=0.1", "grpo-nll_coef=0.1")],
    "clip": [("grpo", ""), ("nthr", "grpo"),
             *(row for clip in CLIP for row in ((f"grpo-{clip}", ""), (f"nthr-{clip}", f"grpo-{clip}")))],
    "kl": [("grpo", ""), ("nthr", "grpo"), ("grpo-kl_coef=0.0001", ""), ("nthr-kl_coef=0.0001", "grpo-kl_coef=0.0001"),
           ("grpo-kl_coef=0.01", ""), ("nthr-kl_coef=0.01", "grpo-kl_coef=0.01")],
    "lr": [("grpo-lr=3.33e-05", ""), ("nthr-lr=3.33e-05", "grpo-lr=3.33e-05"), ("grpo", ""), ("nthr", "grpo"),
           ("grpo-lr=0.0003", ""), ("nthr-lr=0.0003", "grpo-lr=0.0003"), ("grpo-lr=0.001", ""),
           ("nthr-lr=0.001", "grpo-lr=0.001")],
    "group-size": [("grpo-group_size=4", ""), ("nthr-group_size=4", "grpo-group_size=4"), ("grpo", ""),
                   ("nthr", "grpo"), ("grpo-group_size=16", ""), ("nthr-group_size=16", "grpo-group_size=16")]}
SHORT = ("--steps=60", "--batch-size=16", "--minibatch-size=16", "--micro-batch-tokens=2048", "--eval-every=0",
         "--eval-size=600", "--delta-every=5")                                 # the documented settings of tiny


# ---------------------------------------------------------------------------------------------------------- helpers

@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder in which `ablate` runs the stand-in; config.json has all of train.py's flags, as the real one."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "train.py").write_text(STAND_IN)
    plain = vars(train_flags(*SHORT, "--steps=12", "--seed=0"))
    (folder / "plain.json").write_text(json.dumps(plain))
    (tmp_path / "rules.py").write_text("def half(advantages, *_):\n    return advantages / 2\n\n\n"
                                       "def none(advantages, *_):\n    return advantages * 0\n")
    monkeypatch.setattr(ablations, "TRAIN", folder / "train.py")
    monkeypatch.chdir(tmp_path)
    return folder


def train_flags(*flags):
    """The flags of a train.py that is called with these, whatever the default --out holds."""
    return parse_train_flags("", [*(flag for flag in flags if not flag.startswith("--out")), "--out=holds/no/run"])


def ablate(*flags):
    ablations.main(["--steps", "12", "--jobs", "4", "--out", "out", *map(str, flags)])


def calls(stand_in):
    """[(run folder's name, flags)] since the last time."""
    path = stand_in / "calls.jsonl"
    made = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return made


def snapshot(folder):
    """{file: (bytes, time of the last change)}"""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def error_of(*flags):
    with pytest.raises(SystemExit) as caught:
        ablate(*flags)
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("error: ")
    assert "\n" not in caught.value.code
    return caught.value.code


def results():
    """{run: {seed: row of results.csv}}"""
    found = {}
    with open("out/results.csv", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["run"], {})[int(row["seed"])] = row
    return found


def inside(t, df):
    """P(|T| < t): Simpson's rule on the density of Student's t, with x = tan u, which makes its tails finite."""
    u = np.linspace(0, math.atan(t), 20001)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = constant * (1 + np.tan(u) ** 2 / df) ** (-(df + 1) / 2) / np.cos(u) ** 2
    weights = np.ones(len(u))
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return 2 * (weights * density).sum() * (u[1] - u[0]) / 3


def student_p(differences):
    """Two-sided p of Student's paired t-test."""
    t = differences.mean() / differences.std(ddof=1) * math.sqrt(len(differences))
    return 1 - inside(abs(t), len(differences) - 1)


# ------------------------------------------------------------------------------------------------------------ numbers

def test_holm_by_hand():
    """Sorted, the k-th smallest of m is multiplied by m − k + 1, is at least the one before, and at most 1."""
    assert ablations.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert ablations.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0} and ablations.holm({}) == {}
    assert ablations.holm({"c": None, "a": 0.01, "b": 0.02, "d": None}) == {
        "a": pytest.approx(0.04), "b": pytest.approx(0.06), "c": None, "d": None}


def test_paired_differences_that_cannot_be_judged():
    nothing = dict.fromkeys(("difference", "low", "high", "p"))
    assert ablations.paired([]) == nothing and ablations.paired([0.5]) == {**nothing, "difference": 0.5}
    assert ablations.paired([0.5, 0.5]) == {"difference": 0.5, "low": 0.5, "high": 0.5, "p": 0.0}
    assert ablations.paired([0.0, 0.0])["p"] == 1.0


def test_the_t_quantile_leaves_5_percent_of_the_density_outside():
    found = {df: inside(ablations.t_quantile(df), df) for df in (1, 2, 3, 4, 5, 9, 10, 30)}
    assert found == pytest.approx(dict.fromkeys(found, 0.95), abs=1e-9)


def test_the_verdict_follows_the_corrected_p():
    def verdict(low, difference, high, p, seeds=5):
        return ablations.verdict({"low": low, "difference": difference, "high": high, "p": p, "pairs": seeds})

    assert verdict(0.002, 0.01, 0.018, 0.049) == (
        "NTHR beats GRPO significantly: +1.00 [+0.20, +1.80] points of greedy accuracy, 5 seeds, p after Holm's "
        "correction 0.049.")
    worse = verdict(-0.018, -0.01, -0.002, 0.0004)
    assert worse.startswith("NTHR is significantly worse than GRPO: -1.00 [-1.80, -0.20]") and "<0.001." in worse
    assert verdict(0.002, 0.01, 0.018, 0.05).startswith("NTHR does not beat GRPO significantly: +1.00 [")
    assert "cannot be judged" in verdict(None, 0.01, None, None, seeds=1)


# ----------------------------------------------------------------------------------------- with a stand-in for train.py

@pytest.mark.parametrize("chosen, count", [
    (("methods", "nll"), 6), pytest.param(tuple(ROWS), 43, marks=pytest.mark.full)], ids=["some", "all"])
def test_every_setting_is_one_run_and_the_tables_follow_from_the_csv(stand_in, capsys, chosen, count):
    rules = ("--rules", "rules.py:half", "rules.py:none") if "rules" in chosen else ()
    ablate("--seeds", 3, "--seed", 4, "--tables", *chosen, *rules)
    printed, started = capsys.readouterr().out, dict(calls(stand_in))
    names = {run for table in chosen for run, _ in ROWS[table]}
    assert len(names) == count
    assert started.keys() == {f"{name}-seed{seed}" for name in names for seed in (4, 5, 6)}
    plain, paths = json.loads((stand_in / "plain.json").read_text()), {"half": "rules.py:half", "none": "rules.py:none"}
    for name in names:                                                         # its name says all that is changed
        method, *changed = re.split("-(?=[a-z_]+=)", name)
        changes = {"method": paths.get(method, method), "seed": 5, **dict(change.split("=") for change in changed)}
        for flag, value in vars(train_flags(*started[f"{name}-seed5"])).items():
            if flag != "out":
                assert value == type(value)(changes[flag]) if flag in changes else value == plain[flag], (name, flag)

    found = results()
    assert found.keys() == names
    for run, seeds in found.items():                                           # results.csv from metrics.jsonl
        for seed, row in seeds.items():
            folder = Path(f"out/runs/{run}-seed{seed}")
            assert not (folder / "checkpoint").exists()
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            column = {key: np.array([line[key] for line in lines[1:] if line[key] is not None])
                      for key in lines[-1] if key != "seconds"}
            expected = {"eval_accuracy": lines[-1]["eval_accuracy"], "success_rate": column["success_rate"][2:].mean()}
            for key in ("delta_mean", "delta_nonpositive_share", "clip_share", "selected_share"):
                expected[key] = column[key].mean() if len(column[key]) else ""
            for key, value in expected.items():
                assert (row[key] == "") if value == "" else float(row[key]) == pytest.approx(value, rel=1e-12), key

    recorded = json.loads(Path("out/results.json").read_text())
    assert recorded["seed"] == 4 and set(recorded["tables"]) == set(chosen)
    markdown = Path("out/tables.md").read_text()
    accuracies = {run: np.array([float(found[run][seed]["eval_accuracy"]) for seed in (4, 5, 6)]) for run in found}
    p_values = ablations.holm({run: student_p(accuracies[run] - accuracies[against])
                               for table in chosen for run, against in ROWS[table] if against})
    for table in chosen:                                                       # the tables from results.csv
        for row, (run, against) in zip(recorded["tables"][table], ROWS[table], strict=True):
            accuracy = accuracies[run]
            error = accuracy.std(ddof=1) / math.sqrt(3)
            assert (row["run"], row["against"] or "", row["seeds"]) == (run, against, 3)
            assert row["pairs"] == (3 if against else 0)
            assert row["eval_accuracy"] == pytest.approx(accuracy.mean(), rel=1e-12)
            assert row["standard_error"] == pytest.approx(error, rel=1e-9)
            setting = row["setting"].replace("|", "\\|")                        # a "|" would end the cell
            text = f"| {setting} | {100 * accuracy.mean():.2f} ± {100 * error:.2f} | 3 | "
            if against:
                difference = accuracy - accuracies[against]
                error = difference.std(ddof=1) / math.sqrt(3)
                assert row["difference"] == pytest.approx(difference.mean(), rel=1e-9)
                assert row["high"] - row["difference"] == pytest.approx(row["difference"] - row["low"], rel=1e-9)
                assert inside((row["high"] - row["difference"]) / error, df=2) == pytest.approx(0.95, abs=1e-9)
                text += (f"{100 * difference.mean():+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}] | "
                         f"{p_values[run]:.3f} | ")
                assert row["p"] == pytest.approx(p_values[run], abs=1e-9) and row["p"] > 0.001
            else:
                assert row["difference"] is row["low"] is row["high"] is row["p"] is None
                text += "– | – | "
            assert text in markdown and text in printed
            for key in ("success_rate", "delta_mean", "delta_nonpositive_share", "clip_share", "selected_share"):
                values = [float(found[run][seed][key]) for seed in (4, 5, 6) if found[run][seed][key]]
                assert row[key] == (pytest.approx(np.mean(values), rel=1e-12) if values else None)
    assert ablations.verdict(recorded["tables"]["methods"][3]) in markdown
    assert ("exactly 1 and no clip acts" in markdown) == ("clip" in chosen)
    pixels = image.imread("out/ablations.png")
    assert 200 < pixels.shape[0] < 3000 and 500 < pixels.shape[1] < 3000 and pixels[..., :3].std() > 0.05

    shutil.copy("out/results.csv", "alone.csv")                                # nothing else is needed for the tables
    shutil.rmtree("out")
    assert ablations.tables(ablations.read_results(Path("alone.csv"))) == recorded["tables"]


def test_a_second_start_runs_only_what_is_missing(stand_in):
    ablate("--tables", "methods", "--seeds", 2)
    assert len(calls(stand_in)) == 8
    before = snapshot(Path("out/runs"))
    ablate("--tables", "methods", "--seeds", 2)
    assert calls(stand_in) == [] and snapshot(Path("out/runs")) == before
    ablate("--tables", "methods", "nll", "--seeds", 3)
    assert sorted(name for name, _ in calls(stand_in)) == sorted(
        [f"{run}-seed2" for run in ("grpo", "nthr", "pos-only", "random")]
        + [f"{method}-nll_coef=0.1-seed{seed}" for method in ("grpo", "nthr") for seed in (0, 1, 2)])
    assert {path: state for path, state in snapshot(Path("out/runs")).items() if path in before} == before


def test_half_finished_runs_are_resumed_and_torn_ones_started_again(stand_in):
    ablate("--tables", "methods", "--seeds", 1)
    calls(stand_in)
    runs = Path("out/runs")
    half, torn, bare, cut = (runs / f"{run}-seed0" for run in ("grpo", "nthr", "random", "pos-only"))
    for folder, kept in ((half, 1), (cut, 4)):                                 # stopped after step 0 or 3
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:kept]))
        (folder / "checkpoint").mkdir()
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "eval_accuracy": 0.')                         # torn where it would be finished
    (torn / "metrics.jsonl").write_text('{"step": 0, "eval')                   # before any checkpoint
    (torn / "leftover").write_text("of the first try")
    (bare / "config.json").unlink()                                            # a checkpoint alone is not enough
    config = json.loads((cut / "config.json").read_text())                     # of a version that had no such flag
    (cut / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "eval_only"}))
    (bare / "checkpoint").mkdir()
    ablate("--tables", "methods", "--seeds", 1)
    started = dict(calls(stand_in))
    assert started["grpo-seed0"] == [f"--resume={half}"] and started["pos-only-seed0"] == [f"--resume={cut}"]
    for folder in (torn, bare):
        assert f"--out={folder}" in started[folder.name] and len(started[folder.name]) > 5
    assert len(started) == 4 and not (torn / "leftover").exists()
    assert all(seeds[0]["eval_accuracy"] for seeds in results().values())


def test_a_half_finished_run_of_a_rule_is_given_its_file_again(stand_in):
    """train.py runs no file that only a config.json names."""
    ablate("--tables", "methods", "--seeds", 1, "--rules", "rules.py:half")    # --rules adds its table
    folder = Path("out/runs/half-seed0")
    assert folder.name in dict(calls(stand_in))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))
    (folder / "checkpoint").mkdir()
    ablate("--tables", "methods", "--seeds", 1, "--rules", "rules.py:half")
    assert calls(stand_in) == [["half-seed0", ["--method=rules.py:half", f"--resume={folder}"]]]


def test_results_of_another_version_end_with_one_line(stand_in):
    Path("results.csv").write_text("run,seed,method\ngrpo,0,grpo\n")
    for path, words in ((Path("results.csv"), "lacks batch_size, beta"), (Path("none.csv"), "cannot be read")):
        with pytest.raises(SystemExit, match=words):
            ablations.read_results(path)


def test_a_failed_run_is_shown_the_others_go_on_and_a_restart_retries_it(stand_in, capsys):
    (stand_in / "fail").write_text("grpo-seed1 random-seed0 random-seed1 random-seed2")
    message = error_of("--tables", "methods", "--seeds", 3)
    assert "4 of 12 runs failed" in message and "grpo-seed1 random-seed0 random-seed1 random-seed2" in message
    assert len(calls(stand_in)) == 12
    printed = capsys.readouterr().out
    assert "grpo-seed1 failed:\n    first line\n    second line\n    last words of grpo-seed1" in printed
    rows = {row["run"]: row for row in json.loads(Path("out/results.json").read_text())["tables"]["methods"]}
    assert [rows[run]["seeds"] for run in ("grpo", "pos-only", "random", "nthr")] == [2, 3, 0, 3]
    assert [rows[run]["pairs"] for run in ("grpo", "pos-only", "random", "nthr")] == [0, 2, 0, 2]
    assert rows["random"]["eval_accuracy"] is None and "| GRPO + Random | – ± – | 0 | – | – | " in printed
    accuracy = {run: [float(results()[run][seed]["eval_accuracy"]) for seed in (0, 2)] for run in ("grpo", "nthr")}
    assert rows["nthr"]["difference"] == pytest.approx(np.subtract(accuracy["nthr"], accuracy["grpo"]).mean())
    half = (rows["nthr"]["high"] - rows["nthr"]["low"]) / 2                    # over two pairs: df = 1
    difference = np.subtract(accuracy["nthr"], accuracy["grpo"])
    assert inside(half / (difference.std(ddof=1) / math.sqrt(2)), df=1) == pytest.approx(0.95, abs=1e-9)

    (stand_in / "fail").unlink()
    ablate("--tables", "methods", "--seeds", 3)
    assert sorted(name for name, _ in calls(stand_in)) == ["grpo-seed1", "random-seed0", "random-seed1", "random-seed2"]


def test_if_every_run_fails_the_files_say_so(stand_in):
    (stand_in / "fail").write_text("grpo-seed0 nthr-seed0 pos-only-seed0 random-seed0")
    assert "4 of 4 runs failed" in error_of("--tables", "methods", "--seeds", 1)
    assert all(row["seeds"] == 0 for row in json.loads(Path("out/results.json").read_text())["tables"]["methods"])
    assert "cannot be judged" in Path("out/tables.md").read_text()


def test_a_run_with_other_flags_is_not_reused(stand_in):
    ablate("--tables", "methods", "--seeds", 1)
    calls(stand_in)
    before = snapshot(Path("out/runs"))
    for flags, words in ((("--steps", 13), "--steps 12, but 13 is asked for"),
                         (("--lr", "2e-4"), "--lr 0.0001, but 0.0002 is asked for"),
                         (("--temperature", "0.9"), "--temperature 1.0, but 0.9 is asked for")):
        message = error_of("--tables", "methods", "--seeds", 1, *flags)
        assert words in message and "choose another --out" in message and "grpo-seed0" in message
    assert calls(stand_in) == [] and snapshot(Path("out/runs")) == before


def test_flags_of_train_py_reach_every_run(stand_in):
    ablate("--tables", "lr", "--seeds", 1, "--lr", "3e-4", "--max-grad-norm=0.5", "--eval-size", 7)
    started = dict(calls(stand_in))
    assert started.keys() == {f"{method}{lr}-seed0" for method in ("grpo", "nthr")
                              for lr in ("", "-lr=0.0001", "-lr=0.0009", "-lr=0.003")}
    for name, flags in started.items():
        seen = train_flags(*flags)
        assert (seen.max_grad_norm, seen.eval_size, seen.steps) == (0.5, 7, 12)
        assert seen.lr == float(name.split("lr=")[1].split("-seed")[0] if "lr=" in name else "3e-4")


def test_settings_that_are_a_models_default_are_shared():
    args, flags = ablations.parse_args(["--model", "some/model"])
    assert args.seeds == 5 and args.out == "runs/ablations-model" and not any("steps" in flag for flag in flags)
    plain = train_flags(*flags)                                                # App. 7.3: 2 updates a step, KL 1e-4
    base = {name: getattr(plain, name) for name in ablations.SETTINGS}
    rows = ablations.layout(base)
    names = [ablations.run_name(settings, base) for _, settings in rows["clip"]]
    assert names[:2] == ["grpo-minibatch_size=32", "nthr-minibatch_size=32"] and "nthr" in names[2:8]
    assert [ablations.run_name(settings, base) for _, settings in rows["kl"]] == [
        "grpo-kl_coef=0", "nthr-kl_coef=0", "grpo", "nthr", "grpo-kl_coef=0.01", "nthr-kl_coef=0.01"]


def test_quick_is_the_papers_tables():
    args, flags = ablations.parse_args(["--quick"])
    assert (args.tables, args.seeds, args.out) == (["methods", "beta", "eta", "nll"], 3, "runs/ablations-tiny-quick")
    assert train_flags(*flags).steps == 25
    args, flags = ablations.parse_args(["--quick", "--steps", "4", "--seeds", "2", "--tables", "kl"])
    assert (args.tables, args.seeds, "--steps=4" in flags) == (["kl"], 2, True)


def test_the_defaults_of_the_embedded_model_are_the_documented_ones():
    args, flags = ablations.parse_args([])
    assert (args.seeds, args.tables, args.out) == (5, list(ROWS), "runs/ablations-tiny")
    assert train_flags(*flags) == train_flags(*SHORT)


def test_bad_flags_end_with_one_line_and_start_nothing(stand_in):
    assert not wrong_endings(lambda flags: ablate(*flags), [
        (("--seeds", 0), "--seeds must be at least 1, got 0"), (("--jobs", 0), "--jobs must be at least 1, got 0"),
        (("--method", "grpo"), "--method and --resume are set for each run"),
        (("--eval-only",), "--eval-only trains none"),
        (("--batch-size", 6, "--minibatch-size", 3), "--batch-size must be a multiple of 4, got 6"),
        (("--rules", "rules.py:half", "other.py:half"), "different names, none of grpo"),
        (("--tables", "rules", "--rules", "rules.py:third"), "rules.py defines no function third"),
        (("--lr", -1), "--lr must be"), (("--reward", "nothing"), "--reward"), (("--seed", -1), "--seed must be"),
        (("--micro-batch-tokens", 0), "--micro-batch-tokens must be at least 1")])
    assert calls(stand_in) == []


def test_help_and_unknown_flags(stand_in, capsys):
    for flags, code in ((["--help"], 0), (["--tables", "nonsense"], 2), (["--no-such-flag", "1"], 2)):
        with pytest.raises(SystemExit) as caught:
            ablations.main(flags)
        assert caught.value.code == code
    assert "--tables" in capsys.readouterr().out and calls(stand_in) == []


# ------------------------------------------------------------------------------------------------------ with train.py

@pytest.mark.full
def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(stand_in, monkeypatch, tmp_path):
    """Three methods are there already, GRPO's run a real one; NTHR's training is stopped midway and continued."""
    size = ["--steps=30", "--eval-size=4", "--batch-size=2", "--minibatch-size=2", "--max-new-tokens=40"]
    command = ["--tables", "methods", "--seeds", "1", "--jobs", "1", "--out", "out", *size]
    (stand_in / "plain.json").write_text(json.dumps(vars(train_flags(*SHORT, *size))))
    ablations.main(command)
    grpo, nthr = Path("out/runs/grpo-seed0"), Path("out/runs/nthr-seed0")
    flags = dict(calls(stand_in))["grpo-seed0"]
    for folder in (grpo, nthr):
        shutil.rmtree(folder)
    run_here(*flags)
    for checkpoint in grpo.glob("checkpoint*"):
        shutil.rmtree(checkpoint)
    process = subprocess.Popen([sys.executable, str(ROOT / "experiments" / "ablations.py"), *command], cwd=tmp_path,
                               env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # "nohup" ignores it
    deadline = time.time() + 240
    while not ((nthr / "metrics.jsonl").exists() and (nthr / "metrics.jsonl").read_text().count("\n") > 2):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)
    finished = {path: state for folder in Path("out/runs").iterdir() if folder != nthr
                for path, state in snapshot(folder).items()}
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; run the same command again" in printed
    before = (nthr / "metrics.jsonl").read_text()
    assert 2 < before.count("\n") < 31 and before.endswith("\n")               # it finished its step and saved
    assert (nthr / "checkpoint" / "trainer.pt").is_file()

    monkeypatch.setattr(ablations, "TRAIN", ROOT / "train.py")
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    ablations.main(command)
    after = (nthr / "metrics.jsonl").read_text()
    assert after.startswith(before) and [json.loads(line)["step"] for line in after.splitlines()] == list(range(31))
    assert {path: state for path, state in snapshot(Path("out/runs")).items() if path in finished} == finished
    assert {path.parent.name for path in finished} == {"grpo-seed0", "pos-only-seed0", "random-seed0"}
    rows = {row["run"]: row for row in json.loads(Path("out/results.json").read_text())["tables"]["methods"]}
    last = {run: json.loads(Path(f"out/runs/{run}-seed0/metrics.jsonl").read_text().splitlines()[-1])
            for run in ("grpo", "nthr")}
    assert rows["nthr"]["difference"] == pytest.approx(last["nthr"]["eval_accuracy"] - last["grpo"]["eval_accuracy"])
    assert rows["nthr"]["low"] is None and rows["grpo"]["selected_share"] is None
    assert 0 < rows["nthr"]["selected_share"] < 1
