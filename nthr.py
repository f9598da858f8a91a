"""NTHR, Negative Token Hidden Reward (Deng et al. 2025, arXiv 2505.18830), in one file that needs only torch.

GRPO pushes every token of a wrong answer down equally hard. Many of those tokens are correct steps that the right
answers share, so the push drags the right answers down too (Lazy Likelihood Displacement). NTHR scores each token of
a wrong answer by how strongly it is tied to the right answers of its group and weakens the penalty of high scorers.

In the order of the code, for one group of G responses (a, b: tokens; h_a: the hidden state that predicts a;
W: the lm_head weight; π(·|a) = softmax(W h_a); e_v: one-hot):
    App. 7.2  α_{a,b} = ⟨e_{y_a} − π(·|a), e_{y_b} − π(·|b)⟩                     prediction-error similarity
    Eq. 7     s_b = Σ_{a in correct responses} α_{a,b} ⟨h_a, h_b⟩                s⁻ on wrong tokens, s⁺ on correct ones
    App. 7.4  M⁺ = Σ_a (e_{y_a} − π(·|a)) h_aᵀ,  s_b = (e_{y_b} − π(·|b))ᵀ M⁺ h_b          the same in linear time
    §5        s̄⁺_{i'} = mean of s⁺ over response i',  τ = β · min_{i'} s̄⁺_{i'}            threshold
    Eq. 8     V⁻ = {wrong tokens with s⁻ > τ};  Algorithm 1: Â ← η Â on V⁻               selection
    Eq. 5     p⁻ Σ s⁻ − p⁺ Σ s⁺ = GWHES, summed over the correct responses y⁺_i  how lazy a question will be
M⁺ is exactly ∂/∂W of Σ_i ln π(y⁺_i|x), and s_b is the derivative of ln π_{W+εM⁺}(y_b|h_b) in ε at 0: how much one
gradient step that raises the correct responses would also raise this token.

Departures from the paper, each with its reason:
  1. With `logprobs`, ln Σ_v exp(w_vᵀ h) is taken as (logit − log-probability) of the sampled token instead of being
     summed again over the vocabulary: the same number, and no |V|-sized work is left.
  2. A sampling temperature enters π = softmax(W h / temperature). The factor 1/temperature² of the derivative is
     left out: it scales s and τ alike and never changes the selection.
  3. An empty response has no mean, so it does not enter τ; without any correct token τ = +∞ selects nothing.
  4. s̄⁺ is the printed sum, i = i' included. The words of §5 say "other" responses: tau_over="others" leaves out what
     y⁺_{i'} adds to its own s̄⁺, ‖M⁺ of y⁺_{i'} alone‖² / |y⁺_{i'}|. That lowers τ; with N⁺ = 1 it is 0.
  5. Groups with p = 0 or 1 come back unchanged (scores 0, τ = +∞, η = 1): there is nothing to compare.
  6. The printed Eq. 5 is a quantity of one y⁺_i. The sum over i, N⁺ times the mean, is what s⁻ and s⁺ add up to.
  7. η multiplies negative advantages only: with graded rewards a wrong response may have a positive one, no penalty.
App. 7.4's V*_x (vocabulary="responses") is the default as in the paper's runs; "all" is Eq. 7 without approximation.
"""
import math
import sys
from typing import NamedTuple

import torch

# Shapes: G responses of one question, T response tokens, V vocabulary, d hidden size,
#         N valid tokens of the group (no padding), U vocabulary columns in use (V or |V*_x|)


class NTHR(NamedTuple):
    """What `nthr_advantages` returns."""
    advantages: torch.Tensor   # (G, T) Â, multiplied by η where it is negative and selected (Algorithm 1)
    selected: torch.Tensor     # (G, T) bool, V⁻ of Eq. 8
    scores: torch.Tensor       # (G, T) float32, s⁻ on wrong responses, s⁺ on correct ones, 0 on padding
    tau: torch.Tensor          # () float32, the threshold τ
    eta: float                 # the factor η of this group


