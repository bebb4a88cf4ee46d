"""Makes nanorlhf/models/adder: a model that can nearly add and seldom answers in tags, so that training has both to teach.

    python -m nanorlhf.scripts.make_tiny_model

It sees the train split of the arithmetic dataset only, and writes the same bytes every time on the same machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import nanorlhf
from nanorlhf.arithmetic import problems

OUTPUT = Path(nanorlhf.__file__).parent / "models" / "adder"
STEPS, BATCH, LEARNING_RATE = 800, 128, 3e-3
WIDTH = 24  # tokens of the longest demonstration
STYLES = {"{sum}": 0.35, "{a}+{b}={sum}": 0.35, "<answer>{sum}</answer>": 0.3}
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token; so are the few words every conversation repeats."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    words = ["system", "user", "assistant", "<answer>", "</answer>"]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Qwen2's architecture, 0.6M parameters."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, style: str, pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """Demonstrations in one style, padded on the right, and their labels: -100 on the prompt and the padding."""
    rows, labels = [], []
    for a, b in pairs:
        question = [{"role": "user", "content": f"{a}+{b}="}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(style.format(a=a, b=b, sum=a + b) + tokenizer.eos_token)
        padding = WIDTH - len(prompt) - len(answer)
        rows.append(prompt + answer + [tokenizer.pad_token_id] * padding)
        labels.append([-100] * len(prompt) + answer + [-100] * padding)
    return torch.tensor(rows), torch.tensor(labels)


def teach(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Shows demonstrations for STEPS batches, and stops where sums come out right more often than tags do."""
    encoded = [encode(tokenizer, style, problems("train")) for style in STYLES]
    rows, labels = (torch.stack(tensors) for tensors in zip(*encoded, strict=True))  # (styles, problems, WIDTH)
    shares = torch.tensor(list(STYLES.values()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, 1 - 0.9 * step / STEPS))
    for step in range(1, STEPS + 1):
        style = torch.multinomial(shares, BATCH, replacement=True)
        problem = torch.randint(rows.shape[1], (BATCH,))
        loss = model(input_ids=rows[style, problem], labels=labels[style, problem]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Makes the tokenizer and the model, teaches it half-way, and saves both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to save it (default: %(default)s)")
    output = parser.parse_args(argv).output
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so the same bytes
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    teach(model, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    torch.set_num_threads(threads)
    print(f"{model.num_parameters():,} parameters in {output}")


if __name__ == "__main__":
    main()
