"""The parts of an engine of vLLM's that stay when it has gone."""

from __future__ import annotations

import gc


def forget() -> None:
    """Lets go of an engine that never came up, or was closed: torch and vLLM may refer to it, and hold its memory."""
    from torch._dynamo import convert_frame
    from vllm.device_allocator.cumem import CuMemAllocator
    from vllm.model_executor.layers import rotary_embedding

    getattr(convert_frame, "_bytecode_hooks", {}).clear()  # each is a method of its model
    getattr(rotary_embedding, "_ROPE_DICT", {}).clear()  # as vLLM does when an engine ends
    gc.collect()
    getattr(CuMemAllocator.instance, "release_pools", lambda: None)()
