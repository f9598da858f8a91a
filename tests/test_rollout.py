"""rollout.py against models with hand-made next-token tables, transformers' generate and exact probabilities."""
import math
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MambaConfig,
                          PreTrainedTokenizerFast, Qwen2Config)

import grpo
import rollout
from support.data import encode_prompt

TINY = Path(__file__).resolve().parent.parent / "tiny"
END = "<|endoftext|>"
SIZES = dict(intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0)
CONFIGS = {
    "qwen2 tied": lambda V: Qwen2Config(vocab_size=V, hidden_size=32, tie_word_embeddings=True, **SIZES),
    "llama untied": lambda V: LlamaConfig(vocab_size=V, hidden_size=32, tie_word_embeddings=False, **SIZES),
    "gpt2 absolute positions": lambda V: GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0),
    "qwen2 sliding window": lambda V: Qwen2Config(
        vocab_size=V, hidden_size=32, use_sliding_window=True, sliding_window=4, max_window_layers=1, **SIZES),
}


def byte_level_tokenizer(characters, merges=(), specials=(END,), **options):
    """Byte-level BPE: the special tokens, one token per character, the merges; pad is the EOS itself."""
    words = [*specials, *characters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{
        "eos_token": END, "pad_token": END, "additional_special_tokens": list(specials[1:]), **options})


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456Ġ"         # "Ġ" is the byte-level space
TOKENIZER = byte_level_tokenizer(LETTERS)                                       # 61 ids: EOS = pad = 0, "a" = 1, ...


def tiny_model(kind, vocabulary=61, seed=1):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](vocabulary)).eval()


def table_model(logits):
    """A transformers Llama whose next-token logits are exactly row `last token` of the given (V, V) table.

    Attention and MLP add nothing, embeddings are one-hot and RMSNorm multiplies those by √d."""
    V = len(logits)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=V, hidden_size=32, rms_norm_eps=1e-12, tie_word_embeddings=False, **SIZES)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(V, 32))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :V] = torch.as_tensor(logits, dtype=torch.float32).T / 32 ** 0.5
    return model


def chain_model(successors):
    """A `table_model` over 16 ids that writes a fixed successor after each token."""
    table = torch.zeros(16, 16)
    for token, successor in successors.items():
        table[token, successor] = 40.0
    return table_model(table)


# after "a" (1) comes b, c, EOS; after "d" (4): e, e, e, ... for ever
CHAIN = {1: 2, 2: 3, 3: 0, 4: 5, 5: 5, 6: 0}
SMALL = byte_level_tokenizer("abcdefghijklmno")                                 # 16 ids


def forward_shapes(model):
    """A list that collects (rows, columns) of each forward pass of the model."""
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    return shapes


def transformers_greedy(model, prompt, max_new_tokens, stop_ids):
    """The response of transformers' own greedy search to one prompt alone, as a list of ids."""
    ids = torch.tensor([prompt])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                         max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=0, repetition_penalty=1.0)
    return out[0, len(prompt):].tolist()


def one_forward_pass(model, ids, prompt_length, temperature):
    """ln π (T,) of the tokens after the prompt and the lm_head's input (T, d) that predicted each.

    One pass over the row alone, without padding and without a cache, and a softmax over all of its logits."""
    inputs = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, prompt_length - 1:-1]
    hook.remove()
    logprobs = torch.log_softmax(logits.double() / temperature, -1)
    return logprobs.gather(1, ids[prompt_length:, None])[:, 0], inputs[0][0, prompt_length - 1:-1]


def responses(result):
    return [row[mask].tolist() for row, mask in zip(result.response_ids, result.response_mask)]


# ---- masks, lengths, texts: all expectations follow from the table by hand

def test_an_eos_that_is_also_the_pad_token_is_inside_the_mask():
    result = rollout.generate(chain_model(CHAIN), SMALL, [[1], [4], [6]], 2, 5, temperature=0)
    assert SMALL.pad_token_id == SMALL.eos_token_id == 0
    assert result.response_ids.tolist() == [[2, 3, 0, 0, 0]] * 2 + [[5, 5, 5, 5, 5]] * 2 + [[0, 0, 0, 0, 0]] * 2
    assert result.response_mask.tolist() == [[True] * n + [False] * (5 - n) for n in (3, 3, 5, 5, 1, 1)]
    assert result.finished.tolist() == [True, True, False, False, True, True]
    assert result.texts == ["bc", "bc", "eeeee", "eeeee", "", ""]


