"""grpo.py against hand arithmetic, Eq. 1 and 2 as plain Python loops, autograd and the logits of transformers."""
import math

import pytest
import torch
from transformers import (AutoModelForCausalLM, CohereConfig, FalconH1Config, Gemma2Config, Gemma3TextConfig,
                          GPT2Config, GraniteConfig, LlamaConfig, PhiConfig, Qwen2Config)

import grpo
from support.models import checkpoint_activations
from test_nthr import LargestTensor, cases

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0)
CONFIGS = {
    "qwen2 tied": lambda V: Qwen2Config(vocab_size=V, tie_word_embeddings=True, **SIZES),
    "llama untied": lambda V: LlamaConfig(vocab_size=V, tie_word_embeddings=False, **SIZES),
    "gpt2 absolute positions": lambda V: GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0),
}


def tiny_model(kind, vocabulary=61):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](vocabulary)).eval()


def ragged_batch(prompt_lengths, response_lengths, vocabulary=61, seed=1):
    """Random ids (padding too is random), attention mask and P: prompts left-padded, responses right-padded."""
    P, T = max(prompt_lengths), max(response_lengths)
    ids = torch.randint(vocabulary, (len(prompt_lengths), P + T), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[0] * (P - p) + [1] * (p + t) + [0] * (T - t)
                         for p, t in zip(prompt_lengths, response_lengths)])
    return ids, mask, P


def unpadded_logits(model, ids, mask, P):
    """Per row the (|y_i|, V) logits that predict its response, from one plain forward pass without any padding."""
    rows = []
    for row, valid in zip(ids, mask.bool()):
        rows.append(model(row[valid][None]).logits[0, int(valid[:P].sum()) - 1:-1])
    return rows


def naive_logprobs(model, ids, mask, P, temperature=1.0):
    """Per row log softmax(logits / temperature) of the response tokens, through the full logits."""
    result = []
    for logits, row, valid in zip(unpadded_logits(model, ids, mask, P), ids[:, P:], mask[:, P:].bool()):
        y = row[valid]
        result.append(torch.log_softmax(logits / temperature, -1)[torch.arange(len(y)), y])
    return result


def random_batch(lengths, seed=0):
    """logprobs, old, ref, advantages (B, T), mask, correct (B,): random numbers whose ratios reach outside the clip."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(max(lengths), 1)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64) - 0.1
    logprobs = old + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)
    ref = old + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, T, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return logprobs, old, ref, advantages, mask, torch.rand(B, generator=g) < 0.5


def loop_loss(logprobs, old, ref, advantages, mask, correct, G, eps, kl_coef, nll_coef):
    """Eq. 1 with KL and NLL as printed: plain Python loops over questions, responses and tokens, no tensor algebra."""
    Q = len(logprobs) // G
    totals = dict(loss=0.0, kl=0.0, nll=0.0, clip_share=0.0)
    for q in range(Q):
        responses = range(q * G, q * G + G)
        tokens = sum(1 for i in responses for k in range(mask.shape[1]) if mask[i, k])
        for i in responses:
            for k in range(mask.shape[1]):
                if not mask[i, k]:
                    continue
                lp, lo, lr, A = (x[i, k].item() for x in (logprobs, old, ref, advantages))
                gamma = math.exp(lp) / math.exp(lo)
                free, clipped = gamma * A, min(max(gamma, 1 - eps), 1 + eps) * A
                r = math.exp(lr) / math.exp(lp)
                kl, nll = r - 1 - math.log(r), (-lp if correct[i] else 0.0)
                for name, value in (("loss", -min(free, clipped) + kl_coef * kl + nll_coef * nll), ("kl", kl),
                                    ("nll", nll), ("clip_share", 1.0 if clipped < free else 0.0)):
                    totals[name] += value / tokens / Q
    return totals


def close(actual, expected, atol=5e-5, rtol=1e-5):
    """Padding changes the order of float32 sums, which moves ln π by up to 5e-6: ten times that is allowed."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# ---- group_advantages, pos_only, random_selection

def test_advantages_are_centred_and_divided_by_the_population_std():
    for rewards, expected in (([1, 0, 0, 0], [3 ** 0.5] + [-(3 ** -0.5)] * 3),  # mean 1/4, variance 3/16
                              ([1, 2, 3, 6], [x / 3.5 ** 0.5 for x in (-2, -1, 0, 3)]),  # mean 3, variance (4+1+0+9)/4
                              ([-5, -7], [1, -1])):
        result = grpo.group_advantages(torch.tensor([rewards], dtype=torch.float64))
        torch.testing.assert_close(result, torch.tensor([expected], dtype=torch.float64))


def test_binary_advantages_are_those_of_lemma_4_2():
    G = 8
    rewards = torch.tensor([[1.0] * n + [0.0] * (G - n) for n in range(1, G)])
    result = grpo.group_advantages(rewards)
    for n in range(1, G):
        p = n / G
        root = math.sqrt(p * (1 - p))
        expected = torch.tensor([(1 - p) / root] * n + [-p / root] * (G - n))
        torch.testing.assert_close(result[n - 1], expected)


