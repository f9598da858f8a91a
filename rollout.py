"""Sampling of the G responses per question that GRPO compares: y_i ~ π_old(·|x) (§2), in plain PyTorch.

Tokens are drawn from softmax(logits / temperature) and from nothing else: no top-k, no top-p, no repetition penalty
from a model's generation_config, so that the distribution sampled from is the one that Eq. 1's ratio divides by.
Each prompt is prefilled once and its KV cache repeated for its responses; a row leaves the batch when it finishes.
"""
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

# Shapes: Q prompts, G responses each, B = Q·G rows (the G of a prompt consecutive), P prompt tokens, T response
#         tokens, V vocabulary, R rows that are being decoded together
SHOW_PROGRESS_AFTER = 10                # seconds
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
# How chat templates end a turn. Base models share the template of their chat sibling, but often list only
# <|endoftext|> as their end (Qwen2.5), and would write the user's next question after the answer.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


@dataclass
class Rollout:
    """B sampled responses. Masks are built from lengths, so an EOS counts even where pad and EOS are the same id."""
    prompt_ids: torch.Tensor      # (B, P) left-padded
    prompt_mask: torch.Tensor     # (B, P) bool
    response_ids: torch.Tensor    # (B, T) right-padded, the stop token included
    response_mask: torch.Tensor   # (B, T) bool
    logprobs: torch.Tensor        # (B, T) float32, ln π of each token when it was sampled, 0 on padding
    finished: torch.Tensor        # (B,) bool: ended by a stop token, not cut off at max_new_tokens
    texts: list                   # B decoded responses, special tokens left out

    def inputs(self, rows):
        """(ids, attention_mask, P) for a forward pass on `rows`, columns that are padding in all of them cut off."""
        P = int(self.prompt_mask[rows].sum(1).max())
        T = max(1, int(self.response_mask[rows].sum(1).max()))
        first = self.prompt_ids.shape[1] - P
        ids = torch.cat([self.prompt_ids[rows, first:], self.response_ids[rows, :T]], dim=1)
        return ids, torch.cat([self.prompt_mask[rows, first:], self.response_mask[rows, :T]], dim=1), P

    def select(self, rows):
        """The Rollout of these rows, a LongTensor."""
        tensors = [getattr(self, field.name)[rows] for field in fields(self)[:-1]]
        return Rollout(*tensors, [self.texts[row] for row in rows.tolist()])


def concatenate(rollouts):
    """One Rollout of all rows: prompts padded on the left, responses on the right, to the longest."""
    def join(name, left):
        values = [getattr(rollout, name) for rollout in rollouts]
        width = max(value.shape[1] for value in values)
        pads = [(width - value.shape[1], 0) if left else (0, width - value.shape[1]) for value in values]
        return torch.cat([F.pad(value, pad) for value, pad in zip(values, pads)])

    return Rollout(join("prompt_ids", True), join("prompt_mask", True), join("response_ids", False),
                   join("response_mask", False), join("logprobs", False),
                   torch.cat([rollout.finished for rollout in rollouts]),
                   [text for rollout in rollouts for text in rollout.texts])


def encode_prompt(tokenizer, problem, instruction=INSTRUCTION):
    """Token ids of a question and an instruction: the tokenizer's chat template if it has one, else a plain one."""
    question = f"{problem}\n{instruction}" if instruction else problem
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                             return_dict=False)
    return tokenizer(f"Question: {question}\nAnswer:").input_ids


def stop_token_ids(model, tokenizer):
    """The sorted ids that end a response: the model's and the tokenizer's EOS and the end of a chat turn."""
    eos = model.generation_config.eos_token_id
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary.get(token) for token in END_OF_TURN}
    return sorted(ids - {None})


def _left_pad(sequences, pad_id, device):
    """Token lists -> ids (Q, P) and mask (Q, P) bool."""
    P = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[pad_id] * (P - len(sequence)) + sequence for sequence in sequences], device=device)
    mask = torch.tensor([[False] * (P - len(sequence)) + [True] * len(sequence) for sequence in sequences],
                        device=device)
    return ids, mask


def _sample(logits, temperature, generator):
    """(R, V) logits -> the sampled token (R,) and its log-probability (R,). Temperature 0 takes the most likely."""
    logits = logits.float() / (temperature or 1.0)
    log_z = torch.logsumexp(logits, dim=-1)
    if not log_z.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or training diverged")
    if temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        token = torch.multinomial(torch.exp(logits - log_z[:, None]), 1, generator=generator)[:, 0]
    return token, logits.gather(1, token[:, None])[:, 0] - log_z


