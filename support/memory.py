"""What a run takes: memory, estimated from the shapes before it is loaded, bounded, and measured; seconds by phase."""
import math
import os
import sys
import time
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM

from grpo import LOGITS_AT_ONCE
from rollout import BUCKET, PREFILL_TOKENS
from support.errors import memory_for
from support.models import READ_NO_STATES

PHASES = ("data_generation", "nthr", "old_probabilities", "reference", "model_update", "likelihood_change")
RUNTIME = 0.6 * 2 ** 30    # bytes that Python and its libraries take on a CPU


def sampling_bytes(shape, slots, prompt_length, max_new_tokens, kept_rows, width):
    """{part: bytes} while `slots` responses are decoded together and `kept_rows` keep their hidden states.

    shape: what `model_shape` returns; width: bytes of a number in the compute dtype."""
    prompts = min(slots * prompt_length, max(PREFILL_TOKENS, prompt_length))   # tokens of prompts in one pass
    cached = (prompt_length + max_new_tokens + BUCKET) * shape["layers"] * shape["kv"]
    return {"KV cache": slots * cached * width, "sampling logits": slots * shape["vocabulary"] * 16,
            "prefill": prompts * (layer_bytes(shape, width) + 4 * shape["layers"] * shape["kv"]),
            "hidden states": kept_rows * max_new_tokens * shape["d"] * width}


def update_bytes(shape, tokens, checkpointing, width):
    """{part: bytes} of the forward and backward pass of a micro-batch of so many tokens, as if it shared no prompt.

    With checkpointing a layer keeps its input, or its keys and values in a pass without gradient.
    "head" is `grpo.LOGITS_AT_ONCE`, twice in float32, and the gradient of the head before it is added to that of the
    embeddings, which mostly are the same tensor."""
    layer, kept = tokens * layer_bytes(shape, width), tokens * shape["layers"] * max(shape["d"], shape["kv"]) * 4
    return {"activations": layer + kept if checkpointing else layer * shape["layers"],
            "head": 8 * min(LOGITS_AT_ONCE, tokens * shape["vocabulary"]) + 4 * shape["vocabulary"] * shape["d"]}


def layer_bytes(shape, width):
    """Bytes per token that a decoder layer with a gated MLP saves for its backward pass: six float32 tensors of its two
    norms; the projections and their rotations; gate, up and their product."""
    d, attention, kv, inner = (shape[name] for name in ("d", "attention", "kv", "inner"))
    return 24 * d + width * (2 * d + 4 * attention + 2 * kv + 4 * inner)


def model_shape(config):
    """{"parameters", "layers", "d", "attention", "kv", "inner", "vocabulary"} of a config; kv: keys and values."""
    with torch.device("meta"):                                                 # shapes without memory
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    text = config.get_text_config()
    heads, d = text.num_attention_heads, text.hidden_size
    size = getattr(text, "head_dim", None) or d // heads
    return {"parameters": parameters, "layers": text.num_hidden_layers, "d": d, "attention": heads * size,
            "kv": 2 * size * (getattr(text, "num_key_value_heads", None) or heads),
            "inner": getattr(text, "intermediate_size", None) or 4 * d, "vocabulary": text.vocab_size}


def estimate_memory(config, args, prompt_length):
    """Bytes at the peak if every response took --max-new-tokens: ({part: bytes}, {phase: bytes})."""
    shape, trains, half = model_shape(config), not args.eval_only, args.dtype == "bfloat16"
    width, rows, weights = 2 if half else 4, args.batch_size * args.group_size, 4 * shape["parameters"]
    rollouts = 3 if args.sampling_rounds > 1 else 1                            # kept, of the last round, of this one
    kept_rows = rows * rollouts if trains and args.method not in READ_NO_STATES else 0
    length = prompt_length + args.max_new_tokens
    tokens = min(args.minibatch_size * args.group_size * length, max(args.micro_batch_tokens, length))
    parts = {"weights": weights, "gradients": weights * trains, "AdamW": 2 * weights * trains,
             "reference": width * shape["parameters"] if args.kl_coef and trains else 0,
             "bfloat16 copy": weights // 2 if half else 0}                     # what autocast keeps while it is entered
    slots = min(args.max_sequences, max(rows if trains else 0, args.eval_size))
    sampling = sampling_bytes(shape, slots, prompt_length, args.max_new_tokens, kept_rows, width)
    update = update_bytes(shape, tokens, args.gradient_checkpointing, width) if trains else {}
    kept = sum(parts.values()) - parts["gradients"] + (0 if args.device.startswith("cuda") else RUNTIME)
    phases = {"sampling": kept + sum(sampling.values())}
    if trains:
        phases["update"] = kept + parts["gradients"] + sum(update.values())
    return parts | sampling | update, phases


def device_memory(device):
    """Bytes of the device, or None where that is not known."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device == "cpu" else None
    except (AttributeError, ValueError):                                       # Windows
        return None


def announce_memory(config, args, prompt_length):
    """Print the estimated peak of each phase; warn if one exceeds the device."""
    try:
        phases, available = estimate_memory(config, args, prompt_length)[1], device_memory(args.device)
    except Exception:                                                          # loading it will say what is wrong
        return print("memory: no estimate for a model of this kind")
    shown = ", ".join(f"{need / 2 ** 30:.1f} GiB in {phase}" for phase, need in phases.items())
    print(f"memory, estimated for responses of {args.max_new_tokens} tokens: {shown}")
    if available and max(phases.values()) > available:
        print(f"warning: {args.device} has {available / 2 ** 30:.1f} GiB; lower --max-sequences (sampling) or "
              f"--micro-batch-tokens (update), or leave out the reference model (--kl-coef 0)", file=sys.stderr)


def peak_memory():
    """Peak GiB so far: of the GPU's allocator if one is in use, else resident; None on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def micro_batches(rollout, rows, most_tokens, most_rows):
    """`rows`, a LongTensor, in parts for one forward pass: at most so many tokens, padding included, and rows.

    Rows are sorted by response length, so that little is padding; one that exceeds the budget goes alone."""
    prompts, responses = rollout.prompt_mask.sum(1).tolist(), rollout.response_mask.sum(1).tolist()
    parts, P, T = [], 0, 0
    for row in sorted(rows.tolist(), key=responses.__getitem__):
        P, T = max(P, prompts[row]), max(T, responses[row])
        n = len(parts[-1]) + 1 if parts else math.inf
        if n * (P + T) > most_tokens or n > most_rows:
            parts.append([])
            P, T = prompts[row], responses[row]
        parts[-1].append(row)
    return [torch.tensor(part) for part in parts]


class Timer(dict):
    """Seconds of a training step by phase, under the names of the paper's Table 3."""

    def __init__(self):
        super().__init__(dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        with memory_for(phase):
            yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self[phase] = self.get(phase, 0.0) + time.perf_counter() - start