def test_equal_rewards_give_exactly_zero_whatever_their_value():
    rewards = torch.tensor([[0.0] * 3, [1.0] * 3, [0.7] * 3, [-1e30] * 3, [1e-30] * 3])
    assert (grpo.group_advantages(rewards) == 0).all()


def test_rewards_equal_up_to_rounding_give_exactly_zero_and_spare_other_groups():
    with cases() as case:
        for dtype in (torch.float32, torch.float64):
            eps, tenth, seven = torch.finfo(dtype).eps, torch.tensor(0.1, dtype=dtype), torch.tensor(0.7, dtype=dtype)
            rewards = torch.stack([torch.stack([sum([tenth] * 6, tenth), 7 * tenth, seven, seven]),  # 0.7 in three ways
                                   torch.tensor([1, 1 + 2 * eps, 1, 1 - eps], dtype=dtype) * -1e20,
                                   torch.tensor([1, 0, 1, 0], dtype=dtype)])
            assert all(len(row.unique()) > 1 for row in rewards)                # equal up to rounding, not in bits
            with case(dtype):
                result = grpo.group_advantages(rewards)
                assert (result[:2] == 0).all() and result[2].tolist() == [1, -1, 1, -1]


def test_a_small_but_real_difference_is_not_rounding():
    for dtype, difference in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        result = grpo.group_advantages(torch.tensor([[1.0, 1.0 + difference]], dtype=dtype))
        torch.testing.assert_close(result, torch.tensor([[-1.0, 1.0]], dtype=dtype))


def test_advantages_do_not_depend_on_the_scale_of_the_rewards():
    with cases() as case:
        for scale, dtype in ((1e30, torch.float32), (1e-30, torch.float32), (-2.5, torch.float32),
                             (1e300, torch.float64), (1e-300, torch.float64)):
            expected = torch.tensor([[-2, -1, 0, 3]], dtype=dtype) / 3.5 ** 0.5 * (1 if scale > 0 else -1)
            with case((scale, dtype)):
                close(grpo.group_advantages(torch.tensor([[1, 2, 3, 6]], dtype=dtype) * scale), expected, 1e-6, 1e-5)


def test_integer_and_bool_rewards_give_float32_and_floats_keep_their_dtype():
    for rewards in (torch.tensor([[1, 0], [-3, 5]]), torch.tensor([[True, False], [False, True]])):
        result = grpo.group_advantages(rewards)
        assert result.dtype == torch.float32 and result.tolist() == [[1, -1], [-1, 1]]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        result = grpo.group_advantages(torch.tensor([[1, 0]], dtype=dtype))
        assert result.dtype == dtype and result.tolist() == [[1, -1]]


def test_rewards_of_a_wrong_shape_or_not_finite_are_refused():
    with cases() as case:
        for rewards, message in ((torch.ones(4), r"\(4,\)"), (torch.ones(4, 1), r"\(4, 1\)"),
                                 (torch.ones(2, 2, 2), r"\(2, 2, 2\)"), (torch.tensor([[1.0, math.nan]]), "finite"),
                                 (torch.tensor([[1.0, math.inf]]), "finite")):
            with case(rewards), pytest.raises(ValueError, match=message):
                grpo.group_advantages(rewards)


def test_pos_only_zeroes_negative_advantages_and_nothing_else():
    advantages = torch.tensor([[1.5, -0.5, 0.0], [-2.0, 0.25, 3.0]])
    assert grpo.pos_only(advantages).tolist() == [[1.5, 0, 0], [0, 0.25, 3.0]]
    assert advantages.tolist() == [[1.5, -0.5, 0.0], [-2.0, 0.25, 3.0]]


SELECTION_MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]).bool()
SELECTION_CORRECT = torch.tensor([True, False, False, False])
SELECTED = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()


def test_random_selection_takes_as_many_tokens_per_row_as_nthr_and_only_valid_incorrect_ones():
    told, holes = SELECTED.clone(), torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1]])
    told[0, :3] = True                                                          # a correct row is never touched
    with cases() as case:
        for name, selected, mask, correct, counts in (
                ("padding", SELECTED, SELECTION_MASK, SELECTION_CORRECT, [0, 1, 2, 2]),
                ("told to take of a correct row", told, SELECTION_MASK, SELECTION_CORRECT, [0, 1, 2, 2]),
                ("a mask with holes", torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0]]).bool(), holes.bool(),
                 torch.tensor([False]), [2]),
                ("zeros and ones", torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0]]), holes.float(), torch.zeros(1), [2])):
            generator = torch.Generator().manual_seed(0)
            with case(name):
                for _ in range(50):
                    chosen = grpo.random_selection(selected, mask, correct, generator)
                    assert chosen.dtype == torch.bool and chosen.sum(1).tolist() == counts
                    assert not (chosen & ~mask.bool()).any()


def test_random_selection_is_uniform_over_the_valid_tokens():
    n, generator = 4000, torch.Generator().manual_seed(0)
    counts = sum(grpo.random_selection(SELECTED, SELECTION_MASK, SELECTION_CORRECT, generator).float()
                 for _ in range(n))
    for row, probability, length in ((1, 1 / 3, 3), (2, 2 / 5, 5)):             # count / length of the row
        bound = 4.5 * math.sqrt(n * probability * (1 - probability))            # 4.5 standard deviations
        assert ((counts[row, :length] - n * probability).abs() < bound).all()


