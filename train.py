"""Train a causal language model with GRPO + NTHR (Deng et al. 2025, arXiv 2505.18830) on one device.

python train.py                                     # embedded model, CPU, 2-5 minutes: greedy accuracy 54% -> 75%
python train.py --method grpo                       # the same without NTHR: an A/B with one flag
python train.py --model tiny/stack                  # a second embedded model: stack-machine programs
python train.py --model Qwen/Qwen2.5-0.5B-Instruct  # App. 7.3's 0.5B settings on MATH levels 3-5, one GPU
python train.py --model my/folder --data my.jsonl   # any Hugging Face causal LM, any {"problem", "answer"} file
python train.py --resume runs/tiny-nthr-seed0       # continue a run that was stopped
python train.py --eval-only --model my/folder       # greedy accuracy on the five benchmarks of Table 2, no training
"""
import json
import math
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from grpo import (group_advantages, grpo_loss, likelihood_change, pos_only, random_selection, response_logprobs,
                  token_weights)
from nthr import nthr_advantages
from rollout import concatenate, generate
from support.checkpoint import (Progress, StopSignal, append_rows, checkpoints, cut_log, load_progress, lock_folder,
                                replace_text, save_checkpoint)
from support.data import draw_questions, load_function, load_reward, step_seed
from support.errors import OutOfMemory, fail
from support.evaluate import (accuracy_line, accuracy_metrics, accuracy_table, greedy_answers, rewarded_answers,
                              sampled_group, warn_if_none_is_right, warn_if_unmixed)
from support.flags import METHODS, parse_args, recordable_flags, resume_command
from support.memory import Timer, micro_batches, peak_memory
from support.models import READ_NO_STATES, checkpoint_activations, load_model, precision
from support.start import load_data

# Shapes: Q questions, G responses each, K kept questions, B = K·G rows (the G of a question consecutive), T tokens
NOT_MEASURED = dict.fromkeys("tau eta selected_share updates skipped_updates loss clip_share kl nll grad_norm "
                             "ratio_deviation delta_mean delta_nonpositive_share eval_accuracy".split())


@dataclass
class Run:
    """All that the steps of a run work on."""
    model: torch.nn.Module         # π_θ
    reference: torch.nn.Module     # π_ref of the KL penalty; None without --kl-coef
    optimizer: torch.optim.Optimizer
    tokenizer: object
    problems: list                 # {"problem", "answer"} each
    prompts: list                  # their token ids
    eval_problems: list
    eval_prompts: list
    progress: Progress
    sampled: tuple = ()            # what `sampled_group` shows of the last step


def sample_groups(run, args, step):
    """y_i ~ π_old and r_i for the next questions; groups that are all right or all wrong are dropped (App. 7.3).

    Returns the rollout of the K kept groups (None if K is 0), correct (K, G) bool; all answers, and their metrics."""
    reward, kept, correct, answers, lengths = load_reward(args.reward), [], [], [], []
    for round_ in range(args.sampling_rounds):
        questions = draw_questions(len(run.problems), run.progress.position, args.batch_size, args.seed)
        run.progress.position += args.batch_size
        with precision(args.device, args.dtype):
            rollout = generate(run.model, run.tokenizer, [run.prompts[q] for q in questions], args.group_size,
                               args.max_new_tokens, args.temperature, step_seed(args.seed, step, round_),
                               args.max_sequences, keep_hidden=args.method not in READ_NO_STATES)
        lengths += rollout.response_mask.sum(1).tolist()
        rows = rewarded_answers([run.problems[q] for q in questions for _ in range(args.group_size)], rollout, reward)
        answers += rows
        right = torch.tensor([row["reward"] == 1 for row in rows]).view(-1, args.group_size)   # (Q, G)
        mixed = (right.any(1) & ~right.all(1)).nonzero()[:args.batch_size - len(correct), 0]
        if len(mixed):
            kept.append(rollout.select(torch.arange(right.numel()).view_as(right)[mixed].flatten()))
            correct += right[mixed]
        if len(correct) == args.batch_size:
            break
    success_rate, finished = (np.mean([row[name] for row in answers]).item() for name in ("reward", "finished"))
    metrics = {"questions": len(answers) // args.group_size, "groups_kept": len(correct), "success_rate": success_rate,
               "response_length": np.mean(lengths).item(), "tokens": sum(lengths), "truncated_share": 1 - finished}
    return *((concatenate(kept), torch.stack(correct).to(args.device)) if kept else (None, None)), answers, metrics