def test_a_stop_in_the_last_allowed_token_is_finished_and_one_token_earlier_is_cut_off():
    model = chain_model(CHAIN)
    for limit, finished in ((2, False), (3, True), (4, True)):
        result = rollout.generate(model, SMALL, [[1]], 1, limit, temperature=0)
        assert result.finished.tolist() == [finished]
        assert responses(result) == [[2, 3, 0][:limit]]
        assert result.response_ids.shape == (1, min(limit, 3))                  # no columns of padding only


def test_prompts_are_left_padded_and_each_is_repeated_for_its_group():
    result = rollout.generate(chain_model(CHAIN), SMALL, [[7, 8, 1], [4]], 2, 2, temperature=0)
    assert result.prompt_ids.tolist() == [[7, 8, 1]] * 2 + [[0, 0, 4]] * 2
    assert result.prompt_mask.tolist() == [[True] * 3] * 2 + [[False, False, True]] * 2
    assert responses(result) == [[2, 3]] * 2 + [[5, 5]] * 2


def test_a_prompt_that_holds_the_pad_token_keeps_it():
    model = chain_model({0: 6, **CHAIN, 6: 7})                                  # pad = EOS = 0: "f" follows it
    result = rollout.generate(model, SMALL, [[4, 0], [0], [4, 4, 4]], 1, 2, temperature=0)
    assert result.prompt_mask.tolist() == [[False, True, True], [False, False, True], [True] * 3]
    assert responses(result) == [[6, 7], [6, 7], [5, 5]]


def test_responses_are_padded_with_the_pad_token_or_0_without_one():
    for pad, expected in (("o", 15), (None, 0)):
        tokenizer = byte_level_tokenizer("abcdefghijklmno", pad_token=pad)
        result = rollout.generate(chain_model(CHAIN), tokenizer, [[1], [4, 6, 4]], 1, 4, temperature=0)
        assert result.response_ids[0].tolist() == [2, 3, 0, expected]
        assert result.prompt_ids[0].tolist() == [expected, expected, 1]


def test_logprobs_are_those_of_the_table_at_each_temperature_and_zero_on_padding():
    table = torch.zeros(16, 16)
    table[1, 0] = 3.0                                                           # after "a": EOS e³ : 15
    table[4, :8] = torch.arange(8.0)
    for temperature in (1.0, 0.5, 2.0):
        result = rollout.generate(table_model(table), SMALL, [[1], [4]], 50, 1, temperature, seed=0)
        for row in range(100):
            token = result.response_ids[row, 0].item()
            logits = table[1 if row < 50 else 4].tolist()
            z = sum(math.exp(x / temperature) for x in logits)
            assert result.logprobs[row, 0].item() == pytest.approx(logits[token] / temperature - math.log(z), abs=1e-4)
    result = rollout.generate(table_model(table), SMALL, [[1]], 20, 4, seed=0)
    assert result.logprobs.dtype == torch.float32 and not result.logprobs.requires_grad
    assert (~result.response_mask).any() and (result.logprobs[~result.response_mask] == 0).all()
    assert (result.logprobs[result.response_mask] < 0).all()


def test_greedy_logprobs_are_those_of_temperature_1():
    table = torch.zeros(16, 16)
    table[4, 5] = 2.0
    result = rollout.generate(table_model(table), SMALL, [[4]], 1, 1, temperature=0)
    assert result.logprobs.item() == pytest.approx(2 - math.log(math.exp(2) + 15), abs=1e-4)


def test_texts_leave_out_special_tokens_wherever_they_stand_and_padding():
    tokenizer = byte_level_tokenizer("abcdefghijkĠ", specials=(END, "<|im_end|>", "<|think|>"))
    # ids: 0 END, 1 im_end, 2 think, 3 "a", 4 "b", ..., 14 " "
    model = chain_model({3: 4, 4: 14, 14: 2, 2: 5, 5: 1, 9: 9})
    result = rollout.generate(model, tokenizer, [[3], [9]], 1, 7, temperature=0)
    assert responses(result) == [[4, 14, 2, 5, 1], [9] * 7]                     # im_end stops, think does not
    assert result.texts == ["b c", "g" * 7] and result.finished.tolist() == [True, False]


def test_texts_end_where_the_response_ends_even_if_id_0_is_an_ordinary_token():
    tokenizer = byte_level_tokenizer("bcdefghijklmno", specials=("a",), eos_token="o", pad_token="o")
    result = rollout.generate(chain_model({1: 2, 2: 14, 4: 5, 5: 5}), tokenizer, [[1], [4]], 1, 5, temperature=0,
                              stop_ids=[14])
    assert tokenizer.decode([0]) == "a" and responses(result) == [[2, 14], [5] * 5]
    assert result.texts == ["c", "fffff"]


