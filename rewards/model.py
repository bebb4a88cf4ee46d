"""`model:NAME`: the score of a Hugging Face sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TOKENS = 16384  # that the classifier reads at once


def model(name: Any) -> Callable[..., list[float]]:
    """A reward function around the classifier `name`, loaded at its first call, or around one that is loaded."""
    loaded: list[tuple[Any, Any]] = []

    def model(prompts: list[Any], completions: list[Any]) -> list[float]:
        if not loaded:
            loaded.append(load(name))
        classifier, tokenizer = loaded[0]
        with on_the_gpu(classifier):
            return classify(classifier, tokenizer, prompts, completions)

    model.in_trainer = True  # type: ignore[attr-defined]  where the GPU is
    return model


def load(name: Any) -> tuple[Any, Any]:
    """The classifier, in main memory, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not isinstance(name, str):
        return name.eval(), AutoTokenizer.from_pretrained(name.config.name_or_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    return classifier.eval(), AutoTokenizer.from_pretrained(name)


@contextmanager
def on_the_gpu(classifier: Any) -> Iterator[None]:
    """The classifier is on the GPU, where there is one, while it scores and no longer."""
    import torch

    home = classifier.device
    try:
        yield classifier.to("cuda" if torch.cuda.is_available() else home)
    finally:
        classifier.to(home)


def classify(classifier: Any, tokenizer: Any, prompts: list[Any], completions: list[Any]) -> list[float]:
    """Scores in the order given; read in batches of similar length."""
    import torch

    encoded = [encode(tokenizer, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    scores = [0.0] * len(encoded)
    while order:
        size = max(1, TOKENS // len(encoded[order[-1]]["input_ids"]))
        batch, order = order[-size:], order[:-size]
        padded = tokenizer.pad([encoded[i] for i in batch], return_tensors="pt").to(classifier.device)
        with torch.no_grad():
            for i, score in zip(batch, classifier(**padded).logits[:, 0].float().tolist(), strict=True):
                scores[i] = score
    return scores


def encode(tokenizer: Any, prompt: Any, completion: Any) -> Any:
    """A conversation by the classifier's own chat template, else question and answer as a pair."""
    if not isinstance(prompt, str) and tokenizer.chat_template:
        return tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)
    question = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    answer = completion if isinstance(completion, str) else completion[-1]["content"]
    return tokenizer(question, answer, truncation=True)