def _binary(name, values, shape, device):
    """A tensor, array or list of bools, or of 0 and 1, as a bool tensor of this shape; else a ValueError."""
    try:
        values = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError):                              # None, strings, rows of several lengths
        raise ValueError(f"{name} must be bool or hold only 0 and 1, got {values!r:.60}") from None
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(values.shape)}")
    if values.dtype != torch.bool and not ((values == 0) | (values == 1)).all():
        raise ValueError(f"{name} must be bool or hold only 0 and 1, got {values[(values != 0) & (values != 1)][0]}")
    return values.bool()


def _check_group(hidden, tokens, mask, correct, lm_head, logprobs=None):
    """mask and correct as bool, after a ValueError that names the first argument found wrong."""
    for name, value in (("hidden", hidden), ("tokens", tokens), ("lm_head", lm_head)):
        if not torch.is_tensor(value):
            weight = ": pass lm_head.weight" if isinstance(value, torch.nn.Module) else ""
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}{weight}")
    if tokens.dim() != 2 or lm_head.dim() != 2 or hidden.shape != (*tokens.shape, lm_head.shape[1]):
        raise ValueError(f"hidden must be (G, T, d), tokens (G, T) and lm_head (V, d), got {tuple(hidden.shape)}, "
                         f"{tuple(tokens.shape)} and {tuple(lm_head.shape)}")
    mask = _binary("mask", mask, tokens.shape, hidden.device)
    correct = _binary("correct", correct, tokens.shape[:1], hidden.device)
    y = tokens[mask]
    if y.numel() and not 0 <= y.min() <= y.max() < len(lm_head):
        raise ValueError(f"tokens must be rows of lm_head, 0..{len(lm_head) - 1}, got {y.min()}..{y.max()}")
    if not (hidden.amax(-1).isfinite() & hidden.amin(-1).isfinite())[mask].all():          # no second (G, T, d)
        raise ValueError("hidden holds NaN or infinite values on valid tokens: check the forward pass that made it")
    if logprobs is not None and not (torch.is_tensor(logprobs) and logprobs.shape == mask.shape
                                     and logprobs[mask].isfinite().all()):
        raise ValueError(f"logprobs must be a tensor {tuple(mask.shape)}, finite on valid tokens, got "
                         f"{tuple(getattr(logprobs, 'shape', ())) or type(logprobs).__name__}")
    return mask, correct


def _accumulator(hidden, lm_head):
    """The widest of their dtypes and float32: half-precision sums over thousands of tokens are noise."""
    return torch.promote_types(torch.promote_types(hidden.dtype, lm_head.dtype), torch.float32)


@torch.no_grad()
def nthr_scores_pairwise(hidden, tokens, mask, correct, lm_head):
    """Eq. 7 as printed, pair by pair: the executable definition, O(N² (V + d)), for reading and testing only.

    Arguments and result as `nthr_scores` with vocabulary="all"; float64 input is scored and returned in float64."""
    mask, correct = _check_group(hidden, tokens, mask, correct, lm_head)
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = _accumulator(hidden, lm_head)
        h, W = hidden.to(dtype), lm_head.to(dtype)                             # (G, T, d), (V, d)
        errors = {}                                                            # (i, k) -> e_y − π(·|x, y_<k), (V,)
        for i, k in mask.nonzero().tolist():
            errors[i, k] = -torch.softmax(W @ h[i, k], dim=-1)
            errors[i, k][tokens[i, k]] += 1
        scores = torch.zeros(mask.shape, dtype=h.dtype, device=h.device)       # (G, T)
        for j, k_prime in errors:                                              # the token that is scored
            for i, k in errors:
                if correct[i]:                                                 # every token k of every y⁺_i
                    alpha = errors[i, k] @ errors[j, k_prime]
                    scores[j, k_prime] += alpha * (h[i, k] @ h[j, k_prime])
    return scores


