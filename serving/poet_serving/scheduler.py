"""vLLM's scheduler, taught that the two requests of a guided pair are one: in every step both or neither.

vLLM admits and preempts one request at a time. Before it does, this scheduler looks ahead by the same counts of slots,
ids and cache pages: whole pairs are preempted where the pages of the next ids are not there, and requests are held back
from vLLM's view that would be admitted without their other half. What vLLM then does by itself parts no pair; should it
ever, `poet_serving.guidance` stops the engine rather than writing wrong ids.

Requests are served in the order of arrival. Pages are counted for every kind of cache that a model has. This module
knows nothing of ids and logits.
"""

import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from poet_serving.guidance import half_of, half_of_arguments
from poet_serving.scenes import ScenePages

__all__ = ["PairScheduler"]


class PairScheduler(Scheduler):  # type: ignore[misc]
    """See the module. The first request of a pair waits outside the queue until the second has arrived."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._single: dict[str, Request] = {}
        """Pair to its first request, whose other half is yet to come."""
        self._partners: dict[str, Request] = {}
        """Request id to the other half, for all that wait or run."""

    def add_request(self, request: Request) -> None:
        """Queue a request, or a pair when its second half arrives."""
        pooling = request.pooling_params
        half = half_of(request.sampling_params) if pooling is None else half_of_arguments(pooling.extra_kwargs or {})
        if half is None:
            super().add_request(request)
            return
        first = self._single.pop(half.pair, None)
        if first is None:
            self._single[half.pair] = request
            return
        self._partners |= {first.request_id: request, request.request_id: first}
        super().add_request(first)
        super().add_request(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """End requests from outside; one half of a pair takes the other with it."""
        if request_ids is None:
            named = {*self.requests, *(request.request_id for request in self._single.values())}
        else:
            named = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        named |= {self._partners[name].request_id for name in named & self._partners.keys()}
        ended = []
        for pair, request in list(self._single.items()):
            if request.request_id in named:
                del self._single[pair]
                request.status = finished_status
                ended.append(request)
        return ended + super().finish_requests(named, finished_status)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Choose the ids of the next step."""
        if not self._partners:
            return super().schedule(throttle_prefills)
        held = list(self.waiting) if self._preempt_pairs() else self._find_misfits()
        self.waiting.remove_requests(held)
        try:
            return super().schedule(throttle_prefills)
        finally:
            for request in held:
                self.waiting.add_request(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self._partners.pop(request.request_id, None)
        return super()._free_request(request, delay_free_blocks)

    def _unit(self, request: Request) -> list[Request]:
        partner = self._partners.get(request.request_id)
        return [request] if partner is None else [request, partner]

    def _preempt_pairs(self) -> bool:
        """Preempt from the latest arrival on until the pages of all running requests' next ids are free."""
        preempted = False
        while sum(map(self._pages_wanted, self.running)) > self._free_pages():
            unit = [request for request in self.running if request in self._unit(self.running[-1])]
            for request in reversed(unit):
                self.running.remove(request)
                self._preempt_request(request, time.monotonic())
            preempted = True
        return preempted

    def _find_misfits(self) -> list[Request]:
        """The waiting requests from the first on that does not fit with its other half into the next step."""
        slots = self.max_num_running_reqs - len(self.running)
        ids = self.max_num_scheduled_tokens - len(self.running)
        pages = self._free_pages() - sum(map(self._pages_wanted, self.running))
        pages -= self.kv_cache_manager.watermark_blocks
        waiting, admitted = list(self.waiting), set()
        for request in waiting:
            if request.request_id in admitted:
                continue
            unit = self._unit(request)
            slots -= len(unit)
            ids -= sum(one.num_tokens for one in unit)
            pages -= sum(map(self._pages_wanted, unit))
            if min(slots, ids, pages) < 0:
                break
            admitted |= {one.request_id for one in unit}
        return [request for request in waiting if request.request_id not in admitted]

    def _free_pages(self) -> int:
        return int(self.kv_cache_manager.block_pool.get_num_free_blocks())

    def _pages_wanted(self, request: Request) -> int:
        """Pages that the request lacks for all its ids, over all kinds of cache."""
        wanted = 0
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            held = len(manager.req_to_blocks.get(request.request_id, ()))
            if isinstance(manager, ScenePages):
                held = max(held, manager.pages_before(request.num_tokens))
            wanted += -(-request.num_tokens // manager.block_size) - held
        return wanted
