"""NTHR inside TRL's GRPOTrainer: several GPUs, DeepSpeed, FSDP, vLLM and LoRA then come from TRL and accelerate.

python examples/trl_nthr.py                                                  # embedded model, 50 steps on a CPU
accelerate launch examples/trl_nthr.py --model Qwen/Qwen2.5-0.5B-Instruct    # all GPUs, App. 7.3's settings
With or without NTHR, TRL's update differs from train.py's in
    advantages    over the sample standard deviation + 1e-4: √((G−1)/G) of §2's, which AdamW mostly divides out
    normaliser    of all tokens ("dapo") or a micro-batch's ("bnpo"), not of each question: equal if all have as many
    KL term       times the ratio γ, unless use_bias_correction_kl is off, as it is by default here
"""
import os
import sys
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo import check_head                                                             # noqa: E402
from nthr import nthr_advantages, nthr_eta                                              # noqa: E402
from rollout import stop_token_ids                                                      # noqa: E402
from support.data import EMBEDDED, INSTRUCTION, TINY, load_problems, load_reward        # noqa: E402
from support.errors import fail                                                         # noqa: E402
from support.models import load_pretrained                                              # noqa: E402

# Shapes: N rows of all processes, n of this one, G of a question, P prompt and T completion tokens, d hidden size,
#         U different tokens in the completions


