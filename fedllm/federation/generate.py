"""Try a finished run's adapter beside its untuned base."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from fedllm.data.encode import PromptEncoder
from fedllm.data.sources import default_instruction
from fedllm.errors import RunError
from fedllm.models.load import load_base, load_tokenizer
from fedllm.runs.folder import load_config, open_run


def answer(folder: Path, prompt: str, *, max_new_tokens: int) -> tuple[str, str]:
    """Return the base's and the tuned model's greedy answers to a prompt.

    Raises
    ------
    RunError
        If the run has no finished adapter.
    ModelError
        If the base cannot be loaded.
    """
    run = open_run(folder)
    config = load_config(run)
    if not (run.adapter_dir / "adapter_model.safetensors").is_file():
        raise RunError(f"{run.path}: no finished adapter yet; go on with run.resume={run.path}")
    tokenizer = load_tokenizer(config.model)
    encoder = PromptEncoder(
        tokenizer,
        instruction=default_instruction(config.data),
        prompt=config.data.prompt,
        max_length=config.train.max_length,
    )
    ids = torch.tensor([encoder.prompt_ids(prompt)])
    model = PeftModel.from_pretrained(load_base(config.model), run.adapter_dir).eval()

    def continuation() -> str:
        with torch.no_grad():
            out = model.generate(  # type: ignore[no-untyped-call]
                input_ids=ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    tuned = continuation()
    with model.disable_adapter():
        return continuation(), tuned