def test_random_selection_follows_its_generator():
    mask, selected = torch.ones(2, 40).bool(), torch.arange(40).lt(20).expand(2, 40)
    draws = [grpo.random_selection(selected, mask, torch.tensor([False, False]), torch.Generator().manual_seed(seed))
             for seed in (3, 3, 4)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])
    assert not draws[0][0].equal(draws[0][1])                                   # rows are drawn independently


# ---- response_logprobs

def test_logprobs_are_log_softmax_of_the_unpadded_logits_and_zero_on_padding():
    ids, mask, P = ragged_batch([5, 2, 7, 1], [4, 6, 1, 3])
    with cases() as case, torch.no_grad():
        for kind, temperature in (*zip(CONFIGS, (1.0, 0.6, 1.7)), ("qwen2 tied", 0.6), ("llama untied", 1.0)):
            model = tiny_model(kind)
            with case((kind, temperature)):
                result = grpo.response_logprobs(model, ids, mask, P, temperature)
                expected = naive_logprobs(model, ids, mask, P, temperature)
                assert result.shape == (4, 6) and result.dtype == torch.float32
                for row, valid, naive in zip(result, mask[:, P:].bool(), expected):
                    close(row[valid], naive)
                    assert (row[~valid] == 0).all()


def test_at_an_extreme_temperature_every_token_is_as_likely_or_one_is_certain():
    model = tiny_model("llama untied")
    ids, mask, P = ragged_batch([5, 2], [4, 6])
    with torch.no_grad():
        hot = grpo.response_logprobs(model, ids, mask, P, 1e30)
        close(hot, -math.log(61) * mask[:, P:], 1e-5)
        likeliest = torch.stack([model(row[valid][None]).logits[0, -1].argmax()      # of the prompts' last states
                                 for row, valid in zip(ids[:, :P], mask[:, :P].bool())])
        cold = grpo.response_logprobs(model, torch.cat([ids[:, :P], likeliest[:, None]], 1), mask[:, :P + 1], P, 1e-30)
    assert cold.tolist() == [[0.0], [0.0]]                                      # ln 1, not NaN


def test_more_left_padding_and_the_ids_of_padding_change_nothing():
    ids, mask, P = ragged_batch([5, 2], [4, 6])
    wide_ids = torch.cat([torch.full((2, 9), 7), ids], dim=1)
    wide_mask = torch.cat([torch.zeros(2, 9, dtype=torch.long), mask], dim=1)
    with cases() as case, torch.no_grad():
        for kind in CONFIGS:
            model = tiny_model(kind)
            narrow = grpo.response_logprobs(model, ids, mask, P)
            with case(f"{kind}, padding"):
                close(grpo.response_logprobs(model, wide_ids, wide_mask.bool(), P + 9), narrow)
            with case(f"{kind}, ids"):
                other = grpo.response_logprobs(model, ids.masked_fill(mask == 0, 3), mask, P)
                torch.testing.assert_close(other, narrow)


def test_returned_states_are_the_inputs_of_the_lm_head():
    ids, mask, P = ragged_batch([5, 2, 3], [4, 6, 2])
    with cases() as case, torch.no_grad():
        for kind in CONFIGS:
            model = tiny_model(kind)
            with case(kind):
                logprobs, hidden = grpo.response_logprobs(model, ids, mask, P, return_hidden=True)
                assert hidden.shape == (3, 6, 32) and logprobs.equal(grpo.response_logprobs(model, ids, mask, P))
                for row, valid, logits in zip(hidden, mask[:, P:].bool(), unpadded_logits(model, ids, mask, P)):
                    close(model.get_output_embeddings()(row[valid]), logits)


def gradients(model, logprobs, coefficients):
    """Of Σ coefficient · ln π with respect to each parameter; None where it is frozen."""
    model.zero_grad()
    sum((row * c).sum() for row, c in zip(logprobs, coefficients)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_of_all_parameters_equal_those_through_the_full_logits(monkeypatch):
    ids, mask, P = ragged_batch([5, 2, 3], [4, 6, 2])
    coefficients = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 61 * 5)                         # 12 tokens in chunks of 5
    with cases() as case:
        for kind in CONFIGS:
            model = tiny_model(kind)
            result = gradients(model, grpo.response_logprobs(model, ids, mask, P, 0.8), coefficients)
            expected = gradients(model, naive_logprobs(model, ids, mask, P, 0.8),
                                 [c[valid] for c, valid in zip(coefficients, mask[:, P:].bool())])
            assert len(result) > 10
            for name, gradient in expected.items():
                with case(f"{kind}, {name}"):
                    close(result[name], gradient, 1e-3 * gradient.abs().max().item(), 1e-3)


def test_the_base_model_runs_once_and_with_the_mask():
    ids, mask, P = ragged_batch([5, 2, 3], [4, 6, 2])
    with cases() as case:
        for kind in CONFIGS:
            model, masks = tiny_model(kind), []
            model.base_model.register_forward_pre_hook(
                lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True)
            with case(kind):
                grpo.response_logprobs(model, ids, mask, P).sum().backward()
                assert len(masks) == 1 and masks[0].bool().equal(mask.bool())


