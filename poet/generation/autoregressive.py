"""Writing outputs one id after another with the reference transformer.

The rows of a batch are padded on the left, so that all prefixes end at one column and all outputs advance together.
A guided output has a second row, which starts from the prefix to move away from and is told the same ids.
It knows ids and grammars; it does not know codes, tasks, bundles or other engines.

Legend: B rows, guides' included, P columns of the longest prefix, L columns computed in one step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from poet.errors import ShapeError
from poet.generation.context import build_cache
from poet.generation.sampling import SamplingConfig, build_generator, guide, penalise, sample
from poet.grammar import Grammar, GrammarState, max_output_length
from poet.model.attention import SceneLayout
from poet.model.transformer import PoetTransformer

__all__ = ["write_outputs"]

FILLER = 0
"""Stands where a row has no id: left of its prefix and after its end. No place that counts ever sees it."""


@torch.inference_mode()
def write_outputs(
    model: PoetTransformer,
    prefixes: Sequence[Sequence[int]],
    grammars: Sequence[Grammar],
    configs: Sequence[SamplingConfig],
    guides: Sequence[Sequence[int] | None] | None = None,
    progress: Callable[[int], None] | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
    watch: Callable[[int, Sequence[int]], None] | None = None,
) -> list[list[int]]:
    """Write the output of each prefix, all rows in one batch.

    Ids that the grammar leaves no choice about are written without asking the model; their keys and values are computed
    together with the next id that it is asked for.

    Args:
        model: in evaluation mode.
        prefixes: at least one id each, in [0, vocab_size).
        grammars: what each output may be.
        configs: how each output draws, and how far it is moved away from its guide.
        guides: of each output the prefix that guidance moves it away from, or None; None guides none.
        progress: called after every column with the number of ids written so far in all outputs.
        contexts: of each output the ids of its film's earlier scenes, () where there is none; None: of no output.
        watch: called after every column with each output that has grown: its number and its ids so far.

    Returns:
        The output ids of each prefix, complete in its grammar.

    Raises:
        ShapeError: there is no prefix, an empty one, or not as many guides or contexts as prefixes.
    """
    guides = [None] * len(prefixes) if guides is None else guides
    if len(guides) != len(prefixes):
        raise ShapeError(
            f"there must be a guide, or None, for each of the {len(prefixes)} prefixes, got {len(guides)}."
        )
    steering = [ids for ids in guides if ids is not None]
    guided_rows = [row for row, ids in enumerate(guides) if ids is not None]
    guide_rows = {row: len(prefixes) + place for place, row in enumerate(guided_rows)}
    prefixes = [*prefixes, *steering]
    if not prefixes or not all(prefixes):
        raise ShapeError(f"there must be one prefix or more of one id or more, got {[len(ids) for ids in prefixes]}.")
    device = model.model.norm.weight.device
    states = [GrammarState(grammar) for grammar in grammars]
    generators = [build_generator(config) for config in configs]
    outputs: list[list[int]] = [[] for _ in states]
    columns = _left_padded(prefixes)
    max_len = columns.shape[1] + max(map(max_output_length, grammars))
    pasts = [()] * len(grammars) if contexts is None else list(contexts)
    if len(pasts) != len(grammars):
        raise ShapeError(f"there must be a past, or (), for each of the {len(grammars)} outputs, got {len(pasts)}.")
    pasts += [pasts[row] for row in guided_rows]
    cache, layout, positions = build_cache(model, pasts, _layout(prefixes, max_len))
    while not all(state.done for state in states):
        choosing = [row for row, state in enumerate(states) if not state.done and not _forced(state)]
        column = [FILLER if state.done else state.low for state in states]
        if choosing:
            stop = cache.length + columns.shape[1]
            hidden = model(columns.to(device), layout, positions[:, cache.length : stop], cache)
            logits = model.logits(hidden[choosing, -1])
            guided = [place for place, row in enumerate(choosing) if row in guide_rows]
            if guided:
                steered_from = model.logits(hidden[[guide_rows[choosing[place]] for place in guided], -1])
                scales = [configs[choosing[place]].guidance_scale for place in guided]
                logits = logits.float()
                logits[guided] = guide(logits[guided], steered_from, scales)
            for place, row in enumerate(choosing):
                penalise(logits[place], outputs[row], configs[row])
            drawn = sample(
                logits,
                [states[row].allowed for row in choosing],
                [configs[row] for row in choosing],
                [generators[row] for row in choosing],
            )
            for row, id in zip(choosing, drawn.tolist(), strict=True):
                column[row] = id
            columns = columns[:, :0]
        for row, (state, output, id) in enumerate(zip(states, outputs, column, strict=True)):
            if not state.done:
                state.advance(id)
                output.append(id)
                if watch is not None:
                    watch(row, output)
        column += [column[row] for row in guide_rows]
        columns = torch.cat((columns, torch.tensor(column)[:, None]), 1)
        if progress is not None:
            progress(sum(map(len, outputs)))
    return outputs


def _forced(state: GrammarState) -> bool:
    low, high, stop = state.allowed
    return stop is None and high == low + 1


def _left_padded(prefixes: Sequence[Sequence[int]]) -> Tensor:
    """(B, P) int64 on the CPU."""
    longest = max(map(len, prefixes))
    return torch.tensor([[FILLER] * (longest - len(ids)) + list(ids) for ids in prefixes])


def _layout(prefixes: Sequence[Sequence[int]], max_len: int) -> SceneLayout:
    """The layout of prefixes and the outputs to come: each row's ids end at the right edge."""
    prefix_lengths = torch.tensor([len(ids) for ids in prefixes])
    lengths = prefix_lengths + max_len - int(prefix_lengths.max())
    return SceneLayout.from_prefix_lengths(prefix_lengths, lengths, max_len, left_padded=True)
