"""Before the first step: data and prompts, a check of the reward, and a block of lines that says what will be run."""
from transformers import AutoTokenizer

from support.data import check_reward, draw_questions, encode_prompts, load_eval_problems, split_problems
from support.errors import printable, warn
from support.memory import announce_memory
from support.models import load_config, load_pretrained

FEW_PROBLEMS = 20    # of an evaluation: below it, one problem moves the accuracy by over 5 points


def load_data(args, source):
    """(tokenizer, problems, prompts, eval_problems, eval_prompts) of the model `source`, announced and checked.

    With --eval-only there are no problems to train on. Prompts are lists of token ids."""
    tokenizer = load_pretrained(AutoTokenizer, source)                         # first: a misspelt id is found at once
    problems, eval_problems = (([], load_eval_problems(args.eval_data, args.eval_size)) if args.eval_only else
                               split_problems(args.data, args.eval_data, args.eval_size))
    check_reward(args.reward, (problems or eval_problems)[0]["answer"])
    config = load_config(source)
    prompts, eval_prompts = (rows and encode_prompts(rows, tokenizer, config, args.max_new_tokens, args.instruction)
                             for rows in (problems, eval_problems))
    announce_run(args, tokenizer, problems, prompts, eval_problems, eval_prompts)
    announce_memory(config, args, max(map(len, prompts or eval_prompts)))
    return tokenizer, problems, prompts, eval_problems, eval_prompts


def announce_run(args, tokenizer, problems, prompts, eval_problems, eval_prompts):
    """Print what will be run, with the first prompt as the model gets it; warn of little or repeated data."""
    first, kept = 0, "answers.jsonl"
    evaluated = f"{len(eval_problems)} for evaluation" + (f" ({args.eval_data})" if args.eval_data else "")
    if problems:
        first = draw_questions(len(problems), 0, 1, args.seed)[0]
        kept = f"config.json, metrics.jsonl, samples.jsonl and the newest {args.keep_checkpoints} checkpoints"
        evaluated = f"{len(problems)} to train on ({args.data}), {evaluated}"
    print(printable(f"model: {args.model} on {args.device} in {args.dtype}"))
    print(printable(f"problems: {evaluated}; reward: {args.reward}"))
    print("first prompt, as the model gets it:")
    for line in tokenizer.decode((prompts or eval_prompts)[first], clean_up_tokenization_spaces=False).split("\n"):
        print(f"  | {printable(line)}")
    print(printable(f"its gold answer: {(problems or eval_problems)[first]['answer']}"))
    print(printable(f"kept in {args.out}: {kept}"), flush=True)
    if len(eval_problems) < FEW_PROBLEMS:
        warn(f"few evaluation problems ({len(eval_problems)}): each is worth {100 / len(eval_problems):.0f} points of "
             f"accuracy")
    repeated = len(problems) - len({row["problem"] for row in problems})
    if repeated:
        warn(f"{repeated} of {len(problems)} problems repeat the question of another")
    if problems and args.batch_size > len(problems):
        warn(f"a step repeats questions: --batch-size {args.batch_size} exceeds the {len(problems)} problems")
