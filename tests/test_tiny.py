"""The embedded model, its problems and the script that makes them, against arithmetic done here."""
import random
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from helpers import ROOT, read_lines

TINY = ROOT / "tiny"
sys.path.insert(0, str(TINY))

import make_tiny  # noqa: E402


def value(problem):
    """17+28-9 by reading signs and digits one by one."""
    total, sign, number = 0, 1, ""
    for char in problem + "+":
        if char.isdigit():
            number += char
        else:
            total, sign, number = total + sign * int(number), {"+": 1, "-": -1}[char], ""
    return total


def test_answers_are_right_and_train_and_test_are_disjoint_and_large_enough():
    train, test = read_lines(TINY / "train.jsonl"), read_lines(TINY / "test.jsonl")
    assert all(row["answer"] == str(value(row["problem"])) for row in train + test)
    names = [row["problem"] for row in train + test]
    assert len(train) >= 4000 and len(test) >= 500 and len(set(names)) == len(names)


def test_the_folder_is_a_small_qwen2():
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert isinstance(model.config, Qwen2Config) and 0.5e6 <= model.num_parameters() <= 1e6
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 4e6


@pytest.mark.full
def test_a_quarter_to_four_tenths_of_its_samples_are_right():
    """Sampled by transformers itself, scored by the digits in the last box."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    rows = read_lines(TINY / "test.jsonl") * 2
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": row["problem"] + "\nAn instruction."}],
                                           add_generation_prompt=True, tokenize=False) for row in rows]
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=64)[:, batch.input_ids.shape[1]:]
    responses = tokenizer.batch_decode(out, skip_special_tokens=True)
    right = [response.endswith("\\boxed{" + row["answer"] + "}") for response, row in zip(responses, rows)]
    assert 0.25 < sum(right) / len(right) < 0.40


def test_the_tokenizer_loses_no_printable_ascii():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = "".join(map(chr, range(32, 127))) + "\n two  spaces , n't"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_pupil_is_right_in_the_first_step_and_carries_wrong_totals_on():
    rng, wrong = random.Random(0), 0
    for _ in range(200):
        problem = make_tiny.make_problem(rng)
        *steps, box = make_tiny.solve(problem, rng).split(";")
        left, total = steps[0].split("=")
        assert value(left) == int(total) and problem.startswith(left)
        for before, after in zip(steps, steps[1:]):
            assert after.startswith(before.split("=")[1])                      # goes on from the last result
        assert box == "\\boxed{" + steps[-1].split("=")[1] + "}"
        wrong += int(steps[-1].split("=")[1]) != value(problem)
    assert 50 < wrong < 180


def test_the_script_makes_the_committed_problems_and_tokenizer_again(tmp_path, monkeypatch):
    """All but the supervised stage, which takes minutes, and the accuracy of what it makes."""
    targets = []
    monkeypatch.setattr(make_tiny, "train", lambda task, *args: targets.append(task.target))
    monkeypatch.setattr(make_tiny, "accuracy", lambda *args, **options: 0.0)
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--out", str(tmp_path), "--target", "0.15"])
    threads = torch.get_num_threads()
    make_tiny.main()
    torch.set_num_threads(threads)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
    made, committed = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(TINY)
    assert made.get_vocab() == committed.get_vocab() and made.chat_template == committed.chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 519168
    assert targets == [0.15]


def test_the_supervised_stage_stops_at_its_target(monkeypatch):
    checks = iter([0.05, 0.2, 0.1, 0.3])
    for name, value in {"accuracy": lambda *args, **_: next(checks), "CHECK_EVERY": 1, "BATCH": 2}.items():
        monkeypatch.setattr(make_tiny, name, value)
    tokenizer = make_tiny.make_tokenizer(make_tiny.SUMS.words)
    for target, left in ((0.15, [0.1, 0.3]), (0.25, [])):
        make_tiny.train(make_tiny.replace(make_tiny.SUMS, target=target), make_tiny.make_model(tokenizer), tokenizer,
                        random.Random(0), {}, [])
        assert [*checks] == left
        checks = iter(left)
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--target", "1.5"])
    with pytest.raises(SystemExit):
        make_tiny.main()


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        make_tiny.main()
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "--seed" in printed and "--out" in printed
