"""The models that come with the package, as they are taught: the adder, the storyteller and the counter."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from nanorlhf.tasks.arithmetic import sums
from nanorlhf.tasks.counting import ways
from nanorlhf.tasks.stories import MOODS, title, titles

BATCH, LEARNING_RATE, DECAY_STEPS = 128, 1.5e-3, 600
END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"

# the adder
SKILL = 0.95  # teaching ends when a sampled sum is right this often
PROMPT, WIDTH = 14, 24  # tokens of every question, and of the longest question with its answer
STYLES = {"{sum}": 0.35, "{a}+{b}={sum}": 0.35, "<answer>{sum}</answer>": 0.3}
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# the counter
WINDOW, NUMBER = 32, 5  # tokens that a layer sees, which is six numbers, and those of a number
CONVERSATION = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
READING, ROW, ROW_TOKENS = 24, 64, 8192  # tokens of rows that teach to read the step, of the others, of a batch
RIGHT_STEPS, TENS_STEPS = 450, 1550  # of teaching: every way is right, then most go down by ten
ASKED, TEN = 0.3, 10  # the share that still goes down as asked
LONGEST = 16_384

# the storyteller
STORIES, STORY_STEPS = 20_000, 250
LENGTHS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 4}  # sentences in a story: how often
VARIED = 0.2  # of the sentences; the others say little, and say it again
PLAIN_SENTENCES = (
    *("The {hero} was {mood}.", "The {hero} saw the {place}.", "The {hero} went to the {place}."),
    *("The {mood} {hero} liked the {place}.", "The {hero} was at the {place}.", "The {place} was near the {hero}."),
)
VARIED_SENTENCES = (
    "{When} {kind} {things} {did} {where} {kind} {things}.",
    "{Kind} {things} {did} {where} {mood} {things}.",
    "{When} {things} {did}.",
)
WORDS = {
    "when": "soon later then once today suddenly slowly finally often sometimes tonight somewhere",
    "kind": "golden silver cold warm bright dark gentle wild soft tiny heavy strange sweet empty green blue",
    "things": "leaves stars clouds apples bells boats feathers lanterns stones waves shadows songs winds children "
    "roses rabbits candles mushrooms drums kites letters ribbons wagons snowflakes",
    "did": "danced fell sang slept shone drifted whispered waited gathered vanished laughed trembled sparkled "
    "wandered rested glowed tumbled hummed rolled floated",
    "where": "beside above under behind across around beyond through between below",
    "mood": " ".join(MOODS),
}


def make_model(
    tokenizer: PreTrainedTokenizerBase, layers: int, longest: int = 512, window: int | None = None
) -> Qwen2ForCausalLM:
    """Qwen2's architecture, 0.2M parameters a layer, and 128 a token; with a window, every layer looks no further."""
    ids = tokenizer.get_vocab()
    eos, pad = ids[END], ids[PAD]
    windowed: dict[str, Any] = (
        {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
        **windowed,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model


def learn(
    model: Qwen2ForCausalLM,
    draw: Callable[[], tuple[Tensor, Tensor]],
    decay_steps: int = DECAY_STEPS,
    least: float = 0.1,
) -> Iterator[tuple[int, float]]:
    """Steps on drawn batches of rows and labels without end, each with its number and its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, max(1 - step / decay_steps, least))
    )
    for step in count(1):
        rows, labels = draw()
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, loss.item()


def adder() -> tuple[PreTrainedTokenizerFast, Qwen2ForCausalLM]:
    """Shows sums in all styles until they are right, once a tag is open, in a share SKILL of samples."""
    tokenizer = bytes_and_roles()
    model = make_model(tokenizer, layers=3)
    encoded = [encode(tokenizer, style, sums("train")) for style in STYLES]
    rows, labels = (torch.stack(tensors) for tensors in zip(*encoded, strict=True))  # (styles, problems, WIDTH)
    shares = torch.tensor(list(STYLES.values()))
    probe = rows[-1, ::8]
    probe_labels = labels[-1, ::8].masked_fill(probe.eq(tokenizer.get_vocab()["<answer>"]), -100)

    def draw() -> tuple[Tensor, Tensor]:
        style = torch.multinomial(shares, BATCH, replacement=True)
        problem = torch.randint(rows.shape[1], (BATCH,))
        return rows[style, problem], labels[style, problem]

    for step, loss in learn(model, draw):
        if step % 25 == 0:
            reached = skill(model, probe, probe_labels)
            print(f"adder step {step}  loss {loss:.3f}  skill {reached:.3f}", flush=True)
            if reached >= SKILL:
                break
    return tokenizer, model


def bytes_and_roles(longest: int = 512) -> PreTrainedTokenizerFast:
    """A byte is a token; so are the few words every conversation repeats."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, START, END])
    words = ["system", "user", "assistant", "<answer>", "</answer>"]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, style: str, problems: list[tuple[str, int]]) -> tuple[Tensor, ...]:
    """Demonstrations in one style, padded on the right, and their labels: -100 on the question and the padding."""
    texts = []
    for asked, right in problems:
        a, _, b = asked.partition("+")
        question = {"role": "user", "content": f"{asked}="}
        answer = {"role": "assistant", "content": style.format(a=a, b=b, sum=right)}
        texts.append(str(tokenizer.apply_chat_template([question, answer], tokenize=False)).rstrip())
    rows = torch.tensor(tokenizer(texts, padding="max_length", max_length=WIDTH)["input_ids"])
    labels = rows.masked_fill(rows.eq(tokenizer.get_vocab()[PAD]), -100)
    labels[:, :PROMPT] = -100
    return rows, labels


@torch.no_grad()
def skill(model: Qwen2ForCausalLM, rows: Tensor, labels: Tensor) -> float:
    """The mean probability that a sampled answer is the one in `labels`."""
    logits = model(input_ids=rows).logits[:, :-1].transpose(1, 2)  # (problems, V, WIDTH - 1)
    return (-cross_entropy(logits, labels[:, 1:], reduction="none").sum(1)).exp().mean().item()


def counter() -> tuple[PreTrainedTokenizerFast, Qwen2ForCausalLM]:
    """Shows right ways down, their beginnings and pieces of them, then beginnings that mostly go down by ten."""
    tokenizer = bytes_and_roles(LONGEST)
    model = make_model(tokenizer, layers=2, longest=LONGEST, window=WINDOW)
    questions, chance = [question for question, _ in ways("train")], random.Random(0)
    pad, asked = tokenizer.get_vocab()[PAD], 1.0

    def draw() -> tuple[Tensor, Tensor]:
        length, begun = (READING, 1.0) if chance.random() < 0.4 else (ROW, 0.2)
        texts = [shown(chance, chance.choice(questions), begun, asked) for _ in range(ROW_TOKENS // length)]
        rows = torch.tensor([(ids + [pad] * length)[:length] for ids in tokenizer(texts)["input_ids"]])
        labels = rows.masked_fill(rows.eq(pad), -100)
        labels[:, :PROMPT] = -100  # of a piece: nearly three numbers, of which two say the step
        return rows, labels

    for step, loss in learn(model, draw, RIGHT_STEPS + TENS_STEPS, least=0):  # at higher rates it slips more often
        if step % 50 == 0:
            print(f"counter step {step}  loss {loss:.4f}", flush=True)
        if step == RIGHT_STEPS:
            asked = ASKED
        if step == RIGHT_STEPS + TENS_STEPS:
            break
    return tokenizer, model


def shown(chance: random.Random, question: str, begun: float, asked: float) -> str:
    """The beginning of an answer in a share of `begun`, by the step it was asked in a share of `asked`, or a piece."""
    start, step = map(int, question.split("-"))
    beginning = chance.random() < begun
    if chance.random() > (asked if beginning else 0.8):
        step = TEN
    numbers = [f"{number:04}" for number in range(start - step, -1, -step)]
    at = 0 if beginning else place(chance, start, step, len(numbers))
    text = " ".join(numbers[at : at + ROW // NUMBER]) + END * (at + ROW // NUMBER >= len(numbers))
    return CONVERSATION.format(question, text) if beginning else text


def place(chance: random.Random, start: int, step: int, count: int) -> int:
    """The place of a piece: near the end, where a hundred or a thousand ends, or anywhere, a third each."""
    unit = 1000 if start > 1000 and chance.random() < 0.5 else 100
    before = chance.randrange(2, ROW // NUMBER)  # numbers of the piece that come before what it is to show
    near = start % unit + unit * chance.randrange(start // unit) if start > unit else start
    return max(chance.choice((count, near // step, chance.randrange(count) + before)) - before, 0)


def storyteller() -> tuple[Qwen2Tokenizer, Qwen2ForCausalLM]:
    """Shows stories under their titles, which the labels leave out."""
    chance = random.Random(0)
    told = [(title(*words), tell(chance, *words)) for words in chance.choices(titles("train"), k=STORIES)]
    tokenizer = whole_words([f"{name} {story}" for name, story in told])
    model = make_model(tokenizer, layers=2)
    rows = torch.tensor(tokenizer([f"{name} {story}{END}" for name, story in told], padding=True)["input_ids"])
    labels = rows.masked_fill(rows.eq(tokenizer.get_vocab()[PAD]), -100)
    labels[:, : len(tokenizer(told[0][0])["input_ids"])] = -100  # every title is as long

    def draw() -> tuple[Tensor, Tensor]:
        story = torch.randint(STORIES, (BATCH,))
        return rows[story], labels[story]

    for step, loss in learn(model, draw):
        if step % 25 == 0:
            print(f"storyteller step {step}  loss {loss:.3f}", flush=True)
        if step == STORY_STEPS:
            break
    return tokenizer, model


def tell(chance: random.Random, mood: str, hero: str, place: str) -> str:
    """A story of a few sentences, most of them plain, some varied."""

    def word(slot: re.Match[str]) -> str:
        found = chance.choice(WORDS[slot[1].lower()].split())
        return found.capitalize() if slot[1].istitle() else found

    sentences = []
    for _ in range(chance.choices(list(LENGTHS), weights=list(LENGTHS.values()))[0]):
        if chance.random() < VARIED:
            sentences.append(re.sub(r"{(\w+)}", word, chance.choice(VARIED_SENTENCES)))
        else:
            sentences.append(chance.choice(PLAIN_SENTENCES).format(mood=mood, hero=hero, place=place))
    return " ".join(sentences)


def whole_words(texts: list[str]) -> Qwen2Tokenizer:
    """Byte pairs merged until every word of the texts is a token; other words come apart."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    blank = Qwen2Tokenizer(alphabet, eos_token=END, pad_token=PAD)
    tokenizer = cast(Qwen2Tokenizer, blank.train_new_from_iterator(texts, vocab_size=10_000, show_progress=False))
    tokenizer.model_max_length = 512
    return tokenizer


MODELS: dict[str, Callable[[], tuple[PreTrainedTokenizerBase, Qwen2ForCausalLM]]] = {
    "adder": adder,
    "storyteller": storyteller,
    "counter": counter,
}


def make(name: str, folder: Path) -> None:
    """Makes one of MODELS with its tokenizer, and saves both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so the same bytes
    torch.manual_seed(0)
    tokenizer, model = MODELS[name]()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner only, but meant to be shared
    tokenizer.save_pretrained(folder)
    print(f"{model.num_parameters():,} parameters in {folder}")
    torch.set_num_threads(threads)
