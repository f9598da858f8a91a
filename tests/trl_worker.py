"""What test_trl.py runs in its own process and, by torchrun, in two: `torchrun … tests/trl_worker.py FOLDER`.

Rollouts, rewards and questions are made up and fixed, so that the test knows what every process has."""
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import trl_nthr  # noqa: E402
from trl_nthr import TINY, NTHRTrainer  # noqa: E402

ROWS = 24
CHECKPOINTING = ("activation_checkpointing" if hasattr(GRPOConfig, "activation_checkpointing")
                 else "gradient_checkpointing")                                # renamed in transformers 5.24
CASES = {   # name: (G, per_device_train_batch_size of each of two processes, how the model is sharded)
    "inside": (4, 12, None), "across": (8, 12, None), "accumulated": (8, 4, None), "fsdp2": (8, 12, 2),
    "fsdp1": (8, 12, 1)}


def verdict(row):
    """1.0 if row `row` of all is right: mixed groups, of which process 0 has more, and last ones that are all wrong."""
    return float(row < 16 and row % 3 == 0)


def rollouts(G):
    """24 rows (prompt ids, completion ids), G consecutive ones with the same prompt; lengths differ everywhere."""
    generator = torch.Generator().manual_seed(G)

    def ids(length):
        return torch.randint(4, 100, (length,), generator=generator).tolist()
    prompts = [ids(5 + 3 * (group % 3)) for group in range(ROWS // G)]
    shared = [ids(6) for _ in prompts]                                         # wrong answers share tokens with right
    return [(prompts[row // G], shared[row // G][:3 + row % 4] + ids(2 + row * 7 % 11) + [1]) for row in range(ROWS)]


def config(folder, **options):
    """Small, quiet and without a network."""
    return GRPOConfig(**{
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, CHECKPOINTING: False, "num_generations": 4,
        "per_device_train_batch_size": 12, "max_completion_length": 40, "shuffle_dataset": False, "logging_steps": 1,
        "max_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", **options})


def tiny_model(**options):
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, **options)


def fixed_trainer(folder, G, rows=None, kind=NTHRTrainer, rewards=(verdict,), extra=None, model=None, options=None,
                  **arguments):
    """A trainer of `kind` whose rollouts are the given rows, of which each process takes its block.

    rewards: functions of the row number. extra: more fields of the rollouts by name, a list with an entry per row."""
    rows = rows or rollouts(G)

    def rollout(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        block = slice(first, first + len(prompts))
        return {"prompt_ids": [row[0] for row in rows[block]], "completion_ids": [row[1] for row in rows[block]],
                "logprobs": [[0.0] * len(row[1]) for row in rows[block]], "row": list(range(*block.indices(len(rows)))),
                **{name: values[block] for name, values in (extra or {}).items()}}

    def function(of_row):
        def reward(row, **_):
            return [of_row(number) for number in row]
        reward.__name__ = of_row.__name__
        return reward
    questions = Dataset.from_dict({"prompt": [f"question {i}" for i in range(len(rows) // G)]})
    return kind(model or tiny_model(), [function(of_row) for of_row in rewards],
                config(folder, num_generations=G, **(options or {})), questions,
                processing_class=AutoTokenizer.from_pretrained(TINY, padding_side="left"), rollout_func=rollout,
                **arguments)


def first_batch(trainer):
    """What TRL would train on first, before it is shuffled."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def shard(trainer, version):
    """FSDP's sharding of the model, as accelerate does it on GPUs (on a CPU it would leave the model whole)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    if version == 2:
        mesh = init_device_mesh("cpu", (2,))
        for layer in trainer.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(trainer.model, mesh=mesh)
    else:
        trainer.model = trainer.model_wrapped = FullyShardedDataParallel(trainer.model, device_id=torch.device("cpu"),
                                                                         use_orig_params=True)
    trainer._dist.fsdp_version = version


def save_sharded(trainer):
    """What the example does after training, as if accelerate had sharded the model."""
    trainer.is_fsdp_enabled, trainer.train, state = True, lambda *_: None, trainer.accelerator.state
    trl_nthr.trainer_from_flags = lambda: trainer
    with patch.dict(state._shared_state, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2),
                    distributed_type=DistributedType.FSDP):
        trl_nthr.main()


def main(folder):
    for name, (G, batch_size, version) in CASES.items():
        trainer = fixed_trainer(folder, G, options={
            "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 12 // batch_size}, eta=0.25)
        if version:
            shard(trainer, version)
        weight, rank = trainer._head.weight, trainer.accelerator.process_index
        torch.save(first_batch(trainer), folder / f"{name} {rank}.pt")
        (folder / f"{name} {rank}.json").write_text(json.dumps(
            {"processes": trainer.accelerator.num_processes, "weight": type(weight).__name__, "size": weight.numel(),
             "metrics": dict(trainer._metrics["train"])}))
        if version == 2:                                                       # version 1's own gather crashes on CPUs
            trainer.args.output_dir = str(folder / "saved")
            save_sharded(trainer)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()                                  # else gloo's threads may abort the exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
