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
RUNS = {"grpo": {}, "pos-only": {"method": "pos-only"}, "random": {"method": "random"}, "nthr": {"method": "nthr"}}


def write_results(folder, accuracies):
    """accuracies: {run: {seed: greedy accuracy, or None for a run that failed}}"""
    folder.mkdir()
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "seed", *PLAIN, *ablations.MEASURES])
        writer.writeheader()
        for run, seeds in accuracies.items():
            for seed, accuracy in seeds.items():
                measures = dict.fromkeys(ablations.MEASURES, "" if accuracy is None else 0.5)
                writer.writerow({"run": run, "seed": seed, **PLAIN, **RUNS[run], **measures,
                                 "eval_accuracy": "" if accuracy is None else accuracy})


@pytest.fixture
def folders(tmp_path):
    write_results(tmp_path / "ablations-sums", {
        "grpo": {1: 0.70, 2: 0.72, 3: 0.71}, "pos-only": {1: 0.73, 2: 0.74, 3: 0.74},
        "random": {1: 0.70, 2: 0.71, 3: None}, "nthr": {1: 0.70, 2: 0.73, 3: 0.71}})
    write_results(tmp_path / "programs", {
        "grpo": {1: 0.60, 2: 0.61}, "pos-only": {1: 0.60, 2: 0.61}, "random": {1: 0.60, 2: 0.62},
        "nthr": {1: 0.61, 2: 0.64}})
    return tmp_path / "ablations-sums", tmp_path / "programs"


def test_the_table_and_the_pooled_test_by_hand(folders, tmp_path, capsys):
    """Two of sums, Pos Only's 3, 2 and 3 points: mean 2.67, standard error 0.333, t of two degrees of freedom 4.303."""
    forest.main([*map(str, folders), "--compare", "pos-only", "nthr", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "forest.md").read_text()
    assert text in capsys.readouterr().out
    cells = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    lines = {label: rest for label, *rest in cells}
    assert lines["difference to GRPO, points"] == ["sums", "sums: seeds", "sums: p (Holm)", "programs",
                                                   "programs: seeds", "programs: p (Holm)"]
    # p of t = 8 with two degrees of freedom is 1 − 8 / √(2 + 64), with one 1 − 2/π · arctan t
    p = {"pos-only": 1 - 8 / math.sqrt(66), "random": 1 - 2 / math.pi * math.atan(1), "nthr": 1 - 1 / math.sqrt(3)}
    assert lines["Pos Only"] == ["+2.67 [+1.23, +4.10]", "3", f"{3 * p['pos-only']:.3f}",
                                 "+0.00 [+0.00, +0.00]", "2", "–"]
    assert lines["GRPO + Random"][:3] == ["-0.50 [-6.85, +5.85]", "2", f"{min(1, 2 * p['nthr']):.3f}"]    # the larger
    assert lines["NTHR"][:2] == ["+0.33 [-1.10, +1.77]", "3"]
    # NTHR − Pos Only: −3, −1, −3 on sums, 1 and 3 on programs: mean −0.6, standard error 1.166, t of four 2.776
    assert "nthr minus pos-only: -0.60 [-3.84, +2.64] points, 5 pairs of 2 tasks, p = 0.634" in text
    pixels = image.imread(str(tmp_path / "out" / "forest.png"))
    assert pixels.shape[1] > 800 and pixels[..., :3].std() > 0.05


def test_bad_input_ends_with_one_line(folders, tmp_path):
    assert not wrong_endings(lambda flags: forest.main([*flags, "--out", str(tmp_path / "out")]), [
        ([str(tmp_path)], "has no results.csv"),
        ([str(folders[0]), "--compare", "nthr", "dapo"], "no seed of any folder has both nthr and dapo; the runs are "
                                                        "grpo, pos-only, random, nthr")])