# ---- greedy decoding equals transformers' generate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [33], [12, 44, 3], [5, 6, 7, 8, 9, 10, 12], [60, 1, 60, 1, 2]]


def test_greedy_equals_transformers_generate_token_by_token():
    failed = []
    for kind in CONFIGS:
        model = tiny_model(kind)
        free = [transformers_greedy(model, prompt, 12, [0]) for prompt in PROMPTS]
        stop_ids = sorted({0, free[0][3], free[1][6], free[2][9]})              # several stops, at several lengths
        expected = [transformers_greedy(model, prompt, 12, stop_ids) for prompt in PROMPTS]
        assert len({len(response) for response in expected}) >= 3
        for max_sequences in (256, 3, 1):
            result = rollout.generate(model, TOKENIZER, PROMPTS, 2, 12, temperature=0, stop_ids=stop_ids,
                                      max_sequences=max_sequences)
            if (responses(result) != [response for response in expected for _ in range(2)] or result.finished.tolist()
                    != [response[-1] in stop_ids for response in expected for _ in range(2)]):
                failed.append((kind, max_sequences))
    assert not failed


def test_greedy_on_the_tiny_folder_equals_transformers_generate_with_its_own_prompts_and_stops():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY).eval(), AutoTokenizer.from_pretrained(TINY)
    prompts = [encode_prompt(tokenizer, problem) for problem in ("1+2", "35+4", "8")]
    stop_ids = rollout.stop_token_ids(model, tokenizer)
    result = rollout.generate(model, tokenizer, prompts, 1, 16, temperature=0)
    assert tokenizer.eos_token_id in stop_ids
    assert responses(result) == [transformers_greedy(model, prompt, 16, stop_ids) for prompt in prompts]
    assert not any(tokenizer.eos_token in text for text in result.texts)


# ---- sampling

def kept_unlike_one_forward_pass(case, result, model, temperature, atol=1e-4):
    """What of `result.logprobs` and `result.hidden` differs from `one_forward_pass`, row by row, named by the case."""
    failed = []
    for row, mask in enumerate(result.response_mask):
        prompt = result.prompt_ids[row][result.prompt_mask[row]]
        expected = one_forward_pass(model, torch.cat([prompt, result.response_ids[row][mask]]), len(prompt),
                                    temperature)
        for name, kept, wanted in zip(("logprobs", "hidden"), (result.logprobs[row], result.hidden[row]), expected):
            if not torch.allclose(kept[mask].double(), wanted.double(), atol=atol, rtol=atol) or kept[~mask].any():
                failed.append((case, name, row))
    return failed


def test_kept_logprobs_and_states_are_those_of_one_forward_pass_over_the_finished_sequences():
    """Prompts of many lengths (left padding), responses of many lengths (rows leave early), few slots (refilled)."""
    stop_ids, failed = list(range(0, 61, 9)), []
    for kind, temperature, max_sequences in (
            ("qwen2 tied", 1.0, 256), ("qwen2 tied", 0.7, 4), ("llama untied", 1.5, 6), ("llama untied", 1.0, 1),
            ("gpt2 absolute positions", 0.6, 5), ("gpt2 absolute positions", 1.0, 256),
            ("qwen2 sliding window", 1.3, 3), ("qwen2 sliding window", 1.0, 256)):
        model = tiny_model(kind)
        result = rollout.generate(model, TOKENIZER, PROMPTS, 4, 12, temperature, seed=0, stop_ids=stop_ids,
                                  max_sequences=max_sequences)
        assert len(result.response_mask.sum(1).unique()) > 4 and 0 < result.finished.sum() < 20
        assert result.hidden.shape == (*result.response_ids.shape, 32) and result.hidden.dtype == torch.float32
        failed += kept_unlike_one_forward_pass((kind, temperature, max_sequences), result, model, temperature)
    assert not failed


def test_greedy_keeps_the_logprobs_of_temperature_1_and_the_states():
    model = tiny_model("qwen2 tied")
    result = rollout.generate(model, TOKENIZER, PROMPTS, 1, 8, temperature=0, max_sequences=2)
    assert not kept_unlike_one_forward_pass("greedy", result, model, 1.0)


def test_a_sliding_window_matters_to_what_is_kept():
    """The comparisons above would not see a window that is ignored if it changed nothing."""
    inside, outside = tiny_model("qwen2 sliding window"), tiny_model("qwen2 tied")
    outside.load_state_dict(inside.state_dict())
    result = rollout.generate(inside, TOKENIZER, PROMPTS, 2, 12, seed=0, stop_ids=[])
    assert kept_unlike_one_forward_pass("no window", result, outside, 1.0)


