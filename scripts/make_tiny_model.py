"""Makes nanorlhf/models/adder: a model that nearly adds and seldom answers in tags, so training has both to teach.

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

OUTPUT = Path(str(nanorlhf.__file__)).parent / "models" / "adder"
BATCH, LEARNING_RATE, DECAY_STEPS = 128, 1.5e-3, 600
SKILL = 0.95  # teaching ends when a sampled sum is right this often
PROMPT, WIDTH = 14, 24  # tokens of every question, and of the longest question with its answer
END, PAD = "<|im_end|>", "<|endoftext|>"
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
    tokenizer.add_special_tokens([PAD, "<|im_start|>", END])
    words = ["system", "user", "assistant", "<answer>", "</answer>"]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Qwen2's architecture, 0.6M parameters."""
    ids = tokenizer.get_vocab()
    eos, pad = ids[END], ids[PAD]
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
    """Demonstrations in one style, padded on the right, and their labels: -100 on the question and the padding."""
    texts = []
    for a, b in pairs:
        question = {"role": "user", "content": f"{a}+{b}="}
        answer = {"role": "assistant", "content": style.format(a=a, b=b, sum=a + b)}
        texts.append(str(tokenizer.apply_chat_template([question, answer], tokenize=False)).rstrip())
    rows = torch.tensor(tokenizer(texts, padding="max_length", max_length=WIDTH)["input_ids"])
    labels = rows.masked_fill(rows.eq(tokenizer.get_vocab()[PAD]), -100)
    labels[:, :PROMPT] = -100
    return rows, labels


@torch.no_grad()
def skill(model: Qwen2ForCausalLM, rows: torch.Tensor, labels: torch.Tensor) -> float:
    """How probable it is, on average, that a sampled answer is the one in `labels`."""
    logits = model(input_ids=rows).logits[:, :-1].transpose(1, 2)  # (problems, V, WIDTH - 1)
    return (-cross_entropy(logits, labels[:, 1:], reduction="none").sum(1)).exp().mean().item()


def teach(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Shows demonstrations in all styles until the sums, once a tag is open, are right in a share SKILL of samples."""
    encoded = [encode(tokenizer, style, problems("train")) for style in STYLES]
    rows, labels = (torch.stack(tensors) for tensors in zip(*encoded, strict=True))  # (styles, problems, WIDTH)
    shares = torch.tensor(list(STYLES.values()))
    probe = rows[-1, ::8]
    probe_labels = labels[-1, ::8].masked_fill(probe.eq(tokenizer.get_vocab()["<answer>"]), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, max(1 - step / DECAY_STEPS, 0.1))
    )
    step, reached = 0, 0.0
    while reached < SKILL:
        style = torch.multinomial(shares, BATCH, replacement=True)
        problem = torch.randint(rows.shape[1], (BATCH,))
        loss = model(input_ids=rows[style, problem], labels=labels[style, problem]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        step += 1
        if step % 25 == 0:
            reached = skill(model, probe, probe_labels)
            print(f"step {step}  loss {loss.item():.3f}  skill {reached:.3f}", flush=True)


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
    (output / "model.safetensors").chmod(0o644)  # written for its owner only, but meant to be shared
    tokenizer.save_pretrained(output)
    torch.set_num_threads(threads)
    print(f"{model.num_parameters():,} parameters in {output}")


if __name__ == "__main__":
    main()
