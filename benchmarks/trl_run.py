"""TRL's GRPOTrainer as it comes, generating with transformers, for benchmarks/as_shipped.py.

    PYTHONPATH=.peer python benchmarks/trl_run.py WORK.json

Prints 'step K' after each update. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Say(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        print(f"step {state.global_step}", flush=True)


def exact(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [float(one[0]["content"].strip() == wanted) for one, wanted in zip(completions, answer, strict=True)]


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work["samples"],
        gradient_accumulation_steps=work["groups"],
        num_generations=work["samples"],
        max_completion_length=work["new_tokens"],
        max_steps=work["steps"],
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": work["dtype"]},
    )
    rows = work["rows"]
    trainer = GRPOTrainer(
        model=work["model"],
        args=settings,
        reward_funcs=exact,
        train_dataset=Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": row["question"]}] for row in rows],
                "answer": [row["answer"] for row in rows],
            }
        ),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        callbacks=[Say()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
