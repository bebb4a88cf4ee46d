"""The model that learns: base weights, an adapter on top, and the reference it started from."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nanorlhf import activations, attention, checkpoint
from nanorlhf.budget import ran_out
from nanorlhf.config import shipped_model, split_names
from nanorlhf.errors import UsageError, first_line, told
from nanorlhf.logprobs import backbone_hidden, head_of, token_logprobs
from nanorlhf.lora import fuse
from nanorlhf.options import TrainConfig
from nanorlhf.sharding import layers_of, shard, whole
from nanorlhf.types import MicroBatch, WeightSync

POLICY = "default"  # PEFT's name for the adapter that learns
REFERENCE = "reference"  # a second adapter, where the first one does not start from nothing


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
        self.came_as_object = model is not None
        if model is None:
            model = load(config, self.device)
        self.model = with_adapter(config, model, peft_config)
        fuse_adapters(self.model)
        self.base: PreTrainedModel = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # type: ignore[assignment]
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
        """What the engine serves too: bfloat16 on CUDA even where full fine-tuning keeps float32 masters."""
        on_cuda = self.device.type == "cuda" and self.config.dtype == "auto"
        return torch.bfloat16 if on_cuda else self.base.dtype

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def coverage(self) -> str:
        """How much of the model learns, in words."""
        total = sum(p.numel() for p in self.base.parameters())
        if not isinstance(self.model, PeftModel):
            return f"all {total:,} weights are trained"
        adapted = [m for m in self.base.modules() if isinstance(m, LoraLayer)]
        trained = sum(p.numel() for p in self.trainable.values())
        total -= sum(p.numel() for n, p in self.base.named_parameters() if "lora_" in n)
        covered = sum(m.get_base_layer().weight.numel() for m in adapted)  # type: ignore[union-attr]
        share = f"{len(adapted)} layers that hold {covered / total:.0%} of {total:,} weights"
        without = "; experts are left out" if expert_blocks(self.base) else ""
        return f"LoRA adapts {share}{without}; {trained:,} are trained"

    def recompute(self, share: Fraction | int = 1) -> None:
        """This share of the layers (rounded up) keep nothing but their input for backward from now on."""
        layers = len(layers_of(self.base))
        count = math.ceil(share * layers)
        activations.recompute(self.base, self.config.activation_offload, self.device, count)
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
        """With LoRA's own dropout, where there is any; the base computes what the engine serves."""
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
        """bfloat16 arithmetic where that is what the engine computes in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def verify(self) -> None:
        """Refuses a model whose packed rows would not give its own log-probabilities."""
        with self.autocast():
            attention.verify(self.model)

    def hidden(self, batch: MicroBatch, model: nn.Module | None = None) -> Tensor:
        """(T, H) last hidden states of a row."""
        with self.autocast():
            return backbone_hidden(model or self.model, batch.input_ids, batch.position_ids, batch.cu_seqlens)

    def logprobs(
        self, batch: MicroBatch, model: nn.Module | None = None, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities of the targets under the sampled distribution, and its entropy."""
        head = self.head if model is None else head_of(model)
        hidden = self.hidden(batch, model)[batch.predict_at]
        with self.autocast():
            return token_logprobs(hidden, head, batch.targets, self.config.temperature, entropy_grad=entropy_grad)

    def adapter(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's adapter config as a dict, and its tensors by PEFT's names."""
        assert isinstance(self.model, PeftModel), "without an adapter only merged weights can be served"
        return self.model.peft_config[POLICY].to_dict(), get_peft_model_state_dict(self.model)

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the plain model by its Hugging Face name, merged out of place: the base never drifts."""
        deltas = {id(m.get_base_layer().weight): m for m in self.base.modules() if isinstance(m, LoraLayer)}  # type: ignore[union-attr]
        for name, parameter in self.base.named_parameters():
            if "lora_" in name:
                continue
            adapted = deltas.get(id(parameter))
            weight = whole(parameter.detach())
            if adapted is not None:
                weight = weight + adapted.get_delta_weight(POLICY).to(weight.dtype)  # type: ignore[operator]
            yield name.replace(".base_layer.", "."), weight

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """The same by the names and in the shapes of a checkpoint: a layer's experts are one tensor here, and many
        there."""
        if getattr(self.base, "_weight_conversions", None) == []:
            yield from self.merged()
            return
        for _, layer in groupby(self.merged(), lambda named: re.match(r".*?\.\d+\.|", named[0])[0]):  # type: ignore[index]
            yield from revert_weight_conversion(self.base, dict(layer)).items()

    def serving_copy(self, sync: WeightSync) -> nn.Module:
        """A second model to generate with: the plain one for `merged`, one with the adapter for `lora`."""
        model = copy.deepcopy(self.model)
        if isinstance(model, PeftModel):
            for name in model.peft_config.keys() - {POLICY}:
                model.delete_adapter(name)
            if sync == "merged":
                model = model.merge_and_unload()  # type: ignore[operator]
        return model.requires_grad_(False).eval()

    def save_base(self, folder: Path) -> None:
        """The model without what was learned, for an engine to load."""
        base = copy.deepcopy(self.model).unload() if isinstance(self.model, PeftModel) else self.base  # type: ignore[operator]
        base.save_pretrained(str(folder))

    def save(self, folder: Path) -> None:
        """The adapter in PEFT's format (or the whole model), as PEFT and vLLM load it; a kept reference beside it."""
        if isinstance(self.model, PeftModel):
            kept = [name for name in (POLICY, REFERENCE) if name in self.model.peft_config]
            self.model.save_pretrained(str(folder), selected_adapters=kept)
            return
        self.model.save_pretrained(str(folder))
        if self.frozen is not None:
            self.frozen.save_pretrained(str(folder / REFERENCE))

    def restore(self, folder: Path) -> None:
        """Takes back what `save` wrote."""
        beside = folder / REFERENCE
        if isinstance(self.model, PeftModel):
            set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
            if beside.is_dir():
                self.add_adapter(REFERENCE)
                set_peft_model_state_dict(self.model, load_file(beside / "adapter_model.safetensors"), REFERENCE)
            return
        kind, how = AutoModelForCausalLM, {"dtype": self.base.dtype, "use_safetensors": True}
        self.model.load_state_dict(kind.from_pretrained(folder, **how).state_dict())
        if self.frozen is not None:
            self.frozen.load_state_dict(kind.from_pretrained(beside, **how).state_dict())


def pick_device(name: str) -> torch.device:
    """The device asked for, or the first there is of cuda, mps and cpu."""
    if name != "auto":
        counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        there = [n for kind, count in counts.items() if count for n in (kind, *(f"{kind}:{i}" for i in range(count)))]
        if name not in there:
            raise UsageError(f"device={name!r} cannot work: here there are {', '.join(there)}, and auto")
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(config: TrainConfig, device: torch.device) -> PreTrainedModel:
    """The base model: bfloat16 under an adapter on CUDA, float32 elsewhere and for full fine-tuning."""
    half = config.dtype == "bfloat16" or (
        config.dtype == "auto" and device.type == "cuda" and not config.full_finetuning
    )
    with reading("model_name_or_path", config.model_name_or_path):
        return AutoModelForCausalLM.from_pretrained(
            shipped_model(config.model_name_or_path),
            dtype=torch.bfloat16 if half else torch.float32,
            trust_remote_code=config.trust_remote_code,
        )


@contextlib.contextmanager
def reading(option: str, name: str) -> Iterator[None]:
    """Files that cannot be read as weights are the user's to mend."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and ran_out(error):
            raise
        raise UsageError(f"{option}={name!r} cannot be loaded: {first_line(error)}") from error


def with_adapter(
    config: TrainConfig, model: PreTrainedModel | PeftModel, peft_config: LoraConfig | None
) -> PreTrainedModel | PeftModel:
    """The model with a new adapter, with the one named to go on from, or as it came; only adapters learn."""
    if isinstance(model, PeftModel) or (config.full_finetuning and peft_config is None):
        return model
    if config.adapter_name_or_path:
        with reading("adapter_name_or_path", config.adapter_name_or_path):
            return PeftModel.from_pretrained(model, find_adapter(config.adapter_name_or_path), is_trainable=True)
    targets = split_names(config.lora) if config.lora != "all-linear" else linear_layers(model)
    adapter = peft_config or LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapter)  # type: ignore[return-value]
    except ValueError as error:
        raise UsageError(f"lora={config.lora!r} cannot work: {told(error).partition(': ')[2]}") from None


def fuse_adapters(model: nn.Module) -> None:
    """Runs linear layers and their adapters as one function, where both are plain."""
    for module in model.modules():
        if type(module) is LoraLinear:
            fuse(module)


def let_lora_drop(model: nn.Module) -> None:
    """Puts LoRA's own dropout, and nothing else, into training mode."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()


def expert_blocks(model: nn.Module) -> set[str]:
    """Names of the blocks that hold experts, such as mlp; none in a dense model."""
    return {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(".experts")}


def linear_layers(model: PreTrainedModel) -> str | list[str]:
    """The layers that all-linear stands for: in a model with experts, names of those outside of their blocks."""
    blocks = expert_blocks(model)
    if not blocks:
        return "all-linear"
    head = model.get_output_embeddings()
    linear = [name.split(".") for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    inside = {name[-1] for name in linear if blocks & set(name)}
    return sorted({name[-1] for name in linear} - inside)


def rank_of(model: nn.Module) -> int:
    """The largest rank of a model's adapter; 0 without one."""
    if not isinstance(model, PeftModel):
        return 0
    lora = model.peft_config[POLICY]
    assert isinstance(lora, LoraConfig)
    return max([lora.r, *(lora.rank_pattern or {}).values()])


def saved_adapter(name: str) -> LoraConfig:
    """The form of an adapter that was trained before."""
    found = PeftConfig.from_pretrained(find_adapter(name))
    assert isinstance(found, LoraConfig)
    return found


def find_adapter(name: str) -> str:
    """The adapter's folder or name on the hub; a run's directory means its newest checkpoint."""
    found = str(checkpoint.latest(Path(name)) or name)
    try:
        PeftConfig.from_pretrained(found)
    except (OSError, ValueError) as error:
        raise UsageError(f"adapter_name_or_path={name!r} holds no adapter: {str(error).splitlines()[0]}") from None
    return found


def refuse_router_loss(about: PretrainedConfig) -> None:
    """A router's auxiliary loss is refused, for no trainer here adds it."""
    if getattr(about.get_text_config(), "output_router_logits", False):
        raise UsageError(
            f"the config of {about.name_or_path or 'the model'} asks for a router's auxiliary loss, which is not "
            "trained here: set output_router_logits to false in its config.json (of a model object: in model.config)"
        )


def refuse_unsupported(model: nn.Module) -> None:
    """Models and adapters that the loss, the chunked head or the engine could not serve are refused with the reason."""
    refuse_router_loss(model.config)  # type: ignore[arg-type]
    if not isinstance(model, PeftModel):
        return
    lora = model.peft_config[POLICY]
    if not isinstance(lora, LoraConfig):
        raise UsageError(f"{lora.peft_type} adapters are not served by the engine; use LoRA")
    if lora.modules_to_save:
        raise UsageError(
            f"modules_to_save={lora.modules_to_save} is not served by the engine; use lora: none to train whole layers"
        )
    if lora.target_parameters:
        raise UsageError(
            "LoRA on experts is not served by the engine; leave their layers out of lora (all-linear does), "
            "or use lora: none"
        )
    if lora.use_dora:
        raise UsageError("DoRA adapters are not served by the engine; use plain LoRA")
    head = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, LoraLayer) or any(isinstance(m, LoraEmbedding) for m in model.modules()):
        raise UsageError("LoRA on embeddings or on the LM head is not supported; leave them out of target_modules")
