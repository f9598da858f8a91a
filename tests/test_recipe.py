"""The code under "In a trainer that is not TRL" in examples/README.md, against each response alone without padding."""
import copy
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import ROOT, SIZES
from test_nthr import cases, eq7

G = 4
QUESTION = torch.tensor([7, 3, 3, 7, 7, 3, 7, 3])                              # rows of two questions, in any order
CORRECT = torch.tensor([1, 0, 1, 0, 0, 0, 1, 1]) == 1
ADVANTAGES = torch.tensor([1.0, -1.0, 0.75, -0.5, -1.25, -0.75, 0.75, 1.0])


@pytest.fixture(scope="module")
def nthr_credit():
    text, names = (ROOT / "examples" / "README.md").read_text(encoding="utf-8"), {}
    section = text.split("\n## In a trainer that is not TRL\n")[1]
    exec(re.search("```python\n(.*?)```", section, re.DOTALL)[1], names)
    return names["nthr_credit"]


@pytest.fixture(scope="module")
def model():
    """A policy that is sure of some tokens and not of others."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    return model


def samples(seed=0):
    """Per row the ids of a prompt and of a response, of several lengths; responses share tokens, as answers do."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high, count):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    prompts = {q: ids(2, 100, 3 + q // 3) for q in QUESTION.unique().tolist()}
    return [(prompts[q], ids(40, 52, 4 + row % 3)) for row, q in enumerate(QUESTION.tolist())]


def batch_of(model, rows, side, temperature=1.0):
    """The arguments of the recipe, padded on this side, and where each row's response begins in (B, L - 1)."""
    L = max(len(prompt) + len(response) for prompt, response in rows) + 2
    ids, attention, loss = torch.zeros(len(rows), L).long(), torch.zeros(len(rows), L), torch.zeros(len(rows), L)
    starts = []
    for row, (prompt, response) in enumerate(rows):
        first = L - len(prompt) - len(response) if side == "left" else 0
        ids[row, first:first + len(prompt) + len(response)] = torch.tensor(prompt + response)
        attention[row, first:first + len(prompt) + len(response)] = 1
        starts.append(first + len(prompt) - 1)
        loss[row, starts[-1] + 1:starts[-1] + 1 + len(response)] = 1
    return dict(ids=ids, attention_mask=attention, loss_mask=loss, advantages=ADVANTAGES, correct=CORRECT,
                question=QUESTION, G=G, temperature=temperature,
                logprobs=loss_logprobs(model, ids, attention, temperature).detach()), starts


