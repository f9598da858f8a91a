r"""Regenerates the embedded model of this folder, its tokenizer and its problems (make_stack.py makes stack/).

    python tiny/make_tiny.py
    python tiny/make_tiny.py --seed 1 --out /tmp/tiny1

The model writes small sums step by step, one character per token:

    17+28-9   ->   17+28=45;45-9=36;\boxed{36}<eos>

It imitates a careless pupil and stops as soon as 34% of its samples on validation problems are
right: most groups of samples then hold right and wrong answers that share steps, and reinforcement
learning has much left to gain. The supervised stage draws its own problems: none of train.jsonl
(6000 problems), test.jsonl (600) or the 512 of validation.

Expected with seed 0: 5 minutes on one core, 2.36 MB, test accuracy 55% greedy and 33% sampled.
"""

import argparse
import json
import random
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

TRAIN, TEST, VALIDATION = 6000, 600, 512  # problems the supervised stage never sees
TERMS = (3, 4)  # lengths of a problem, equally likely
CARELESSNESS = 0.7  # probability that the pupil's step, from the second on, is careless
FORGETFULNESS = 0.7  # share of careless steps that forget the carry: 0.49 > 0.3, so greedy errs too
TARGET = 0.34  # sampled validation accuracy at which the supervised stage stops
LAYERS, WIDTH, MLP_WIDTH, HEADS, CONTEXT = 3, 128, 256, 4, 256
BATCH, LEARNING_RATE, WARMUP, MAX_STEPS, CHECK_EVERY = 64, 3e-3, 100, 3000, 25
MARKER = "<answer>"
CHAT_TEMPLATE = (
    "{{ messages[-1]['content'].split('\\n')[0] }}"
    "{% if add_generation_prompt %}{{ '" + MARKER + "' }}{% endif %}"
)


@dataclass
class Task:
    """What a pupil is to learn, and how its answers are checked."""
    folder: Path
    make_problem: Callable  # (rng) -> problem
    solve: Callable  # (problem, rng) -> the pupil's response, right or wrong
    answer: Callable  # (problem) -> the right answer
    reward: Callable  # (response, answer) -> 1 if right, else 0
    target: float  # sampled validation accuracy to stop at
    words: tuple = ()  # each gets a token of its own, with and without a space before it
    decay_from: int = MAX_STEPS  # after this step the learning rate is a third


def make_problem(rng):
    """Draws a problem such as "17+28-9": 3 or 4 terms, every running total within 0 to 99."""
    total = rng.randint(1, 99)
    problem = str(total)
    for _ in range(rng.choice(TERMS) - 1):
        result = rng.choice([n for n in range(100) if n != total])
        problem += f"{result - total:+d}"
        total = result
    return problem


def terms_of(problem):
    """Splits "17+28-9" into [17, 28, -9]."""
    return [int(term) for term in problem.replace("-", "+-").split("+")]