def test_states_are_kept_in_the_compute_dtype_and_logprobs_in_float32():
    model = tiny_model("llama untied")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = rollout.generate(model, TOKENIZER, PROMPTS, 2, 8, seed=0, max_sequences=3)
    assert result.hidden.dtype == torch.bfloat16 and result.logprobs.dtype == torch.float32
    assert not kept_unlike_one_forward_pass("autocast", result, model, 1.0, atol=0.2)
    assert kept_unlike_one_forward_pass("autocast", result, model, 1.0, atol=1e-4)
    result = rollout.generate(model.to(torch.bfloat16), TOKENIZER, PROMPTS, 1, 2, seed=0)
    assert result.hidden.dtype == torch.bfloat16 and result.logprobs.dtype == torch.float32


def test_without_keep_hidden_no_states_are_stored_and_the_samples_are_the_same():
    model = tiny_model("qwen2 tied")
    kept, left_out = (rollout.generate(model, TOKENIZER, PROMPTS, 2, 8, seed=0, keep_hidden=keep)
                      for keep in (True, False))
    assert left_out.hidden is None
    assert left_out.response_ids.equal(kept.response_ids) and left_out.logprobs.equal(kept.logprobs)
    assert left_out.select(torch.tensor([2, 0])).hidden is None
    assert rollout.concatenate([left_out, left_out]).hidden is None


def chi_square_of_samples(temperature):
    """χ² of 20000 responses of one or two tokens against exact probabilities, its degrees of freedom and its bound.

    The model's generation_config asks for all that `generate` must ignore."""
    V, n = 9, 20000
    model = tiny_model("qwen2 tied", V, seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.4)                          # flatter: no token is too rare to count
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0,
                                   min_p=0.5, no_repeat_ngram_size=1, suppress_tokens=[2], min_new_tokens=2)
    prompt = [3, 3, 7]
    result = rollout.generate(model, byte_level_tokenizer("abcdefgh"), [prompt], n, 2, temperature, seed=0,
                              max_sequences=n, keep_hidden=False)

    def exact(prefix):
        with torch.no_grad():
            return torch.softmax(model(torch.tensor([prefix])).logits[0, -1].double() / temperature, -1).tolist()

    first = exact(prompt)
    assert max(first) > 1.5 / V                                                 # not uniform
    expected = {(0,): first[0]}                                                 # EOS ends a response
    for a in range(1, V):
        expected |= {(a, b): first[a] * p for b, p in enumerate(exact(prompt + [a]))}
    assert sum(expected.values()) == pytest.approx(1)
    counts = dict.fromkeys(expected, 0)
    for response in responses(result):
        counts[tuple(response)] += 1
    cells = [key for key, p in expected.items() if n * p >= 5]
    rare = [key for key in expected if key not in cells]
    pairs = [(counts[key], n * expected[key]) for key in cells]
    if rare:
        pairs.append((sum(counts[key] for key in rare), max(n * sum(expected[key] for key in rare), 1.0)))
    df = len(pairs) - 1
    bound = df * (1 - 2 / (9 * df) + 4.5 * math.sqrt(2 / (9 * df))) ** 3        # Wilson–Hilferty, 4.5 deviations
    return sum((seen - mean) ** 2 / mean for seen, mean in pairs), df, bound


def test_samples_follow_softmax_of_logits_over_temperature_whatever_the_generation_config_says():
    chi_square, df, bound = chi_square_of_samples(0.6)
    assert df > 30 and chi_square < bound


@pytest.mark.full
def test_samples_follow_softmax_at_other_temperatures():
    failed = []
    for temperature in (1.0, 1.5):
        chi_square, df, bound = chi_square_of_samples(temperature)
        if df <= 30 or chi_square >= bound:
            failed.append((temperature, chi_square, df, bound))
    assert not failed


def test_one_seed_reproduces_and_another_differs_and_neither_touches_the_global_generator():
    model = tiny_model("qwen2 tied")
    state = torch.get_rng_state()
    draws = [rollout.generate(model, TOKENIZER, PROMPTS, 3, 8, seed=seed) for seed in (5, 5, 6)]
    assert torch.get_rng_state().equal(state)
    assert draws[0].response_ids.equal(draws[1].response_ids) and draws[0].logprobs.equal(draws[1].logprobs)
    assert responses(draws[0]) != responses(draws[2])
    rows = responses(draws[0])
    assert all(len({tuple(row) for row in rows[q:q + 3]}) == 3 for q in range(0, 15, 3))    # a group's samples differ


