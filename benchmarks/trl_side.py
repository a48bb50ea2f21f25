"""TRL's GRPOTrainer as a side of benchmarks/versus_trl.py: its own training loop, fed with groups from a file.

    PYTHONPATH=.peer python benchmarks/trl_side.py WORK.json [--old-pass] [--liger]

Reads one line per update from stdin, answers with a line '@ SECONDS GRAD_NORM' on stdout. --old-pass adds the forward
pass over old log-probabilities that TRL makes whenever its samples come from vLLM, by TRL's own method; --liger lets
it use Liger's kernels for layers and loss (on a GPU).
Nothing of this project is imported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class WithOldPass(GRPOTrainer):
    """What _generate_and_score_completions does beside the rest when `use_vllm` is set."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        kept = output["completion_ids"].size(1)
        size = self.args.per_device_train_batch_size
        with torch.no_grad():
            old, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, kept, batch_size=size)
        output["old_per_token_logps"] = old
        return output


class OnDemand(TrainerCallback):
    """Waits for a line before each update, and says what the update took."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu, self._begun, self.norm = on_gpu, 0.0, float("nan")

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._begun = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._taken = self._now() - self._begun

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "grad_norm" in logs:
            print(f"@ {self._taken} {logs['grad_norm']}", flush=True)


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device(work["device"])
    if device.type == "cpu":
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    groups = work["groups"]
    size, together = len(groups[0]["samples"]), work.get("trl_groups", 1)

    def replay(prompts: list[str], trainer: Any) -> dict[str, Any]:
        seen: Counter[str] = Counter()
        answers = []
        for name in prompts:
            answers.append(groups[int(name)]["samples"][seen[name]])
            seen[name] += 1
        return {
            "prompt_ids": [groups[int(name)]["prompt"] for name in prompts],
            "completion_ids": answers,
            "logprobs": [[-10.0] * len(one) for one in answers],
        }

    def reward(prompts: list[str], **_: Any) -> list[float]:
        seen: Counter[str] = Counter()
        rewards = []
        for name in prompts:
            rewards.append(groups[int(name)]["rewards"][seen[name]])
            seen[name] += 1
        return rewards

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size * together,
        gradient_accumulation_steps=len(groups) // together,
        num_generations=size,
        max_completion_length=max(len(one) for group in groups for one in group["samples"]),
        max_steps=10**6,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="none",
        bf16=False,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_liger_kernel="--liger" in sys.argv,
        model_init_kwargs={"dtype": work["dtype"]},
    )
    made = WithOldPass if "--old-pass" in sys.argv else GRPOTrainer
    trainer = made(
        model=work["model"],
        args=settings,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(groups))]}),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        rollout_func=replay,
        callbacks=[OnDemand(device.type == "cuda")],
    )
    trainer.train()


if __name__ == "__main__":
    main()