@torch.no_grad()
def nthr_scores(hidden, tokens, mask, correct, lm_head, logprobs=None, vocabulary="responses", temperature=1.0,
                chunk_size=512, return_own=False):
    """Eq. 7 by M⁺ (App. 7.4), `chunk_size` tokens at a time: never T⁺ × T⁻ and never T × V at once.

    hidden (G, T, d): last-layer states that predict `tokens` (G, T), i.e. the input of lm_head (V, d).
    mask (G, T) bool: valid response tokens. correct (G,): bools, or 0 and 1, as a tensor, array or list.
    vocabulary: "all", or "responses" = V*_x, the tokens that occur in the group (columns dropped, not renormalised).
    logprobs (G, T): the old policy's log π(tokens) at this temperature. "responses" then costs O(T |V*_x| d);
        without it the softmax normaliser costs one pass over V. "all" has every logit anyway and ignores it.
    Returns (G, T) float32: s⁻ on incorrect rows, s⁺ on correct rows, 0 on padding; accumulated in float32 or wider.
    return_own: also (G,), ‖M⁺ of y⁺_i alone‖², what each y⁺_i adds to its own Σ_k s⁺ (0 on incorrect rows).
    Raises ValueError on wrong shapes or ids, non-finite numbers, and logprobs that make probabilities over V*_x clearly
    exceed 1; logprobs that are off in another way (such as another temperature) can go unnoticed."""
    mask, correct = _check_group(hidden, tokens, mask, correct, lm_head, logprobs)
    if vocabulary not in ("all", "responses") or not temperature > 0 or chunk_size < 1:
        raise ValueError(f'vocabulary must be "all" or "responses", temperature > 0 and chunk_size >= 1, got '
                         f"{vocabulary!r}, {temperature} and {chunk_size}")
    h, y = hidden[mask], tokens[mask].long()                                   # (N, d), (N,)
    chunks = [slice(i, i + chunk_size) for i in range(0, max(1, len(y)), chunk_size)]
    positive = correct[:, None].expand_as(mask)[mask].nonzero()[:, 0]          # which of the N tokens are in a y⁺_i
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = _accumulator(hidden, lm_head)
        W = lm_head.to(dtype) if vocabulary == "all" or logprobs is None else None
        if vocabulary == "responses":
            log_pi = logprobs[mask].to(dtype) if logprobs is not None else torch.cat([
                torch.log_softmax(h[c].to(dtype) @ W.T / temperature, -1).gather(1, y[c, None])[:, 0]
                for c in chunks])                                              # (N,)
            columns, y = torch.unique(y, return_inverse=True)                  # V*_x (U,), y as indices into it
            W = lm_head[columns].to(dtype)                                     # (U, d)

        def prediction_error(c):                                               # e_y − π(·) of tokens c, (chunk, U)
            logits = h[c].to(dtype) @ W.T / temperature
            row = torch.arange(len(logits), device=y.device)
            log_z = torch.logsumexp(logits, -1) if vocabulary == "all" else logits[row, y[c]] - log_pi[c]
            pi = torch.exp(logits - log_z[:, None])
            pi[row, y[c]] -= 1
            return pi.neg_()

        M, own = torch.zeros_like(W), torch.zeros(len(mask), device=y.device)  # M⁺ (U, d), and (G,)
        part = torch.zeros_like(W) if return_own else M                        # M⁺ of one y⁺_i alone
        responses = positive.split(mask.sum(1)[correct].tolist()) if return_own else [positive]
        for i, response in zip(correct.nonzero()[:, 0], responses):
            for c in response.split(chunk_size):
                part.addmm_(prediction_error(c).T, h[c].to(dtype))
            if return_own:
                own[i] = part.norm().square()
                M += part
                part.zero_()
        s, mass = [], []                                                       # one entry per chunk
        for c in chunks:
            error = prediction_error(c)
            s.append(((error @ M) * h[c].to(dtype)).sum(-1).float())           # (e_y − π)ᵀ M⁺ h, as it is returned
            mass.append(1 - error.sum(-1))                                     # Σ_v π(v) over the columns in use
    s, mass = torch.cat(s), torch.cat(mass)                                    # (N,), (N,)
    if mass.mean() > 1.2:                                                      # V*_x ⊂ V: at most 1 up to rounding
        raise ValueError("hidden, tokens, logprobs or temperature do not belong together. Check first that state k "
                         "predicts token k and is the lm_head's input; pass None only if logprobs alone are at fault")
    if not s.isfinite().all():
        raise ValueError("scores are not finite: lm_head holds NaN or infinity, or its logits or the scores overflow")
    scores = torch.zeros(mask.shape, device=s.device).masked_scatter(mask, s)  # (G, T) float32
    return (scores, own) if return_own else scores