def credit_rule(args, generator, selections):
    """The function of --method: (advantages (G, T), hidden, tokens, mask, correct, lm_head, logprobs) -> advantages.

    τ, η and the number of tokens that NTHR selects are appended to `selections`."""
    def nthr(*group):                                                          # Algorithm 1
        try:
            result = nthr_advantages(*group[:-1], logprobs=group[-1], beta=args.beta, eta=args.eta,
                                     vocabulary=args.nthr_vocab, temperature=args.temperature, tau_over=args.tau_over)
        except ValueError as error:                                            # of numbers: the shapes fit
            raise FloatingPointError(f"{error}; try --dtype float32 or a higher --temperature") from None
        selections.append((result.tau.item(), result.eta, result.selected.sum().item()))
        return result

    def random(advantages, hidden, tokens, mask, correct, *head):              # §5.3
        result = nthr(advantages, hidden, tokens, mask, correct, *head)
        chosen = random_selection(result.selected, mask, correct, generator)
        return torch.where(chosen, result.eta * advantages, advantages)

    rules = {"nthr": lambda *group: nthr(*group).advantages, "random": random,
             "grpo": lambda advantages, *_: advantages, "pos-only": lambda advantages, *_: pos_only(advantages)}
    return rules.get(args.method) or load_function("--method", args.method)


@torch.no_grad()
def token_advantages(model, rollout, correct, args, step):
    """Â of §2, then the rule of --method once per group, on what sampling kept: (B, T), and NTHR's metrics."""
    mask, lm_head, selections = rollout.response_mask, model.get_output_embeddings().weight, []
    if args.method not in METHODS:                                             # π of a rule is softmax(hidden lm_headᵀ)
        lm_head = lm_head / args.temperature
    advantages = group_advantages(correct.float()).view(-1, 1).repeat(1, mask.shape[1])            # (B, T)
    generator = torch.Generator().manual_seed(step_seed(args.seed, step, args.sampling_rounds))    # no round has it
    rule = credit_rule(args, generator, selections)
    for k, right in enumerate(correct):                                        # (G,)
        rows = slice(k * args.group_size, (k + 1) * args.group_size)
        t = max(1, int(mask[rows].sum(1).max()))
        hidden = None if rollout.hidden is None else rollout.hidden[rows, :t]
        changed = rule(advantages[rows, :t], hidden, rollout.response_ids[rows, :t], mask[rows, :t], right, lm_head,
                       rollout.logprobs[rows, :t])
        if not torch.is_tensor(changed) or changed.shape != mask[rows, :t].shape or not changed.isfinite().all():
            fail(f"--method {args.method} must return finite advantages (G, T) = {(args.group_size, t)}, got "
                 f"{str(getattr(changed, 'shape', changed))[:60]} with {str(changed)[:60]}")
        advantages[rows, :t] = changed
    if not selections:
        return advantages, {}
    (tau, eta, selected), negative = np.array(selections).T, mask[~correct.flatten()].sum().item()
    return advantages, {"tau": tau.mean(), "eta": eta.mean(), "selected_share": selected.sum() / max(1, negative)}


def policy_logprobs(model, rollout, rows, args):
    """`response_logprobs` of these rows in one forward pass: (b, t), t the longest of these responses."""
    with precision(args.device, args.dtype):
        return response_logprobs(model, *rollout.inputs(rows), args.temperature)


