"""examples/walkthrough.ipynb as committed, and its numbers when it runs, against arithmetic and the modules."""
import ast
import json
import re
import sys

import pytest
import torch
from transformers import AutoTokenizer

import nthr
from helpers import ROOT
from rollout import generate
from support.data import encode_prompts, load_problems
from support.models import load_model, load_pretrained

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "experiments"))

import common  # noqa: E402
import lld  # noqa: E402

NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"
NUMBER = r"(-?[0-9.]+)"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook):
    """All that the cells print."""
    return "".join("".join(output["text"]) for cell in code_cells(notebook) for output in cell["outputs"]
                   if output["output_type"] == "stream")


def numbers(pattern, text):
    """The numbers of the only line that matches."""
    [match] = re.findall(pattern, text, re.MULTILINE)
    return [float(value) for value in ([match] if isinstance(match, str) else match)]


def check_numbers(text):
    """What the notebook prints about one question, its threshold, and its updates."""
    [(problem, gold)] = re.findall(r"^question: (\S+) +gold answer: (\S+)$", text, re.MULTILINE)
    answers = re.findall(r"^  reward ([01]): .*\\boxed\{(.*)\}$", text, re.MULTILINE)
    assert eval(problem) == int(gold) and len(answers) == 8                    # digits and signs: a sum
    right = [int(reward) for reward, _ in answers]
    assert right == [int(boxed == gold) for _, boxed in answers]
    p = sum(right) / 8
    for name in ("advantages", "by Lemma 4.2"):
        shown = ast.literal_eval(re.search(rf"^{name} +tensor\((.*)\)$", text, re.MULTILINE)[1])
        assert shown == pytest.approx([((1 - p) / p) ** 0.5 if r else -(p / (1 - p)) ** 0.5 for r in right], abs=1e-4)

    problems, tokenizer = load_problems(ROOT / "tiny" / "train.jsonl"), load_pretrained(AutoTokenizer, ROOT / "tiny")
    model = load_model(str(ROOT / "tiny"), "cpu", "nthr")
    [row] = [row for row in problems if row["problem"] == problem]
    rollout = generate(model, tokenizer, encode_prompts([row], tokenizer, model.config, 64), 8, 64, 1.0, 0)
    group = rollout.hidden, rollout.response_ids, rollout.response_mask, torch.tensor(right) == 1
    W = model.get_output_embeddings().weight.detach()
    scores, wrong = nthr.nthr_scores_pairwise(*group, W), group[2] & ~group[3][:, None]
    of_b = [value for name in ("s_b, summed here: ", "nthr_scores_pairwise: ", r"\(e_y − π\)ᵀ M⁺ h: ", "nthr_scores: ",
                               r"d ln π\(b\) / d step: ") for value in numbers(f"^{name}{NUMBER}$", text)]
    assert of_b == pytest.approx([scores[wrong].max().item()] * 5, abs=2e-3)
    alpha, product, added = numbers(rf"^α = {NUMBER}, ⟨h, h⟩ = {NUMBER}, the pair adds {NUMBER}$", text)
    assert alpha * product == pytest.approx(added, rel=1e-2)
    tau = ((scores * group[2]).sum(1) / group[2].sum(1))[group[3]].min().item()
    assert numbers(rf"τ = {NUMBER}$", text) == pytest.approx([tau], abs=1e-3)
    assert numbers(rf"^η = .* = {NUMBER}$", text) == [round(2 * abs(0.5 - p), 2)]
    assert numbers(rf"^{NUMBER} of the {NUMBER} tokens of wrong", text) == [(scores > tau)[wrong].sum(), wrong.sum()]
    args = common.parse_flags(lld.build_parser(), ["--device", "cpu"])
    model = common.to_float64(model)
    initial = [parameter.detach().clone() for parameter in model.parameters()]
    row, _ = lld.study(model, initial, common.Group(0, problem, gold, rollout, group[3]),
                       torch.Generator().manual_seed(0), [(3, False)], {}, {"sgd": (1e-3, [1e-3])}, args)["sgd"]
    for method, name in lld.METHODS.items():
        shown = numbers(rf"^Δ\(x\) with {re.escape(name)} +{NUMBER}$", text)
        assert shown == pytest.approx([row[f"delta {method}"]], abs=2e-5), method
    assert 0 < row["delta grpo"] < row["delta nthr"]
    above = rf" is above GRPO's on {NUMBER} of {NUMBER} questions$"
    [nthr_above, n], [random_above, _] = (numbers(rf"^Δ\(x\) with GRPO \+ {name}{above}", text)
                                          for name in ("NTHR", "Random"))
    assert n == 40 and nthr_above > 30 and 10 < random_above < 30
    accuracies = re.findall(r"^  step (\d+): greedy accuracy ([0-9.]+)% on 200 problems$", text, re.MULTILINE)
    assert [step for step, _ in accuracies] == 2 * ["0", "5", "10", "15", "20"]
    assert accuracies[0] == accuracies[5] and all(float(accuracies[i][1]) > float(accuracies[0][1]) for i in (4, 9))


def test_the_committed_notebook_is_small_whole_and_of_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert len(text) < 1e6 and "/tmp/" not in text and str(ROOT) not in text
    assert [cell["execution_count"] for cell in code_cells(notebook)] == [*range(1, 1 + len(code_cells(notebook)))]
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert {output.get("name") for output in outputs} == {"stdout", None}      # no warnings
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 1
    check_numbers(printed(notebook))


def test_its_equations_are_those_of_the_readme():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    tags = {name for tag in re.findall(r"\\tag\{(.*?)\}", text) for name in tag.split(", ")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tags == {"§2", "App. 7.2", "Eq. 7", "App. 7.4", "§5", "Eq. 8", "Algorithm 1", "Eq. 2"}
    assert not [tag for tag in tags if not re.search(rf"^\| .*{re.escape(tag)}.* \| `", readme, re.MULTILINE)]


@pytest.mark.full
def test_it_runs_and_its_numbers_are_those_of_the_modules():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3",
                            resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    check_numbers(printed(notebook))
