"""Base models and adapters from files, and what cannot be trained or served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nanorlhf.config import names
from nanorlhf.config.names import shipped_model
from nanorlhf.config.option import split_names
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError, error_line, first_line
from nanorlhf.policy.gated import gated, is_gated
from nanorlhf.policy.lora import fuse
from nanorlhf.policy.products import linear, prefers_onednn
from nanorlhf.system.device import ran_out
from nanorlhf.system.terminal import log

POLICY = "default"  # PEFT's name for the adapter that learns
SHAPE = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora"}
REFERENCE = "reference"  # a second adapter, if the first one does not start from nothing


def load(
    config: TrainConfig, device: torch.device, kind: Any = AutoModelForCausalLM, **options: Any
) -> PreTrainedModel:
    """The base model, in the dtype that it learns in."""
    with reading("model_name_or_path", config.model_name_or_path):
        return kind.from_pretrained(
            shipped_model(config.model_name_or_path),
            dtype=dtype_of(config, device.type),
            trust_remote_code=config.trust_remote_code,
            **options,
        )


def dtype_of(config: TrainConfig, device: str) -> torch.dtype:
    """That of base weights: bfloat16 under an adapter on CUDA, float32 elsewhere and for full fine-tuning."""
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device == "cuda" and not config.full_finetuning)
    return torch.bfloat16 if half else torch.float32


def convert(base: PreTrainedModel, dtype: torch.dtype, adapted: bool) -> None:
    """Gives the weights of a model object the dtype that files are read in, and what learns over them float32."""
    came = base.dtype
    for name, p in base.named_parameters() if came in {torch.float32, torch.bfloat16} else ():
        if adapted and (p.requires_grad or "lora_" in name):
            p.data = p.data.float()
        elif p.dtype == came:  # not what its makers keep finer
            p.data = p.data.to(dtype)


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
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise UsageError("the model has an adapter already: give it, or peft_config, and not both")
        if POLICY not in model.peft_config:
            raise UsageError(
                f"the model's adapter is to be called {POLICY!r}, and there is {', '.join(model.peft_config)}"
            )
        model.set_adapter(POLICY)  # which learns from now on, even if it was loaded to be used only
        return model
    if config.full_finetuning and peft_config is None:
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
        task_type="SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapter)  # type: ignore[return-value]
    except ValueError as error:
        raise UsageError(f"lora={config.lora!r} cannot work: {error_line(error).partition(': ')[2]}") from None


def is_classifier(model: Any) -> bool:
    """Whether it gives a sequence a score, and not its next token."""
    return model.get_output_embeddings() is None


def speed_up(model: nn.Module) -> None:
    """Runs linear layers with plain adapters as one function, others by the quickest library, gates in less memory."""
    for module in model.modules():
        if type(module) is LoraLinear:
            fuse(module)
        elif type(module) is nn.Linear and prefers_onednn():
            module.forward = partial(linear, module)  # type: ignore[assignment]
        elif is_gated(module):
            module.forward = partial(gated, module)  # type: ignore[assignment]


def let_lora_drop(model: nn.Module) -> None:
    """Puts LoRA's own dropout, and nothing else, into training mode."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()


def drops_out(model: nn.Module) -> bool:
    """Whether LoRA has a dropout of its own."""
    adapted = (module for module in model.modules() if isinstance(module, LoraLayer))
    return any(not isinstance(dropout, nn.Identity) for module in adapted for dropout in module.lora_dropout.values())


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
    found = str(names.latest(Path(name)) or name)
    try:
        kind = PeftConfig.from_pretrained(found).task_type
    except (OSError, ValueError) as error:
        raise UsageError(f"adapter_name_or_path={name!r} holds no adapter: {first_line(error)}") from None
    if kind == "SEQ_CLS":
        raise UsageError(f"{name!r} is a reward model, which writes nothing; judge by it: reward_funcs model:{name}")
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
    base: Any = model.get_base_model()
    if lora.modules_to_save and not is_classifier(base):
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
    head = base.get_output_embeddings()
    if isinstance(head, LoraLayer) or any(isinstance(m, LoraEmbedding) for m in model.modules()):
        raise UsageError("LoRA on embeddings or on the LM head is not supported; leave them out of target_modules")


def check_model(config: TrainConfig, model: Any) -> PretrainedConfig:
    """The model's config; refuses one that cannot be found or whose context is too short, before weights are loaded."""
    if config.adapter_name_or_path:
        config.require(not config.full_finetuning, "lora", "there is an adapter to go on from; leave lora as it is")
        saved = PeftConfig.from_pretrained(find_adapter(config.adapter_name_or_path))
        others = [(name, getattr(saved, theirs, None)) for name, theirs in SHAPE.items()]
        if own := [f"{name} {value}" for name, value in others if value not in (None, getattr(config, name))]:
            log.info(f"the adapter keeps its own {', '.join(own)}")
    if model is None:
        if not config.model_name_or_path:
            raise UsageError("no model: say model_name_or_path (a Hugging Face name, a folder, or nanorlhf:adder)")
        try:
            about = AutoConfig.from_pretrained(
                shipped_model(config.model_name_or_path), trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            why = first_line(error) + ("; --trust_remote_code runs it" if "trust_remote_code" in str(error) else "")
            raise UsageError(f"model_name_or_path={config.model_name_or_path!r} cannot be loaded: {why}") from None
    else:
        about = model.config
        if model.dtype == torch.float16:
            raise UsageError(
                "the model's weights are float16, too coarse to learn in; load it with dtype=torch.bfloat16"
            )
    refuse_router_loss(about)
    context = getattr(about.get_text_config(), "max_position_embeddings", None)
    wanted = config.max_prompt_length + config.max_completion_length
    if context and wanted > context:
        raise UsageError(
            f"max_prompt_length={config.max_prompt_length} and max_completion_length={config.max_completion_length} "
            f"make {wanted} tokens, and the model takes {context}; shorten one"
        )
    return about


def coverage(model: nn.Module) -> str:
    """Says how much of the model learns."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not isinstance(model, PeftModel):
        return f"all {trained:,} weights are trained"
    base: Any = model.get_base_model()
    adapted = [m for m in base.modules() if isinstance(m, LoraLayer)]
    total = sum(p.numel() for n, p in base.named_parameters() if "lora_" not in n)
    covered = sum(m.get_base_layer().weight.numel() for m in adapted)  # type: ignore[union-attr]
    share = f"{len(adapted)} layers that hold {covered / total:.0%} of {total:,} weights"
    without = "; experts are left out" if expert_blocks(base) else ""
    return f"LoRA adapts {share}{without}; {trained:,} are trained"
