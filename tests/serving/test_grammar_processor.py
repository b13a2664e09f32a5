"""The logits processor on its own: no engine, no model."""

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from poet.errors import ConfigError
from poet.grammar import Grammar, Segment, allowed
from poet_serving.grammar import GRAMMAR_KEY, GrammarLogitsProcessor, final_id, grammar_arguments

NUM_IDS = 53
FIXED = (Segment(1, 3, 4), Segment(5, 11, 23), Segment(2, 23, 31))
OPEN = (Segment(1, 3, 4), Segment(7, 11, 23, stop=5), Segment(1, 2, 3))


def processor_of(*rows: tuple[Grammar | None, list[int]]) -> GrammarLogitsProcessor:
    processor = GrammarLogitsProcessor(None, torch.device("cpu"), False)
    added = [
        (row, SamplingParams() if grammar is None else SamplingParams(**grammar_arguments(grammar)), None, output)
        for row, (grammar, output) in enumerate(rows)
    ]
    processor.update_state(BatchUpdate(batch_size=len(rows), removed=[], added=added, moved=[]))
    return processor


def legal(processor: GrammarLogitsProcessor, rows: int) -> list[set[int]]:
    logits = processor.apply(torch.zeros(rows, NUM_IDS))
    assert set(logits.unique().tolist()) <= {0.0, -torch.inf}
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


def test_each_row_may_write_what_its_own_grammar_allows_at_its_own_place() -> None:
    outputs = [[], [3, 11], [3, 11, 12, 13, 14, 15], [7, 7]]
    processor = processor_of((FIXED, outputs[0]), (FIXED, outputs[1]), (FIXED, outputs[2]), (None, outputs[3]))
    assert legal(processor, 4) == [{3}, set(range(11, 23)), set(range(23, 31)), set(range(NUM_IDS))]


def test_rows_at_one_place_are_masked_alike() -> None:
    assert legal(processor_of((FIXED, [3]), (FIXED, [3]), (FIXED, [3])), 3) == 3 * [set(range(11, 23))]


def test_an_output_is_followed_as_vllm_extends_it() -> None:
    output: list[int] = []
    processor = processor_of((OPEN, output))
    for written in (3, 11, 22, 5, 2):
        low, high, stop = allowed(OPEN, output)
        assert legal(processor, 1) == [set(range(low, high)) | ({stop} if stop is not None else set())]
        output.append(written)


def test_a_text_of_the_largest_length_must_stop() -> None:
    assert legal(processor_of((OPEN, [3, *7 * [12]])), 1) == [{5}]


def test_after_the_stop_the_next_segment_is_due() -> None:
    assert legal(processor_of((OPEN, [3, 12, 5])), 1) == [{2}]


def test_likelihoods_of_legal_ids_stay_as_they_are() -> None:
    logits = torch.randn(2, NUM_IDS)
    masked = processor_of((OPEN, [3]), (FIXED, [3])).apply(logits.clone())
    assert torch.equal(masked[0, 11:23], logits[0, 11:23])
    assert masked[0, 5] == logits[0, 5]
    assert torch.equal(masked[1, 11:23], logits[1, 11:23])


def test_requests_keep_their_grammars_when_rows_move_and_leave() -> None:
    processor = processor_of((FIXED, []), (FIXED, [3]), (OPEN, [3]))
    processor.update_state(
        BatchUpdate(batch_size=2, removed=[0], added=[], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    )
    assert legal(processor, 2) == [set(range(11, 23)) | {5}, set(range(11, 23))]


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ([], "at least one segment"),
        ([[1, 3]], "count, low, high"),
        ([[1, 3, 3]], "low < high"),
        ([["one", 3, 4]], "of integers"),
        ("abc", "lists"),
        ([[7, 11, 23, 5], [2, 30, 31]], "must end in one id"),
    ],
)
def test_a_bad_grammar_is_refused(grammar: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrammarLogitsProcessor.validate_params(SamplingParams(max_tokens=5, extra_args={GRAMMAR_KEY: grammar}))


def test_a_request_must_not_outlive_its_grammar() -> None:
    arguments = grammar_arguments(FIXED)
    GrammarLogitsProcessor.validate_params(SamplingParams(**arguments))
    with pytest.raises(ValueError, match="at most the 8 ids"):
        GrammarLogitsProcessor.validate_params(SamplingParams(**{**arguments, "max_tokens": 9}))
    with pytest.raises(ValueError, match="stop_token_ids"):
        GrammarLogitsProcessor.validate_params(SamplingParams(**{**grammar_arguments(OPEN), "stop_token_ids": []}))


def test_a_request_without_grammar_passes() -> None:
    GrammarLogitsProcessor.validate_params(SamplingParams())


def test_only_an_open_grammar_needs_an_id_that_ends_it() -> None:
    assert final_id(FIXED) is None
    assert final_id(OPEN) == 2
    assert final_id((Segment(7, 11, 23, stop=5),)) == 5
    with pytest.raises(ConfigError, match="must end in one id"):
        final_id((Segment(7, 11, 23, stop=5), Segment(1, 11, 12)))
