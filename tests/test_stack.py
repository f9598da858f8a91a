"""The stack machine's reward against exact polynomials, and tiny/stack with its script and train.py's --reward."""
import random
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from helpers import ROOT, metrics_of, read_lines, run_here, write, wrong_endings
from support.data import load_reward, run_file

STACK = ROOT / "tiny" / "stack"
sys.path.insert(0, str(STACK.parent))

import make_stack  # noqa: E402
import make_tiny  # noqa: E402
from stack_machine import program_reward, run  # noqa: E402

GOLD = "PUSH a PUSH b SUB PUSH c MUL PUSH d ADD"                               # of (a-b)*c+d


class Polynomial(Counter):
    """{monomial, its letters sorted: coefficient}, by schoolbook arithmetic."""

    def plus(self, other, factor):
        return Polynomial({m: self[m] + factor * other[m] for m in self.keys() | other.keys()})

    def __add__(self, other):
        return self.plus(other, 1)

    def __sub__(self, other):
        return self.plus(other, -1)

    def __mul__(self, other):
        product = Polynomial()
        for m, x in self.items():
            for n, y in other.items():
                product["".join(sorted(m + n))] += x * y
        return product

    def __eq__(self, other):                                                   # a Counter's missing counts are zeros
        return not any(self.plus(other, -1).values())


LETTERS = {letter: Polynomial({letter: 1}) for letter in "abcdef"}


def polynomial_of(program):
    """What a program leaves, as one polynomial; None if it is malformed, underflows or leaves not exactly one value."""
    operations = {"ADD": lambda x, y: [x + y], "SUB": lambda x, y: [x - y], "MUL": lambda x, y: [x * y],
                  "SWAP": lambda x, y: [y, x]}
    stack, words = [], program.split()
    while words:
        word, *words = words
        if word == "PUSH" and words and words[0] in LETTERS:
            stack.append(LETTERS[words[0]])
            words = words[1:]
        elif word in operations and len(stack) >= 2:
            stack[-2:] = operations[word](*stack[-2:])
        else:
            return None
    return stack[0] if len(stack) == 1 else None


def is_right(response, problem):
    found = polynomial_of(response)
    return found is not None and found == eval(problem, {}, LETTERS)           # infix as Python reads it


# ------------------------------------------------------------------------------------------- the machine, the reward

STACKS = [   # program, the stack that it leaves with a = 7, b = 2, c = 3; None if it cannot be run
    ("PUSH a PUSH b SUB", [5]), ("PUSH b PUSH a SUB", [-5]), ("PUSH b PUSH a SWAP SUB", [5]), ("PUSH a PUSH b", [7, 2]),
    ("PUSH a PUSH b SWAP", [2, 7]), ("PUSH a PUSH b ADD PUSH c MUL", [27]), ("PUSH a PUSH b PUSH c MUL ADD", [13]),
    ("PUSH c PUSH a PUSH b SUB", [3, 5]), ("", []), (" PUSH\na ", [7]),
    ("ADD", None), ("PUSH a ADD", None), ("PUSH a SWAP", None), ("PUSH", None), ("PUSH a PUSH", None),
    ("PUSH PUSH", None), ("PUSH z", None), ("PUSH 1", None), ("push a", None), ("a", None), ("PUSH a POP", None),
    ("PUSH a;", None), ("PUSHa", None), (None, None), (7, None), (b"PUSH a", None), (["PUSH", "a"], None)]
RIGHT = [
    GOLD, "PUSH b PUSH a SWAP SUB PUSH c MUL PUSH d ADD", "PUSH d PUSH c PUSH a PUSH b SUB MUL ADD", f"\n {GOLD}  ",
    "PUSH a PUSH c MUL PUSH b PUSH c MUL SUB PUSH d ADD",                      # ac - bc + d
    "PUSH d PUSH b PUSH a SUB PUSH c MUL SUB"]                                 # d - (b-a)c
WRONG = [
    "PUSH b PUSH a SUB PUSH c MUL PUSH d ADD", "PUSH a PUSH b PUSH c MUL SUB PUSH d ADD",
    "PUSH a PUSH b SUB PUSH c PUSH d ADD MUL", "PUSH a PUSH b SUB PUSH c MUL PUSH d",
    "PUSH a PUSH b SUB PUSH c MUL PUSH d SUB", "PUSH a PUSH b SUB PUSH c MUL", f"{GOLD} PUSH a", f"PUSH a {GOLD}",
    f"{GOLD} ADD", f"{GOLD} PUSH", f"{GOLD} SWAP", f"{GOLD} HALT", f"{GOLD}.", f"The program is {GOLD}", GOLD.lower(),
    GOLD.replace(" ", ""), GOLD.replace("d", "z"), GOLD.replace("d", "é"), "", " ", "\0", "PUSH", "SUB", "PUSH \ud800",
    "ＰＵＳＨ a", "(a-b)*c+d", "\\boxed{" + GOLD + "}", None, 3.0, GOLD.encode(), [GOLD]]