def test_parts_of_a_split_batch_do_not_repeat_each_others_randomness():
    result = rollout.generate(tiny_model("qwen2 tied"), TOKENIZER, [[5, 6]], 4, 8, seed=5, max_sequences=1)
    assert len({tuple(row) for row in responses(result)}) == 4


def test_without_a_seed_the_global_generator_decides():
    model, draws = tiny_model("qwen2 tied"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(responses(rollout.generate(model, TOKENIZER, PROMPTS, 2, 8)))
    assert draws[0] == draws[1] != draws[2]


# ---- the work done: prefill once per prompt, finished rows leave

def test_each_prompt_is_prefilled_once_and_finished_rows_leave_the_batch():
    model = chain_model(CHAIN)
    shapes = forward_shapes(model)
    rollout.generate(model, SMALL, [[7, 7, 1], [4], [2], [6]], 3, 5, temperature=0)
    # lengths by hand: "a" 3 (b c EOS), "d" 5 (cut off), "b" 2 (c EOS), "f" 1 (EOS); 3 rows each
    assert shapes == [(4, 3), (9, 1), (6, 1), (3, 1), (3, 1)]


def test_decoding_ends_with_the_last_row():
    model = chain_model(CHAIN)
    shapes = forward_shapes(model)
    rollout.generate(model, SMALL, [[1]], 4, 50, temperature=0)
    assert shapes == [(1, 1), (4, 1), (4, 1)]


def test_the_progress_bar_ends_at_its_total_the_number_of_sampled_tokens(monkeypatch):
    bars = []

    class Bar(rollout.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(rollout, "tqdm", Bar)
    rollout.generate(chain_model(CHAIN), SMALL, [[1], [4], [2], [6]], 3, 5, temperature=0, max_sequences=5)
    assert [(bar.n, bar.total) for bar in bars] == [(33, 33)]                   # 3 rows each of 3, 5, 2 and 1 tokens


def test_no_more_than_max_sequences_rows_are_decoded_together_and_waiting_prompts_move_up():
    model = chain_model(CHAIN)
    shapes = forward_shapes(model)
    result = rollout.generate(model, SMALL, [[7, 1], [4], [6, 6, 6]], 2, 4, temperature=0, max_sequences=4)
    # longest first: "f" ends at its first token, "a" after 3, "d" is cut off at 4. Rows f f a a; f leaves, d d move up
    # while a goes on: 2 rows of a (b sampled), then 4 rows together, 4 again, and d alone
    assert shapes == [(2, 3), (2, 1), (1, 1), (4, 1), (2, 1), (2, 1)]
    assert responses(result) == [[2, 3, 0]] * 2 + [[5] * 4] * 2 + [[0]] * 2


def test_slots_are_refilled_a_quarter_at_a_time():
    model = chain_model(CHAIN)
    shapes = forward_shapes(model)
    rollout.generate(model, SMALL, [[6]] * 3 + [[4]] * 7, 1, 2, temperature=0, max_sequences=8)
    # prompts of one length keep their order: 3 rows end at once (3 of 8 slots >= 2), the 2 waiting ones move up
    assert shapes == [(8, 1), (5, 1), (2, 1), (2, 1)]
    shapes.clear()
    rollout.generate(model, SMALL, [[6]] + [[4]] * 9, 1, 2, temperature=0, max_sequences=8)
    assert shapes == [(8, 1), (7, 1), (2, 1), (2, 1)]                           # one free slot waits for another


def unlike_transformers_in_a_small_cache(cases):
    """The cases (kind, max_sequences) whose greedy responses differ from transformers'.

    Tiny buckets, all memory that is not written filled with NaN, many prompts in few slots."""
    failed = []
    prompts = [[1 + (5 * i + j) % 60 for j in range(1 + i % 7)] for i in range(16)]
    stop_ids = list(range(0, 61, 7))
    for kind in dict.fromkeys(kind for kind, _ in cases):
        model = tiny_model(kind)
        expected = [transformers_greedy(model, prompt, 12, stop_ids) for prompt in prompts]
        assert len({len(response) for response in expected}) >= 3
        torch.use_deterministic_algorithms(True)                                # fills new memory with NaN
        try:
            for max_sequences in (slots for name, slots in cases if name == kind):
                result = rollout.generate(model, TOKENIZER, prompts, 1, 12, temperature=0, stop_ids=stop_ids,
                                          max_sequences=max_sequences)
                if responses(result) != expected:
                    failed.append((kind, max_sequences))
        finally:
            torch.use_deterministic_algorithms(False)
    return failed


def test_growing_shifting_and_refilling_the_cache_changes_nothing(monkeypatch):
    monkeypatch.setattr(rollout, "BUCKET", 2)
    assert not unlike_transformers_in_a_small_cache([("qwen2 sliding window", 2), ("gpt2 absolute positions", 5)])


@pytest.mark.full
def test_growing_shifting_and_refilling_the_cache_changes_nothing_for_any_model_and_number_of_slots(monkeypatch):
    monkeypatch.setattr(rollout, "BUCKET", 2)
    assert not unlike_transformers_in_a_small_cache([(kind, slots) for kind in CONFIGS for slots in (2, 3, 5, 16)])


def test_the_cache_holds_no_columns_that_no_row_needs():
    """Four rows of 40 tokens one after the other in one slot: columns of the rows before are dropped."""
    model, widths = chain_model(CHAIN), []

    def record(module, args, kwargs):
        cache = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]
        widths.append(cache.get_seq_length())

    model.model.layers[0].self_attn.register_forward_pre_hook(record, with_kwargs=True)
    rollout.generate(model, SMALL, [[4]] * 4, 1, 40, temperature=0, max_sequences=1)
    assert max(widths) == 39                                                    # a prompt of 1 and 38 of 40 tokens


def test_the_cache_is_passed_under_the_name_that_a_forward_has():
    """transformers 5.24 renamed the argument, and its position differs between models."""
    class Old:
        def forward(self, input_ids=None, past_key_values=None, attention_mask=None, **kwargs):
            pass

    class New:
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
            pass

    cache = object()
    assert grpo.cache_argument(Old(), cache) == {"past_key_values": cache}
    assert grpo.cache_argument(New(), cache) == {"cache": cache}


def test_sampling_gives_no_warning():
    for kind in CONFIGS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")                                      # a name that a library renamed is one
            rollout.generate(tiny_model(kind), TOKENIZER, PROMPTS, 2, 3, seed=0, max_sequences=4)


# ---- Rollout.inputs, select, concatenate

def hand_made():
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    return rollout.Rollout(
        prompt_ids=torch.tensor([[0, 0, 3, 4], [0, 5, 6, 7], [0, 0, 0, 8]]),
        prompt_mask=torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]).bool(),
        response_ids=torch.tensor([[11, 0, 0], [12, 13, 0], [14, 15, 16]]), response_mask=mask,
        logprobs=-torch.arange(1.0, 10.0).view(3, 3) * mask, finished=torch.tensor([True, True, False]),
        texts=["r0", "r1", "r2"], hidden=torch.arange(1.0, 19.0).view(3, 3, 2) * mask[..., None])