def test_a_head_with_a_bias_is_scored_with_it_and_its_gradient_is_that_of_autograd_whatever_is_frozen(monkeypatch):
    ids, mask, P = ragged_batch([4, 2, 3], [3, 5, 4])
    coefficients = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = mask[:, P:].bool()
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 61 * 5)                         # 12 tokens in chunks of 5
    with cases() as case:
        for frozen, temperature in (("body", 0.6), ("head", 1.0), ("nothing", 0.6)):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(PhiConfig(vocab_size=61, **SIZES)).eval().double()
            with torch.no_grad():
                model.lm_head.bias.normal_(0, 3)
            for name, p in model.named_parameters():
                p.requires_grad_(frozen == "nothing" or name.startswith("lm_head") == (frozen == "body"))
            logprobs, naive = (f(model, ids, mask, P, temperature) for f in (grpo.response_logprobs, naive_logprobs))
            with case(f"{frozen} frozen, forward"):
                torch.testing.assert_close(logprobs[valid], torch.cat(naive))
            result = gradients(model, logprobs, coefficients)
            expected = gradients(model, naive, [c[row] for c, row in zip(coefficients, valid)])
            assert any(gradient is not None for gradient in expected.values())
            for name, gradient in expected.items():
                with case(f"{frozen} frozen, {name}"):
                    assert (result[name] is None) == (gradient is None)
                    if gradient is not None:
                        torch.testing.assert_close(result[name], gradient)


def test_in_bfloat16_autocast_the_gradient_is_that_of_float32_up_to_rounding(monkeypatch):
    """bfloat16 rounds each product to 0.4%; sums over chunks are kept in float32."""
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 61 * 5)                         # 12 tokens in chunks of 5
    model = tiny_model("llama untied")
    ids, mask, P = ragged_batch([5, 2, 3], [4, 6, 2])
    both = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logprobs, hidden = grpo.response_logprobs(model, ids, mask, P, return_hidden=True)
            logits = model.lm_head(hidden)                                      # in bfloat16, if enabled
            assert logits.dtype == grpo.compute_dtype(model) == (torch.bfloat16 if enabled else torch.float32)
        assert logprobs.dtype == torch.float32
        expected = torch.log_softmax(logits.float(), -1).gather(2, ids[:, P:, None])[..., 0] * mask[:, P:]
        close(logprobs, expected)                                               # a float32 head is off by 0.01
        logprobs.sum().backward()
        both.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, exact in both[0].items():
        assert both[1][name].dtype == torch.float32
        assert (both[1][name] - exact).norm() < 0.03 * exact.norm(), name
    assert not both[0]["lm_head.weight"].equal(both[1]["lm_head.weight"])


def shared_batch():
    """`ragged_batch` in which rows 0, 1 and 3 have one prompt, rows 2 and 4 another, row 5 its own; padding differs."""
    ids, mask, P = ragged_batch([7, 7, 4, 7, 4, 4], [4, 1, 6, 3, 2, 5])
    for row, source in ((1, 0), (3, 0), (4, 2)):
        ids[row, :P] = torch.where(mask[row, :P] == 1, ids[source, :P], ids[row, :P])
    return ids, mask, P


SLIDING = {
    "qwen2, windows of 3 in the second layer": Qwen2Config(
        vocab_size=61, use_sliding_window=True, sliding_window=3, max_window_layers=1, **SIZES),
    "gemma 3, windows of 3 in the first layer": Gemma3TextConfig(
        vocab_size=61, sliding_window=3, head_dim=8, layer_types=["sliding_attention", "full_attention"], **SIZES),
    **{f"qwen2, windows of {size}, of a prompt of 7 and a response of 6": Qwen2Config(
        vocab_size=61, use_sliding_window=True, sliding_window=size, max_window_layers=0, **SIZES) for size in (9, 20)}}