HUGE = [   # the first is right but for its length, and the powers of a would take minutes
    GOLD + " PUSH b SUB PUSH b ADD" * 10 ** 5, "PUSH a PUSH b" + " SWAP" * 10 ** 6, "PUSH a " * 10 ** 6,
    "PUSH a " + "PUSH a MUL " * 10 ** 6, "PUSH " * 10 ** 6, "PUSH " + "a" * 10 ** 6, "(" * 10 ** 6]


def test_run_by_hand():
    assert [case for case in STACKS if run(case[0], {"a": 7, "b": 2, "c": 3}) != case[1]] == []


def test_programs_of_the_same_polynomial_are_right_and_all_others_wrong():
    assert [response for response in RIGHT if program_reward(response, GOLD) != 1.0] == []
    assert [response for response in WRONG if program_reward(response, GOLD) != 0.0] == []


def test_huge_responses_are_refused_before_they_are_run():
    inputs = {"a": 7, "b": 2, "c": 3, "d": 1}
    assert [response[:20] for response in HUGE if run(response, inputs) is not None
            or program_reward(response, GOLD) != 0.0] == []


def test_100_words_are_run_and_101_are_not():
    assert run("PUSH a" + " PUSH b ADD" * 32 + " PUSH b", {"a": 7, "b": 2}) == [71, 2]         # 2 + 96 + 2 words
    assert program_reward(GOLD + " PUSH b SUB PUSH b ADD" * 14, GOLD) == 1.0   # 95 words
    assert program_reward(GOLD + " PUSH b SUB PUSH b ADD" * 15, GOLD) == 0.0   # 101 words


def test_no_response_is_right_if_the_gold_program_is_malformed_or_leaves_several_values():
    for gold in ("", "PUSH", "PUSH a PUSH b", "a-b", None):
        assert program_reward(gold, gold) == 0.0


def test_the_reward_is_equality_of_exact_polynomials_on_the_pupils_programs():
    rng, seen = random.Random(0), Counter()
    for _ in range(2000):
        problem = make_stack.make_problem(rng)
        response, gold = make_stack.solve(problem, rng), make_stack.solve(problem)
        right = is_right(response, problem)
        assert program_reward(response, gold) == right, (problem, response)
        seen[right, response == gold, "SWAP" in response, polynomial_of(response) is None] += 1
    assert sum(n for (right, *_), n in seen.items() if right) > 500
    assert sum(n for (right, same, *_), n in seen.items() if right and not same) > 200         # right answers vary
    assert sum(n for (right, _, swap, _), n in seen.items() if right and swap) > 30
    assert sum(n for (right, _, _, broken), n in seen.items() if not right and broken) > 100
    assert sum(n for (right, _, _, broken), n in seen.items() if not right and not broken) > 500


# --------------------------------------------------------------------------------------------------- the task's files

def test_the_reference_programs_compute_their_problems_and_train_and_test_are_disjoint():
    train_rows, test_rows = read_lines(STACK / "train.jsonl"), read_lines(STACK / "test.jsonl")
    rng = random.Random(0)
    for row in train_rows + test_rows:
        assert set(row) == {"problem", "answer"} and set(row["problem"]) <= set("abcdef+-*()")
        inputs = {name: rng.randrange(-99, 100) for name in "abcdef"}
        assert run(row["answer"], inputs) == [eval(row["problem"], {}, inputs)], row
        assert program_reward(row["answer"], row["answer"]) == 1.0
    names = [row["problem"] for row in train_rows + test_rows]
    assert len(train_rows) == 6000 and len(test_rows) == 600 and len(set(names)) == len(names)


def test_each_instruction_and_input_of_a_program_is_one_token_and_nothing_is_lost():
    tokenizer = AutoTokenizer.from_pretrained(STACK)
    for row in read_lines(STACK / "test.jsonl"):
        ids = tokenizer(row["answer"], add_special_tokens=False).input_ids
        assert [tokenizer.decode([i]).strip() for i in ids] == row["answer"].split()
        assert tokenizer.decode(ids) == row["answer"] and len(ids) < 40
        assert tokenizer.tokenize(row["problem"]) == list(row["problem"])
    ids = tokenizer("PUSH a SUB SWAP ADD MUL PUSH f", add_special_tokens=False).input_ids
    assert [tokenizer.decode([i]) for i in ids] == ["PUSH", " a", " SUB", " SWAP", " ADD", " MUL", " PUSH", " f"]
    text = "".join(map(chr, range(32, 127))) + "\n two  spaces, PUSHED SWA pPUSH"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_folder_is_a_small_qwen2():
    model = AutoModelForCausalLM.from_pretrained(STACK)
    assert isinstance(model.config, Qwen2Config) and 0.5e6 <= model.num_parameters() <= 1e6
    assert not model.config.tie_word_embeddings and (STACK / "model.safetensors").stat().st_size < 3e6


