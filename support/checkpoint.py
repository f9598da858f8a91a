"""Checkpoints and logs of a run: killed at any moment and resumed, it ends like one that nothing happened to (CPU)."""
import json
import math
import os
import shutil
import signal
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from support.errors import fail

try:
    import fcntl
except ImportError:                                                            # Windows: two processes are not noticed
    fcntl = None


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside weights, optimizer and random-number states."""
    step: int = 0                # steps done
    position: int = 0            # questions drawn
    nonfinite: int = 0           # updates skipped in a row, for a loss or gradient that was not finite
    unmixed: int = 0             # steps in a row in which no question had both right and wrong answers


class StopSignal:
    """Ctrl-C and SIGTERM: the first sets `number`, for the loop to finish its step and save; a second ends at once."""

    def __init__(self, command):
        self.number, self.command = 0, command
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, _):
        if self.number:
            os.write(2, f"\nstopped in the middle of a step; continue with: {self.command}\n".encode())
            os._exit(128 + number)                                             # at once, whatever is at work
        self.number = number
        os.write(2, b"\nfinishing this step and saving it; once more gives the step up\n")     # print may be at work


@contextmanager
def lock_folder(out):
    """Hold the output folder, so that a second process that would write to it ends with one line.

    The lock ends with the process, however that dies. A folder in which nothing was written is not left behind."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY) if fcntl else None
    except OSError as error:
        fail(f"--out {out} cannot be used as a folder: {error}")
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        fail(f"another process is writing to {out}: wait until it has ended, or choose another --out")
    except OSError:                                                            # some network drives have no locks
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
        with suppress(OSError):
            Path(out).rmdir()                                                  # fails unless it is empty


@contextmanager
def fail_if_unwritable(path):
    """One line if a file of the output folder cannot be written, as on a full disk."""
    try:
        yield
    except Exception as error:                                                 # torch.save, safetensors have their own
        while error.__context__:                                               # the first cause is the clearest
            error = error.__context__
        fail(f"cannot write {path}: {' '.join(str(error).split())[:200]}: make room, then start again or --resume")


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    is_folder = Path(path).is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:                                                            # a folder, on Windows and some networks
        if not is_folder:
            raise


def replace_text(path, text):
    """Replace a text file by another that is already whole on the disk."""
    with fail_if_unwritable(path):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)


def append_rows(path, rows):
    """Append JSON lines, on the disk when this returns; a non-finite number becomes null, which JSON can hold."""
    with fail_if_unwritable(path), open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value
                                   for name, value in row.items()}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_log(path, step):
    """Drop the lines of later steps, which a resumed run makes again, and a torn last line."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            fail(f"{path}, line {number} is damaged: mend or remove it, then --resume again")
    replace_text(path, "".join(line + "\n" for line in kept))


def checkpoints(out):
    """The checkpoints of an output folder, newest first: "checkpoint", then each "checkpoint-STEP"."""
    newest = Path(out) / "checkpoint"
    older = [path for path in Path(out).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return [newest] * newest.is_dir() + sorted(older, key=lambda path: int(path.name[11:]), reverse=True)


def save_checkpoint(out, model, tokenizer, optimizer, progress, keep):
    """Weights in Hugging Face format, optimizer, progress and RNG states: complete, or not there at all.

    All is written and synced beside the newest checkpoint and then takes its name, "checkpoint"; that one becomes
    "checkpoint-STEP", and the `keep` newest stay."""
    final, temporary = out / "checkpoint", out / "checkpoint.tmp"
    with fail_if_unwritable(final):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            rng = {"cpu": torch.get_rng_state(),
                   "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}
            with open(temporary / "trainer.pt", "wb") as file:                 # its errors are clearer than torch's
                torch.save({"optimizer": optimizer.state_dict(), "rng": rng}, file)
            (temporary / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
        except Exception:                                                      # the room may be wanted for a next try
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if final.exists():
            older = out / f"checkpoint-{read_progress(final).step}"
            shutil.rmtree(older, ignore_errors=True)
            final.rename(older)
        temporary.rename(final)
        sync(out)
        for old in checkpoints(out)[keep:]:
            old.rename(temporary)                                              # what is named checkpoint is whole
            shutil.rmtree(temporary)


def read_progress(checkpoint):
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))


def load_progress(checkpoint, optimizer):
    """Load optimizer and RNG states of a checkpoint, into `optimizer` and torch. Returns its `Progress`."""
    path = checkpoint / "trainer.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if torch.cuda.is_initialized() and len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        path = checkpoint / "progress.json"
        return read_progress(checkpoint)
    except Exception as error:                                                 # whatever a stranger's file can raise
        fail(f"{path} cannot be used ({' '.join(str(error).split())[:200]}): move {checkpoint} away to --resume from "
             f"an older one, or start a new run with --model {checkpoint}")
