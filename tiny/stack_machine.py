"""A stack machine, and the reward that checks a program by running it.

    PUSH a PUSH b SUB PUSH c MUL      computes (a-b)*c

PUSH x puts an input on the stack; ADD, SUB and MUL replace the two topmost values, left below right, by one; SWAP
exchanges them. With SWAP the operands of SUB can be computed in either order.
"""
import random

INPUTS = "abcdef"
OPERATIONS = {"ADD": lambda left, right: [left + right], "SUB": lambda left, right: [left - right],
              "MUL": lambda left, right: [left * right], "SWAP": lambda left, right: [right, left]}
MAX_WORDS = 100  # of a program: bounds its steps and the size of its numbers
# Programs that compute different polynomials, of degree n, agree on one such assignment with probability n / 2**61.
ASSIGNMENTS = [{name: random.Random(f"{name}{trial}").randrange(2 ** 61) for name in INPUTS} for trial in range(3)]


def run(program, inputs):
    """The stack after a program, the top last. inputs: {name: int}.

    None if the program is no str, has more than MAX_WORDS words, holds something that is no instruction or no input,
    or needs more values than the stack has."""
    if not isinstance(program, str):
        return None
    words = program.split(maxsplit=MAX_WORDS)
    if len(words) > MAX_WORDS:
        return None
    stack, words = [], iter(words)
    for word in words:
        if word == "PUSH" and (name := next(words, None)) in inputs:
            stack.append(inputs[name])
        elif word in OPERATIONS and len(stack) >= 2:
            right, left = stack.pop(), stack.pop()
            stack += OPERATIONS[word](left, right)
        else:
            return None
    return stack


def program_reward(response, gold):
    """Return 1.0 if the program `response` leaves one value, equal to that of the program `gold` for all ASSIGNMENTS
    of the inputs, else 0.0. Raises nothing."""
    for inputs in ASSIGNMENTS:
        stack = run(response, inputs)
        if stack is None or len(stack) != 1 or stack != run(gold, inputs):
            return 0.0
    return 1.0
