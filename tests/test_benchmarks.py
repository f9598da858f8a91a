"""The five benchmarks of Table 2: their files, their order and rounding, --eval-only, and evaluation while training.

Nothing is downloaded: the files are made up, in the format of each source, and served from file:// addresses."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
import test_train
import train
from test_train import read_lines

ROOT = Path(__file__).resolve().parents[1]
TABLE_2 = ["aime24", "amc23", "math500", "minerva", "olympiadbench"]
QWEN = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data/"
URLS = {"aime24": QWEN + "aime24/test.jsonl", "amc23": QWEN + "amc23/test.jsonl",
        "math500": "https://raw.githubusercontent.com/rasbt/reasoning-from-scratch/"
                   "f79c9cd0ae7d824aa4e9a9bc2ca4a85167f81958/ch03/01_main-chapter-code/math500_test.json",
        "minerva": QWEN + "minerva_math/test.jsonl", "olympiadbench": QWEN + "olympiadbench/test.jsonl"}
# Made-up problems with the fields of each source, and what they mean
SOURCES = {
    "aime24": [{"id": 60, "problem": "One?", "solution": r"So \boxed{25}.", "answer": "025", "question": "One?"},
               {"id": 61, "problem": "Two?", "solution": r"So \boxed{204}.", "answer": "204", "url": "u"}],
    "amc23": [{"id": 0, "problem": "How far?", "answer": 27.0, "url": "u", "question": "How far?"},
              {"id": 1, "problem": "How cold?", "answer": -1.0, "url": "u", "question": "How cold?"},
              {"id": 2, "problem": "How much?", "answer": 2.5, "url": "u", "question": "How much?"}],
    "math500": [{"problem": "What?", "solution": r"$\boxed{\frac{1}{2}}$", "answer": r"\frac{1}{2}", "level": 1,
                 "subject": "Algebra", "unique_id": "test/1.json"}],
    "minerva": [{"problem": "How bright?", "solution": r"\[ \boxed{4.5e33} \mathrm{~W} \]", "type": "8.282J", "idx": 0},
                {"problem": "Solve.", "solution": r"It is \boxed{\frac{e^{t}}{3}}.", "type": "18.03", "idx": 1}],
    "olympiadbench": [{"id": 1606, "subfield": "Algebra", "context": None, "question": "Which?", "unit": None,
                       "solution": ["So $2$."], "final_answer": ["$(1,2),(2,1)$"], "is_multiple_answer": True}]}
MEANING = {"aime24": [("One?", "025"), ("Two?", "204")],
           "amc23": [("How far?", "27"), ("How cold?", "-1"), ("How much?", "2.5")],
           "math500": [("What?", r"\frac{1}{2}")],
           "minerva": [("How bright?", "4.5e33"), ("Solve.", r"\frac{e^{t}}{3}")],
           "olympiadbench": [("Which?", "$(1,2),(2,1)$")]}


# ---------------------------------------------------------------------------------------------------------- helpers

def run_here(*flags):
    """The script after its imports, in this process, on the CPU."""
    test_train.run_here(*flags, "--device", "cpu", "--dtype", "float32")


def error_of(action, *args):
    with pytest.raises(SystemExit) as caught:
        action(*args)
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message and len(message) < 900
    return message


def parse(*flags):
    return train.parse_args([*map(str, flags), "--device", "cpu"])


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def boxed_integer_equals(response, gold):
    """The reward of a sum, by a regular expression."""
    boxed = re.findall(r"\\boxed\{(-?\d+)\}", response)
    return float(bool(boxed) and int(boxed[-1]) == int(gold))


# --------------------------------------------------------------------------------------------------------- fixtures

@pytest.fixture
def served(tmp_path, monkeypatch):
    """The five sources as files, with the number of their problems; torch.hub's folder is empty. Returns {name: file}."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    files, addresses = {}, {}
    for name, rows in SOURCES.items():
        file = files[name] = tmp_path / "server" / "/".join(URLS[name].split("/")[-2:])
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(rows, indent=2) if file.suffix == ".json" else
                        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        addresses[name] = (file.as_uri(), len(rows))
    monkeypatch.setattr(train, "DOWNLOADS", addresses)
    return files


@pytest.fixture
def sums(tmp_path):
    """Two files of sums for the embedded model: 12 and 4 problems."""
    rows = [json.loads(line) for line in (ROOT / "tiny" / "test.jsonl").read_text().splitlines()[:16]]
    return json_lines(tmp_path / "long.jsonl", rows[:12]), json_lines(tmp_path / "short.jsonl", rows[12:])