class NTHRTrainer(GRPOTrainer):
    """GRPOTrainer with Algorithm 1. nthr_beta, eta: those of `nthr.nthr_advantages` (args.beta is TRL's KL weight).

    correctness: name of the reward function that tells right (1) from wrong (0); what gets None from it is left out."""

    def __init__(self, *args, nthr_beta=1.0, eta="2|0.5-p|", correctness=None, **kwargs):
        nthr_eta(0.5, eta)                                                     # a ValueError before a model is loaded
        super().__init__(*args, **kwargs)
        names, self._nthr = self.reward_func_names, {"beta": nthr_beta, "eta": eta, "temperature": self.temperature}
        self._correctness = names[0] if correctness is None and len(names) == 1 else correctness
        if names.count(self._correctness) != 1:
            raise ValueError(f"correctness must name one of the reward functions {', '.join(names)}, got {correctness}")
        self._policy = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model    # of LoRA
        check_head(self._policy)
        head = self._head = self._policy.get_output_embeddings()
        packed = head.weight.numel() not in (0, head.in_features * head.out_features)  # 0: ZeRO-3 holds it in parts
        if packed or head.bias is not None or self._is_vlm or self.args.torch_compile:
            raise ValueError("NTHR needs a text model, a head without bias or quantisation, and no torch_compile")
        if self.args.use_transformers_continuous_batching:
            raise ValueError("NTHR refuses use_transformers_continuous_batching: with bf16, TRL then casts the trained "
                             "float32 weights in place, which loses small updates; leave it out")

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)                            # (N, functions)
        self._verdicts = rewards[:, self.reward_func_names.index(self._correctness)]
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:                                                # not in an evaluation
            advantages, factors = batch["advantages"][:, None], self._factors(batch)           # (n, 1), (n, T)
            weak = (factors < 1) & (advantages < 0)
            self._metrics["train"]["nthr/weakened"].append(self.accelerator.gather(weak.sum()).sum().item())
            batch["advantages"] = torch.where(weak, advantages * factors, advantages)
        return batch

    @torch.no_grad()
    def _factors(self, batch):
        """(n, T): η on V⁻, else 1. A group may straddle processes: each that has a row of it scores it, all of it."""
        G, n, rank = self.num_generations, len(batch["advantages"]), self.accelerator.process_index
        right, wrong = ((self._verdicts == verdict).view(-1, G) for verdict in (1, 0))         # (N/G, G)
        if not ((right | wrong).flatten() | self._verdicts.isnan()).all():
            raise ValueError(f"as correctness, {self._correctness} must return 1 (right), 0 (wrong) or None")
        mask = batch["completion_mask"]                                        # (n, T); 0 on a masked cut-off response
        prompts = self._gather(batch["prompt_ids"], batch["prompt_mask"], left=True)           # (N, P, 2)
        answers = self._gather(batch["completion_ids"], mask, mask * batch.get("tool_mask", 1))    # (N, T, 3)
        columns, tokens = torch.unique(answers[:, :, 0], return_inverse=True)  # (U,), (N, T) indices into it
        W, factors = self._head_rows(columns), torch.ones(answers.shape[:2], device=mask.device)
        mixed = (right.any(1) & wrong.any(1)).tolist()
        groups = [[g for g in range(r * n // G, -(-(r + 1) * n // G)) if mixed[g]] for r in range(self.args.world_size)]
        most = max(groups, key=len)                                            # FSDP: as many passes in each process
        hook = self._policy.base_model.register_forward_hook(lambda *call: states.append(call[2][0]))
        self.model.eval()                                                      # no dropout, no random number drawn
        for g in (groups[rank] + most)[:len(most)]:
            rows, known = slice(g * G, (g + 1) * G), right[g] | wrong[g]
            P, T = int(prompts[rows, :, 1].sum(1).max()), max(1, int(answers[rows, :, 1].sum(1).max()))
            ids, attention_mask = torch.cat([prompts[rows, -P:], answers[rows, :T, :2]], 1).unbind(-1)
            states = []                                                        # TRL never calls lm_head: no hook there
            logprobs = self._get_per_token_logps_and_entropies(self.model, ids, attention_mask, T,
                                                               self.args.per_device_train_batch_size)[0][known]
            hidden = torch.cat(states)[known, -T - 1:-1]                       # those that predict the last T tokens
            y, valid = tokens[rows, :T][known], answers[rows, :T, 2][known]
            penalties = nthr_advantages(-torch.ones_like(logprobs), hidden, y, valid, right[g, known], W,
                                        logprobs=logprobs, **self._nthr).advantages
            factors[rows, :T][known] = -penalties
        self.model.train()
        hook.remove()
        return factors[rank * n:(rank + 1) * n, :mask.shape[1]]

    def _gather(self, *fields, left=False):
        """Tensors (n, T) each -> one of all processes (N, longest T, how many), padded on the right or left."""
        padded = self.accelerator.pad_across_processes(torch.stack(fields, -1), dim=1, pad_first=left)
        return self.accelerator.gather(padded)

    def _head_rows(self, columns):
        """The rows of lm_head of these tokens, (U, d): FSDP and ZeRO-3 hold it in parts, which may be on a CPU."""
        with self._dist.gather_params([self._head.weight]), self._dist.summon_full_params(self.model, recurse=False):
            W = self._head.weight.full_tensor() if hasattr(self._head.weight, "full_tensor") else self._head.weight
            return W[columns.to(W.device)].to(columns.device)


def flag_parser():
    """GRPOConfig's flags and the example's own, with train.py's defaults for the embedded or for a real model."""
    parser, processes = HfArgumentParser(GRPOConfig), int(os.environ.get("WORLD_SIZE", 1))
    for flag, default, text in (
            ("model", str(TINY), "Hugging Face id or folder"), ("data", "math", "or a file"), ("nthr_beta", 1.0, "§5"),
            ("reward", "math", "or FILE.py:FUNCTION"), ("eta", "2|0.5-p|", "Table 5"), ("lora_rank", 0, "0: no LoRA")):
        parser.add_argument(f"--{flag}", default=default, type=type(default), help=text)
    folder = Path(parser.parse_known_args([x for x in sys.argv[1:] if x not in ("-h", "--help")])[0].model).resolve()
    real = folder not in EMBEDDED
    parser.set_defaults(output_dir=f"runs/{folder.name}-trl", save_strategy="no", lr_scheduler_type="constant",
                        adam_beta2=0.95, disable_dropout=True, logging_first_step=True, use_bias_correction_kl=False,
                        gradient_checkpointing=real, activation_checkpointing=real)    # named anew in 5.24
    if real:                                                                   # two updates per 32 questions
        parser.set_defaults(max_steps=210, learning_rate=5e-7, beta=1e-4, max_completion_length=2500,
                            generation_batch_size=256, gradient_accumulation_steps=max(1, 16 // processes))
    else:
        parser.set_defaults(data=str(folder / "train.jsonl"), reward=EMBEDDED[folder], max_steps=50, learning_rate=1e-4,
                            per_device_train_batch_size=256 // processes, max_completion_length=64, bf16=False)
    return parser


def trainer_from_flags():
    parser = flag_parser()
    own = parser.parse_args()                                                  # --help ends here
    parser.set_defaults(activation_checkpointing=own.gradient_checkpointing)   # which would hide the old name's value
    tokenizer = load_pretrained(AutoTokenizer, own.model, padding_side="left")         # before TRL asks for a GPU
    config, _ = parser.parse_args_into_dataclasses()
    with config.main_process_first():                                          # it downloads, the others find the file
        problems, checker = load_problems(own.data), load_reward(own.reward)
    if len(problems) < (asked := config.generation_batch_size // config.num_generations):
        fail(f"{own.data} holds {len(problems)} questions, a generation takes {asked}: lower --generation_batch_size")
    options = {"dtype": "float32"} | (config.model_init_kwargs or {}) | {"use_safetensors": True}
    model = load_pretrained(AutoModelForCausalLM, own.model, **options)
    stops = model.generation_config.eos_token_id = stop_token_ids(model, tokenizer)    # also the end of a chat turn
    if config.use_vllm:                                                        # which reads the model's own files
        config.generation_kwargs = {"stop_token_ids": stops} | (config.generation_kwargs or {})
    for row in problems:                                                       # prompts as in data.encode_prompt
        text = f"{row['problem']}\n{INSTRUCTION}" if own.reward == "math" else row["problem"]
        row["prompt"] = [{"role": "user", "content": text}] if tokenizer.chat_template else f"Question: {text}\nAnswer:"

    def success(completions, answer, **_):
        return [checker(y if isinstance(y, str) else y[0]["content"], gold) for y, gold in zip(completions, answer)]
    lora = LoraConfig("CAUSAL_LM", r=own.lora_rank, target_modules="all-linear") if own.lora_rank else None
    return NTHRTrainer(model, success, config, Dataset.from_list(problems), processing_class=tokenizer,
                       peft_config=lora, nthr_beta=own.nthr_beta, eta=own.eta)


def main():
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)       # TRL 1.16 uses the old names
    try:
        trainer = trainer_from_flags()
    except ValueError as error:
        fail(error)
    trainer.train(trainer.args.resume_from_checkpoint)
    if trainer.is_fsdp_enabled:                                                # FSDP2's default saves nothing here
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log] or [float("nan")]
    found, folder = any(Path(trainer.args.output_dir).glob("*.safetensors")), trainer.args.output_dir
    saved = f"saved to {folder}" if found else f"no weights in {folder}: ZeRO-3 needs --zero3_save_16bit_model true"
    trainer.accelerator.print(f"success rate: {rewards[0]:.1%} at first, {rewards[-1]:.1%} at last; {saved}")


if __name__ == "__main__":
    main()