@pytest.mark.full
def test_a_quarter_to_four_tenths_of_its_samples_are_right():
    """Sampled by transformers itself, scored by exact polynomials."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STACK), AutoTokenizer.from_pretrained(STACK)
    rows = read_lines(STACK / "test.jsonl")
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": row["problem"]}], add_generation_prompt=True,
                                           tokenize=False) for row in rows]
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=64)[:, batch.input_ids.shape[1]:]
    responses = tokenizer.batch_decode(out, skip_special_tokens=True)
    right = sum(is_right(response, row["problem"]) for response, row in zip(responses, rows))
    assert 0.25 < right / len(rows) < 0.40


def test_the_script_makes_the_committed_problems_and_tokenizer_again(tmp_path, monkeypatch):
    """All but the supervised stage, which takes minutes."""
    monkeypatch.setattr(make_tiny, "train", lambda *args: None)
    monkeypatch.setattr(make_tiny, "accuracy", lambda *args, **options: 0.0)
    monkeypatch.setattr(sys, "argv", ["make_stack.py", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    make_tiny.main(make_stack.STACK)
    torch.set_num_threads(threads)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (STACK / name).read_bytes(), name
    made, committed = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(STACK)
    assert made.get_vocab() == committed.get_vocab() and made.chat_template == committed.chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 525056


# --------------------------------------------------------------------------------------------- train.py and --reward

def test_train_py_runs_on_the_stack_model(tmp_path):
    run_here("--model", STACK, "--device", "cpu", "--steps", 2, "--batch-size", 8, "--minibatch-size", 8, "--eval-size",
             10, "--out", tmp_path / "run")
    metrics, samples = metrics_of(tmp_path / "run"), read_lines(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2] and metrics[2]["groups_kept"] > 0
    test = read_lines(STACK / "test.jsonl")
    answers = [row for row in samples if "response" in row]                    # five of each evaluation
    assert len(answers) == 10 and len(samples) == 11
    for i, row in enumerate(answers):
        assert (row["problem"], row["answer"]) == (test[i % 5]["problem"], test[i % 5]["answer"])
        assert row["finished"] and row["reward"] == is_right(row["response"], row["problem"])


def test_a_reward_file_of_the_users(tmp_path):
    """It uses a name of its own file, and counts characters; it may return a float, a bool, an int. A box is 8
    characters."""
    file = tmp_path / "mine.py"
    for value in ("float(right)", "right", "int(right)"):
        run_file.cache_clear()                                                 # the same path in each case
        write(file, f"BOX = 8\n\ndef sized(response, answer):\n    right = (len(response) - len(answer)) % BOX == 0\n"
                    f"    return {value}\n")
        reward = load_reward(f"{file}:sized")
        found = [reward(response, "xy") for response in ("ab", "abcdefghij", "abc")]
        assert found == [1.0, 1.0, 0.0] and {type(r) for r in found} == {float}, value
    run_here("--model", STACK, "--reward", f"{file}:sized", "--device", "cpu", "--steps", 1, "--batch-size", 4,
             "--minibatch-size", 4, "--eval-size", 20, "--out", tmp_path / "run")
    metrics, samples = metrics_of(tmp_path / "run"), read_lines(tmp_path / "run" / "samples.jsonl")
    for step in (0, 1):
        mine = [row for row in samples if row["step"] == step and "response" in row]
        rewards = [(len(row["response"]) - len(row["answer"])) % 8 == 0 for row in mine]
        assert len(rewards) == 5 and 0 < metrics[step]["eval_accuracy"] < 1
        assert rewards == [row["reward"] for row in mine]


def test_a_reward_that_cannot_be_used_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(case):
        text, name = case
        run_file.cache_clear()                                                 # the same relative path in each case
        if text != "":
            write(tmp_path / "x.py", text), write(tmp_path / "x.txt", text)
        load_reward(name)

    assert not wrong_endings(load, [(case, f"--reward{words}") for case, words in (
        (("", "x.py:f"), ": x.py cannot be run: FileNotFoundError"),
        (("def g(r, a): pass", "x.py:f"), ": x.py defines no function f"),
        (("f = 1", "x.py:f"), ": x.py defines no function f"),
        (("raise KeyError('boom')", "x.py:f"), ": x.py cannot be run: KeyError: 'boom'"),
        (("def f(:", "x.py:f"), ": x.py cannot be run: SyntaxError"),
        (("import no_such_module_", "x.py:f"), ": x.py cannot be run: ModuleNotFoundError: No module named 'no_such_m"),
        (("f = print", "x.txt:f"), " must be a name that --help lists or FILE.py:FUNCTION"),
        (("f = print", "x.py"), " must be a name that --help lists or FILE.py:FUNCTION"),
        (("f = print", "maths"), " must be a name that --help lists or FILE.py:FUNCTION"),
        (("f = print", "x.py:"), ": x.py defines no function"))])