# ------------------------------------------------------------------------------------------------- 1. the sources

def test_the_benchmarks_are_those_of_table_2_at_fixed_commits():
    assert list(train.BENCHMARKS) == TABLE_2
    assert {name: url for name, (url, _) in train.BENCHMARKS.items()} == URLS
    assert [problems for _, problems in train.BENCHMARKS.values()] == [30, 40, 500, 272, 675]


@pytest.mark.parametrize("name", TABLE_2)
def test_each_format_is_read_fully_and_downloaded_once(name, served):
    expected = [{"problem": problem, "answer": answer} for problem, answer in MEANING[name]]
    assert train.load_problems(name) == expected
    served[name].unlink()
    assert train.load_problems(name) == expected


def test_no_two_data_sets_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def fake(url, dst, hash_prefix=None, progress=True):
        asked.append(url)
        problems = dict(train.DOWNLOADS.values())[url] or 1
        json_lines(Path(dst), [{"problem": url, "answer": "1", "level": "Level 3"}] * problems)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fake)
    for name, (url, _) in train.DOWNLOADS.items():
        first, second = train.load_problems(name), train.load_problems(name)
        assert first == second and first[0] == {"problem": url, "answer": "1"}
    assert asked == [url for url, _ in train.DOWNLOADS.values()] and len(asked) == 6    # the five and MATH, each once


@pytest.mark.parametrize("name", ["amc23", "math500"])
@pytest.mark.parametrize("cut", ["within a line", "between two lines", "at the start"])
def test_a_torn_download_is_not_kept(name, cut, served):
    whole = served[name].read_text()
    end = {"within a line": len(whole) - 10, "between two lines": whole.index("\n") + 1, "at the start": 0}[cut]
    served[name].write_text(whole[:end])
    message = error_of(train.load_problems, name)
    assert name in message and served[name].as_uri() in message
    served[name].write_text(whole)
    assert len(train.load_problems(name)) == len(MEANING[name])


@pytest.mark.parametrize("content", ["", '{"problem": "1", "answer": 1}\n{"problem": "2", "ans', '[{"problem": "1"'])
def test_a_torn_download_without_a_known_size_shows_in_its_json(content, served, monkeypatch):
    monkeypatch.setitem(train.DOWNLOADS, "math", (served["amc23"].as_uri(), None))
    whole = served["amc23"].read_text()
    served["amc23"].write_text(content)
    message = error_of(train.load_problems, "math")
    assert message.startswith("error: math ") and "try again" in message and served["amc23"].as_uri() in message
    served["amc23"].write_text(whole.replace('"url"', '"level": "Level 4", "url"'))
    assert len(train.load_problems("math")) == 3


def test_without_a_network_the_message_says_where_the_file_can_be_put(served):
    content = served["aime24"].read_text()
    served["aime24"].unlink()
    message = error_of(train.load_problems, "aime24")
    path = next(Path(word) for word in message.split() if word.endswith("aime24.jsonl") and "hub" in word)
    path.write_text(content)
    assert len(train.load_problems("aime24")) == 2


def test_a_misspelt_benchmark_is_refused_with_the_names_that_exist():
    message = error_of(train.load_problems, "aime2024")
    assert "aime2024" in message and all(name in message for name in TABLE_2)


# ------------------------------------------------------------------------------------------- 2. order and rounding

def evaluated(eval_data, eval_size=1000):
    return [(row["benchmark"], row["problem"], row["answer"])
            for row in train.load_eval_data(SimpleNamespace(eval_data=eval_data, eval_size=eval_size))]


def test_benchmarks_come_in_the_order_of_table_2_and_files_after_them_as_given(served, tmp_path):
    b = str(json_lines(tmp_path / "b.jsonl", [{"problem": "B", "answer": 1}]))
    a = str(json_lines(tmp_path / "a.jsonl", [{"problem": "A", "answer": 2}]))
    rows = evaluated(f"{b},olympiadbench,minerva,{a}, math500,amc23,aime24,{b},amc23")
    expected = [(name, *pair) for name in TABLE_2 for pair in MEANING[name]] + [(b, "B", "1"), (a, "A", "2")]
    assert rows == expected                                                    # what is named twice counts once