def test_inputs_cut_columns_that_are_padding_in_all_rows():
    ids, mask, P = hand_made().inputs(torch.tensor([1, 0]))
    assert P == 3 and ids.tolist() == [[5, 6, 7, 12, 13], [0, 3, 4, 11, 0]]
    assert mask.tolist() == [[True] * 5, [False, True, True, True, False]]
    ids, mask, P = hand_made().inputs(torch.tensor([2]))
    assert P == 1 and ids.tolist() == [[8, 14, 15, 16]] and mask.all()


def test_inputs_of_an_empty_response_keep_one_column():
    made = hand_made()
    made.response_mask[0] = False
    ids, mask, P = made.inputs(torch.tensor([0]))
    assert P == 2 and ids.shape == (1, 3) and mask.tolist() == [[True, True, False]]


def test_select_takes_every_field_of_the_rows_in_their_order():
    picked = hand_made().select(torch.tensor([2, 0]))
    assert picked.prompt_ids.tolist() == [[0, 0, 0, 8], [0, 0, 3, 4]]
    assert picked.prompt_mask.tolist() == [[False, False, False, True], [False, False, True, True]]
    assert picked.response_ids.tolist() == [[14, 15, 16], [11, 0, 0]]
    assert picked.response_mask.tolist() == [[True, True, True], [True, False, False]]
    assert picked.logprobs.tolist() == [[-7, -8, -9], [-1, 0, 0]]
    assert picked.finished.tolist() == [False, True] and picked.texts == ["r2", "r0"]
    assert picked.hidden.tolist() == [[[13, 14], [15, 16], [17, 18]], [[1, 2], [0, 0], [0, 0]]]