def nthr_threshold(scores, mask, correct, beta=1.0, own=None):
    """τ = β · min over correct responses of s̄⁺, the mean of s⁺ over the response's tokens (§5). Returns a () tensor.

    own (G,): what `nthr_scores` returns with return_own; it is left out of s̄⁺, which is 0 where N⁺ = 1 (departure 4).
    β = −∞ gives τ = −∞: every negative token is selected (Table 4). Without any correct token τ = +∞."""
    if math.isnan(beta) or beta == math.inf:
        raise ValueError(f"beta must be a real number or -inf, got {beta}")
    lengths = mask.sum(-1)                                                     # (G,)
    rows = _binary("correct", correct, lengths.shape, mask.device) & (lengths > 0)
    if not rows.any():
        return scores.new_tensor(math.inf)
    if beta == -math.inf:                                                      # −∞ · 0 would be NaN
        return scores.new_tensor(-math.inf)
    total = (scores * mask).sum(-1)[rows]                                      # Σ_k s⁺ of each correct response
    if own is not None:
        total = total - own[rows] if len(total) > 1 else torch.zeros_like(total)
    return beta * (total / lengths[rows]).min()


def nthr_eta(success_rate, rule="2|0.5-p|"):
    """η from a group's success rate p (Table 5): "2|0.5-p|", "p", "1-p", or a number in [0, 1] (or its string)."""
    if not 0 <= success_rate <= 1:
        raise ValueError(f"success_rate must be in [0, 1], got {success_rate}")
    rules = {"2|0.5-p|": 2 * abs(0.5 - success_rate), "p": success_rate, "1-p": 1 - success_rate}
    try:
        eta = float(rules.get(rule, rule))
    except (TypeError, ValueError):
        eta = math.nan
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be one of {', '.join(rules)} or a number in [0, 1], got {rule!r}")
    return eta


def nthr_advantages(advantages, hidden, tokens, mask, correct, lm_head, *, logprobs=None, beta=1.0, eta="2|0.5-p|",
                    vocabulary="responses", temperature=1.0, chunk_size=512, tau_over="all"):
    """Algorithm 1 for one whole group: the negative advantages of selected tokens are multiplied by η.

    advantages (G, T), or one per response, (G,) or (G, 1), expanded to (G, T). A wrong response with a
    positive one keeps it: Algorithm 1 weakens penalties. `selected` is Eq. 8's V⁻ all the same.
    tau_over: the correct responses that s̄⁺ sums over, "all" as §5 prints, or "others" as its words say (departure 4).
    The other arguments are those of `nthr_scores`, `nthr_threshold` (beta) and `nthr_eta` (eta). Returns an `NTHR`;
    nothing is modified in place. Groups with p = 0 or 1 come back unchanged. ValueError as in those functions."""
    mask, correct = _check_group(hidden, tokens, mask, correct, lm_head)
    G, T = mask.shape
    advantages = torch.as_tensor(advantages, device=mask.device)
    if advantages.shape not in ((G, T), (G,), (G, 1)):
        raise ValueError(f"advantages must have shape {(G, T)}, {(G,)} or {(G, 1)}, got {tuple(advantages.shape)}")
    advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).expand(G, T).clone()
    if tau_over not in ("all", "others"):
        raise ValueError(f'tau_over must be "all" or "others", got {tau_over!r}')
    p = correct.sum().item() / G                                               # success rate N⁺/G
    eta = nthr_eta(p, eta)
    if p in (0, 1):
        scores = torch.zeros(mask.shape, device=mask.device)
        return NTHR(advantages, torch.zeros_like(mask), scores, scores.new_tensor(math.inf), 1.0)
    group = hidden, tokens, mask, correct, lm_head, logprobs, vocabulary, temperature, chunk_size
    scores, own = nthr_scores(*group, return_own=True) if tau_over == "others" else (nthr_scores(*group), None)
    tau = nthr_threshold(scores, mask, correct, beta, own)
    selected = mask & ~correct[:, None] & (scores > tau)                       # Eq. 8
    return NTHR(torch.where(selected & (advantages < 0), advantages * eta, advantages), selected, scores, tau, eta)


