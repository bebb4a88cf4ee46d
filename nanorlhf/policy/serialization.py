"""A policy in files: as PEFT, transformers and vLLM load it, and as a checkpoint keeps it."""

from __future__ import annotations

import copy
from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from nanorlhf.policy.loading import POLICY, REFERENCE
from nanorlhf.policy.policy import Policy


def save_base(policy: Policy, folder: Path) -> None:
    """The model without what was learned, for an engine to load."""
    base = copy.deepcopy(policy.model).unload() if isinstance(policy.model, PeftModel) else policy.base  # type: ignore[operator]
    base.save_pretrained(str(folder))


def save(policy: Policy, folder: Path) -> None:
    """The adapter in PEFT's format (or the whole model), as PEFT and vLLM load it; a kept reference beside it."""
    if isinstance(policy.model, PeftModel):
        kept = [name for name in (POLICY, REFERENCE) if name in policy.model.peft_config]
        policy.model.save_pretrained(str(folder), selected_adapters=kept, save_embedding_layers=False)
        return
    policy.model.save_pretrained(str(folder))
    if policy.frozen is not None:
        policy.frozen.save_pretrained(str(folder / REFERENCE))


def restore(policy: Policy, folder: Path) -> None:
    """Takes back what `save` wrote."""
    beside = folder / REFERENCE
    if isinstance(policy.model, PeftModel):
        set_peft_model_state_dict(policy.model, load_file(folder / "adapter_model.safetensors"))
        if beside.is_dir():
            policy.add_adapter(REFERENCE)
            set_peft_model_state_dict(policy.model, load_file(beside / "adapter_model.safetensors"), REFERENCE)
        return
    kind, how = type(policy.base), {"dtype": policy.base.dtype, "use_safetensors": True}
    policy.model.load_state_dict(kind.from_pretrained(folder, **how).state_dict())
    if policy.frozen is not None and beside.is_dir():  # else it was not needed before, and is the start
        policy.frozen.load_state_dict(kind.from_pretrained(beside, **how).state_dict())