def test_concatenate_pads_prompts_on_the_left_and_responses_on_the_right():
    short = rollout.Rollout(torch.tensor([[9, 9]]), torch.tensor([[True, True]]), torch.tensor([[21, 22, 23, 24]]),
                            torch.tensor([[True] * 4]), torch.tensor([[-0.5, -0.5, -0.25, -2.0]]), torch.tensor([True]),
                            ["s"], torch.arange(21.0, 29.0).view(1, 4, 2))
    joined = rollout.concatenate([hand_made(), short])
    assert joined.prompt_mask.tolist() == hand_made().prompt_mask.tolist() + [[False, False, True, True]]
    assert joined.prompt_ids[:3].tolist() == hand_made().prompt_ids.tolist()
    assert joined.prompt_ids[3, 2:].tolist() == [9, 9]
    assert joined.response_mask.tolist() == [[True] * n + [False] * (4 - n) for n in (1, 2, 3, 4)]
    assert joined.response_ids[:, :3].tolist() == [[11, 0, 0], [12, 13, 0], [14, 15, 16], [21, 22, 23]]
    assert joined.response_ids[3, 3] == 24
    assert joined.logprobs.tolist() == [[-1, 0, 0, 0], [-4, -5, 0, 0], [-7, -8, -9, 0], [-0.5, -0.5, -0.25, -2]]
    assert joined.finished.tolist() == [True, True, False, True] and joined.texts == ["r0", "r1", "r2", "s"]
    assert joined.hidden[:3, :3].tolist() == hand_made().hidden.tolist() and not joined.hidden[:3, 3].any()
    assert joined.hidden[3].tolist() == [[21, 22], [23, 24], [25, 26], [27, 28]]
    assert joined.response_mask.dtype == joined.prompt_mask.dtype == torch.bool


# ---- stop_token_ids, string prompts

def test_string_prompts_are_tokenised_without_special_tokens():
    tokenizer = byte_level_tokenizer("abcdefghijklmn", specials=(END, "<bos>"), bos_token="<bos>")    # "a" = 2
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert tokenizer("ab").input_ids == [1, 2, 3]
    result = rollout.generate(chain_model({3: 4}), tokenizer, ["ab", [5, 2, 3], "<bos>ab"], 1, 1, temperature=0)
    assert result.prompt_ids.tolist() == [[0, 2, 3], [5, 2, 3], [1, 2, 3]]
    assert result.prompt_mask.tolist() == [[False, True, True], [True] * 3, [True] * 3]
    assert result.texts == ["c"] * 3


def test_stop_ids_are_all_eos_of_model_and_tokenizer_and_the_ends_of_a_turn():
    failed = []
    for eos, specials, expected in (
            (0, (END,), [0]), (7, (END,), [0, 7]), ([9, 7, 9], (END,), [0, 7, 9]), (None, (END,), [0]),
            (None, (END, "<|im_end|>"), [0, 1]), ([5], (END, "<|x|>", "<|eot_id|>"), [0, 2, 5]),
            (3, (END, "<end_of_turn>", "<|im_end|>"), [0, 1, 2, 3])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))
        ids = rollout.stop_token_ids(model, byte_level_tokenizer("abcdefghijkl", specials=specials))
        if ids != expected:
            failed.append((eos, specials, ids, expected))
    assert not failed


def test_stop_ids_without_any_eos_are_empty_and_generation_runs_to_the_limit():
    tokenizer = byte_level_tokenizer("abcdefghijklmno", eos_token=None)
    model = chain_model(CHAIN)
    model.generation_config.eos_token_id = None
    assert rollout.stop_token_ids(model, tokenizer) == []
    result = rollout.generate(model, tokenizer, [[6]], 1, 3, temperature=0)     # 0 is an ordinary token here
    assert result.response_mask.sum() == 3 and result.finished.tolist() == [False]


def test_the_default_stops_are_stop_token_ids_and_an_argument_replaces_them():
    model = chain_model(CHAIN)
    model.generation_config.eos_token_id = [5, 3]
    assert responses(rollout.generate(model, SMALL, [[1], [4], [6]], 1, 4, temperature=0)) == [[2, 3], [5], [0]]
    result = rollout.generate(model, SMALL, [[1], [4]], 1, 4, temperature=0, stop_ids=[2])
    assert responses(result) == [[2], [5, 5, 5, 5]]


# ---- errors

def test_damaged_weights_stop_with_a_floating_point_error():
    for damage in (math.nan, 3e38):                                             # 3e38: logits overflow to infinity
        model = tiny_model("llama untied")
        with torch.no_grad():
            model.lm_head.weight.mul_(damage)
        for temperature in (1.0, 0):
            with pytest.raises(FloatingPointError, match="not finite"):
                rollout.generate(model, TOKENIZER, [[1, 2]], 2, 3, temperature)


