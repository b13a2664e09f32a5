"""The transformer in a Hugging Face shell: `AutoModelForCausalLM.from_pretrained(bundle)`, `generate()`, PEFT, Trainer.

The shell adds no arithmetic: attention, layers and norms are those of `poet.model.transformer`. A row is one scene, of
which the whole prompt is the prefix. Importing this module registers both classes with transformers. It does not know
grammars: its `generate()` may write any id.

Legend: B rows, L places computed now, S places so far (cache and now), V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers import initialization as guarded
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from poet.errors import ShapeError
from poet.model.attention import PADDING, SceneLayout
from poet.model.config import MODEL_TYPE, PoetConfig
from poet.model.superresolution import UPSAMPLER_TYPE
from poet.model.transformer import (
    INITIAL_DEVIATION,
    Backbone,
    KeyValueCache,
    LayerCache,
    RMSNorm,
    residual_deviation,
)
from poet.vocabulary import SPECIAL_NAMES

__all__ = ["PoetForCausalLM", "PoetHuggingFaceConfig", "PoetUpsamplerConfig"]

IGNORED = -100
"""The label of places that carry no loss."""


class PoetHuggingFaceConfig(Qwen3Config):  # type: ignore[no-untyped-call]
    """A bundle's config.json as transformers reads it: Qwen3's keys and Poet's own.

    `PoetConfig.from_huggingface_dict` checks it when a model is built.
    """

    model_type = MODEL_TYPE

    scene_length: int | None = None
    poet_fingerprint: str = ""
    trained_tasks: list[str] | None = None
    trained_parallel: bool | None = None
    trained_films: int | None = None
    pad_token_id: int | None = SPECIAL_NAMES.index("<pad>")
    bos_token_id: int | None = SPECIAL_NAMES.index("<bos>")
    eos_token_id: int | list[int] | None = SPECIAL_NAMES.index("<eos>")

    @property
    def poet(self) -> PoetConfig:
        """The transformer's shape. Raises ConfigError if it is none."""
        return PoetConfig.from_huggingface_dict(self.to_dict())


class PoetUpsamplerConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """An upsampler's config.json as transformers and vLLM read it: its shape under `upsampler`.

    `poet.model.weights.load_upsampler` checks it.
    """

    model_type = UPSAMPLER_TYPE

    upsampler: dict[str, Any] | None = None
    video_tokenizer: str = ""
    max_position_embeddings: int = 2**20  # any grid: the upsampler's positions are those within its windows

    @property
    def vocab_size(self) -> int:
        """Video codes, and one id more where none is known."""
        return 1 + int((self.upsampler or {})["codebook_size"])

    @property
    def hidden_size(self) -> int:
        """Channels."""
        return int((self.upsampler or {})["hidden_size"])

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return int((self.upsampler or {})["num_layers"])

    @property
    def num_attention_heads(self) -> int:
        """Heads of a layer."""
        return int((self.upsampler or {})["num_heads"])


class PoetForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The reference transformer under the interface of transformers' causal language models."""

    config_class = PoetHuggingFaceConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PoetHuggingFaceConfig) -> None:
        super().__init__(config)
        shape = config.poet
        self.model = Backbone(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw a module's weights as `poet.model.transformer.initialise` does; spares those that were loaded."""
        if isinstance(module, RMSNorm):
            guarded.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            writers = [part for layer in self.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
            writes_residual = any(module is part for part in writers)
            deviation = residual_deviation(self.config.poet) if writes_residual else INITIAL_DEVIATION
            guarded.normal_(module.weight, std=deviation)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor | Cache, ...]:
        """Score the next id at every place, and the loss where labels are given.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, S), 0 at padding on either side; None: there is none.
            position_ids: (B, L) int64; None counts each row's ids from 0.
            past_key_values: keys and values of the S - L places before; extended.
            prefix_lengths: (B,) int64, ids of each row's prefix, padding not counted. None: with labels, all ids before
                the first label that counts (a prefix carries no loss); without, the whole row, as `generate()` has it.
            labels: (B, L) int64, aligned with `input_ids`; -100 carries no loss. Only without cache.
            use_cache: whether to return keys and values; None takes the config's.
            logits_to_keep: score only so many last places (0 is all), or the places of this index.
            return_dict: False returns a tuple.

        Returns:
            `loss` (), float32, the mean over labels that count; `logits` (B, L or fewer, V); `past_key_values`.

        Raises:
            ShapeError: the arguments do not fit each other.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        stop = past + input_ids.shape[1]
        mask = (
            torch.ones_like(input_ids).new_ones(input_ids.shape[0], stop) if attention_mask is None else attention_mask
        )
        if mask.shape != (input_ids.shape[0], stop):
            raise ShapeError(
                f"attention_mask must be (B, S) = {(input_ids.shape[0], stop)} with the {past} cached places, "
                f"got {tuple(mask.shape)}."
            )
        if labels is not None and (labels.shape != input_ids.shape or past):
            raise ShapeError(
                f"labels must be (B, L) = {tuple(input_ids.shape)} and need a pass without cache, "
                f"got {tuple(labels.shape)} after {past} cached places."
            )
        if prefix_lengths is None:
            prefix_lengths = mask.sum(1) if labels is None else _places_before_labels(labels, mask)
        layout = _one_scene(mask.bool(), prefix_lengths)
        if past and input_ids.shape[1] > 1 and bool(layout.prefix[:, past:].any()):
            raise ShapeError(
                "a prefix must be computed in one piece: its ids see each other. Do not cut it into chunks."
            )
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache) and labels is None:
            past_key_values = DynamicCache(config=self.config)
        cache = None if past_key_values is None else _SharedCache(past_key_values, past, self.config.poet)
        hidden = self.model(input_ids, layout, position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss: Any = None
        if labels is not None:
            scores = logits if hidden[:, kept].shape == hidden.shape else self.lm_head(hidden)
            loss = functional.cross_entropy(
                scores[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def generate(self, inputs: Tensor | None = None, *positional: Any, **arguments: Any) -> Any:
        """Write ids after prompts; each whole prompt is its row's prefix.

        Args:
            inputs: (B, L) int64, also as `input_ids`; padded on the left.
            *positional: those of `GenerationMixin.generate` after the first.
            **arguments: those of `GenerationMixin.generate`. Without `attention_mask`, the places that hold the id of
                <pad> are padding. `prefix_lengths` (B,) continues an output: what follows the prefix is causal.

        Returns:
            As `GenerationMixin.generate`.
        """
        ids = arguments.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ShapeError("generate() must be given a prompt as inputs or input_ids, got none.")
        mask = arguments.pop("attention_mask", None)
        mask = (ids != self.config.pad_token_id).long() if mask is None else mask
        prefix_lengths = arguments.pop("prefix_lengths", None)
        prefix_lengths = mask.sum(1) if prefix_lengths is None else prefix_lengths
        arguments |= {"attention_mask": mask, "prefix_lengths": prefix_lengths}
        return super().generate(ids, *positional, **arguments)  # type: ignore[misc]


def _one_scene(mask: Tensor, prefix_lengths: Tensor) -> SceneLayout:
    """The layout of rows of one scene each, padded on either side; mask is (B, S) bool."""
    nothing = torch.zeros_like(mask)
    prefix = mask & (mask.cumsum(1) <= prefix_lengths[:, None])
    return SceneLayout(torch.where(mask, 0, PADDING), nothing.long(), prefix, nothing, films=False)


def _places_before_labels(labels: Tensor, mask: Tensor) -> Tensor:
    """(B,) int64: ids before the first label that counts, padding not among them."""
    nothing_yet = (labels != IGNORED).cumsum(1) == 0
    return (nothing_yet & mask.bool()).sum(1)


class _SharedLayer(LayerCache):
    """One layer of a transformers cache, under the reference's interface."""

    def __init__(self, cache: Cache, layer: int, length: int) -> None:
        self.cache, self.layer, self.length = cache, layer, length

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.length += key.shape[2]
        keys, values = self.cache.update(key, value, self.layer)
        # A static cache returns all of its room.
        return keys[:, :, : self.length], values[:, :, : self.length]


class _SharedCache(KeyValueCache):
    """A transformers cache, which `generate()` reorders and crops as it likes, under the reference's interface."""

    def __init__(self, cache: Cache, length: int, config: PoetConfig) -> None:
        self.max_len, self.context = config.max_position_embeddings, 0
        self.layers = tuple(_SharedLayer(cache, layer, length) for layer in range(config.num_layers))


AutoConfig.register(MODEL_TYPE, PoetHuggingFaceConfig, exist_ok=True)
AutoModelForCausalLM.register(PoetHuggingFaceConfig, PoetForCausalLM, exist_ok=True)