def test_prompts_that_rows_share_are_computed_once_with_the_values_and_gradients_of_whole_rows():
    ids, mask, P = shared_batch()
    coefficients = torch.randn(6, 6, generator=torch.Generator().manual_seed(5))
    with cases() as case:
        for kind in (*CONFIGS, *SLIDING):
            for dtype, exact in ((torch.float32, 1e-3), (torch.float64, 1e-4)):        # norms compute in float32
                torch.manual_seed(0)
                config = SLIDING[kind] if kind in SLIDING else CONFIGS[kind](61)
                model, computed = AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), []
                hook = model.base_model.register_forward_pre_hook(
                    lambda _, args, kwargs: computed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
                logprobs = grpo.response_logprobs(model, ids, mask, P, 0.8)
                hook.remove()
                expected = naive_logprobs(model, ids, mask, P, 0.8)
                with case((kind, dtype)):
                    assert computed == [(3, P), (6, 5)]
                    for row, valid, naive in zip(logprobs, mask[:, P:].bool(), expected):
                        close(row[valid], naive, exact, exact)
                result = gradients(model, logprobs, coefficients)
                wanted = gradients(model, expected, [c[v] for c, v in zip(coefficients, mask[:, P:].bool())])
                for name, gradient in wanted.items():
                    with case((kind, dtype, name)):
                        close(result[name], gradient, exact * gradient.abs().max().item(), exact)


def test_with_activation_checkpointing_the_prompt_is_not_lost():
    ids, mask, P = shared_batch()
    with cases() as case:
        for kind in CONFIGS:
            model = tiny_model(kind)
            checkpoint_activations(model)
            expected = naive_logprobs(model, ids, mask, P)
            wanted = gradients(model, expected, [torch.ones(len(row)) for row in expected])
            with case((kind, "eval mode")), torch.no_grad():
                for row, valid, naive in zip(grpo.response_logprobs(model, ids, mask, P), mask[:, P:].bool(), expected):
                    close(row[valid], naive)
            model.train()
            for module in model.modules():                                     # train mode, but without dropout
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            logprobs = grpo.response_logprobs(model, ids, mask, P)
            result = gradients(model, logprobs, mask[:, P:].float())
            with case(kind):
                for row, valid, naive in zip(logprobs, mask[:, P:].bool(), expected):
                    close(row[valid], naive)
                for name, gradient in wanted.items():
                    close(result[name], gradient, 1e-3 * gradient.abs().max().item(), 1e-3)


def test_shared_prompts_in_bfloat16_with_one_response_token_and_in_a_wrapped_model():
    ids, mask, P = shared_batch()
    model = tiny_model("llama untied")
    exact = grpo.response_logprobs(model, ids, mask, P).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared = grpo.response_logprobs(model, ids, mask, P)
        alone = torch.cat([grpo.response_logprobs(model, ids[i:i + 1], mask[i:i + 1], P) for i in range(6)])
    assert (shared - exact).abs().max() < 2 * (alone - exact).abs().max() < 0.2
    close(grpo.response_logprobs(model, ids[:, :P + 1], mask[:, :P + 1], P), exact[:, :1])
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig("CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    for row, valid, naive in zip(grpo.response_logprobs(wrapped, ids, mask, P), mask[:, P:].bool(),
                                 naive_logprobs(wrapped, ids, mask, P)):
        close(row[valid], naive)
    assert (grpo.response_logprobs(wrapped, ids, mask, P) - exact).abs().max() > 0.01              # the adapter is in


def test_a_head_that_is_no_linear_layer_and_a_prompt_without_a_token_are_refused():
    model = tiny_model("llama untied")
    ids, mask, P = ragged_batch([3, 2], [2, 3])
    with pytest.raises(ValueError, match="prompt_length must be at least 1 .*got 0"):
        grpo.response_logprobs(model, ids, mask, 0)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="no torch.nn.Linear but a Sequential"):
        grpo.response_logprobs(model, ids, mask, P)


def test_no_tensor_of_all_logits_exists_in_forward_or_backward_and_none_is_kept_between(monkeypatch):
    V, chunk = 997, 5
    sizes = SIZES | dict(hidden_size=4, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    ids, mask, P = ragged_batch([3, 4, 2, 4], [8, 6, 8, 7], V)                  # 29 tokens
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", V * chunk)
    with cases() as case:
        for tied in (True, False):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=V, tie_word_embeddings=tied, **sizes))
            kept = []
            with case(f"tied {tied}"):
                with LargestTensor() as forward, torch.autograd.graph.saved_tensors_hooks(
                        lambda x: kept.append(x.shape) or x, lambda x: x):
                    loss = grpo.response_logprobs(model, ids, mask, P).sum()
                with LargestTensor() as backward:
                    loss.backward()
                assert forward.size == backward.size == chunk * V               # 29 · V if all were taken at once
                assert [shape for shape in kept if shape[-1:] == (V,) and shape != (4, V)] == []  # (4, V): weight.T


def test_a_vocabulary_larger_than_the_logits_limit_still_works(monkeypatch):
    model = tiny_model("qwen2 tied")
    ids, mask, P = ragged_batch([3, 2], [2, 3])
    with torch.no_grad():
        expected = grpo.response_logprobs(model, ids, mask, P)
        monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 1)
        torch.testing.assert_close(grpo.response_logprobs(model, ids, mask, P), expected)


def test_an_eos_that_is_also_the_pad_token_keeps_its_logprob_and_gradient():
    model = tiny_model("llama untied")                                          # eos = pad = 0
    ids, mask, P = ragged_batch([3, 3], [3, 5])
    ids = ids.masked_fill(mask == 0, 0)
    ids[0, P + 2] = 0                                                           # the EOS of the shorter response
    logprobs, hidden = grpo.response_logprobs(model, ids, mask, P, return_hidden=True)
    expected = naive_logprobs(model, ids, mask, P)[0][2]
    assert expected < -0.01
    close(logprobs[0, 2], expected)
    gradient = torch.autograd.grad(logprobs[0, 2], model.lm_head.weight)[0][0]  # ∂/∂w_eos ln π(eos) = (1 − π) h
    torch.testing.assert_close(gradient, (1 - expected.exp()) * hidden[0, 2], atol=1e-4, rtol=1e-3)