def test_one_infinite_logit_of_one_row_is_noticed():
    model = chain_model(CHAIN)
    with torch.no_grad():
        model.lm_head.weight[5, 4] = 3e38                                       # times √32 it overflows, after "d" only
    assert responses(rollout.generate(model, SMALL, [[1]], 1, 1, temperature=0)) == [[2]]
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="not finite"):
            rollout.generate(model, SMALL, [[1], [4]], 1, 1, temperature)


def test_logits_that_turn_nan_in_a_later_step_are_noticed():
    model = chain_model(CHAIN)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = math.nan                           # "c", the second token after "a"
    assert responses(rollout.generate(model, SMALL, [[1], [4]], 1, 2, temperature=0)) == [[2, 3], [5, 5]]
    with pytest.raises(FloatingPointError, match="not finite"):
        rollout.generate(model, SMALL, [[1], [4]], 1, 3, temperature=0)


def test_sizes_that_make_no_rollout_are_refused():
    model = chain_model(CHAIN)
    for change in (dict(prompts=[]), dict(prompts="ab"), dict(group_size=0), dict(max_new_tokens=0),
                   dict(max_sequences=0), dict(temperature=-0.5), dict(temperature=math.nan)):
        arguments = {**dict(prompts=[[1]], group_size=1, max_new_tokens=1, max_sequences=1, temperature=1.0), **change}
        with pytest.raises(ValueError, match=f"got .*{next(iter(change.values())) or 0}"):
            rollout.generate(model, SMALL, **arguments)


def test_an_empty_prompt_is_refused_by_its_index():
    for empty in ([], ""):
        with pytest.raises(ValueError, match="prompt 2 has no tokens"):
            rollout.generate(chain_model(CHAIN), SMALL, [[1], "ab", empty, [2]], 1, 2)


def test_a_model_in_training_mode_with_checkpointing_generates_the_same_and_stays_so():
    """transformers drops the cache in that state, and dropout is live."""
    tokenizer = byte_level_tokenizer("abc")
    for kind in ("qwen2 tied", "gpt2 absolute positions"):
        model = tiny_model(kind)
        expected = rollout.generate(model, tokenizer, [[3, 1, 2]], 2, 8, seed=0)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        result = rollout.generate(model, tokenizer, [[3, 1, 2]], 2, 8, seed=0)
        assert model.training and torch.equal(result.response_ids, expected.response_ids), kind


def test_the_cache_is_kept_in_the_compute_type_under_autocast(monkeypatch):
    dtypes = set()
    original = rollout._Layer.update

    def spy(self, *args, **kwargs):
        stored = original(self, *args, **kwargs)
        dtypes.update(tensor.dtype for tensor in stored)
        return stored

    monkeypatch.setattr(rollout._Layer, "update", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout.generate(tiny_model("qwen2 tied"), byte_level_tokenizer("abc"), [[3, 1, 2]], 2, 4, seed=0)
    assert dtypes == {torch.bfloat16}


def test_a_growing_cache_frees_each_old_buffer_before_it_makes_the_next(monkeypatch):
    model, alive = tiny_model("qwen2 tied"), []
    monkeypatch.setattr(rollout, "BUCKET", 4)
    original = rollout._Slots.reserve

    def counted(self, slots):
        old = [weakref.ref(buffer) for buffer in self.buffers]
        original(self, slots)
        alive.append(sum(reference() is not None for reference in old))

    monkeypatch.setattr(rollout._Slots, "reserve", counted)
    rollout.generate(model, TOKENIZER, PROMPTS, 2, 30, seed=0, stop_ids=[])
    assert len(alive) > 4 and set(alive[1:]) == {0}                             # the first are the prompts' own


def test_a_prefill_takes_a_bounded_number_of_prompt_tokens(monkeypatch):
    model = chain_model(CHAIN)
    shapes = forward_shapes(model)
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 7)
    result = rollout.generate(model, SMALL, [[7, 7, 4]] * 5 + [[4] * 9], 2, 3, temperature=0)
    assert [rows * columns for rows, columns in shapes if columns > 1] == [9, 6, 6, 3]      # 9 alone exceeds it
    assert responses(result) == [[5, 5, 5]] * 12


def test_a_model_without_a_kv_cache_is_refused():
    """Its layers keep a state of another kind; without it each token would be sampled as if it stood alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="LinearAttentionLayer"):
        rollout.generate(model, TOKENIZER, PROMPTS, 1, 4)


def test_an_error_while_sampling_leaves_the_model_in_its_mode():
    model = tiny_model("qwen2 tied").train()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        rollout.generate(model, TOKENIZER, PROMPTS, 1, 4)
    assert model.training
