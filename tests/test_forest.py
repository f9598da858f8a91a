"""experiments/forest.py: its table and its picture from invented results.csv, differences taken by hand."""
import csv
import math
import sys

import pytest

from helpers import ROOT, wrong_endings

image = pytest.importorskip("matplotlib.image")
sys.path.insert(0, str(ROOT / "experiments"))

import ablations  # noqa: E402
import forest  # noqa: E402

PLAIN = {"method": "grpo", "beta": 1.0, "eta": "2|0.5-p|", "tau_over": "all", "nll_coef": 0.0, "clip_eps": 0.2,
         "kl_coef": 0.0, "lr": 1e-4, "group_size": 8, "batch_size": 16, "minibatch_size": 16}
RUNS = {"grpo": {}, "pos-only": {"method": "pos-only"}, "random": {"method": "random"}, "nthr": {"method": "nthr"},
        "nthr-tau_over=others": {"method": "nthr", "tau_over": "others"}, "half": {"method": "my.py:half"},
        "random-tau_over=others": {"method": "random", "tau_over": "others"},
        "grpo-nll_coef=0.1": {"nll_coef": 0.1}, "nthr-nll_coef=0.1": {"method": "nthr", "nll_coef": 0.1}}


def write_results(folder, accuracies):
    """accuracies: {run: {seed: greedy accuracy, or None for a run that failed}}"""
    folder.mkdir(parents=True)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "seed", *PLAIN, *ablations.MEASURES])
        writer.writeheader()
        for run, seeds in accuracies.items():
            for seed, accuracy in seeds.items():
                measures = dict.fromkeys(ablations.MEASURES, "" if accuracy is None else 0.5)
                writer.writerow({"run": run, "seed": seed, **PLAIN, **RUNS[run], **measures,
                                 "eval_accuracy": "" if accuracy is None else accuracy})
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    """Sums have the tables methods and nll, in which plain NTHR has another label; programs have methods."""
    return (write_results(tmp_path / "ablations-sums", {
                "grpo": {1: 0.70, 2: 0.72, 3: 0.71}, "pos-only": {1: 0.73, 2: 0.74, 3: 0.74},
                "random": {1: 0.70, 2: 0.71, 3: None}, "nthr": {1: 0.70, 2: 0.73, 3: 0.71},
                "grpo-nll_coef=0.1": {1: 0.70}, "nthr-nll_coef=0.1": {1: None}}),
            write_results(tmp_path / "programs", {
                "grpo": {1: 0.60, 2: 0.61}, "pos-only": {1: 0.60, 2: 0.61}, "random": {1: 0.60, 2: 0.62},
                "nthr": {1: 0.61, 2: 0.64}}))


def lines_of(out):
    """{label: the other cells of its row} of forest.md"""
    cells = [line[2:-2].split(" | ") for line in (out / "forest.md").read_text().splitlines() if line[:2] == "| "]
    return {label: rest for label, *rest in cells}


def test_the_table_by_hand(folders, tmp_path, capsys):
    """Of sums, Pos Only's 3, 2 and 3 points: mean 2.67, standard error 0.333, t of two degrees of freedom 4.303."""
    forest.main([*folders, "--out", str(tmp_path / "out")])
    lines = lines_of(tmp_path / "out")
    assert (tmp_path / "out" / "forest.md").read_text() in capsys.readouterr().out
    assert lines["difference to GRPO, points"] == [
        "sums, 0–3 pairs", "p (Holm)", "programs, 0–2 pairs", "p (Holm)", "all, 0–5 pairs", "p (Holm)"]
    assert [*lines][2:] == ["Pos Only", "GRPO + Random", "NTHR", "GRPO, NLL", "NTHR, NLL"]
    # p of t = 8 with two degrees of freedom is 1 − 8 / √(2 + 64), of t = 1 it is 1 − 1/√3; the others have none or 1/2
    assert lines["Pos Only"][:2] == ["+2.67 [+1.23, +4.10]", f"{5 * (1 - 8 / math.sqrt(66)):.3f}"]
    assert lines["GRPO + Random"][:2] == ["-0.50 [-6.85, +5.85]", "1.000"]
    assert lines["NTHR"][:2] == ["+0.33 [-1.10, +1.77]", "1.000"]
    assert lines["GRPO, NLL"] == ["+0.00", "–", "–", "–", "+0.00", "–"] and lines["NTHR, NLL"] == ["–"] * 6
    assert lines["Pos Only"][2:4] == ["+0.00 [+0.00, +0.00]", "1.000"]
    # pooled, 0, 1, 0 of sums and 1, 3 of programs: mean 1, standard error 0.548, t of four degrees of freedom 2.776
    assert lines["NTHR"][4] == "+1.00 [-0.52, +2.52]"
    pixels = image.imread(str(tmp_path / "out" / "forest.png"))
    assert pixels.shape[1] > 1000 and pixels[..., :3].std() > 0.05


def test_named_runs_against_another_run(folders, tmp_path):
    """NTHR − Pos Only: −3, −1, −3 on sums, 1 and 3 on programs. Pooled: mean −0.6, standard error 1.166."""
    forest.main([*folders, "--against", "pos-only", "--runs", "nthr", "--out", str(tmp_path / "out")])
    lines = lines_of(tmp_path / "out")
    assert [*lines][2:] == ["NTHR"] and lines["difference to Pos Only, points"][::2] == [
        "sums, 3 pairs", "programs, 2 pairs", "all, 5 pairs"]
    # a single row is not corrected: t = −(7/3) / (2/3) with two degrees of freedom
    assert lines["NTHR"][1] == f"{1 - 3.5 / math.sqrt(2 + 3.5 ** 2):.3f}" and lines["NTHR"][4] == "-0.60 [-3.84, +2.64]"


def test_the_table_of_rules_alone_has_its_baseline(tmp_path):
    rules = write_results(tmp_path / "rules", {
        "grpo": {1: 0.5, 2: 0.5}, "nthr": {1: 0.5, 2: 0.5}, "nthr-tau_over=others": {1: 0.6, 2: 0.6},
        "random-tau_over=others": {1: 0.5, 2: 0.5}, "half": {1: 0.5, 2: 0.7}})
    forest.main([rules, "--out", str(tmp_path / "out")])
    lines = lines_of(tmp_path / "out")
    assert [*lines][2:] == ["NTHR", "NTHR, τ over the others", "GRPO + Random, τ over the others", "half"]
    assert lines["half"][0] == "+10.00 [-117.06, +137.06]"                     # t of one degree of freedom 12.706


def test_bad_input_ends_with_one_line(folders, tmp_path):
    twin = write_results(tmp_path / "other" / "sums", {"grpo": {1: 0.5}})
    assert not wrong_endings(lambda flags: forest.main([*flags, "--out", str(tmp_path / "out")]), [
        ([str(tmp_path)], "cannot be read"), ([folders[0], twin], "different names, none of them all, got sums sums"),
        ([folders[0], "--against", "dapo"], "nthr-nll_coef=0.1; got dapo"),
        ([folders[0], "--runs", "nthr", "grpo"], "other runs than --against grpo, got nthr grpo"),
        ([str(ROOT / "experiments" / "results" / "none")], "name a folder that ablations.py has written")])