def loss_logprobs(model, ids, attention_mask, temperature=1.0):
    """What a trainer computes for its loss, (B, L - 1)."""
    logits = model(ids, attention_mask=attention_mask).logits[:, :-1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


def expected_of(model, rows, temperature, whole_vocabulary, beta, eta):
    """Per row the advantages of its tokens by Eq. 7, Eq. 8 and Algorithm 1, from its states alone and unpadded."""
    found = {}
    for q in QUESTION.unique().tolist():
        members = [row for row in range(len(rows)) if QUESTION[row] == q]
        T = max(len(rows[row][1]) for row in members)
        hidden, tokens, mask = torch.zeros(G, T, 32), torch.zeros(G, T).long(), torch.zeros(G, T).bool()
        for i, row in enumerate(members):
            prompt, response = rows[row]
            with torch.no_grad():
                states = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
            hidden[i, :len(response)] = states[len(prompt) - 1:-1]
            tokens[i, :len(response)], mask[i, :len(response)] = torch.tensor(response), True
        right, columns = CORRECT[members], None if whole_vocabulary else sorted(set(tokens[mask].tolist()))
        s = eq7(hidden, tokens, mask, right, model.lm_head.weight, columns, temperature)
        tau = beta * min(s[i][mask[i]].mean() for i in range(G) if right[i])
        assert (s[mask] - tau).abs().min() > 1e-4 * s.abs().max()              # no rounding decides
        for i, row in enumerate(members):
            weak = [not right[i] and bool(x > tau) for x in s[i][mask[i]]]
            found[row] = [ADVANTAGES[row].item() * (eta if x else 1) for x in weak]
    return [found[row] for row in range(len(rows))]


def test_the_recipe_is_algorithm_1_on_each_response_alone(nthr_credit, model):
    rows, weakened, kept = samples(), 0, 0
    with cases() as case:
        for side in ("left", "right"):
            for temperature, vocabulary in ((1.0, "responses"), (1.0, "all"), (0.7, "responses")):
                batch, starts = batch_of(model, rows, side, temperature)
                expected = expected_of(model, rows, temperature, vocabulary == "all", beta=0.1, eta=0.5)
                for advantages in (ADVANTAGES, ADVANTAGES[:, None].expand_as(batch["logprobs"])):
                    with case((side, temperature, vocabulary, tuple(advantages.shape))):
                        new = nthr_credit(model, **batch | {"advantages": advantages}, beta=0.1, eta=0.5,
                                          vocabulary=vocabulary)
                        assert new.shape == batch["logprobs"].shape and not new.requires_grad
                        found = [new[row, k:k + len(rows[row][1])].tolist() for row, k in enumerate(starts)]
                        assert found == expected
                for row in (~CORRECT).nonzero()[:, 0].tolist():
                    same = expected[row].count(ADVANTAGES[row].item())
                    weakened, kept = weakened + len(expected[row]) - same, kept + same
    assert weakened > 20 and kept > 20


def with_states(model, change):
    """The model, but with other hidden states in what it returns."""
    def call(*args, **options):
        return SimpleNamespace(hidden_states=change(model(*args, **options).hidden_states))

    call.get_output_embeddings = model.get_output_embeddings
    return call


def test_its_assertions_fire_on_the_mistakes_that_are_silent_without_them(nthr_credit, model):
    with cases() as case:
        for side in ("left", "right"):
            batch, _ = batch_of(model, samples(), side)
            nthr_credit(with_states(model, lambda states: states), **batch)    # none: nothing is raised
            for name, change in (("a later state", lambda states: [states[-1].roll(-1, 1)]),
                                 ("an earlier state", lambda states: [states[-1].roll(1, 1)]),
                                 ("hidden_states[-2]", lambda states: states[:-1])):
                with case((side, name)):
                    with pytest.raises(AssertionError, match="check hidden, temperature, logprobs"):
                        nthr_credit(with_states(model, change), **batch)
            for temperature in (0.6, 0.9, 1.5):
                with case((side, f"temperature {temperature}")):
                    with pytest.raises(AssertionError, match="check hidden, temperature, logprobs"):
                        nthr_credit(model, **batch | {"temperature": temperature})
            with case((side, "padding in the mask")):
                with pytest.raises(AssertionError, match="loss_mask holds padding"):
                    nthr_credit(model, **batch | {"loss_mask": torch.ones_like(batch["loss_mask"])})
            for name, question in (("two questions", QUESTION * 0), ("half a group", torch.arange(8) // 2)):
                with case((side, name)):
                    with pytest.raises(AssertionError, match="all G responses to one question"):
                        nthr_credit(model, **batch | {"question": question})


def weights_after_a_step(model, batch, credit):
    """All weights after one AdamW step on the mean of Â ln π over the loss's mask, Â from `credit(model)`."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    advantages, mask = credit(model), batch["loss_mask"][:, 1:]
    (-(advantages * loss_logprobs(model, batch["ids"], batch["attention_mask"]) * mask).sum() / mask.sum()).backward()
    optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters())


def test_with_eta_1_a_training_step_is_the_one_without_it_bit_for_bit(nthr_credit, model):
    for side in ("left", "right"):
        batch, _ = batch_of(model, samples(), side)
        plain = weights_after_a_step(model, batch, lambda model: ADVANTAGES[:, None])
        same, other = (weights_after_a_step(model, batch, lambda model: nthr_credit(model, **batch, beta=0.1, eta=eta))
                       for eta in (1, 0.5))
        assert torch.equal(same, plain) and not torch.equal(other, plain), side