def test_rows_without_response_tokens_are_all_zero():
    model = tiny_model("qwen2 tied")
    ids, mask, P = ragged_batch([3, 2], [2, 0])
    assert (grpo.response_logprobs(model, ids, mask, P)[1] == 0).all()
    mask[:, P:] = 0
    result = grpo.response_logprobs(model, ids, mask, P)
    assert result.shape == (2, 2) and (result == 0).all()
    result.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_logprobs_are_float32_and_sum_to_one_in_a_bfloat16_model():
    model = tiny_model("qwen2 tied").bfloat16()
    V, P = 61, 4
    prompt = ragged_batch([P], [1])[0][0, :P]
    ids = torch.cat([prompt.expand(V, P), torch.arange(V)[:, None]], dim=1)     # every one-token response
    with torch.no_grad():
        result = grpo.response_logprobs(model, ids, torch.ones_like(ids), P)
    assert result.dtype == torch.float32
    assert abs(result.double().exp().sum().item() - 1) < 1e-5                   # bfloat16 would be off by 1e-3


def test_a_model_that_changes_its_logits_after_the_lm_head_is_refused_and_no_other():
    ids, mask, P = ragged_batch([4, 4], [3, 3])
    with cases() as case, torch.no_grad():
        for config, option, value in ((Gemma2Config, "final_logit_softcapping", 2.0),
                                      (Gemma2Config, "final_logit_softcapping", None),
                                      (GraniteConfig, "logits_scaling", 8.0), (GraniteConfig, "logits_scaling", 1.0),
                                      (CohereConfig, "logit_scale", 0.25), (CohereConfig, "logit_scale", 1.0)):
            torch.manual_seed(0)
            config = config(vocab_size=61, head_dim=8, **{option: value}, **SIZES)
            model = AutoModelForCausalLM.from_config(config).eval()
            with case((option, value)):
                if value in (None, 1.0):
                    close(grpo.response_logprobs(model, ids, mask, P), torch.stack(naive_logprobs(model, ids, mask, P)))
                else:
                    with pytest.raises(ValueError, match=f"{option} = {value}"):
                        grpo.response_logprobs(model, ids, mask, P)


def test_a_model_that_multiplies_its_logits_under_another_name_is_scored_right_or_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FalconH1Config(
        vocab_size=61, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        lm_head_multiplier=0.25, **SIZES)).eval()
    ids, mask, P = ragged_batch([4, 4], [3, 3])
    with torch.no_grad():
        expected = torch.stack(naive_logprobs(model, ids, mask, P))
        try:
            result = grpo.response_logprobs(model, ids, mask, P)
        except ValueError:
            return
    close(result, expected)


# ---- token_weights, grpo_loss

def test_token_weights_are_one_over_questions_times_tokens_of_the_group():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()    # groups of 4 and 2 tokens
    torch.testing.assert_close(grpo.token_weights(mask, 2), torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 4]))
    torch.testing.assert_close(grpo.token_weights(mask, 4), torch.tensor([1 / 6] * 4))


LENGTHS = [5, 1, 3, 2, 7, 4, 1, 1, 6]                                           # three questions of three responses


def test_loss_and_metrics_equal_eq_1_as_plain_loops():
    with cases() as case:
        for eps, kl, nll in ((0.2, 0.0, 0.0), (0.2, 0.7, 0.0), (0.1, 0.0, 0.4), (0.3, 0.5, 0.2)):
            logprobs, old, ref, advantages, mask, correct = random_batch(LENGTHS)
            expected = loop_loss(logprobs, old, ref, advantages, mask, correct, 3, eps, kl, nll)
            logprobs.requires_grad_()
            with case(f"clip {eps}, KL {kl}, NLL {nll}"):
                loss, metrics = grpo.grpo_loss(logprobs, old, advantages, mask, 3, eps, ref, kl, nll, correct)
                assert expected["clip_share"] > 0.1 and loss.item() == pytest.approx(expected["loss"], rel=1e-6)
                assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-6)
                assert all(value.shape == () and not value.requires_grad for value in metrics.values())


def test_gradient_equals_finite_differences_of_the_plain_loops():
    batch = random_batch([3, 1, 2, 4])
    logprobs, old, ref, advantages, mask, correct = batch
    leaf = logprobs.clone().requires_grad_()
    grpo.grpo_loss(leaf, old, advantages, mask, 2, 0.2, ref, 0.3, 0.5, correct)[0].backward()
    for i, k in mask.nonzero().tolist():
        sides = []
        for step in (1e-6, -1e-6):
            moved = logprobs.clone()
            moved[i, k] += step
            sides.append(loop_loss(moved, old, ref, advantages, mask, correct, 2, 0.2, 0.3, 0.5)["loss"])
        assert leaf.grad[i, k].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-6)


def test_the_default_clip_is_the_papers_and_no_other_term_is_on():
    old, advantages, mask = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    loss, metrics = grpo.grpo_loss(torch.full((1, 1), math.log(2)), old, advantages, mask, 1)
    assert loss.item() == pytest.approx(-1.2) and set(metrics) == {"loss", "clip_share"}


