"""NTHR inside TRL's GRPOTrainer: several GPUs, DeepSpeed, FSDP, vLLM and LoRA then come from TRL and accelerate.

python examples/trl_nthr.py                                                 # embedded model, 50 steps on a CPU
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/trl_nthr.py    # the same in two processes
accelerate launch examples/trl_nthr.py --model Qwen/Qwen2.5-1.5B            # App. 7.3, one process per GPU

The flags are those of `Script` and of GRPOConfig. With or without NTHR, TRL's update differs from train.py's in
    advantages    over the sample standard deviation + 1e-4: √((G−1)/G) of §2's, which AdamW mostly divides out
    normaliser    Eq. 1 averages over a question's tokens, then over questions; "dapo" (the default) over all tokens and
                  "bnpo" over a micro-batch's: equal if all groups have as many, also those without signal
    KL term       times the ratio γ, unless use_bias_correction_kl is off, as it is by default here
Tests run one and two CPU processes, LoRA, and the sharded forward pass of FSDP. Not run: GPUs, vLLM, DeepSpeed.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo import check_head                                                    # noqa: E402
from nthr import nthr_advantages, nthr_eta                                     # noqa: E402
from rollout import INSTRUCTION, stop_token_ids                                # noqa: E402
from train import EMBEDDED, TINY, load, load_problems, load_reward             # noqa: E402


class NTHRTrainer(GRPOTrainer):
    """GRPOTrainer with Algorithm 1. nthr_beta, eta: those of `nthr.nthr_advantages` (args.beta is TRL's KL weight).

    correctness: name of the reward function that tells right (1) from wrong (0), if there are several. A response that
    it does not apply to (None) keeps its advantage and does not count in its group. ValueError for what cannot work."""

    def __init__(self, *args, nthr_beta=1.0, eta="2|0.5-p|", correctness=None, **kwargs):
        nthr_eta(0.5, eta)                                                     # a ValueError before a model is loaded
        super().__init__(*args, **kwargs)
        names, self._nthr = self.reward_func_names, {"beta": nthr_beta, "eta": eta, "temperature": self.temperature}
        self._correctness = names[0] if correctness is None and len(names) == 1 else correctness
        if self._correctness not in names:
            raise ValueError(f"correctness must name one of the reward functions {', '.join(names)}, got {correctness}")
        check_head(self._causal_model())
        if self._causal_model().get_output_embeddings().bias is not None or self._is_vlm or self.args.torch_compile:
            raise ValueError("NTHR needs a text model, a head without bias and no torch_compile, which skips hooks")

    def _causal_model(self):
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model   # LoRA's layers stay in it

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)                            # (N, functions), of all processes
        self._verdicts = rewards[:, self.reward_func_names.index(self._correctness)]
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:                                                # not in an evaluation
            advantages, factors = batch["advantages"][:, None], self._factors(batch)           # (n, 1), (n, T)
            self._metrics["train"]["nthr/weakened"].append(self.accelerator.gather((factors < 1).sum()).sum().item())
            batch["advantages"] = torch.where(advantages < 0, advantages * factors, advantages)
        return batch

    def _states(self, ids, attention_mask, T):
        """States that predict the last T tokens (G, T, d) and their ln π (G, T), as TRL's loss computes them."""
        states = []                                                            # TRL never calls lm_head: no hook there
        hook = self._causal_model().base_model.register_forward_hook(lambda *call: states.append(call[2][0]))
        self.model.eval()                                                      # no dropout, no random number drawn
        logprobs = self._get_per_token_logps_and_entropies(self.model, ids, attention_mask, T,
                                                           self.args.per_device_train_batch_size)[0]
        self.model.train()
        hook.remove()
        return torch.cat(states)[:, -T - 1:-1], logprobs

    @torch.no_grad()
    def _factors(self, batch):
        """(n, T): η on V⁻, else 1. A group may straddle processes: each that has a row of it scores it, all of it."""
        G, n, rank = self.num_generations, len(batch["advantages"]), self.accelerator.process_index
        right, wrong = ((self._verdicts == verdict).view(-1, G) for verdict in (1, 0))         # (N/G, G)
        if not ((right | wrong).flatten() | self._verdicts.isnan()).all():
            raise ValueError(f"as correctness, {self._correctness} must return 1 (right), 0 (wrong) or None")
        ids, mask = batch["completion_ids"], batch["completion_mask"]          # (n, T); 0 on a masked cut-off response
        prompts, answers = (                                                   # (N, P, 2), (N, T, 3), of all processes
            self.accelerator.gather(self.accelerator.pad_across_processes(torch.stack(x, -1), 1, pad_first=left))
            for x, left in (((batch["prompt_ids"], batch["prompt_mask"]), True),
                            ((ids, mask, mask * batch.get("tool_mask", 1)), False)))
        columns, tokens = torch.unique(answers[:, :, 0], return_inverse=True)  # (U,), (N, T) indices into it
        head = self._causal_model().get_output_embeddings()                    # in parts, with FSDP and ZeRO-3
        with self._dist.gather_params([head.weight]), self._dist.summon_full_params(self.model, recurse=False):
            W = (head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight)[columns]   # (U, d)
        mixed, factors = (right.any(1) & wrong.any(1)).tolist(), torch.ones(answers.shape[:2], device=mask.device)
        groups = [[g for g in range(r * n // G, -(-(r + 1) * n // G)) if mixed[g]] for r in range(self.args.world_size)]
        for g in (groups[rank] + max(groups, key=len))[:max(map(len, groups))]:    # as many passes in each, for FSDP
            rows, known = slice(g * G, (g + 1) * G), right[g] | wrong[g]
            P, t = int(prompts[rows, :, 1].sum(1).max()), max(1, int(answers[rows, :, 1].sum(1).max()))
            ids, attention_mask = torch.cat([prompts[rows, -P:], answers[rows, :t, :2]], 1).unbind(-1)
            states, logprobs = (x[known] for x in self._states(ids, attention_mask, t))
            y, valid = tokens[rows, :t][known], answers[rows, :t, 2][known]
            factors[rows, :t][known] = nthr_advantages(torch.ones_like(logprobs), states, y, valid, right[g, known], W,
                                                       logprobs=logprobs, **self._nthr).advantages
        return factors[rank * n:(rank + 1) * n, :mask.shape[1]]


@dataclass
class Script:
    model: str = str(TINY)    # Hugging Face id or folder
    data: str = "math"        # or a file, as train.py takes it
    reward: str = "math"      # or FILE.py:FUNCTION
    nthr_beta: float = 1.0
    eta: str = "2|0.5-p|"
    lora_rank: int = 0        # 0 trains all weights


def main():
    parser = HfArgumentParser((Script, GRPOConfig))
    folder, processes = Path(parser.parse_known_args()[0].model).resolve(), int(os.environ.get("WORLD_SIZE", 1))
    parser.set_defaults(output_dir=f"runs/{folder.name}-trl", save_strategy="no", lr_scheduler_type="constant",
                        adam_beta2=0.95, disable_dropout=True, logging_first_step=True, use_bias_correction_kl=False)
    if folder in EMBEDDED:                                                     # as train.py
        parser.set_defaults(data=str(folder / "train.jsonl"), reward=EMBEDDED[folder], max_steps=50, learning_rate=1e-4,
                            per_device_train_batch_size=256 // processes, max_completion_length=64, bf16=False,
                            gradient_checkpointing=False, dataloader_pin_memory=False)
    else:                                                                      # App. 7.3: two updates per 32 questions
        parser.set_defaults(max_steps=210, learning_rate=5e-7, beta=1e-4, max_completion_length=2500,
                            generation_batch_size=256, gradient_accumulation_steps=max(1, 16 // processes))
    own, config = parser.parse_args_into_dataclasses()
    tokenizer, checker = load(AutoTokenizer, own.model, padding_side="left"), load_reward(own.reward)
    model = load(AutoModelForCausalLM, own.model, use_safetensors=True,
                 **{"dtype": "float32"} | (config.model_init_kwargs or {}))
    model.generation_config.eos_token_id = stop_token_ids(model, tokenizer)    # also the end of a chat turn
    with config.main_process_first():                                          # it downloads, the others find the file
        problems = load_problems(own.data)
    for row in problems:                                                       # prompts as in rollout.encode_prompt
        text = f"{row['problem']}\n{INSTRUCTION}" if own.reward == "math" else row["problem"]
        row["prompt"] = [{"role": "user", "content": text}] if tokenizer.chat_template else f"Question: {text}\nAnswer:"
    def success(completions, answer, **_):
        return [checker(y if isinstance(y, str) else y[0]["content"], gold) for y, gold in zip(completions, answer)]
    lora = LoraConfig("CAUSAL_LM", r=own.lora_rank, target_modules="all-linear") if own.lora_rank else None
    trainer = NTHRTrainer(model, success, config, Dataset.from_list(problems), processing_class=tokenizer,
                          peft_config=lora, nthr_beta=own.nthr_beta, eta=own.eta)
    trainer.train(config.resume_from_checkpoint)
    first, *_, last = [log["reward"] for log in trainer.state.log_history if "reward" in log] * 2
    trainer.save_model()
    trainer.accelerator.print(f"success rate: {first:.1%} at first, {last:.1%} at last; saved to {config.output_dir}")


if __name__ == "__main__":
    main()
