"""Completions from what vLLM says of its requests: those that ended, and those that were cut off."""

from __future__ import annotations

from typing import Any

from nanorlhf.engines.base import Completion


def completion(output: Any) -> Completion:
    """The output of a finished request, as a Completion."""
    written = output.outputs[0]
    assert written.finish_reason in {"stop", "length"}, f"request {output.request_id} ended by {written.finish_reason}"
    ids, logprobs = list(written.token_ids), list(written.logprobs.logprobs)
    assert len(ids) == len(logprobs), "a log-probability for every token"
    return Completion(int(output.request_id), ids, logprobs, stopped=written.finish_reason == "stop")


def cut_off(state: Any) -> Completion:
    """A request as far as it is, by the state that vLLM keeps of it: only those that ended have an output."""
    ids, logprobs = list(state.detokenizer.output_token_ids), list(state.logprobs_processor.logprobs.logprobs)
    assert len(ids) == len(logprobs), "a log-probability for every token"
    return Completion(int(state.external_req_id), ids, logprobs, stopped=False, ended=False)
