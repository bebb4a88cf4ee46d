"""`model:NAME`: the score of a Hugging Face sequence classifier with one output, or of one that a run here trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanorlhf.data.templates import conversation_ids
from nanorlhf.errors import UsageError, first_line

TOKENS = 16384  # that the classifier reads at once


def model(name: Any) -> Callable[..., list[float]]:
    """A reward function around the classifier `name`, loaded at its first call, or around one that is loaded."""
    if isinstance(name, str):
        name = find(name)
    classifier = Classifier(name)

    def model(prompts: list[Any], completions: list[Any]) -> list[float]:
        with classifier.on_the_gpu() as loaded:
            return classify(loaded, classifier.tokenizer, prompts, completions)

    model.in_trainer = True  # type: ignore[attr-defined]  where the GPU is
    model.classifier = classifier  # type: ignore[attr-defined]  for the memory plan
    return model


def find(name: str) -> str:
    """The classifier's folder or its name on the hub; refuses one that is not there, before anything is loaded."""
    from transformers import AutoConfig

    trained = Path(name) / "model"
    found = str(trained) if trained.is_dir() else name
    try:
        AutoConfig.from_pretrained(found, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = "a reward model's own code is never run" if "trust_remote_code" in str(error) else first_line(error)
        raise UsageError(f"reward 'model:{name}' cannot be loaded: {why}") from None
    return found


class Classifier:
    """A sequence classifier with its tokenizer: in main memory, unless it is moved."""

    def __init__(self, name: Any) -> None:
        self.name = name
        self.loaded: Any = None
        self.tokenizer: Any = None

    def load(self) -> Any:
        """The model, read from where it lies the first time."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if self.loaded is None:
            if isinstance(self.name, str):
                kind = AutoModelForSequenceClassification
                self.loaded = kind.from_pretrained(self.name, num_labels=1, trust_remote_code=False).eval()
                self.tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
            else:
                self.loaded = self.name.eval()
                self.tokenizer = AutoTokenizer.from_pretrained(self.name.config.name_or_path)
            name_padding(self.tokenizer, self.loaded.config)
        return self.loaded

    def leave(self) -> None:
        """Goes to main memory; what was never loaded is there already."""
        if self.loaded is not None:
            self.loaded.to("cpu")

    def enter(self, device: Any) -> None:
        """Comes to the GPU."""
        self.load().to(device)

    @contextmanager
    def on_the_gpu(self) -> Iterator[Any]:
        """It is on the GPU, if there is one, while it scores, and multiplies in TF32; afterwards back where it was."""
        import torch

        loaded, precision = self.load(), torch.get_float32_matmul_precision()
        home, cuda = loaded.device, torch.cuda.is_available()
        try:
            torch.set_float32_matmul_precision("high" if cuda else precision)
            yield loaded.to("cuda" if cuda else home)
        finally:
            torch.set_float32_matmul_precision(precision)
            loaded.to(home)

    def footprint(self, longest: int) -> tuple[int, int]:
        """Bytes of its weights, and roughly those it works in with completions of so many tokens."""
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        if not isinstance(self.name, str):
            about, size = self.name.config, sum(p.nbytes for p in self.name.parameters())
            skeleton, item = self.name, self.name.dtype.itemsize
        else:
            about: Any = AutoConfig.from_pretrained(self.name, num_labels=1, trust_remote_code=False)
            item = (about.dtype or torch.float32).itemsize
            with torch.device("meta"):
                skeleton = AutoModelForSequenceClassification.from_config(about)
            size = item * sum(p.numel() for p in skeleton.parameters())
        text = about.get_text_config()
        values = 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size) + 8 * text.hidden_size
        if not skeleton._supports_sdpa:  # noqa: SLF001  its attention holds every token's scores for every other
            values += 4 * text.num_attention_heads * min(longest, text.max_position_embeddings)
        return size, TOKENS * values * item


def name_padding(tokenizer: Any, about: Any) -> None:
    """Chooses what pads, if nothing is named: a token that ends no conversation, for the score is read before it."""
    if tokenizer.pad_token is None and about.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(about.pad_token_id)
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.eos_token
    about.pad_token_id = tokenizer.pad_token_id


def classify(classifier: Any, tokenizer: Any, prompts: list[Any], completions: list[Any]) -> list[float]:
    """Scores in the order given; read in batches of similar length."""
    import torch

    encoded = [conversation_ids(tokenizer, *turns) for turns in zip(prompts, completions, strict=True)]
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
