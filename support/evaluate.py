"""Answers of a model and what they say: accuracy by benchmark as in Table 2, one sampled group, why none is right."""
from reward import extract_answer
from rollout import generate
from support.data import encode_prompt, shorten
from support.errors import memory_for, printable, warn
from support.models import precision


def rewarded_answers(problems, rollout, reward):
    """The rows of `problems`, one for each row of the rollout, with "response", "reward" and "finished" of that."""
    return [{**row, "response": text, "reward": reward(text, row["answer"]), "finished": finished}
            for row, text, finished in zip(problems, rollout.texts, rollout.finished.tolist())]


def greedy_answers(model, tokenizer, problems, prompts, reward, max_new_tokens, max_sequences, dtype="float32"):
    """The rows of `problems`, in their order, each with its greedy "response", "reward" and "finished"."""
    with memory_for("evaluation"), precision(model.device, dtype):             # generate sorts them by length
        rollout = generate(model, tokenizer, prompts, 1, max_new_tokens, 0.0, max_sequences=max_sequences,
                           keep_hidden=False, bar_after=0)
    return rewarded_answers(problems, rollout, reward)


def values_by_benchmark(answers, field):
    """{benchmark: the values of a field of its answers}, in the order of the answers."""
    values = {}
    for row in answers:
        values.setdefault(row["benchmark"], []).append(row[field])
    return values


def average_accuracy(answers):
    """The share of right answers by benchmark, and the mean of these shares, whatever the benchmarks' sizes."""
    accuracy = {name: sum(rewards) / len(rewards) for name, rewards in values_by_benchmark(answers, "reward").items()}
    return accuracy, sum(accuracy.values()) / len(accuracy)


def accuracy_metrics(answers):
    """{"eval_accuracy": the average} and, of several benchmarks, "eval_by_benchmark"."""
    accuracy, average = average_accuracy(answers)
    return {"eval_accuracy": average} | ({"eval_by_benchmark": accuracy} if len(accuracy) > 1 else {})


def accuracy_line(step, answers):
    """What is printed of an evaluation while training: the average, and each benchmark if there are several."""
    accuracy, average = average_accuracy(answers)
    each = f" ({', '.join(f'{name} {share:.1%}' for name, share in accuracy.items())})" if len(accuracy) > 1 else ""
    return printable(f"step {step}: greedy accuracy {average:.1%} on {len(answers)} problems{each}")


def accuracy_table(answers):
    """Lines of text: a row per benchmark and the average, in percent with one and with two decimals as in Table 2.

    The average is that of the rounded rows, as the paper's are (all multiples of 0.02), each with the same weight."""
    finished = values_by_benchmark(answers, "finished")
    rows = [(printable(name), len(finished[name]), f"{100 * share:.1f}", finished[name].count(False))
            for name, share in average_accuracy(answers)[0].items()]
    average = sum(float(row[2]) for row in rows) / len(rows)
    rows.append(("average", len(answers), f"{average:.2f}", sum(row[3] for row in rows)))
    width = max(len(row[0]) for row in rows)
    return [f"{name:<{width}}  {problems:>8}  {percent:>10}  {truncated:>9}" for name, problems, percent, truncated in
            [("benchmark", "problems", "accuracy %", "truncated"), *rows]]


def likely_cause(answers, reward, max_new_tokens):
    r"""What was counted of `answers`, and the likely reason that no question has both right and wrong ones.

    answers: {"response", "answer", "reward", "finished"} each; reward: the value of --reward."""
    wrong = [row for row in answers if row["reward"] != 1]
    cut_off = sum(not row["finished"] for row in wrong)
    unboxed = sum(row["finished"] and not extract_answer(row["response"]) for row in wrong) if reward == "math" else 0
    counted = (f"of {len(answers)} answers, {len(answers) - len(wrong)} are right, {cut_off} cut off"
               f"{f', {unboxed} finished without a box' if reward == 'math' else ''}: ")
    row = next((row for row in wrong if row["finished"]), answers[0])
    example = f"one is {shorten(row['response'])}, and the answer is {shorten(row['answer'])}"
    if not wrong:
        return counted + f"the questions are too easy for this model, or --reward calls everything right; {example}"
    if len(wrong) < len(answers):
        return counted + "raise --group-size, --batch-size or --sampling-rounds"
    if 2 * cut_off >= len(wrong):
        return counted + f"raise --max-new-tokens (now {max_new_tokens})"
    if 2 * unboxed >= len(wrong):
        return counted + r"the reward reads the last \boxed{}, so check the prompt, --instruction and --model"
    return counted + f"the questions are too hard, or --reward and --data do not fit; {example}"


def warn_if_none_is_right(answers, reward, max_new_tokens):
    """The likely cause, of an evaluation without any right answer."""
    if not any(row["reward"] == 1 for row in answers):
        warn(f"no answer is right: {likely_cause(answers, reward, max_new_tokens)}")


def warn_if_unmixed(steps, learned_nothing, answers, reward, max_new_tokens):
    """The likely cause, after 3, 13, 23, ... steps in a row in which no group was mixed.

    answers: those of the newest of these steps. learned_nothing: the run ends without any update, which is said too."""
    if steps % 10 == 3 or (steps and learned_nothing):
        warn(f"no question had both right and wrong answers in {steps} steps; in the last one, "
             f"{likely_cause(answers, reward, max_new_tokens)}")


def sampled_group(answers, group_size, rollout, selected, tokenizer, instruction):
    """The first sampled question with right and wrong answers (else the first) as a line of samples.jsonl.

    Its answers are the first rows of `rollout` and of `selected` (B, T) bool; both are None if no group is mixed.
    "selected" holds [position, text] of the selected tokens, a list for each response."""
    groups = [answers[i:i + group_size] for i in range(0, len(answers), group_size)]
    group = next((rows for rows in groups if len({row["reward"] for row in rows}) > 1), groups[0])
    prompt = encode_prompt(tokenizer, group[0]["problem"], instruction)
    tokens, ids = [[] for _ in group], rollout.response_ids[:group_size].tolist() if rollout else []
    for i, k in selected[:group_size].nonzero().tolist() if rollout else ():
        tokens[i].append([k, tokenizer.decode(ids[i][k])])
    return {"problem": group[0]["problem"], "answer": group[0]["answer"],
            "prompt": tokenizer.decode(prompt, clean_up_tokenization_spaces=False),
            "responses": [row["response"] for row in group], "rewards": [row["reward"] for row in group],
            "selected": tokens}
