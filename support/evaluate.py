"""Greedy answers of a model, and what they say: accuracy by benchmark, and a table like the paper's Table 2."""
from rollout import generate
from support.errors import memory_for, printable
from support.models import precision


def greedy_answers(model, tokenizer, problems, prompts, checker, max_new_tokens, max_sequences,
                   dtype="float32"):
    """The rows of `problems`, in their order, each with its greedy "response", "reward" and "finished"."""
    with memory_for("evaluation"), precision(model.device, dtype):             # generate sorts them by length
        rollout = generate(model, tokenizer, prompts, 1, max_new_tokens, 0.0, max_sequences=max_sequences,
                           keep_hidden=False)
    return [{**row, "response": text, "reward": checker(text, row["answer"]), "finished": finished}
            for row, text, finished in zip(problems, rollout.texts, rollout.finished.tolist())]


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