def test_on_policy_loss_is_minus_the_token_mean_of_the_advantages_with_full_gradient():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    advantages, mask = torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    loss, metrics = grpo.grpo_loss(logprobs, logprobs.detach(), advantages, mask, 2)
    loss.backward()
    assert loss.item() == pytest.approx(-1 / 3) and metrics["clip_share"] == 0
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1 / 3, -1 / 3], [1 / 3, 0.0]]))


def test_the_gradient_is_minus_ratio_times_advantage_and_exactly_zero_where_ppo_stops():
    with cases() as case:
        for ratio, advantage, gradient, stopped in (
                (0.5, 1.0, -0.5, 0), (0.5, -1.0, 0.0, 1), (1.0, 1.0, -1.0, 0), (1.0, -1.0, 1.0, 0),
                (1.5, 1.0, 0.0, 1), (1.5, -1.0, 1.5, 0), (0.5, 0.0, 0.0, 0), (1.5, 0.0, 0.0, 0)):
            logprobs = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
            old, A = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[advantage]], dtype=torch.float64)
            with case(f"ratio {ratio}, advantage {advantage}"):
                loss, metrics = grpo.grpo_loss(logprobs, old, A, torch.ones(1, 1), 1)
                loss.backward()
                assert metrics["clip_share"] == stopped
                assert logprobs.grad.item() == (pytest.approx(gradient) if gradient else 0)


def test_a_ratio_that_would_overflow_has_the_gradient_of_the_clip_not_nan():
    logprobs = torch.tensor([[0.0], [0.0]], requires_grad=True)
    loss, _ = grpo.grpo_loss(logprobs, torch.tensor([[-100.0], [0.0]]), torch.tensor([[1.0], [-1.0]]),
                             torch.ones(2, 1), 2)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 - 1) / 2)                         # clip(e^100) = 1.2, over 2 tokens
    assert logprobs.grad.tolist() == [[0.0], [0.5]]


def test_kl_is_the_k3_estimate_by_hand_and_pulls_towards_the_reference():
    logprobs = torch.tensor([[math.log(0.5), math.log(0.2)]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[math.log(0.25), math.log(0.2)]], dtype=torch.float64)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    loss, metrics = grpo.grpo_loss(logprobs, logprobs.detach(), zero, torch.ones(1, 2), 1, ref_logprobs=ref,
                                   kl_coef=3.0)
    by_hand = (0.5 - 1 + math.log(2) + 0) / 2                                   # r = 1/2 and r = 1
    assert metrics["kl"].item() == pytest.approx(by_hand) and loss.item() == pytest.approx(3 * by_hand)
    loss.backward()                                                             # d/dlogprob = (1 − r) / 2 · 3
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.75, 0.0]], dtype=torch.float64))


def test_nll_by_hand_counts_correct_responses_over_all_tokens_of_their_question():
    logprobs = torch.tensor([[-1.0, -2.0], [-4.0, -8.0], [-0.5, 0.0], [-1.5, 0.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]]).bool()
    correct = torch.tensor([1, 0, 0, 1])
    loss, metrics = grpo.grpo_loss(logprobs, logprobs.detach(), torch.zeros(4, 2), mask, 2, nll_coef=2.0,
                                   correct=correct)
    by_hand = ((1 + 2) / 4 + 1.5 / 2) / 2                                       # 0.75
    assert metrics["nll"].item() == pytest.approx(by_hand) and loss.item() == pytest.approx(2 * by_hand)
    loss.backward()
    expected = torch.tensor([[-0.25, -0.25], [0, 0], [0, 0], [-0.5, 0]])        # −coef · weight, weight 1/8 and 1/4
    torch.testing.assert_close(logprobs.grad, expected)


def test_metrics_by_hand_on_two_questions():
    old = torch.full((4, 2), -1.0, dtype=torch.float64)
    ratios = torch.tensor([[1.5, 1.0], [0.5, 9.0], [2.0, 1.1], [1.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]])                       # 3 tokens and 2 tokens
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    _, metrics = grpo.grpo_loss(old + ratios.log(), old, advantages, mask, 2)
    # question 1: min → 1.2 (stopped), 1, −0.8 (stopped); question 2: −2 (goes on), 1.1
    assert metrics["clip_share"].item() == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["loss"].item() == pytest.approx(-((1.2 + 1 - 0.8) / 3 + (-2 + 1.1) / 2) / 2)


def test_any_rows_in_any_order_add_up_to_the_whole_batch_with_token_weights():
    logprobs, old, ref, advantages, mask, correct = random_batch(LENGTHS)
    whole = logprobs.clone().requires_grad_()
    loss, metrics = grpo.grpo_loss(whole, old, advantages, mask, 3, 0.2, ref, 0.3, 0.5, correct)
    loss.backward()
    weights = grpo.token_weights(mask, 3)
    with cases() as case:
        for size in (1, 2, 3, 4, 9):
            parts, totals = logprobs.clone().requires_grad_(), dict.fromkeys(metrics, 0.0)
            with case(f"{size} rows at a time"):
                for rows in torch.randperm(9, generator=torch.Generator().manual_seed(size)).split(size):
                    part, part_metrics = grpo.grpo_loss(parts[rows], old[rows], advantages[rows], mask[rows], 3, 0.2,
                                                        ref[rows], 0.3, 0.5, correct[rows], weights[rows])
                    part.backward()
                    totals = {name: totals[name] + part_metrics[name] for name in totals}
                torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)
                torch.testing.assert_close(totals, metrics, rtol=1e-6, atol=1e-9)


