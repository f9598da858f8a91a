"""GRPO as the NTHR paper states it (arXiv 2505.18830, §2, Eq. 1), its baselines (§3, §5.3) and Eq. 2.

In the order of the code:
    §2     Â_{i,k} = (r_i − μ)/σ                      group_advantages: μ, σ mean and *population* std of the group
    §3     Pos Only: Â < 0 becomes 0                  pos_only
    §5.3   GRPO + Random                              random_selection
           γ_{i,k} = π_θ/π_old needs ln π(y_{i,k})    response_logprobs
    Eq. 1  J = E_x[1/Σ_i|y_i| Σ_i Σ_k min(γÂ, clip(γ, 1−ε, 1+ε)Â)]        grpo_loss (negated, plus KL and NLL)
    Eq. 2  Δ(x) = 1/N⁺ Σ_i [ln π_θ'(y⁺_i|x) − ln π_θ(y⁺_i|x)]            likelihood_change

Choices where the paper is silent: the KL penalty is the k3 estimator of GRPO (DeepSeekMath), and KL and NLL use the
normaliser of Eq. 1, so that every term is a mean over the tokens of a question, then over questions.
"""
import inspect

import torch
from transformers.cache_utils import DynamicCache

# Shapes: Q questions, G responses each, B = Q·G, P prompt tokens, T response tokens, V vocabulary, d hidden size
LOGITS_AT_ONCE = 2 ** 26   # logits per chunk, whatever V is: 256 MiB in float32, at most two such tensors at once


def group_advantages(rewards):
    """Â of §2: (Q, G) rewards -> (Q, G) float advantages, (r − μ)/σ with the population standard deviation.

    A group whose rewards are equal up to rounding gets exactly 0 (no ε in the denominator that would turn rounding
    into ±0.1). Any finite rewards, any scale. Raises ValueError otherwise."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (Q, G) with G >= 2 responses per question, got {tuple(rewards.shape)}")
    if not rewards.isfinite().all():
        raise ValueError("rewards must be finite, got NaN or infinity")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    r = rewards.double()
    scale = r.abs().amax(1, keepdim=True)
    r = r / scale.clamp(min=torch.finfo(torch.float64).tiny)                   # squares must not overflow
    centered = r - r.mean(1, keepdim=True)
    rounding = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    equal = (r.amax(1, keepdim=True) - r.amin(1, keepdim=True)) <= rounding
    sigma = centered.square().mean(1, keepdim=True).sqrt()
    return torch.where(equal, 0.0, centered / sigma.masked_fill(equal, 1.0)).to(dtype)


def pos_only(advantages):
    """§3 Pos Only: negative advantages become 0. Same shape."""
    return advantages.clamp(min=0)


def random_selection(selected, mask, correct, generator):
    """§5.3 GRPO + Random: in each response as many random tokens as NTHR selected there.

    selected (B, T) bool from `nthr_advantages`, mask (B, T) bool, correct (B,) bool. Returns (B, T) bool, uniform
    over the valid tokens of the incorrect responses."""
    candidates = mask.bool() & ~correct.bool()[:, None]
    keys = torch.rand(mask.shape, generator=generator, device=generator.device).to(mask.device)
    rank = keys.masked_fill(~candidates, 2.0).argsort(dim=1).argsort(dim=1)    # 0 = smallest key of the row
    return (rank < selected.sum(1, keepdim=True)) & candidates


class _TokenLogprobs(torch.autograd.Function):
    """(N, d) hidden states, (N,) tokens -> (N,) ln π(token), π = softmax((W h + bias) / temperature).

    A few tokens' logits exist at a time. They are computed again in the backward pass, where
    ∂ ln π(y) / ∂ logits = (e_y − π) / temperature is formed in place: autograd would keep all, several times."""

    @staticmethod
    def logits(hidden, weight, bias, temperature):                             # in float32 or wider, a new tensor
        logits = torch.nn.functional.linear(hidden, weight, bias)              # (n, V)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)

    @staticmethod
    def forward(ctx, hidden, tokens, weight, bias, temperature, dtype):
        W, b = weight.to(dtype), None if bias is None else bias.to(dtype)      # autocast would cast them chunk by chunk
        logprobs, log_z, chunk = [], [], max(1, LOGITS_AT_ONCE // len(weight))
        for h, y in zip(hidden.to(dtype).split(chunk), tokens.split(chunk)):
            logits = _TokenLogprobs.logits(h, W, b, temperature)
            token, top = logits.gather(1, y[:, None])[:, 0], logits.amax(1)
            log_z.append(logits.sub_(top[:, None]).exp_().sum(1).log() + top)
            logprobs.append(token - log_z[-1])
        ctx.save_for_backward(hidden, tokens, weight, bias, torch.cat(log_z))
        ctx.temperature, ctx.dtype, ctx.chunk = temperature, dtype, chunk
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad):
        hidden, tokens, weight, bias, log_z = ctx.saved_tensors
        W, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        need_hidden, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for part in torch.arange(len(tokens), device=tokens.device).split(ctx.chunk):
            h, y, c = hidden[part].to(ctx.dtype), tokens[part], grad[part] / ctx.temperature
            pi = _TokenLogprobs.logits(h, W, b, ctx.temperature).sub_(log_z[part, None]).exp_()
            pi.mul_(-c[:, None]).scatter_add_(1, y[:, None], c[:, None])       # grad · (e_y − π) / temperature
            if need_bias:
                grad_bias += pi.sum(0)
            pi = pi.to(ctx.dtype)
            if need_hidden:
                grad_hidden[part] = (pi @ W).to(hidden.dtype)
            if need_weight and weight.dtype == ctx.dtype:
                grad_weight.addmm_(pi.T, h)                                    # without a temporary (V, d)
            elif need_weight:
                grad_weight += pi.T @ h                                        # summed in float32
        return grad_hidden, None, grad_weight, grad_bias, None, None


def check_head(model):
    """ValueError if the model's logits are not lm_head(hidden): Eq. 7 and `response_logprobs` take π = softmax(W h)."""
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        kind = type(model.get_output_embeddings()).__name__
        raise ValueError(f"the model's lm_head is no torch.nn.Linear but a {kind}: choose a model with a plain head "
                         f"(merge an adapter of the head first)")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(model.config.get_text_config(), name, None)
        if value not in (None, 1):
            raise ValueError(f"the model changes its logits after the lm_head ({name} = {value}), so that they are not "
                             f"W h as Eq. 7 needs: choose a model without it")


