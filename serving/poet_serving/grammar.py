"""Legal ids in vLLM: a logits processor under which no request can write an id that its grammar does not allow.

A request carries its grammar in `SamplingParams.extra_args` as plain lists (`poet.grammar.grammar_to_json`), because
they cross process borders. Where a request stands is read off its output alone, so preemption changes nothing. This
module does not know what the ids mean. N: requests of a step; V: padded vocabulary.
"""

import math
from collections import defaultdict
from typing import Any

from torch import Tensor
from vllm.sampling_params import SamplingParams

from poet.errors import ConfigError
from poet.grammar import Allowed, Grammar, GrammarState, grammar_from_json, grammar_to_json, max_output_length
from poet_serving.processors import FollowingProcessor

__all__ = ["GRAMMAR_KEY", "GrammarLogitsProcessor", "final_id", "grammar_arguments"]

GRAMMAR_KEY = "poet_grammar"


def final_id(grammar: Grammar) -> int | None:
    """Return the id that ends an output of open length, None where the number of ids says when it ends.

    Raises:
        ConfigError: The length is open and no id stands at the end and nowhere else.
    """
    if all(segment.stop is None for segment in grammar):
        return None
    *before, last = grammar
    final = last.stop if last.stop is not None else last.low
    fixed = last.stop is not None or (last.count == 1 and last.high == last.low + 1)
    if not fixed or any(segment.low <= final < segment.high or segment.stop == final for segment in before):
        raise ConfigError(
            "a grammar of open length must end in one id that stands nowhere else in it, such as <eos>; "
            f"got {grammar_to_json(grammar)}."
        )
    return final


def grammar_arguments(grammar: Grammar) -> dict[str, Any]:
    """Return what `SamplingParams` need so that a request follows the grammar and ends where it ends.

    Raises:
        ConfigError: See `final_id`; or the grammar is empty.
    """
    if not grammar:
        raise ConfigError("a grammar must have at least one segment, got none.")
    final = final_id(grammar)
    return {
        "max_tokens": max_output_length(grammar),
        "stop_token_ids": None if final is None else [final],
        "extra_args": {GRAMMAR_KEY: grammar_to_json(grammar)},
    }


class GrammarLogitsProcessor(FollowingProcessor[GrammarState]):
    """Sets the logits of all ids to -inf that a request's grammar does not allow at its next place.

    Requests without a grammar are left alone.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose grammar is malformed, or that could outlive its grammar.

        Raises:
            ValueError: vLLM answers the request with its message.
        """
        given = (sampling_params.extra_args or {}).get(GRAMMAR_KEY)
        if given is None:
            return
        due = grammar_arguments(grammar_from_json(given))
        limit = sampling_params.max_tokens
        if limit is None or limit > due["max_tokens"]:
            raise ConfigError(
                f"max_tokens must be at most the {due['max_tokens']} ids of the grammar, got {limit}. "
                "Build the request with poet_serving.grammar.grammar_arguments()."
            )
        if not set(due["stop_token_ids"] or ()) <= set(sampling_params.stop_token_ids or ()):
            raise ConfigError(
                f"stop_token_ids must hold {due['stop_token_ids']}, which ends this grammar, got "
                f"{sampling_params.stop_token_ids}."
            )

    @staticmethod
    def remember(params: SamplingParams) -> GrammarState | None:
        """Return the beginning of a request's grammar."""
        given = (params.extra_args or {}).get(GRAMMAR_KEY)
        return None if given is None else GrammarState(grammar_from_json(given))

    def apply(self, logits: Tensor) -> Tensor:
        """Mask one step in place.

        Args:
            logits: (N, V) float32.

        Returns:
            The same tensor.
        """
        due: dict[Allowed, list[int]] = defaultdict(list)
        for row, (state, output_ids) in self.followed.items():
            for written in output_ids[state.place :]:
                state.advance(written)
            if not state.done:
                due[state.allowed].append(row)
        for allowed, rows in due.items():
            # Clips of one batch stand mostly at the same place: then two fills mask all of them.
            if len(rows) == len(logits):
                _mask(logits, allowed)
            else:
                for row in rows:
                    _mask(logits[row : row + 1], allowed)
        return logits


def _mask(logits: Tensor, allowed: Allowed) -> None:
    """Fill with -inf all of (R, V) but [low, high) and the stop id."""
    stop = None if allowed.stop is None else logits[:, allowed.stop].clone()
    logits[:, : allowed.low] = -math.inf
    logits[:, allowed.high :] = -math.inf
    if stop is not None:
        logits[:, allowed.stop] = stop
