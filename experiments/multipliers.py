"""Other rules for the tokens of wrong answers: does NTHR need its hidden states and its prediction errors?

python train.py --method experiments/multipliers.py:lowest_entropy                   # train with one of them
python experiments/ablations.py --tables rules --seeds 12                            # train with each of them
python experiments/lld.py --eta "2|0.5-p|" --tau-over others --rules                 # one update with each of them

A rule maps a group's advantages (G, T) to new ones. The first six choose tokens by another score than NTHR's. In each
wrong response they weaken as many tokens as NTHR with τ over the others selects (β = 1), by the same η.
They hold the group's full logits (N, V), which suits small models.
"""
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nthr import nthr_advantages, nthr_eta, nthr_scores


class RuleInput(NamedTuple):
    """What train.py hands to a rule: G responses of up to T tokens, V vocabulary, d hidden size; N valid tokens."""
    advantages: torch.Tensor   # (G, T)
    hidden: torch.Tensor       # (G, T, d), the states that predict `tokens`
    tokens: torch.Tensor       # (G, T)
    mask: torch.Tensor         # (G, T) bool
    correct: torch.Tensor      # (G,) bool
    lm_head: torch.Tensor      # (V, d), divided by the sampling temperature
    logprobs: torch.Tensor     # (G, T), ln π of `tokens`

    def states(self):
        """The hidden states of the valid tokens: (N, d)."""
        return self.hidden[self.mask].to(self.lm_head.dtype)

    def log_policy(self):
        """ln π(·) where each valid token was sampled: (N, V)."""
        return torch.log_softmax(self.states() @ self.lm_head.T, -1)

    def padded(self, values):
        """(N,) values of the valid tokens as (G, T)."""
        return torch.zeros_like(self.logprobs).masked_scatter(self.mask, values.to(self.logprobs.dtype))

    def right(self):
        """Which of the N valid tokens belong to a right response: (N,) bool."""
        return self.correct[:, None].expand_as(self.mask)[self.mask]


def rule(function):
    """`function` of one `RuleInput` as a rule of the signature that --method calls."""
    return wraps(function)(lambda *arguments: function(RuleInput(*arguments)))


def weaken_highest(score, group):
    """η on the tokens of each wrong response with the highest score (G, T), as many as NTHR selects there."""
    nthr = nthr_advantages(*group[:-1], logprobs=group.logprobs, tau_over="others")
    rank = score.masked_fill(~group.mask, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.where(rank < nthr.selected.sum(1, keepdim=True), nthr.eta * group.advantages, group.advantages)


def entropy(group):
    """H(π) where each token was sampled, in nats: (G, T)."""
    log_pi = group.log_policy()
    return group.padded(-(log_pi.exp() * log_pi).sum(-1))


def confidence(group):
    """−ln(1 − π(token)): (G, T). It rises with π, and tells tokens apart whose π rounds to 1."""
    log_pi = group.log_policy()
    log_pi[torch.arange(len(log_pi), device=log_pi.device), group.tokens[group.mask]] = -torch.inf
    return group.padded(-log_pi.logsumexp(-1))


# ------------------------------------------------------------------------------------ as many tokens, by another score

@rule
def lowest_entropy(group):
    """Entropy instead of the score, as the paper's reviewers asked: where the model hesitates least."""
    return weaken_highest(-entropy(group), group)


@rule
def highest_entropy(group):
    """Where the model hesitates most. 2506.01939 trains on such "forking tokens" alone; here they are weakened."""
    return weaken_highest(entropy(group), group)


@rule
def highest_probability(group):
    """The token's own probability instead of the score, as the paper's reviewers asked: largest π."""
    return weaken_highest(confidence(group), group)


@rule
def lowest_probability(group):
    """Smallest π: the tokens with the largest prediction error."""
    return weaken_highest(-confidence(group), group)


@rule
def errors_alone(group):
    """Eq. 7 without ⟨h, h⟩: Σ_a α_{a,b} = ⟨Σ_a (e_{y_a} − π(·|a)), e_{y_b} − π(·|b)⟩, a over the right responses.

    Over the whole vocabulary, not V*_x."""
    error = -group.log_policy().exp()                                          # e_y − π(·), (N, V)
    error[torch.arange(len(error), device=error.device), group.tokens[group.mask]] += 1
    return weaken_highest(group.padded(error @ error[group.right()].sum(0)), group)


@rule
def states_alone(group):
    """Eq. 7 without α: Σ_a ⟨h_a, h_b⟩ = ⟨Σ_a h_a, h_b⟩, a over the tokens of the right responses."""
    h = group.states()
    return weaken_highest(group.padded(h @ h[group.right()].sum(0)), group)


# ---------------------------------------------------------------------------------------- τ as a quantile of s⁻ itself

def weaken_top(share, group):
    """η on this share of the group's wrong tokens, those with the highest s⁻ (fewer where equal scores end there)."""
    scores, wrong = nthr_scores(*group[1:]), group.mask & ~group.correct[:, None]
    chosen = wrong & (scores > torch.quantile(scores[wrong], 1 - share))
    eta = nthr_eta(group.correct.sum().item() / len(group.correct))
    return torch.where(chosen, eta * group.advantages, group.advantages)


@rule
def top_10_percent(group):
    """τ is the 0.9 quantile of the group's s⁻. The paper's reviewers asked how much depends on τ."""
    return weaken_top(0.1, group)


@rule
def top_20_percent(group):
    """τ is the 0.8 quantile of the group's s⁻."""
    return weaken_top(0.2, group)


@rule
def top_50_percent(group):
    """τ is the median of the group's s⁻."""
    return weaken_top(0.5, group)


# ------------------------------------------------------------------------------------------------------ the neighbours

@rule
def ar(group):
    """Advantage re-weighting (2505.12929): Â (α π + 1 − α) on every token, right or wrong, with its largest α, 0.3."""
    return group.advantages * (0.3 * group.logprobs.exp() + 0.7)


@rule
def resrl(group):
    """ResRL (2605.00380): wrong tokens (0.1 + 0.9 z) Â, right tokens 0.1 Â. z is the energy of a state outside the
    right tokens' 64 principal directions, between its 0.2 and 0.8 quantiles over the wrong tokens.
    Departures: the states are the last layer's, not the penultimate's. The directions are at most d/2, and no more
    than there are right tokens."""
    h = F.layer_norm(group.states(), group.hidden.shape[-1:])                  # (N, d)
    h = h - h[group.right()].mean(0)
    directions = torch.linalg.svd(h[group.right()], full_matrices=False).Vh[:min(64, h.shape[1] // 2)]     # (k, d)
    energy = (h - h @ directions.T @ directions).square().sum(-1)              # (N,)
    low, high = torch.quantile(energy[~group.right()], torch.tensor([0.2, 0.8]).to(energy))
    z = ((energy - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return group.advantages * group.padded(torch.where(group.right(), 0.1, 0.1 + 0.9 * z))