def update(run, rollout, correct, advantages, args, timer):
    """Ascend Eq. 1 by AdamW, one update per mini-batch of questions: ln π_old (B, T) and metrics, means over updates.

    The first mini-batch needs no pass for ln π_old: π_θ is π_old, the ratio exactly 1. Each later one gets its pass
    before the first update, from the same micro-batches: other shapes round differently, which would move the ratio.
    An update with a non-finite loss or gradient is skipped; progress.nonfinite counts how many in a row."""
    model, mask, old = run.model, rollout.response_mask, rollout.logprobs.clone()                  # (B, T) both
    groups = torch.arange(len(mask)).view_as(correct).tensor_split(args.batch_size // args.minibatch_size)
    first, *later = [(rows, micro_batches(rollout, rows, args.micro_batch_tokens, args.micro_batch_size))
                     for rows in map(torch.flatten, groups) if len(rows)]      # whole groups, as equal as possible
    model.train(args.gradient_checkpointing)                                   # recomputation works in train mode only
    for micro in (micro for _, micros in later for micro in micros):
        with timer("old_probabilities"), torch.no_grad():
            logprobs = policy_logprobs(model, rollout, micro, args)
            old[micro, :logprobs.shape[1]] = logprobs
    done, skipped, deviation = [], 0, 0.0
    for number, (rows, micros) in enumerate((first, *later)):
        weights, totals, ref = torch.zeros(len(mask), device=mask.device), {}, None
        weights[rows] = token_weights(mask[rows], args.group_size)
        for micro in tqdm(micros, desc="update", unit=" micro-batches", leave=False, delay=10):
            if run.reference:
                with timer("reference"), torch.no_grad():
                    ref = policy_logprobs(run.reference, rollout, micro, args)
            with timer("model_update"):
                logprobs = policy_logprobs(model, rollout, micro, args)
                t = logprobs.shape[1]
                if number == 0:                                                # until here, old is the sampler's
                    deviation = max(deviation, torch.expm1(logprobs.detach() - old[micro, :t]).abs().max().item())
                    old[micro, :t] = logprobs.detach()
                loss, metrics = grpo_loss(
                    logprobs, old[micro, :t], advantages[micro, :t], mask[micro, :t], args.group_size, args.clip_eps,
                    ref, args.kl_coef, args.nll_coef, correct.flatten()[micro], weights[micro])
                loss.backward()
                totals = {name: totals.get(name, 0.0) + value.item() for name, value in metrics.items()}
        with timer("model_update"):
            totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            if math.isfinite(totals["loss"]) and math.isfinite(totals["grad_norm"]):
                run.optimizer.step()
                done.append(totals)
                run.progress.nonfinite = 0
            else:
                skipped, run.progress.nonfinite = skipped + 1, run.progress.nonfinite + 1
                tqdm.write(f"update skipped: loss {totals['loss']}, gradient norm {totals['grad_norm']}")
            run.optimizer.zero_grad(set_to_none=True)
        if run.progress.nonfinite == 3:
            break
    model.eval()
    means = {name: sum(totals[name] for totals in done) / len(done) for name in done[0]} if done else {}
    return old, {"updates": len(done), "skipped_updates": skipped, "ratio_deviation": deviation, **means}


@torch.no_grad()
def step_likelihood_change(model, rollout, correct, old, args):
    """Δ(x) of Eq. 2 for each kept question, in nats: {"delta_mean", "delta_nonpositive_share"}.

    Here θ' is the policy after the whole step, all questions together; §4 updates on one question alone."""
    new, right = old.clone(), correct.flatten().nonzero()[:, 0]                # only the correct responses matter
    for rows in micro_batches(rollout, right, args.micro_batch_tokens, args.micro_batch_size):
        logprobs = policy_logprobs(model, rollout, rows, args)
        new[rows, :logprobs.shape[1]] = logprobs
    new, old, mask = (x.view(*correct.shape, -1) for x in (new, old, rollout.response_mask))       # (K, G, T)
    delta = torch.stack([likelihood_change(*group) for group in zip(new, old, mask, correct)])
    return {"delta_mean": delta.mean().item(), "delta_nonpositive_share": (delta <= 0).float().mean().item()}


def train_step(run, args, step):
    """Algorithm 1 on the next questions: sample, reward, score, update. Returns metrics; moves run.progress on."""
    timer, changes = Timer(), None
    with timer("data_generation"):                                             # y_i ~ π_old, r_i, mixed groups only
        rollout, correct, answers, metrics = sample_groups(run, args, step)
    if rollout:
        with timer("nthr"):                                                    # Eq. 7, Eq. 8, Algorithm 1
            advantages, nthr_metrics = token_advantages(run.model, rollout, correct, args, step)
        changes = (advantages != group_advantages(correct.float()).view(-1, 1)) & rollout.response_mask
        rollout.hidden = None                                                  # read; the update needs the memory
        old, update_metrics = update(run, rollout, correct, advantages, args, timer)               # Eq. 1
        metrics |= nthr_metrics | update_metrics
        if args.delta_every and step % args.delta_every == 0:
            with timer("likelihood_change"):                                   # Eq. 2
                metrics |= step_likelihood_change(run.model, rollout, correct, old, args)
    run.sampled = answers, args.group_size, rollout, changes
    run.progress.unmixed = 0 if rollout else run.progress.unmixed + 1
    warn_if_unmixed(run.progress.unmixed, step == args.steps and not run.optimizer.state, answers, args.reward,
                    args.max_new_tokens)
    metrics["tokens_per_second"] = metrics.pop("tokens") / timer["data_generation"]
    return {**NOT_MEASURED, **metrics, "seconds": timer}


def evaluate(run, args, step):
    """Greedy accuracy: printed, and returned as metrics. samples.jsonl gets five answers and one sampled group."""
    answers = greedy_answers(run.model, run.tokenizer, run.eval_problems, run.eval_prompts, load_reward(args.reward),
                             args.max_new_tokens, args.max_sequences, args.dtype)
    sampled = [sampled_group(*run.sampled, run.tokenizer, args.instruction)] if run.sampled else []
    append_rows(Path(args.out) / "samples.jsonl", [{"step": step, **row} for row in answers[:5] + sampled])
    tqdm.write(accuracy_line(step, answers))
    if not step:                                                               # later, the sampled groups tell
        warn_if_none_is_right(answers, args.reward, args.max_new_tokens)
    return accuracy_metrics(answers)


def load_run(args, checkpoint):
    """A `Run` from --model, or from a checkpoint."""
    source = str(checkpoint or args.model)
    data = load_data(args, source)
    model = load_model(source, args.device, args.method)
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    reference = load_model(args.model, args.device, args.method, getattr(torch, args.dtype)) if args.kl_coef else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=args.device.startswith(("cpu", "cuda")))             # no copies of weights
    progress = load_progress(checkpoint, optimizer) if checkpoint else Progress()
    return Run(model, reference, optimizer, *data, progress)


