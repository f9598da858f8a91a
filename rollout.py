"""Sampling of the G responses per question that GRPO compares: y_i ~ π_old(·|x) (§2), in plain PyTorch.

Tokens are drawn from softmax(logits / temperature) and from nothing else: no top-k, no top-p, no repetition penalty
from a model's generation_config, so that the distribution sampled from is the one that Eq. 1's ratio divides by.
Sampling has ln π_old and the lm_head's input in its hands, and keeps both: Eq. 7 needs no pass of its own (App. 7.4).
A prompt is prefilled once for the responses that start together; rows that finish leave, and waiting ones move up.
"""
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from grpo import check_head, compute_dtype, hidden_states

# Shapes: Q prompts, G responses each, B = Q·G rows (those of a prompt consecutive), P prompt and T response tokens,
#         V vocabulary, d hidden size, R rows that are decoded together
BUCKET = 64                             # columns by which the KV cache grows
PREFILL_TOKENS = 2 ** 14                # prompt tokens in one forward pass
# Ends of a chat turn. Base models share the template, but may list only <|endoftext|> as their end (Qwen2.5).
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


@dataclass
class Rollout:
    """B sampled responses. Masks are built from lengths, so an EOS counts even where pad and EOS are the same id."""
    prompt_ids: torch.Tensor      # (B, P) left-padded
    prompt_mask: torch.Tensor     # (B, P) bool
    response_ids: torch.Tensor    # (B, T) right-padded, the stop token included
    response_mask: torch.Tensor   # (B, T) bool
    logprobs: torch.Tensor        # (B, T) float32, ln π_old of each token as it was sampled, 0 on padding
    finished: torch.Tensor        # (B,) bool: ended by a stop token, not cut off at max_new_tokens
    texts: list                   # B decoded responses, special tokens left out
    hidden: torch.Tensor = None   # (B, T, d) in the compute dtype, the lm_head's input that predicted each token

    def inputs(self, rows):
        """(ids, attention_mask, P) for a forward pass on `rows`, columns that are padding in all of them cut off."""
        P = int(self.prompt_mask[rows].sum(1).max())
        T = max(1, int(self.response_mask[rows].sum(1).max()))
        first = self.prompt_ids.shape[1] - P
        ids = torch.cat([self.prompt_ids[rows, first:], self.response_ids[rows, :T]], dim=1)
        return ids, torch.cat([self.prompt_mask[rows, first:], self.response_mask[rows, :T]], dim=1), P

    def select(self, rows):
        """The Rollout of these rows, a LongTensor."""
        tensors = {name: value[rows] for name, value in vars(self).items() if torch.is_tensor(value)}
        return Rollout(**tensors, texts=[self.texts[row] for row in rows.tolist()])


def concatenate(rollouts):
    """One Rollout of all rows, at least one: prompts padded on the left, responses on the right, to the longest."""
    if len(rollouts) == 1:                                                     # hidden is large: no copy
        return rollouts[0]
    joined = {}
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "logprobs", "hidden"):
        if getattr(rollouts[0], name) is not None:
            rows = [row for rollout in rollouts for row in getattr(rollout, name)]
            joined[name] = pad_sequence(rows, True, padding_side="left" if "prompt" in name else "right")
    return Rollout(**joined, finished=torch.cat([rollout.finished for rollout in rollouts]),
                   texts=[text for rollout in rollouts for text in rollout.texts])


def stop_token_ids(model, tokenizer):
    """The sorted ids that end a response: the model's and the tokenizer's EOS and the end of a chat turn."""
    eos, vocabulary = model.generation_config.eos_token_id, tokenizer.get_vocab()
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    return sorted((ids | {vocabulary.get(token) for token in END_OF_TURN}) - {None})


def _left_pad(sequences, pad_id, device):
    """Token lists -> ids (Q, P) and mask (Q, P) bool."""
    ids = pad_sequence([torch.tensor(s) for s in sequences], True, padding_value=pad_id, padding_side="left")
    padding = ids.shape[1] - torch.tensor([[len(s)] for s in sequences])
    return ids.to(device), (torch.arange(ids.shape[1]) >= padding).to(device)


def _sample(logits, temperature, generator):
    """(R, V) logits -> the sampled token (R,) and its log-probability (R,). Temperature 0 takes the most likely."""
    pi = torch.softmax(logits.float() if temperature in (0, 1) else logits.float() / temperature, dim=-1)      # (R, V)
    race = torch.empty_like(pi).exponential_(generator=generator) if temperature else torch.ones_like(pi)
    token = torch.div(pi, race, out=race).argmax(dim=-1)                       # first of V arrivals with rates π
    logprob = pi.gather(1, token[:, None])[:, 0].log()
    if not logprob.isfinite().all():
        raise FloatingPointError(f"the model's logits at temperature {temperature} are not finite: its weights are "
                                 "damaged, training diverged, or the temperature is too low")
    return token, logprob