def test_the_evaluation_size_is_that_of_each_benchmark(served):
    rows = evaluated("amc23,minerva,aime24", eval_size=2)
    assert rows == [(name, *pair) for name in ("aime24", "amc23", "minerva") for pair in MEANING[name][:2]]


@pytest.mark.parametrize("eval_data", ["aime24,", ",aime24", "aime24,,amc23", " , "])
def test_an_empty_name_is_refused(eval_data, served):
    assert eval_data in error_of(evaluated, eval_data)


def invented_answers(counts):
    """{benchmark: (problems, right, truncated)} -> answers; the first ones are right, the last ones truncated."""
    return [{"benchmark": name, "reward": float(i < right), "finished": i < problems - truncated}
            for name, (problems, right, truncated) in counts.items() for i in range(problems)]


def test_the_table_by_hand():
    """2/30 = 6.667, 21/40 = 52.5, 371/500 = 74.2, 91/272 = 33.456, 253/675 = 37.481: the mean of 6.7, 52.5, 74.2,
    33.5 and 37.5 is 40.88 (without rounding first, 40.86; over all 1517 problems, 48.65)."""
    answers = invented_answers({"aime24": (30, 2, 11), "amc23": (40, 21, 0), "math500": (500, 371, 12),
                                "minerva": (272, 91, 1), "olympiadbench": (675, 253, 100)})
    assert train.accuracy_table(answers) == [
        "benchmark      problems  accuracy %  truncated",
        "aime24               30         6.7         11",
        "amc23                40        52.5          0",
        "math500             500        74.2         12",
        "minerva             272        33.5          1",
        "olympiadbench       675        37.5        100",
        "average            1517       40.88        124"]


def test_the_columns_of_the_table_fit_long_names():
    lines = train.accuracy_table(invented_answers({"some/long/folder/problems.jsonl": (3, 3, 0), "b": (1, 0, 1)}))
    assert len({len(line) for line in lines}) == 1
    assert [line.split() for line in lines[1:]] == [
        ["some/long/folder/problems.jsonl", "3", "100.0", "0"], ["b", "1", "0.0", "1"], ["average", "4", "50.00", "1"]]


# -------------------------------------------------------------------------------------------------- 3. --eval-only

