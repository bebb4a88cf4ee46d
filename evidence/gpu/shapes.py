"""Models of known shapes with random weights, as folders that every side can load: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The configurations that Qwen published; speed and memory hang on these numbers, not on the weights.
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen3-4B": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {  # with heads of 32, the least that vLLM has on a CPU
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


def write(folder: Path, shape: str, device: str, tiny: bool = False, layers: int = 0, sharpness: float = 1.0) -> None:
    """The model in bfloat16 (float32 on a CPU), and a tokenizer of bytes: AutoTokenizer reads a Qwen so.

    `layers`: only so many of them. `sharpness` multiplies logits: at 5 random weights spread them as training does.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    about = SHAPES[shape] | (TINY | {"head_dim": 32} if tiny and "head_dim" in SHAPES[shape] else TINY if tiny else {})
    about |= {"num_hidden_layers": min(layers, about["num_hidden_layers"])} if layers else {}
    kind = str(about.pop("model_type"))
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(kind, **about, **ends, max_position_embeddings=131072, rope_theta=1e6)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.base_model.norm.weight.data *= sharpness
        model.save_pretrained(folder)
    names = ["</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<{i}>" for i in range(len(names), about["vocab_size"])]
    tokens = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