def test_whole_groups_without_weights_average_to_the_batch_by_their_number_of_questions():
    logprobs, old, ref, advantages, mask, correct = random_batch(LENGTHS)
    whole, parts = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    grpo.grpo_loss(whole, old, advantages, mask, 3, 0.2, ref, 0.3, 0.5, correct)[0].backward()
    for rows, questions in ((slice(0, 6), 2), (slice(6, 9), 1)):
        loss, _ = grpo.grpo_loss(parts[rows], old[rows], advantages[rows], mask[rows], 3, 0.2, ref[rows], 0.3, 0.5,
                                 correct[rows])
        (loss * questions / 3).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)


def test_garbage_on_padding_leaks_into_neither_loss_nor_gradient():
    names = "logprobs", "old_logprobs", "ref_logprobs", "advantages"
    *tensors, mask, correct = random_batch(LENGTHS)

    def result(dirty=None, garbage=0.0):
        values = {name: x.masked_fill(~mask, garbage) if name == dirty else x for name, x in zip(names, tensors)}
        leaf = values.pop("logprobs").clone().requires_grad_()
        loss, metrics = grpo.grpo_loss(leaf, **values, mask=mask, group_size=3, kl_coef=0.3, nll_coef=0.5,
                                       correct=correct)
        loss.backward()
        return loss.detach(), leaf.grad, metrics

    clean, clean_grad, clean_metrics = result()
    with cases() as case:
        for name in names:
            for garbage in (math.nan, math.inf, -math.inf, 1e30):
                with case(f"{garbage} in {name}"):
                    loss, grad, metrics = result(name, garbage)
                    assert loss == clean and grad.equal(clean_grad) and metrics == clean_metrics
                    assert (grad[~mask] == 0).all()


def test_an_empty_response_or_a_wholly_empty_group_stays_finite():
    logprobs, old, ref, advantages, mask, correct = random_batch([3, 0, 0, 0])
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = grpo.grpo_loss(leaf, old, advantages, mask, 2, 0.2, ref, 0.3, 0.5, correct)
    loss.backward()
    first = loop_loss(logprobs[:2], old[:2], ref[:2], advantages[:2], mask[:2], correct[:2], 2, 0.2, 0.3, 0.5)
    assert loss.item() == pytest.approx(first["loss"] / 2, rel=1e-6)            # the empty question counts as 0
    assert leaf.grad.isfinite().all() and (leaf.grad[1:] == 0).all()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert grpo.grpo_loss(logprobs[:2], old[:2], advantages[:2], nothing, 2)[0] == 0


def test_a_row_count_that_is_no_multiple_of_the_group_size_is_refused_without_weights():
    x, mask = torch.zeros(5, 2), torch.ones(5, 2)
    for call in (lambda: grpo.token_weights(mask, 2), lambda: grpo.grpo_loss(x, x, x, mask, 2)):
        with pytest.raises(ValueError, match="5 rows are not whole groups of 2"):
            call()
    assert grpo.grpo_loss(x, x, x, mask, 2, weights=torch.ones(5))[0] == 0


def test_a_tensor_of_another_shape_is_refused_by_name():
    def arguments():
        return dict.fromkeys(("old_logprobs", "advantages", "mask", "ref_logprobs"), torch.zeros(2, 3))

    with cases() as case:
        for names, shapes in ((arguments(), ((2, 4), (2, 1), (3,), (1, 3))),                   # also broadcastable
                              (("correct", "weights"), ((2, 3), (1,), (2, 1)))):
            for name in names:
                for shape in shapes:
                    with case(f"{name} {shape}"), pytest.raises(ValueError, match=name):
                        grpo.grpo_loss(torch.zeros(2, 3), group_size=2, **arguments() | {name: torch.ones(shape)})


def test_a_coefficient_without_its_argument_is_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        grpo.grpo_loss(x, x, x, mask, 2, kl_coef=0.1)
    with pytest.raises(ValueError, match="needs correct"):
        grpo.grpo_loss(x, x, x, mask, 2, nll_coef=0.1)


# ---- likelihood_change

def test_likelihood_change_by_hand_ignores_padding_and_incorrect_responses():
    new = torch.tensor([[-1.0, -1.0, math.nan], [-5.0, -5.0, -5.0], [-2.0, math.inf, 0.0]])
    old = torch.tensor([[-1.5, -2.0, 7.0], [-1.0, -1.0, -1.0], [-1.0, 3.0, math.nan]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    change = grpo.likelihood_change(new, old, mask, torch.tensor([1, 0, 1]))
    assert change.shape == () and change.item() == pytest.approx(((0.5 + 1.0) + (-1.0)) / 2)


def test_likelihood_change_without_a_correct_response_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="at least one correct"):
        grpo.likelihood_change(x, x, torch.ones(2, 3), torch.tensor([False, False]))