def gwhes(scores, mask, correct):
    """GWHES from one group's scores: p⁻ Σ s⁻ − p⁺ Σ s⁺ with p⁻ = p/√(p(1−p)), p⁺ = (1−p)/√(p(1−p)) (Lemma 4.2).

    Eq. 5 is a quantity of one correct response y⁺_i. This is its sum over i: divide by correct.sum() for the mean.
    Higher = lazier. Returns a () tensor; 0 when p is 0 or 1, where every advantage is 0."""
    correct = _binary("correct", correct, mask.shape[:1], mask.device)
    p = correct.sum().item() / len(correct)
    if p in (0, 1):
        return scores.new_zeros(())
    response = (scores * mask).sum(-1)                                         # (G,) Σ_k s of each response
    return (p * response[~correct].sum() - (1 - p) * response[correct].sum()) / math.sqrt(p * (1 - p))


def _toy():
    """Print a group of four answers to 3+4·2; a hidden state is the recency-weighted sum of its prefix's embeddings."""
    words = "4·2 = 8 ; 3+8 11 12 3+4 7 7·2 14 <eos>".split()
    answers = ["4·2 = 8 ; 3+8 = 11 <eos>"] * 2 + ["4·2 = 8 ; 3+8 = 12 <eos>", "3+4 = 7 ; 7·2 = 14 <eos>"]
    W = torch.randn(len(words), 32, generator=torch.Generator().manual_seed(0)) / 32 ** 0.5
    tokens = torch.tensor([[words.index(word) for word in answer.split()] for answer in answers])
    hidden = W.sum(0).expand(*tokens.shape, 32) / 3                            # the question, before the first token
    for k in range(1, tokens.shape[1]):
        hidden[:, k] = 0.7 * hidden[:, k - 1] + W[tokens[:, k - 1]]
    correct = torch.tensor([True, True, False, False])
    advantages = torch.where(correct, 1.0, -1.0)[:, None].expand(tokens.shape)
    result = nthr_advantages(advantages, hidden, tokens, torch.ones_like(tokens), correct, W, eta=0.0)
    shade, plain = ("\033[30;43m", "\033[0m") if sys.stdout.isatty() else ("", "")

    def cell(row, k):
        numbers = f"{result.scores[row, k]:8.2f} {result.advantages[row, k] + 0.0:10.2f}"          # + 0.0: no "-0.00"
        text = f"{words[tokens[row, k]]:>6} {numbers}"
        return f"{shade}{text} <{plain}" if result.selected[row, k] else f"{text}  "

    print(f"question: 3+4·2   right, twice: {answers[0]}   p = 0.5   tau = {result.tau:.2f}   eta = {result.eta:g}\n")
    print(f"wrong: {answers[2]:28} wrong: {answers[3]}\n token    score  advantage{'':11}token    score  advantage")
    for k in range(tokens.shape[1]):
        print(f"{cell(2, k)}{'':8}{cell(3, k)}".rstrip())
    print("\n< score above tau: tied to the right answers, so its penalty is multiplied by eta")


if __name__ == "__main__":
    _toy()