def careless_sum(total, term, rng):
    """A pupil's wrong step: a forgotten carry or borrow, or else a slip of the units."""
    if rng.random() < FORGETFULNESS:
        return 10 * (total // 10 + int(term / 10)) + (total + term) % 10  # right if none is due
    return total + term + rng.choice((-2, -1, 1, 2))


def solve(problem, rng):
    """Writes the steps from left to right; each but the first may be careless."""
    first, second, *rest = terms_of(problem)
    total = first + second
    steps = f"{first}{second:+d}={total};"
    for term in rest:
        careless = rng.random() < CARELESSNESS
        result = careless_sum(total, term, rng) if careless else total + term
        steps += f"{total}{term:+d}={result};"
        total = result
    return f"{steps}\\boxed{{{total}}}"


def answer(problem):
    """The sum, as text."""
    return str(sum(terms_of(problem)))


def reward(response, answer):
    """1 if the response ends in the right box, else 0."""
    return float(response.endswith(f"\\boxed{{{answer}}}"))


SUMS = Task(Path(__file__).parent, make_problem, solve, answer, reward, TARGET)


def make_tokenizer(words):
    """One token per printable ASCII character, newline and word; any other character is dropped.

    It is Qwen2's tokenizer with no other merge, because AutoTokenizer rebuilds that class for every
    Qwen2 folder. Its alphabet writes a space as \u0120 and a newline as \u010a.
    """
    special = ["<pad>", "<eos>", "<unk>", MARKER]
    alphabet = ["\u010a", "\u0120"] + [chr(code) for code in range(33, 127)]
    merges = []
    for word in words:  # PUSH: P U, PU S, PUS H, and with a space: \u0120 PUSH
        merges += [(word[:i], word[i]) for i in range(1, len(word))] + [("\u0120", word)]
    tokens = special + alphabet + ["".join(merge) for merge in merges]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges,
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=[MARKER], padding_side="left", model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer):
    """A Qwen2 of 0.52M parameters; its head is untied, as in the paper's analysis."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=MLP_WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def prompts(tokenizer, problems):
    """Token batch of the problems as the chat template renders them."""
    chats = [[{"role": "user", "content": problem}] for problem in problems]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")


def answers(model, tokenizer, problems, sample):
    """One response per problem: sampled from the full softmax, or greedy."""
    batch = prompts(tokenizer, problems)
    model.eval()
    with torch.no_grad():
        top_k = 0 if sample else None  # the library's default of 50 would cut the softmax
        out = model.generate(**batch, do_sample=sample, top_k=top_k, max_new_tokens=64)
    model.train()
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1]:], skip_special_tokens=True)


def accuracy(task, model, tokenizer, problems, sample):
    """Share of the problems whose response is right."""
    responses = answers(model, tokenizer, problems, sample)
    return sum(task.reward(r, task.answer(p)) for r, p in zip(responses, problems)) / len(problems)


def train(task, model, tokenizer, rng, held_out, validation):
    """Supervised stage: fresh problems until sampled accuracy on `validation` reaches the target."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    progress = tqdm(range(1, MAX_STEPS + 1), desc="supervised")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP)
            if step > task.decay_from:
                group["lr"] /= 3
        stream = iter(lambda: task.make_problem(rng), None)  # endless
        problems = list(islice((p for p in stream if p not in held_out), BATCH))
        texts = [p + MARKER + task.solve(p, rng) + tokenizer.eos_token for p in problems]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right",
                          return_tensors="pt")
        ids = batch.input_ids
        # the loss starts at the marker: the model also learns where a problem ends
        started = (ids == tokenizer.convert_tokens_to_ids(MARKER)).cumsum(1).bool()
        labels = ids.masked_fill(~(started & batch.attention_mask.bool()), -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % CHECK_EVERY == 0:
            sampled = accuracy(task, model, tokenizer, validation, sample=True)
            progress.set_postfix(loss=f"{loss.item():.3f}", sampled=f"{sampled:.2f}")
            if sampled >= task.target:
                return
    raise RuntimeError(f"sampled accuracy is {sampled:.2f} after {MAX_STEPS} steps, expected at "
                       f"least {task.target}: try another --seed")


def write_lines(path, problems, answer):
    """One JSON object per line: the problem and its answer, both strings."""
    lines = [json.dumps({"problem": p, "answer": answer(p)}) for p in problems]
    path.write_text("\n".join(lines) + "\n")


def main(task=SUMS):
    parser = argparse.ArgumentParser(description="Regenerates an embedded model and its problems.")
    parser.add_argument("--seed", type=int, default=0, help="seeds problems, weights and sampling")
    parser.add_argument("--out", type=Path, default=task.folder, help="folder to write")
    parser.add_argument("--target", type=float, default=task.target, help="sampled accuracy to stop at")
    args = parser.parse_args()
    if not 0 < args.target <= 1:
        parser.error(f"--target must be above 0 and at most 1, got {args.target}")
    task = replace(task, target=args.target)
    torch.set_num_threads(1)  # sums split over threads differ in their last bit
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    held_out = {}  # a dict keeps the order of drawing, which a set does not
    while len(held_out) < TRAIN + TEST + VALIDATION:
        held_out[task.make_problem(rng)] = None
    problems = list(held_out)
    test, validation = problems[:TEST], problems[TEST:TEST + VALIDATION]
    args.out.mkdir(parents=True, exist_ok=True)
    write_lines(args.out / "test.jsonl", test, task.answer)
    write_lines(args.out / "train.jsonl", problems[TEST + VALIDATION:], task.answer)

    tokenizer = make_tokenizer(task.words)
    tokenizer.save_pretrained(args.out)  # before its first use, which would save padding state too
    model = make_model(tokenizer)
    train(task, model, tokenizer, rng, held_out, validation)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(args.out)

    print(f"sampled accuracy on test {accuracy(task, model, tokenizer, test, sample=True):.3f}")
    print(f"greedy accuracy on test  {accuracy(task, model, tokenizer, test, sample=False):.3f}")
    print(f"parameters               {model.num_parameters():,}")
    size = sum(file.stat().st_size for file in args.out.iterdir() if file.is_file())
    print(f"folder                   {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