def check_cache(config):
    """ValueError if a layer of the model keeps anything but keys and values, which `generate` could not move about."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        raise ValueError(f"the model has a {kinds.pop().__name__}: choose one whose layers keep keys and values only")


class _Layer(DynamicLayer):
    """One layer of `_Slots`: views of its buffers, whose last column is the room for the token being computed."""

    def get_seq_length(self):
        return self.keys.shape[2] - 1

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values


class _Slots(Cache):
    """The KV cache of the R rows that are decoded together, flush right: the newest token of each in the last column.

    Tokens are written in place, and the last rows move into the slots of those that leave, where transformers'
    DynamicCache copies all that it holds for each new token and each row that leaves."""

    def __init__(self, slots):
        super().__init__(layers=[])
        self.slots, self.rows, self.columns = slots, 0, 0                      # rows and columns: those in use
        self.buffers = []         # mask (slots, 1, capacity, 1), then keys and values (slots, heads, capacity, size)

    def reserve(self, slots):
        """New buffers, BUCKET columns larger than what is in use: of a long tail, only `slots` rows are kept."""
        for layer in self.layers:
            layer.keys = layer.values = None                                   # views would keep every old buffer
        for i, old in enumerate(self.buffers):
            self.buffers[i] = old.new_empty(slots, old.shape[1], self.columns + BUCKET, old.shape[3])
            self.buffers[i][:self.rows, :, :self.columns] = old[:self.rows, :, :self.columns]

    def trim(self, at_least):
        """Drop the columns on the left that no row uses, but keep `at_least` so many."""
        used = self.buffers[0][:self.rows, 0, :self.columns, 0].sum(1).tolist()
        first, self.columns = self.columns - max([at_least, *used]), max([at_least, *used])
        for buffer in self.buffers if first else ():                           # clone: source and target overlap
            buffer[:self.rows, :, :self.columns] = buffer[:self.rows, :, first:first + self.columns].clone()

    def admit(self, model, prompts, repeat, pad_id):
        """prompts[repeat[i]] takes the i-th free slot, each prompt prefilled once. Returns states (len(repeat), d)."""
        distinct = list(dict.fromkeys(repeat))
        ids, mask = _left_pad([prompts[q] for q in distinct], pad_id, model.device)
        repeat = torch.tensor([distinct.index(q) for q in repeat], device=model.device)
        cache = DynamicCache()                                                 # without a config, windows keep it all
        states = hidden_states(model, ids, mask.long(), cache)[:, -1]          # (distinct, d)
        sources, dtype = [mask[:, None, :, None]], compute_dtype(model)        # DynamicCache keeps float32 in autocast
        sources += [x.to(dtype) for layer in cache.layers for x in (layer.keys, layer.values)]
        P, new = mask.shape[1], slice(self.rows, self.rows + len(repeat))
        if not self.buffers:
            self.layers, self.buffers, self.columns = [_Layer() for _ in cache.layers], sources[:], P
            self.reserve(self.slots)
        self.trim(at_least=P)
        for buffer, source in zip(self.buffers, sources):
            buffer[new, :, :self.columns - P] = 0                              # masked, but 0 · NaN would be NaN
            buffer[new, :, self.columns - P:self.columns] = source[repeat]
        self.rows = new.stop
        return states[repeat]

    def remove(self, done):
        """Free the slots of rows done (R,) bool. Returns which row each slot holds now, an index of the R before."""
        self.rows -= int(done.sum())
        holes, movers = done[:self.rows].nonzero()[:, 0], self.rows + (~done[self.rows:]).nonzero()[:, 0]
        for buffer in self.buffers:
            buffer[holes, :, :self.columns] = buffer[movers, :, :self.columns]
        return torch.arange(self.rows, device=done.device).index_copy(0, holes, movers)

    def extend(self, waiting):
        """One more column for the next token of each row. Returns the attention mask (R, columns)."""
        if self.columns == self.buffers[0].shape[2]:
            self.trim(at_least=1)
            if self.columns > self.buffers[0].shape[2] - BUCKET // 2:
                self.reserve(self.slots if waiting else self.rows)
        self.columns += 1
        mask, *states = [buffer[:self.rows, :, :self.columns] for buffer in self.buffers]
        mask[:, :, -1] = True
        for layer, keys, values in zip(self.layers, states[::2], states[1::2]):
            layer.keys, layer.values = keys, values
        return mask[:, 0, :, 0].long()


def _decode(model, prompts, group_size, pad_id, slots, max_new_tokens, temperature, generator, stop_ids, keep_hidden,
            bar):
    """Sample all responses, `slots` at a time: tokens, logprobs (B, max_new_tokens), hidden (B, max_new_tokens, d or
    0), lengths and finished (B,)."""
    device, lm_head, dtype = model.device, model.get_output_embeddings(), compute_dtype(model)
    B = len(prompts) * group_size
    cache = _Slots(min(slots, B))
    tokens, logprobs = (torch.zeros(B, max_new_tokens, dtype=t, device=device) for t in (torch.long, torch.float32))
    hidden = torch.zeros(B, max_new_tokens, lm_head.in_features * keep_hidden, dtype=dtype, device=device)
    lengths, finished = (torch.zeros(B, dtype=t, device=device) for t in (torch.long, torch.bool))
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(group_size)
    # Longest prompts first: one that moves up then fits into the columns in use, next to prompts of its length.
    waiting = prompt_lengths.argsort(descending=True, stable=True).tolist()
    row, states = torch.zeros(0, dtype=torch.long, device=device), None        # (R,) which of B is in a slot, (R, d)
    while waiting or len(row):
        free = cache.slots - len(row)
        if waiting and free >= max(1, cache.slots // 4):                       # some together: a prefill costs a pass
            most = min(free, max(1, PREFILL_TOKENS // int(prompt_lengths[waiting[0]])) * group_size)
            new, waiting = waiting[:most], waiting[most:]
            prefilled = cache.admit(model, prompts, [b // group_size for b in new], pad_id)
            states = torch.cat([states, prefilled]) if len(row) else prefilled
            row = torch.cat([row, torch.tensor(new, device=device)])
        token, logprob = _sample(lm_head(states), temperature, generator)
        tokens[row, lengths[row]], logprobs[row, lengths[row]] = token, logprob
        if keep_hidden:
            hidden[row, lengths[row]] = states.to(dtype)
        lengths[row] += 1
        bar.update(len(row))
        finished[row] = torch.isin(token, stop_ids)
        done = finished[row] | (lengths[row] == max_new_tokens)
        if done.any():
            bar.total -= int((max_new_tokens - lengths[row[done]]).sum())
            left = cache.remove(done)
            row, token = row[left], token[left]
        if len(row):
            positions = (prompt_lengths + lengths)[row, None] - 1
            states = hidden_states(model, token[:, None], cache.extend(waiting), cache, positions)[:, -1]
    return tokens, logprobs, hidden, lengths, finished


@torch.no_grad()
def generate(model, tokenizer, prompts, group_size, max_new_tokens, temperature=1.0, seed=None, max_sequences=256,
             stop_ids=None, keep_hidden=True, bar_after=10):
    """Sample `group_size` responses to each prompt: a Rollout of B = len(prompts) · group_size rows, prompt by prompt.

    prompts: strings (tokenised without special tokens) or lists of token ids. temperature 0 is greedy, with the
    log-probabilities of temperature 1. seed: an int for reproducible sampling on one machine; None: torch's generator.
    max_sequences bounds the rows whose KV cache exists at one time. stop_ids: default `stop_token_ids`.
    keep_hidden=False leaves `Rollout.hidden` None, as for an evaluation: B · T · d numbers less.
    bar_after: seconds after which a progress bar appears.
    Raises ValueError on bad arguments and as `check_cache` and `grpo.check_head`, FloatingPointError on NaN or +inf
    logits."""
    sizes = (group_size, max_new_tokens, max_sequences)
    if isinstance(prompts, str) or not prompts or min(sizes) < 1 or not temperature >= 0:
        raise ValueError(f"need a list of at least one prompt, group_size, max_new_tokens, max_sequences >= 1 and "
                         f"temperature >= 0, got {str(prompts)[:40]!r}, {sizes} and {temperature}")
    check_cache(model.config)
    check_head(model)                                                          # logits are lm_head(states)
    prompts = [tokenizer(p, add_special_tokens=False).input_ids if isinstance(p, str) else list(p) for p in prompts]
    if not all(prompts):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} has no tokens: there is nothing to continue")
    device, training, pad_id = model.device, model.training, tokenizer.pad_token_id or 0
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    stop_ids = torch.tensor(stop_token_ids(model, tokenizer) if stop_ids is None else list(stop_ids), device=device)
    model.eval()                                                               # no dropout, and a cache that is kept
    try:
        with tqdm(total=len(prompts) * group_size * max_new_tokens, desc="sampling", unit=" tokens", unit_scale=True,
                  leave=False, delay=bar_after) as bar:
            tokens, logprobs, hidden, lengths, finished = _decode(
                model, prompts, group_size, pad_id, max_sequences, max_new_tokens, temperature, generator, stop_ids,
                keep_hidden, bar)
    finally:
        model.train(training)
    T, responses = int(lengths.max()), [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
    mask = torch.arange(T, device=device) < lengths[:, None]                   # from lengths, never token == pad
    prompt_ids, prompt_mask = (x.repeat_interleave(group_size, 0) for x in _left_pad(prompts, pad_id, device))
    return Rollout(prompt_ids, prompt_mask, tokens[:, :T].masked_fill(~mask, pad_id), mask, logprobs[:, :T],
                   finished, tokenizer.batch_decode(responses, skip_special_tokens=True),
                   hidden[:, :T] if keep_hidden else None)
