"""Other ways to choose and to weaken the tokens of wrong answers: does it take hidden states and prediction errors?

python train.py --method experiments/multipliers.py:lowest_entropy                   # train with one of them
python experiments/ablations.py --tables rules --seeds 12                            # train with each of them
python experiments/lld.py --eta "2|0.5-p|" --tau-over others --rules                 # one update with each of them

A rule takes a group's advantages (G, T), hidden (G, T, d), tokens (G, T), mask (G, T), correct (G,), lm_head (V, d) and
logprobs (G, T), and returns new advantages (G, T). Rules that choose by another score weaken as many tokens of each
wrong response as NTHR with τ over the others selects (β = 1), by the same η: they differ in which tokens, nothing else.
The temperature is 1. The rules hold the group's full logits (N, V): they are made for small models.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nthr import nthr_advantages, nthr_eta, nthr_scores


class Group(NamedTuple):
    """The arguments of a rule; N valid tokens, V vocabulary, d hidden size."""
    advantages: torch.Tensor
    hidden: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    correct: torch.Tensor
    lm_head: torch.Tensor
    logprobs: torch.Tensor

    def nthr(self):
        """Algorithm 1 with τ over the others, β = 1."""
        return nthr_advantages(*self[:-1], logprobs=self.logprobs, tau_over="others")

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


def weaken_highest(score, group):
    """η on the tokens of each wrong response with the highest score (G, T), as many as NTHR selects there."""
    nthr = group.nthr()
    rank = score.masked_fill(~group.mask, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return torch.where(rank < nthr.selected.sum(1, keepdim=True), nthr.eta * group.advantages, group.advantages)


def entropy(group):
    """H(π) where each token was sampled, in nats: (G, T)."""
    log_pi = group.log_policy()
    return group.padded(-(log_pi.exp() * log_pi).sum(-1))


# ------------------------------------------------------------------------------------ as many tokens, by another score

def nthr_others(*group):
    """Eq. 7 and Eq. 8 with τ over the other right responses: what the next seven are compared with."""
    return Group(*group).nthr().advantages


def random_tokens(*group):
    """§5.3: at random. The group's tokens are the seed, so that a resumed run draws the same."""
    group = Group(*group)
    generator = torch.Generator().manual_seed(int(group.tokens[group.mask].sum()))
    return weaken_highest(torch.rand(group.mask.shape, generator=generator).to(group.mask.device), group)


def lowest_entropy(*group):
    """Entropy instead of the score (asked for by the paper's reviewers): the tokens the model hesitates least on."""
    group = Group(*group)
    return weaken_highest(-entropy(group), group)


def highest_entropy(*group):
    """The tokens the model hesitates most on, those that 2506.01939 calls forking tokens."""
    group = Group(*group)
    return weaken_highest(entropy(group), group)


def highest_probability(*group):
    """The token's own probability instead of the score (asked for by the paper's reviewers): largest π."""
    group = Group(*group)
    return weaken_highest(group.logprobs, group)


def lowest_probability(*group):
    """Smallest π: the tokens with the largest prediction error."""
    group = Group(*group)
    return weaken_highest(-group.logprobs, group)


def errors_alone(*group):
    """Eq. 7 without ⟨h, h⟩: Σ_a α_{a,b} = ⟨Σ_a (e_{y_a} − π(·|a)), e_{y_b} − π(·|b)⟩, a over the right responses."""
    group = Group(*group)
    error = -group.log_policy().exp()                                          # e_y − π(·), (N, V)
    error[torch.arange(len(error), device=error.device), group.tokens[group.mask]] += 1
    return weaken_highest(group.padded(error @ error[group.right()].sum(0)), group)


def states_alone(*group):
    """Eq. 7 without α: Σ_a ⟨h_a, h_b⟩ = ⟨Σ_a h_a, h_b⟩, a over the tokens of the right responses."""
    group = Group(*group)
    h = group.states()
    return weaken_highest(group.padded(h @ h[group.right()].sum(0)), group)


# ---------------------------------------------------------------------------------------- τ as a quantile of s⁻ itself

def weaken_top(share, group):
    """η on this share of the group's wrong tokens, those with the highest s⁻; no threshold τ."""
    scores = nthr_scores(*group[1:])
    wrong = group.mask & ~group.correct[:, None]
    chosen = wrong & (scores > torch.quantile(scores[wrong], 1 - share))
    return torch.where(chosen, nthr_eta(group.correct.float().mean().item()) * group.advantages, group.advantages)


def top_10_percent(*group):
    """τ is the 0.9 quantile of the group's s⁻ (asked for by the paper's reviewers)."""
    return weaken_top(0.1, Group(*group))


def top_20_percent(*group):
    """τ is the 0.8 quantile of the group's s⁻."""
    return weaken_top(0.2, Group(*group))


def top_50_percent(*group):
    """τ is the median of the group's s⁻."""
    return weaken_top(0.5, Group(*group))


# ------------------------------------------------------------------------------------------------------ the neighbours

def ar(*group):
    """Advantage re-weighting (2505.12929): Â (α π + 1 − α) on every token, right or wrong, with its largest α, 0.3."""
    group = Group(*group)
    return group.advantages * (0.3 * group.logprobs.exp() + 0.7)


def resrl(*group):
    """ResRL (2605.00380): wrong tokens (0.1 + 0.9 z) Â, right tokens 0.1 Â. z is how far a state lies outside the span
    of the right tokens' 64 principal directions (half of d if that is less).
    Departure: the last layer's states, which a rule gets, and not the penultimate layer's."""
    group = Group(*group)
    h = F.layer_norm(group.states(), group.hidden.shape[-1:])                  # (N, d)
    h = h - h[group.right()].mean(0)
    directions = torch.linalg.svd(h[group.right()], full_matrices=False).Vh[:min(64, h.shape[1] // 2)]     # (k, d)
    energy = (h - h @ directions.T @ directions).square().sum(-1)              # (N,)
    low, high = torch.quantile(energy[~group.right()], torch.tensor([0.2, 0.8]).to(energy))
    z = ((energy - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return group.advantages * group.padded(torch.where(group.right(), 0.1, 0.1 + 0.9 * z))
