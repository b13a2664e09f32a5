"""What guidance foresees, as a target: a model learns to write at once what it wrote with two passes a step.

A frozen model is asked for every hidden place with the text and without it, and the two answers mixed as guidance mixes
them. Knows ids and logits; which scenes are hidden is the data's business.

Legend: B scenes, L places, C hidden size, V vocabulary, P places that are targets.

Source: Meng et al., arXiv:2210.03142, section 3.1, there for diffusion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poet.generation.sampling import guide
from poet.model.attention import SceneLayout
from poet.model.transformer import PoetTransformer
from poet.vocabulary import Vocabulary

__all__ = ["GuidedTargets", "GuidedTeacher"]


class GuidedTargets:
    """The targets of one batch.

    Args:
        teacher: the frozen model.
        with_text: (B, L, C), zero in scenes that have no such targets.
        without_text: (B, L, C), likewise.
        taught: (B, L) bool, places that may have them.
        scale: of guidance.
    """

    def __init__(
        self, teacher: PoetTransformer, with_text: Tensor, without_text: Tensor, taught: Tensor, scale: float
    ) -> None:
        self.taught = taught
        self._teacher, self._scale = teacher, scale
        self._with_text, self._without_text = with_text, without_text

    @torch.no_grad()
    def probabilities(self, row: Tensor, column: Tensor) -> Tensor:
        """What guidance foresees for places (row, column), (P,) each: (P, V) float32."""
        logits = self._teacher.logits(self._with_text[row, column - 1])
        if self._scale == 1:
            return logits.softmax(-1)
        other = self._teacher.logits(self._without_text[row, column - 1])
        return guide(logits, other, [self._scale] * len(row)).softmax(-1)


class GuidedTeacher:
    """A frozen model that says what hidden places hold.

    Args:
        model: in evaluation mode; it is this one's from now on, and learns no more.
        vocabulary: says what is text, and what stands for none.
        scale: of guidance; 1 is none, and takes half of the time.
    """

    def __init__(self, model: PoetTransformer, vocabulary: Vocabulary, scale: float) -> None:
        self._model, self._scale = model.requires_grad_(False), scale
        self._text, self._null = vocabulary.text_range, vocabulary.special("<null>")

    @torch.no_grad()
    def targets(self, inputs: Tensor, layout: SceneLayout, positions: Tensor | None = None) -> GuidedTargets:
        """Look at a batch.

        Args:
            inputs: (B, L) int64 ids, <mask> where they are hidden.
            layout: of the same; parallel scenes with a text are taught.
            positions: (B, L) int64 rotary positions; None takes the layout's.

        Returns:
            The targets of those scenes' places.
        """
        text = (inputs >= self._text[0]) & (inputs < self._text[1]) & layout.parallel
        taught = text.any(1)
        states = torch.zeros(2, *inputs.shape, self._model.config.hidden_size, device=inputs.device)
        if bool(taught.any()):
            chosen = layout.select(taught)
            places = None if positions is None else positions[taught]
            asked = (inputs, inputs.masked_fill(text, self._null))
            for number, ids in enumerate(asked if self._scale != 1 else asked[:1]):
                states[number, taught] = self._model(ids[taught], chosen, places).float()
        return GuidedTargets(self._model, states[0], states[1], layout.parallel & taught[:, None], self._scale)
