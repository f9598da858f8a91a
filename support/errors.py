"""One line instead of a traceback, for what a user can put right."""
import sys
from contextlib import contextmanager

from tqdm import tqdm

LOWERS_MEMORY = {   # phase of a run: what to do when it runs out of memory
    "loading": "choose a smaller --model, or in a new run leave the reference model out with --kl-coef 0",
    "data_generation": "lower --max-sequences", "evaluation": "lower --max-sequences",
    "nthr": "lower --batch-size or --max-new-tokens, in a new run",
    "old_probabilities": "lower --micro-batch-tokens", "reference": "lower --micro-batch-tokens",
    "model_update": "lower --micro-batch-tokens, with --gradient-checkpointing",
    "likelihood_change": "lower --micro-batch-tokens"}


class OutOfMemory(Exception):
    """The device ran out of memory; the message names the phase and the flags that lower it."""


def printable(text):
    """`text` in one line, with all that a terminal would obey or hide (control characters, bidi marks) as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def fail(message):
    """End the program with one line on standard error and exit code 1."""
    sys.exit(f"error: {printable(message)}")


def warn(message):
    """One line on standard error; the program goes on."""
    tqdm.write(f"warning: {printable(message)}", file=sys.stderr)              # beside a bar, if there is one


@contextmanager
def memory_for(phase):
    """Turn the device's running out of memory into an `OutOfMemory` for this phase, a key of LOWERS_MEMORY."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:                               # only CUDA's allocator has its own class
        known = ("out of memory", "allocate memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in known):
            raise
        raise OutOfMemory(f"out of memory in {phase}: {LOWERS_MEMORY[phase]}") from None