def compute_dtype(model):
    """The dtype that the model's matrix products have now: autocast's, or that of the lm_head."""
    weight = model.get_output_embeddings().weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def cache_argument(model, cache):
    """{name: cache} for a model's forward, which takes `past_key_values` as `cache` from transformers 5.24 on."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def hidden_states(model, ids, attention_mask, cache=None, position_ids=None):
    """The lm_head's inputs for the tokens that follow each of ids (B, n): (B, n, d).

    attention_mask (B, m): of what the cache holds and of ids, m >= n. position_ids (B, n): those of the mask, in which
    left padding takes none. cache: a transformers Cache, which ids are added to."""
    base = getattr(model, "get_base_model", lambda: model)().base_model        # of a model that peft wraps, too
    if position_ids is None:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    return base(input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=cache is not None,
                **cache_argument(base, cache)).last_hidden_state


def _response_states(model, ids, attention_mask, P):
    """The states (B, T, d) that predict the response tokens, from ids and attention_mask (B, P+T).

    Rows with the same prompt share its keys and values, and the gradient flows back through them. In train mode each
    row is computed whole: activation checkpointing drops a cache and goes on without it."""
    keys = ids.masked_fill(attention_mask == 0, -1)[:, :P].cpu()               # padding is -1, whatever its id
    prompts, row = (x.to(ids.device) for x in torch.unique(keys, dim=0, return_inverse=True))      # (≤ B, P), (B,)
    if model.training or len(prompts) == len(ids) or ids.shape[1] == P + 1:
        return hidden_states(model, ids, attention_mask)[:, P - 1:-1]
    cache = DynamicCache()                                                     # without a config, windows keep it all
    first = hidden_states(model, prompts.clamp(min=0), (prompts >= 0).long(), cache)[row, -1:]     # (B, 1, d)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[row], layer.values[row]
    return torch.cat([first, hidden_states(model, ids[:, P:-1], attention_mask[:, :-1], cache)], 1)


def response_logprobs(model, ids, attention_mask, prompt_length, temperature=1.0, return_hidden=False):
    """ln π(y_{i,k} | x, y_{i,<k}) of the response tokens under the distribution that they were sampled from.

    ids, attention_mask (B, P+T): prompts left-padded to P = prompt_length, responses right-padded. model: a Hugging
    Face causal LM. Returns (B, T), float32 (float64 for a float64 model), 0 on padding; with return_hidden also the
    states (B, T, d) that predict those tokens, i.e. the input of lm_head.

    In eval mode a prompt that several of these rows share is computed once. The logits of a few tokens exist at a time,
    in the backward pass, too: never (B, T, V). Raises ValueError where logits are not lm_head(hidden): `check_head`."""
    check_head(model)
    if prompt_length < 1:
        raise ValueError(f"prompt_length must be at least 1 (its last state predicts token 1), got {prompt_length}")
    attention_mask = attention_mask.long()
    states = _response_states(model, ids, attention_mask, prompt_length)       # (B, T, d): state k predicts token k
    valid = attention_mask[:, prompt_length:].bool()                           # (B, T)
    head = model.get_output_embeddings()
    logprobs = _TokenLogprobs.apply(states[valid], ids[:, prompt_length:][valid], head.weight, head.bias, temperature,
                                    compute_dtype(model))                      # (N,)
    logprobs = torch.zeros(valid.shape, dtype=logprobs.dtype, device=ids.device).masked_scatter(valid, logprobs)
    return (logprobs, states) if return_hidden else logprobs


def token_weights(mask, group_size):
    """The normaliser of Eq. 1 as a weight per response: 1 / (Q · Σ_i |y_i|), the sum over its own group. (B,) float32.

    mask (B, T) with the G responses of a question in consecutive rows. ValueError if B is no multiple of G."""
    if len(mask) % group_size:
        raise ValueError(f"{len(mask)} rows are not whole groups of {group_size}: pass all responses of each question")
    tokens = mask.reshape(-1, group_size * mask.shape[1]).sum(1)               # (Q,) Σ_i |y_i|
    return (1 / (len(tokens) * tokens.clamp(min=1).float())).repeat_interleave(group_size)


def grpo_loss(logprobs, old_logprobs, advantages, mask, group_size, clip_eps=0.2, ref_logprobs=None, kl_coef=0.0,
              nll_coef=0.0, correct=None, weights=None):
    """−J of Eq. 1 + kl_coef · KL(π_θ‖π_ref) + nll_coef · NLL of the correct responses (App. 7.8).

    logprobs (with gradient), old_logprobs, advantages, ref_logprobs: (B, T); mask (B, T) bool; correct (B,) bool.
    weights (B,): `token_weights` of the whole batch, when the rows are only a part of it (any rows, in any order):
        the losses and gradients of the parts then add up to those of the whole. Default: the rows are the batch.
    Returns (loss, metrics). metrics holds detached () tensors that add up over the parts in the same way, each a mean
    over tokens, then over questions: "loss", "clip_share" (tokens whose gradient the clip stops), "kl" if
    ref_logprobs is given and "nll" if correct is given. Raises ValueError on wrong shapes or a missing argument."""
    per_token, per_response = logprobs.shape, logprobs.shape[:1]
    for name, value, shape in (("old_logprobs", old_logprobs, per_token), ("advantages", advantages, per_token),
                               ("mask", mask, per_token), ("ref_logprobs", ref_logprobs, per_token),
                               ("correct", correct, per_response), ("weights", weights, per_response)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} to match logprobs, got {tuple(value.shape)}")
    if (kl_coef and ref_logprobs is None) or (nll_coef and correct is None):
        raise ValueError("kl_coef > 0 needs ref_logprobs and nll_coef > 0 needs correct")
    mask = mask.bool()
    weights = token_weights(mask, group_size) if weights is None else weights

    def mean(per_token):                                                       # (B, T) -> (), Eq. 1's normaliser
        return (per_token.masked_fill(~mask, 0.0).sum(1) * weights).sum()

    # γ, at most e^20: beyond it exp overflows, and 0 · ∞ would put NaN where the clip makes the gradient 0.
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0.0).clamp(max=20))
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    loss = -mean(objective)                                                    # Eq. 1
    clipped = torch.where(advantages > 0, ratio > 1 + clip_eps, ratio < 1 - clip_eps) & (advantages != 0)
    metrics = {"clip_share": mean(clipped.float())}
    if ref_logprobs is not None:
        log_ratio = (ref_logprobs - logprobs).masked_fill(~mask, 0.0)
        metrics["kl"] = mean(torch.expm1(log_ratio) - log_ratio)               # k3: r − 1 − ln r, r = π_ref/π_θ
        loss = loss + kl_coef * metrics["kl"]
    if correct is not None:
        metrics["nll"] = mean(-logprobs * correct.bool()[:, None])
        loss = loss + nll_coef * metrics["nll"]
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def likelihood_change(new_logprobs, old_logprobs, mask, correct):
    """Eq. 2 for the responses of one question: the mean over correct responses of ln π_θ'(y|x) − ln π_θ(y|x), () nats.

    new_logprobs, old_logprobs, mask (G, T), correct (G,) bool. Raises ValueError if no response is correct."""
    correct = correct.bool()
    if not correct.any():
        raise ValueError("likelihood_change needs at least one correct response (Eq. 2 averages over them)")
    change = (new_logprobs - old_logprobs).masked_fill(~mask.bool(), 0.0)      # (G, T)
    return change.sum(1)[correct].mean()
