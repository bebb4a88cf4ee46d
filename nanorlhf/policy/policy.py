"""The model that learns: base weights, an adapter on top, and the reference it started from."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nanorlhf.config.training import OnPolicyConfig, TrainConfig
from nanorlhf.policy import attention, merging, recomputation, self_check
from nanorlhf.policy.loading import (
    POLICY,
    REFERENCE,
    convert,
    dtype_of,
    let_lora_drop,
    load,
    rank_of,
    refuse_unsupported,
    speed_up,
    with_adapter,
)
from nanorlhf.policy.logprobs import backbone_hidden, head_of, token_logprobs
from nanorlhf.policy.sharding import layers_of, shard
from nanorlhf.system.device import pick_device
from nanorlhf.types import MicroBatch, WeightSync


class Policy:
    """A causal language model with (or without) a LoRA adapter; every weight it serves is counted by `version`."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel | PeftModel | None = None,
        peft_config: LoraConfig | None = None,
    ) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.version = 0
        self.temperature = config.temperature if isinstance(config, OnPolicyConfig) else 1.0  # of what it learns from
        self.came_as_object = model is not None
        if model is None:
            model = load(config, self.device)
        self.model = with_adapter(config, model, peft_config)
        speed_up(self.model)
        self.base: PreTrainedModel = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # type: ignore[assignment]
        if self.came_as_object:
            convert(self.base, dtype_of(config, self.device.type), self.has_adapter)
        if config.shard_base:
            shard(self.base, self.device)
        self.model.to(self.device)  # type: ignore[arg-type]
        refuse_unsupported(self.model)
        self.base.set_attn_implementation(attention.NAME)
        self.recomputes = False  # all layers, that is
        if config.gradient_checkpointing is True:  # auto is the memory plan's to settle
            self.recompute()
        self.head = head_of(self.model)
        self.one_per_row = attention.one_per_row(self.base)
        self.frozen: PreTrainedModel | None = None
        self.model.eval()

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def lora_rank(self) -> int:
        """The adapter's largest rank; 0 without one."""
        return rank_of(self.model)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the engine serves too: bfloat16 on CUDA, even if full fine-tuning keeps float32 masters."""
        on_cuda = self.device.type == "cuda" and self.config.dtype == "auto"
        return torch.bfloat16 if on_cuda else self.base.dtype

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def recompute(self, share: Fraction | int = 1) -> None:
        """This share of the layers (rounded up) keep nothing but their input for backward from now on."""
        layers = len(layers_of(self.base))
        count = math.ceil(share * layers)
        recomputation.recompute(self.base, self.config.activation_offload, self.device, count)
        self.recomputes = count == layers

    def tensors(self) -> list[Tensor]:
        """Every weight and buffer that this process has whole, all adapters' too."""
        return [t for t in (*self.model.parameters(), *self.model.buffers()) if not isinstance(t, DTensor)]

    def add_adapter(self, name: str) -> None:
        """A second adapter of the same shape on the same base; the policy's own stays the active one."""
        assert isinstance(self.model, PeftModel), "full fine-tuning has no adapters"
        if name not in self.model.peft_config:
            self.model.add_adapter(name, self.model.peft_config[POLICY])
            self.model.to(self.device).eval()  # what is new comes in training mode
        self.model.set_adapter(POLICY)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """With LoRA's own dropout, if there is any; the base computes what the engine serves."""
        let_lora_drop(self.base)
        try:
            yield
        finally:
            self.model.eval()

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """With another adapter in place of the policy's; gradients of one must be taken before the other comes back."""
        assert isinstance(self.model, PeftModel)
        self.model.set_adapter(name)
        try:
            yield
        finally:
            self.model.set_adapter(POLICY)

    def keep_reference(self) -> None:
        """The reference is the policy as it is now; switching the adapter off gives it as long as that is empty."""
        if self.frozen is not None:
            self.frozen.load_state_dict(self.base.state_dict())  # in place, wherever it is
        elif not isinstance(self.model, PeftModel):
            self.frozen = copy.deepcopy(self.base).requires_grad_(False).eval()
        elif any(p.any() for n, p in self.trainable.items() if "lora_B" in n):
            self.add_adapter(REFERENCE)
            set_peft_model_state_dict(self.model, self.adapter()[1], adapter_name=REFERENCE)

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model as it was when the reference was kept."""
        if self.frozen is not None:
            yield self.frozen
        elif isinstance(self.model, PeftModel) and REFERENCE in self.model.peft_config:
            with self.using(REFERENCE):
                yield self.model
        else:
            assert isinstance(self.model, PeftModel), (
                "full fine-tuning needs keep_reference() before it needs a reference"
            )
            with self.model.disable_adapter():
                yield self.model

    def autocast(self) -> torch.autocast:
        """bfloat16 arithmetic if that is what the engine computes in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def verify(self) -> None:
        """Refuses a model whose packed rows would not give its own log-probabilities."""
        with self.autocast():
            self_check.verify(self.model)

    def hidden(self, batch: MicroBatch, model: nn.Module | None = None) -> Tensor:
        """(T, H) last hidden states of a row."""
        with self.autocast():
            return backbone_hidden(model or self.model, batch.input_ids, batch.position_ids, batch.segments)

    def logprobs(
        self, batch: MicroBatch, model: nn.Module | None = None, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities of the targets under the sampled distribution, and its entropy."""
        head = self.head if model is None else head_of(model)
        hidden = self.hidden(batch, model)[batch.predict_at]
        with self.autocast():
            return token_logprobs(hidden, head, batch.targets, self.temperature, entropy_grad=entropy_grad)

    def outputs(self, batch: MicroBatch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """(N,) what losses are made of: log-probabilities, and entropy."""
        return self.logprobs(batch, entropy_grad=entropy_grad)

    def adapter(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's adapter config as a dict, and its tensors by PEFT's names."""
        assert isinstance(self.model, PeftModel), "without an adapter only merged weights can be served"
        tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)  # auto would ask the hub each time
        return self.model.peft_config[POLICY].to_dict(), tensors

    def merged(self, everything: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the plain model by its Hugging Face name; or only what an adapter changes."""
        return merging.merged(self.base, everything)

    def saved(self, everything: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The same by the names and in the shapes of a checkpoint."""
        return merging.saved(self.base, everything)

    def serving_copy(self, sync: WeightSync) -> nn.Module:
        """A second model to generate with: the plain one for `merged`, one with the adapter for `lora`."""
        model = copy.deepcopy(self.model)
        if isinstance(model, PeftModel):
            for name in model.peft_config.keys() - {POLICY}:
                model.delete_adapter(name)
            if sync == "merged":
                model = model.merge_and_unload()  # type: ignore[operator]
        return model.requires_grad_(False).eval()