def test_eval_only_writes_the_greedy_answers_and_prints_the_table(sums, tmp_path, capsys):
    """Against transformers' own greedy generation, one problem at a time; 28 tokens are too few for some."""
    run_here("--eval-only", "--eval-data", f"{sums[1]},{sums[0]}", "--max-new-tokens", 28, "--max-sequences", 5,
             "--out", tmp_path / "out")
    announced, *printed = capsys.readouterr().out.splitlines()
    assert announced.startswith("memory, estimated for responses of 28 tokens: ") and "update" not in announced
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny").eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    expected, table = [], []
    for file in (sums[1], sums[0]):
        for row in read_lines(file):
            ids = torch.tensor([rollout.encode_prompt(tokenizer, row["problem"])])
            new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=28)
            new = new[0, ids.shape[1]:]
            response = tokenizer.decode(new, skip_special_tokens=True)
            expected.append({"benchmark": str(file), **row, "response": response,
                             "reward": boxed_integer_equals(response, row["answer"]),
                             "finished": new[-1].item() == tokenizer.eos_token_id})
        mine = [row for row in expected if row["benchmark"] == str(file)]
        share = sum(row["reward"] for row in mine) / len(mine)
        truncated = sum(not row["finished"] for row in mine)
        table.append([str(file), str(len(mine)), f"{100 * share:.1f}", str(truncated)])
    assert read_lines(tmp_path / "out" / "answers.jsonl") == expected
    assert list(expected[0]) == list(read_lines(tmp_path / "out" / "answers.jsonl")[0])
    assert {row["finished"] for row in expected} == {True, False} and {row["reward"] for row in expected} == {0.0, 1.0}
    lines = [line.split() for line in printed]
    assert lines[0][0] == "benchmark" and lines[1:3] == table and lines[3][:2] == ["average", "16"]
    assert str(tmp_path / "out" / "answers.jsonl") in printed[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers.jsonl"]


def test_eval_only_makes_no_optimizer_loads_one_model_and_no_training_data(sums, tmp_path, monkeypatch):
    loaded, original = [], train.load_model
    monkeypatch.setattr(train, "load_model", lambda *args: loaded.append(args[0]) or original(*args))
    monkeypatch.setattr(torch.optim, "AdamW", None)
    run_here("--eval-only", "--data", tmp_path / "missing.jsonl", "--eval-data", sums[1], "--kl-coef", 1,
             "--out", tmp_path / "out")
    assert loaded == [str(train.TINY)] and len(read_lines(tmp_path / "out" / "answers.jsonl")) == 4


def test_eval_only_takes_all_problems_unless_a_size_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse("--eval-only", "--model", "x/y")
    assert args.eval_data.split(",") == TABLE_2 and args.out == "runs/y-eval" and args.eval_size >= 675
    assert parse("--eval-only", "--model", "x/y", "--eval-size", 7).eval_size == 7
    assert parse("--eval-only", "--model", "x/y", "--eval-data", "amc23").eval_data == "amc23"
    assert parse("--eval-only", "--model", "runs/mine/checkpoint").out == "runs/mine-eval"
    for folder in (ROOT / "tiny", ROOT / "tiny" / "stack"):
        args = parse("--eval-only", "--model", folder)
        assert args.eval_data == str(folder / "test.jsonl") and args.out == f"runs/{folder.name}-eval"


def test_eval_only_with_what_it_cannot_use_is_refused(tmp_path):
    message = error_of(parse, "--eval-only", "--resume", tmp_path)
    assert "--eval-only" in message and "--resume" in message
    message = error_of(parse, "--eval-only", "--data", "mine.jsonl", "--out", tmp_path)
    assert "--eval-data mine.jsonl" in message
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    assert str(blocked) in error_of(run_here, "--eval-only", "--eval-size", 1, "--out", blocked)


def test_earlier_answers_are_never_overwritten(tmp_path):
    (tmp_path / "answers.jsonl").write_text("mine")
    message = error_of(parse, "--eval-only", "--out", tmp_path)
    assert str(tmp_path / "answers.jsonl") in message and "--out" in message
    assert (tmp_path / "answers.jsonl").read_text() == "mine"


def test_an_evaluation_that_was_cut_short_leaves_no_answers_and_can_be_repeated(sums, tmp_path, monkeypatch):
    flags = ["--eval-only", "--eval-data", sums[1], "--out", tmp_path / "out"]

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_here(*flags)
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    monkeypatch.undo()
    run_here(*flags)
    assert len(read_lines(tmp_path / "out" / "answers.jsonl")) == 4


# ---------------------------------------------------------------------------------------------------- 4. training

def test_training_logs_the_mean_over_benchmarks_and_eval_only_finds_the_same_in_its_checkpoint(sums, tmp_path, capsys):
    long, short = map(str, sums)
    both = ["--eval-data", f"{long},{short}", "--eval-size", 10]
    run_here(*both, "--batch-size", 4, "--minibatch-size", 4, "--steps", 1, "--out", tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d+:", line)]
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    run_here("--eval-only", "--model", tmp_path / "run" / "checkpoint", *both, "--max-new-tokens", 64,
             "--out", tmp_path / "eval")
    answers = read_lines(tmp_path / "eval" / "answers.jsonl")
    assert [row["benchmark"] for row in answers] == [long] * 10 + [short] * 4  # at most 10 of each
    right = dict.fromkeys((long, short), 0.0)
    for row in answers:
        right[row["benchmark"]] += boxed_integer_equals(row["response"], row["answer"])
    assert rows[1]["eval_by_benchmark"] == {long: right[long] / 10, short: right[short] / 4}
    assert rows[1]["eval_accuracy"] == pytest.approx((right[long] / 10 + right[short] / 4) / 2)
    assert set(rows[0]) == {"step", "eval_accuracy", "eval_by_benchmark"} and len(lines) == 2
    assert lines[1] == (f"step 1: greedy accuracy {rows[1]['eval_accuracy']:.1%} on 14 problems "
                        f"({long} {right[long] / 10:.1%}, {short} {right[short] / 4:.1%})")


def test_a_single_benchmark_is_its_own_average(sums, tmp_path, capsys):
    run_here("--eval-data", sums[1], "--batch-size", 4, "--minibatch-size", 4, "--steps", 1, "--out", tmp_path / "run")
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all("eval_by_benchmark" not in row for row in rows)
    samples = [row["reward"] for row in read_lines(tmp_path / "run" / "samples.jsonl") if row["step"] == 0]
    assert rows[0]["eval_accuracy"] == sum(samples) / 4
    assert f"step 0: greedy accuracy {sum(samples) / 4:.1%} on 4 problems\n" in capsys.readouterr().out
