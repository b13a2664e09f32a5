"""How a step of vLLM is cut into virtual requests."""

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from poet.errors import ConfigError
from poet_serving.attention import PrefixRule, Span, virtual_requests

RULE = PrefixRule()


def step(query_lengths: list[int], stops: list[int], prompt_lengths: list[int] | None) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *torch.tensor(query_lengths).cumsum(0).tolist()], dtype=torch.int32)
    requests = len(stops)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(stops, dtype=torch.int32),
        num_reqs=requests,
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(query_lengths),
        max_seq_len=max(stops),
        block_table_tensor=10 * torch.arange(requests, dtype=torch.int32)[:, None] + torch.arange(3, dtype=torch.int32),
        slot_mapping=torch.arange(int(starts[-1])),
        rswa_prefix_lens=None if prompt_lengths is None else torch.tensor(prompt_lengths, dtype=torch.int32),
    )


def spans(query_lengths: list[int], stops: list[int], prompt_lengths: list[int]) -> list[Span]:
    starts = [sum(query_lengths[:n]) for n in range(len(query_lengths) + 1)]
    return RULE.spans(starts, stops, prompt_lengths)


def test_a_new_prompt_is_read_both_ways() -> None:
    assert spans([7], [7], [7]) == [Span(request=0, start=0, stop=7, causal=False)]


def test_a_written_id_is_causal() -> None:
    assert spans([1], [12], [7]) == [Span(request=0, start=11, stop=12, causal=True)]


def test_a_preempted_request_is_cut_where_its_prompt_ends() -> None:
    assert spans([12], [12], [7]) == [Span(0, 0, 7, causal=False), Span(0, 7, 12, causal=True)]


def test_spans_cover_a_mixed_step_once_and_in_order() -> None:
    query_lengths, stops = [1, 11, 5, 1], [9, 11, 5, 3]
    cut = spans(query_lengths, stops, prompt_lengths=[7, 7, 5, 2])
    assert [(span.request, span.causal) for span in cut] == [(0, True), (1, False), (1, True), (2, False), (3, True)]
    for request, (length, stop) in enumerate(zip(query_lengths, stops, strict=True)):
        places = [place for span in cut if span.request == request for place in range(span.start, span.stop)]
        assert places == list(range(stop - length, stop))


def test_virtual_requests_share_their_requests_pages() -> None:
    whole = step([1, 11, 5], [9, 11, 5], [7, 7, 5])
    cut = virtual_requests(whole, spans([1, 11, 5], [9, 11, 5], [7, 7, 5]))
    assert cut.num_reqs == 4
    assert cut.query_start_loc.tolist() == [0, 1, 8, 12, 17]
    assert cut.seq_lens.tolist() == [9, 7, 11, 5]
    assert cut.block_table_tensor[:, 0].tolist() == [0, 10, 10, 20]
    assert cut.slot_mapping is whole.slot_mapping
    assert (cut.max_query_len, cut.max_seq_len) == (7, 11)


def test_the_kernel_gets_flags_of_four_bytes_only_where_spans_differ() -> None:
    both = virtual_requests(step([12], [12], [7]), spans([12], [12], [7]))
    assert isinstance(both.causal, torch.Tensor)
    assert (both.causal.dtype, both.causal.tolist()) == (torch.int32, [0, 1])
    assert virtual_requests(step([7, 5], [7, 5], [7, 5]), spans([7, 5], [7, 5], [7, 5])).causal is False
    assert virtual_requests(step([2], [9], [7]), spans([2], [9], [7])).causal is True


def test_missing_prompt_lengths_are_an_error_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="rswa_window"):
        RULE.prompt_lengths(step([7], [7], None))
