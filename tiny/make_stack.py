r"""Regenerates tiny/stack: a second embedded model, its tokenizer and its problems.

    python tiny/make_stack.py
    python tiny/make_stack.py --seed 1 --out /tmp/stack1

The model writes programs for the stack machine of stack_machine.py, one instruction or input per token:

    (a-b)*c+d   ->   PUSH a PUSH b SUB PUSH c MUL PUSH d ADD<eos>

It imitates a pupil whose errors are structural: operator precedence ignored, an operator that takes too long a right
operand, a SWAP or another operator forgotten. Right programs vary too, as the pupil may compute the right operand
first. The code is that of make_tiny.py: the supervised stage stops once TARGET is reached, and sees none of the
problems of train.jsonl (6000), test.jsonl (600) or validation (512).

Expected with seed 0: 4 minutes on one core, 2.67 MB, test accuracy 53% greedy and 30% sampled.
"""
from collections import deque
from pathlib import Path

from make_tiny import Task, main
from stack_machine import INPUTS, OPERATIONS, program_reward

OPERANDS = (4, 5)  # of a problem, equally likely
NAMES = {"+": "ADD", "-": "SUB", "*": "MUL"}
PRECEDENCE = {"+": 1, "-": 1, "*": 2}
ONE_OPERAND = 3  # above all precedences
# Probabilities of the pupil, for each operator. Those above 1/2 make greedy answers wrong, too.
SHORT_REACH = 0.6  # it takes one operand on its right: precedence is ignored
LONG_REACH = 0.6  # otherwise: it takes all that follows
RIGHT_FIRST = 0.6  # a right operand that holds an operator is computed first
NO_SWAP = 0.6  # the SWAP that SUB then needs is forgotten
NO_OPERATOR = 0.1  # any other operator is forgotten
TARGET = 0.31
DECAY_FROM = 1600  # steps; at the full learning rate the accuracy swings


def make_problem(rng):
    """Draws a problem such as "(a-b)*c+d": 4 or 5 different inputs."""
    return write_expression(rng.sample(INPUTS, rng.choice(OPERANDS)), rng)[0]


def write_expression(names, rng):
    """A random expression of these inputs in this order, and the precedence of its last operator."""
    if len(names) == 1:
        return names[0], ONE_OPERAND
    cut, operator = rng.randrange(1, len(names)), rng.choice("+-*")
    (left, left_precedence), (right, right_precedence) = (
        write_expression(part, rng) for part in (names[:cut], names[cut:]))
    if left_precedence < PRECEDENCE[operator]:
        left = f"({left})"
    if right_precedence <= PRECEDENCE[operator]:
        right = f"({right})"
    return left + operator + right, PRECEDENCE[operator]


def happens(probability, rng):
    """Whether the pupil does what it does with this probability; without `rng`, never."""
    return rng is not None and rng.random() < probability


def parse(symbols, least, rng):
    """Takes an expression with operators of precedence `least` and above from the front of `symbols`, a deque.

    Returns a tree: an input, or (operator, left tree, right tree)."""
    tree = symbols.popleft()
    if tree == "(":
        tree = parse(symbols, 1, rng)
        symbols.popleft()  # the closing one
    while symbols and PRECEDENCE.get(symbols[0], 0) >= least:
        operator = symbols.popleft()
        reach = PRECEDENCE[operator] + 1  # what the right operand may hold
        if happens(SHORT_REACH, rng):
            reach = ONE_OPERAND
        elif happens(LONG_REACH, rng):
            reach = 1
        tree = operator, tree, parse(symbols, reach, rng)
    return tree


def write_program(tree, rng):
    """The words of a program that computes a tree."""
    if isinstance(tree, str):
        return ["PUSH", tree]
    operator, left, right = tree
    right_first = isinstance(right, tuple) and happens(RIGHT_FIRST, rng)
    left, right = write_program(left, rng), write_program(right, rng)
    program = right + left if right_first else left + right
    if right_first and operator == "-" and not happens(NO_SWAP, rng):
        program.append("SWAP")
    if not happens(NO_OPERATOR, rng):
        program.append(NAMES[operator])
    return program


def solve(problem, rng=None):
    """The pupil's program for a problem; without `rng` it makes no errors and computes from left to right."""
    return " ".join(write_program(parse(deque(problem), 1, rng), rng))


STACK = Task(Path(__file__).parent / "stack", make_problem, solve, solve, program_reward, TARGET,
             ("PUSH", *OPERATIONS, *INPUTS), DECAY_FROM)

if __name__ == "__main__":
    main(STACK)