def train(args):
    """`train_step` by `train_step`, with evaluations, logs and checkpoints in between; --resume from a checkpoint."""
    out, checkpoint = Path(args.out), next(iter(checkpoints(args.out)), None) if args.resume else None
    run = load_run(args, checkpoint)
    progress, stop = run.progress, StopSignal(resume_command(args))
    replace_text(out / "config.json", json.dumps(recordable_flags(args), indent=1))
    for log in ("metrics.jsonl", "samples.jsonl"):
        cut_log(out / log, progress.step if checkpoint else -1)

    def log_and_save(step, metrics, save):
        append_rows(out / "metrics.jsonl", [{"step": step, **metrics}])
        progress.step = step
        if save:
            save_checkpoint(out, run.model, run.tokenizer, run.optimizer, progress, args.keep_checkpoints)

    if not checkpoint:
        log_and_save(0, evaluate(run, args, 0), save=True)
    stopping = stop.number                                                     # read once a step
    with tqdm(initial=progress.step, total=args.steps, desc=args.method) as bar:
        while progress.step < args.steps and progress.nonfinite < 3 and not stopping:
            metrics = train_step(run, args, step := progress.step + 1)
            last = step == args.steps or progress.nonfinite == 3
            if last or (args.eval_every and step % args.eval_every == 0):
                with metrics["seconds"]("evaluation"):
                    metrics |= evaluate(run, args, step)
            stopping = stop.number
            log_and_save(step, {**metrics, "peak_memory_gib": peak_memory()},
                         save=last or stopping or (args.save_every and step % args.save_every == 0))
            bar.set_postfix(success=f"{metrics['success_rate']:.2f}", groups=metrics["groups_kept"],
                            tokens_s=f"{metrics['tokens_per_second']:.0f}")
            bar.update()
    if progress.nonfinite == 3:
        fail(f"three updates in a row had a non-finite loss or gradient: start again from {out}/checkpoint, which has "
             f"the last good weights, with a lower --lr")
    if progress.step < args.steps:
        print(f"stopped after step {progress.step}; continue with: {stop.command}")
        sys.exit(128 + stopping)
    print(f"done: metrics in {out}/metrics.jsonl, the model in {out}/checkpoint")


def evaluate_only(args):
    """Greedy answers of --model to all of --eval-data: a table, and answers.jsonl in --out."""
    tokenizer, _, _, problems, prompts = load_data(args, args.model)
    model, answers, path = load_model(args.model, args.device, "grpo"), [], Path(args.out) / "answers.jsonl"
    for _, pairs in groupby(zip(problems, prompts), lambda pair: pair[0]["benchmark"]):
        answers += greedy_answers(model, tokenizer, *zip(*pairs), load_reward(args.reward), args.max_new_tokens,
                                  args.max_sequences, args.dtype)
        replace_text(path, "".join(json.dumps(row) + "\n" for row in answers))                    # what is done is kept
    print(*accuracy_table(answers), f"all answers are in {path}", sep="\n")
    warn_if_none_is_right(answers, args.reward, args.max_new_tokens)


def main():
    args = parse_args(__doc__)
    try:
        with lock_folder(args.out):
            (evaluate_only if args.eval_only else train)(args)
    except (FloatingPointError, OutOfMemory) as error:
        saved = not args.eval_only and checkpoints(args.out)
        fail(f"{error}{f'; the last checkpoint is intact: {resume_command(args)} continues from it' if saved else ''}")
    except KeyboardInterrupt:
        print("interrupted: run the same command again, with another --out if that has answers", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