class _Cache(DynamicCache):
    """A KV cache that stores keys in the type of the values: under autocast, rotary embeddings make keys float32."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def _decode(model, prompt_ids, prompt_mask, repeat, max_new_tokens, temperature, generator, stop_ids, bar):
    """Sample a response to prompt repeat[r] for each row r, all together.

    Returns tokens and logprobs (R, max_new_tokens), lengths and finished (R,)."""
    device = prompt_ids.device
    cache = _Cache(config=model.config)
    positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=prompt_ids, attention_mask=prompt_mask.long(), position_ids=positions,
                   past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1][repeat]     # (R, V)
    cache.batch_select_indices(repeat)                                         # one prefill serves all its responses
    mask, position = prompt_mask[repeat].long(), positions[repeat, -1:] + 1    # (R, P+t), (R, 1)
    alive = torch.arange(len(repeat), device=device)                           # the row that each of the R rows is
    tokens = torch.zeros(len(repeat), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(repeat), max_new_tokens, device=device)
    lengths = torch.full((len(repeat),), max_new_tokens, device=device)
    finished = torch.zeros(len(repeat), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        token, logprob = _sample(logits, temperature, generator)
        tokens[alive, t], logprobs[alive, t] = token, logprob
        bar.update(len(alive))
        stopped = torch.isin(token, stop_ids)
        if stopped.any():                                                      # finished rows leave the batch
            lengths[alive[stopped]], finished[alive[stopped]] = t + 1, True
            bar.total -= int(stopped.sum()) * (max_new_tokens - t - 1)
            keep = (~stopped).nonzero()[:, 0]
            alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
            cache.batch_select_indices(keep)
        if len(alive) == 0 or t == max_new_tokens - 1:
            break
        mask = F.pad(mask, (0, 1), value=1)
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache,
                       use_cache=True).logits[:, -1]
        position = position + 1
    return tokens, logprobs, lengths, finished


@torch.no_grad()
def generate(model, tokenizer, prompts, group_size, max_new_tokens, temperature=1.0, seed=None, max_sequences=256,
             stop_ids=None):
    """Sample `group_size` responses to each prompt: a Rollout of B = len(prompts) · group_size rows, prompt by prompt.

    prompts: strings (tokenised without special tokens) or lists of token ids. temperature 0 is greedy, and its
    log-probabilities are those of temperature 1. seed: an int for reproducible sampling on one machine, or None for
    torch's global generator. max_sequences bounds the rows whose KV cache exists at one time. stop_ids: default
    `stop_token_ids`. Raises ValueError on bad sizes or an empty prompt, FloatingPointError on NaN or +inf logits."""
    if group_size < 1 or max_new_tokens < 1 or max_sequences < 1 or not temperature >= 0 or not prompts:
        raise ValueError(f"need at least one prompt, group_size, max_new_tokens, max_sequences >= 1 and temperature "
                         f">= 0, got {len(prompts)}, {group_size}, {max_new_tokens}, {max_sequences}, {temperature}")
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings or of token id lists, got a single string")
    prompts = [tokenizer(p, add_special_tokens=False).input_ids if isinstance(p, str) else list(p) for p in prompts]
    if not all(prompts):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} has no tokens: there is nothing to continue")
    device = model.device
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    stop_ids = torch.tensor(stop_token_ids(model, tokenizer) if stop_ids is None else list(stop_ids), device=device)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    parts, training = [], model.training
    model.eval()                                                               # no dropout, and a cache that is kept
    rows = [q for q in range(len(prompts)) for _ in range(group_size)]
    with tqdm(total=len(rows) * max_new_tokens, desc="sampling", unit=" tokens", unit_scale=True, leave=False,
              delay=SHOW_PROGRESS_AFTER) as bar:
        for start in range(0, len(rows), max_sequences):
            part = rows[start:start + max_sequences]
            repeat = torch.tensor(part, device=device) - part[0]
            prompt_ids, prompt_mask = _left_pad(prompts[part[0]:part[-1] + 1], pad_id, device)
            tokens, logprobs, lengths, finished = _decode(
                model, prompt_ids, prompt_mask, repeat, max_new_tokens, temperature, generator, stop_ids, bar)
            T = int(lengths.max())
            mask = torch.arange(T, device=device) < lengths[:, None]           # from lengths, never token == pad
            texts = tokenizer.batch_decode([row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())],
                                           skip_special_tokens=True)
            parts.append(Rollout(prompt_ids[repeat], prompt_mask[repeat],
                                 tokens[:, :T].masked_fill(~mask, pad_id), mask, logprobs[:, :T], finished, texts))
    model.train(training)
    return concatenate(parts)
