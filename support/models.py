"""Models that Eq. 7 can read: loaded from safetensors, without dropout, with logits that are lm_head(hidden)."""
import logging
import re
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import enable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from grpo import check_head
from rollout import check_cache
from support.errors import OutOfMemory, fail, memory_for, printable

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")       # one of them will do
READ_NO_STATES = ("grpo", "pos-only")    # values of --method that do without hidden states and lm_head


def escape_log_record(record):
    """A logging filter: transformers reports names that it finds in a model's files, and they may hold anything."""
    text = re.sub("\x1b\\[[0-9;]*m", "", record.getMessage())                 # without transformers' own colours
    record.msg, record.args = "\n".join(map(printable, text.expandtabs().split("\n"))), ()
    return True


for transformers_handler in logging.getLogger("transformers").handlers:
    transformers_handler.addFilter(escape_log_record)


def choose_device(name):
    """A --device with "auto" settled; one line if torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()                                     # "meta" makes tensors without values
    except (RuntimeError, AssertionError, ImportError) as error:
        fail(f"--device {name} cannot be used: {str(error).splitlines()[0][:200]}")
    return name


@lru_cache
def find_model(name):
    """The folder or id that from_pretrained can load; one line if there is no such model.

    The Hub is asked once, briefly: from_pretrained would try for most of a minute where there is no network. The copy
    of an earlier download then serves, as a folder."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            fail(f"the folder {name} has no config.json: expected a Hugging Face model with *.safetensors")
        if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
            fail(f"the folder {name} has no tokenizer.json: copy the tokenizer's files of the model it was made from")
        return name
    nothing, cached = f"there is no folder {name} here, and", None
    try:
        cached = try_to_load_from_cache(name, "config.json")                   # a path, if it was downloaded
        print(f"looking for {printable(name)} on the Hub", flush=True)
        model_info(name, timeout=5)
        return name
    except HFValidationError:
        fail(f"{nothing} that is no id of the Hub either: check the spelling")
    except RepositoryNotFoundError:
        fail(f"{nothing} the Hub shows no such model: check the spelling (a private one needs `hf auth login`)")
    except Exception as error:                                                 # no network, or the Hub is down
        if not isinstance(cached, str):
            fail(f"{nothing} the Hub cannot be reached ({' '.join(str(error).split())[:200]}): check the spelling of a "
                 f"folder, or the network")
    print("the Hub cannot be reached: the copy on this machine is used")
    return str(Path(cached).parent)


def load_pretrained(auto_class, name, **options):
    """from_pretrained of a Hugging Face id or folder, or one line; no code that comes with a model is run."""
    source = find_model(name)
    transformers_logging.disable_progress_bar()                                # of weights read from disk
    enable_progress_bars()                                                     # of downloads
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)               # its retries are not news, their end is
    try:
        with memory_for("loading"):
            return auto_class.from_pretrained(source, trust_remote_code=False, **options)
    except OutOfMemory:
        raise
    except Exception as error:                                                 # whatever a stranger's files can raise
        fail(f"cannot load the model {name}: {' '.join(str(error).split())[:300]} (expected a Hugging Face id, or a "
             f"folder with config.json, safetensors weights and a tokenizer)")


def load_config(name):
    """The model's configuration without dropout, which would part π_θ from π_old; one line if it is of no use."""
    config = load_pretrained(AutoConfig, name)
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
            if "implementation" in key and "/" in str(value):
                fail(f"{name} asks for code from the Hub ({value}), which is not run: remove it from its config.json")
    try:
        check_cache(config)
    except ValueError as error:
        fail(f"{name}: {error}")
    return config


def load_model(name, device, method, dtype=torch.float32):
    """The model on its device, in eval mode; one line unless its logits are those of lm_head, as Eq. 7 needs.

    method: the --method that will read its states. A head with a bias does for READ_NO_STATES alone."""
    pickled = [path.name for end in ("bin", "pt", "pth", "ckpt") for path in sorted(Path(name).glob(f"*.{end}"))]
    if pickled and not any(Path(name).glob("*.safetensors")):
        fail(f"{name} holds pickled weights only ({pickled[0]}), and loading a pickle can run any code: convert them "
             f"to safetensors, or use a model that comes with them")
    model, report = load_pretrained(AutoModelForCausalLM, name, config=load_config(name), dtype=dtype,
                                    use_safetensors=True, output_loading_info=True)
    if report["missing_keys"]:                                                 # they would be random numbers
        fail(f"{name} has no weights for {', '.join(sorted(report['missing_keys']))[:200]}: are its files complete?")
    try:
        check_head(model)
        with memory_for("loading"), torch.no_grad():
            model.to(device).eval()
            ids = torch.arange(3, device=device)[None]
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits, own = model(input_ids=ids, use_cache=False).logits, model.get_output_embeddings()(states)
        if not torch.allclose(logits, own, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError("its logits are not lm_head(base_model(ids)): choose another model")
    except (ValueError, AttributeError) as error:
        fail(f"{name}: {error}")
    if method not in READ_NO_STATES and getattr(model.get_output_embeddings(), "bias", None) is not None:
        fail(f"{name} adds a bias to its logits; Eq. 7 needs softmax(W h): choose another model or --method grpo")
    return model


def checkpoint_activations(model):
    """Recompute activations in the backward pass. transformers 5.24 renamed the method that asks for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def precision(device, dtype):
    """Compute in `dtype`; the weights stay float32, so that AdamW's small updates are not rounded away."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
