"""Megatron's model against the reference transformer: the same weights, in every cut, float32.

Processes talk over gloo. The tolerance of 1e-4 relative allows for sums in another order.
"""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from poet.model.attention import SceneLayout
from poet.model.config import PoetConfig
from poet.model.transformer import PoetTransformer
from poet.testing import in_processes
from poet.training.losses import target_losses
from poet.training.megatron_cpu import cpu_for_cuda
from poet.training.megatron_model import PoetGPTModel, load_weights, to_transformer_config
from poet.training.parallelism import Parallelism

CONFIG = PoetConfig(
    vocab_size=384,
    hidden_size=48,
    ffn_hidden_size=88,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    scene_length=38,
    max_position_embeddings=512,
)
LENGTH = 190
CUTS = {
    "one process": Parallelism(),
    "tensor 2": Parallelism(tensor_parallel_size=2),
    "pipeline 2": Parallelism(pipeline_parallel_size=2, recompute="selective"),
    "pipeline 2, uneven": Parallelism(pipeline_parallel_size=2, first_stage_layers=1, last_stage_layers=3),
    "tensor 2 with sequence parallel": Parallelism(tensor_parallel_size=2, sequence_parallel=True),
    "tensor 2, pipeline 2, recomputed": Parallelism(
        tensor_parallel_size=2, pipeline_parallel_size=2, sequence_parallel=True, recompute="full"
    ),
}


def layouts() -> dict[str, SceneLayout]:
    prefixes = torch.tensor([[5, 17, 0, 29, 9], [11, 3, 23, 1, 37]])
    packed = torch.tensor([[31, 53, 19], [7, 0, 61]])
    return {
        "scenes with a prefix": SceneLayout.from_prefix_lengths(
            torch.tensor([13, 29]), torch.tensor([114, 71]), LENGTH
        ),
        "films of five scenes": SceneLayout.from_films(prefixes, CONFIG.scene_length),
        "packed rows": SceneLayout.from_packed(torch.tensor([[5, 17, 19], [7, 0, 11]]), packed, LENGTH),
        "a scene in parallel": SceneLayout.from_prefix_lengths(
            torch.tensor([13, 29]), torch.tensor([114, 71]), LENGTH, parallel=torch.tensor([True, False])
        ),
    }


@pytest.fixture(scope="module")
def reference() -> PoetTransformer:
    torch.manual_seed(5)
    model = PoetTransformer(CONFIG)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
        else:
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, CONFIG.vocab_size, (2, LENGTH), generator=generator)
    loss_mask = torch.rand(2, LENGTH, generator=generator) < 0.4
    loss_mask[:, 0] = False
    return ids, loss_mask


def measure(
    cut: Parallelism, weights: dict[str, Tensor], flex: bool | None = None, tied: bool = True
) -> dict[str, Any] | None:
    """Logits of all places and losses for every layout; from the last stage's processes."""
    with cpu_for_cuda(), torch.set_grad_enabled(flex is None):  # FlexAttention has no backward pass on a CPU
        parallel_state.initialize_model_parallel(cut.tensor_parallel_size, cut.pipeline_parallel_size)
        config = dataclasses.replace(CONFIG, tie_embeddings=tied)
        model = PoetGPTModel(config, to_transformer_config(config, cut), flex=flex)
        load_weights(model, weights)
        ids, loss_mask = inputs()
        schedule, found = get_forward_backward_func(), {}
        for name, layout in layouts().items():
            page = model.book.add(layout, torch.float32)
            results = {}
            for kind in ("logits", "losses"):

                def step(_: Any, model: PoetGPTModel, kind: str = kind, page: Tensor = page) -> Any:
                    out = model(ids, page, loss_mask, output=kind)
                    return out, lambda out: (out.sum(), torch.tensor(1), {"found": out})

                [result] = schedule(
                    forward_step_func=step,
                    data_iterator=None,
                    model=[model],
                    num_microbatches=1,
                    seq_length=LENGTH,
                    micro_batch_size=2,
                    forward_only=True,
                ) or [None]
                if result is not None:
                    results[kind] = result["found"].detach()
            if results:
                results["logits"] = gather_from_tensor_model_parallel_region(results["logits"])
            found[name] = results
        return found if parallel_state.is_pipeline_last_stage() else None


@pytest.mark.parametrize("cut", CUTS)
def test_logits_and_losses_equal_those_of_the_reference(reference: PoetTransformer, cut: str) -> None:
    results = in_processes(CUTS[cut].model_parallel_size, measure, CUTS[cut], reference.state_dict())
    ids, loss_mask = inputs()
    last = [result for result in results if result is not None]
    assert len(last) == CUTS[cut].tensor_parallel_size
    for found in last:
        for name, layout in layouts().items():
            hidden = reference(ids, layout)
            expected = reference.logits(hidden).detach()
            # Padding sees padding only, and what it says is never read.
            inside = layout.document >= 0
            difference = (found[name]["logits"] - expected)[inside].abs().max()
            assert difference < 1e-4 * expected[inside].abs().max(), (name, float(difference))
            losses = target_losses(hidden, ids, loss_mask, reference.logits).detach()
            torch.testing.assert_close(found[name]["losses"], losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", ["one process", "tensor 2", "pipeline 2"])
def test_a_head_of_its_own_gives_the_references_logits(cut: str) -> None:
    torch.manual_seed(7)
    reference = PoetTransformer(dataclasses.replace(CONFIG, tie_embeddings=False))
    weights = {name: weight * 20 if weight.dim() > 1 else weight for name, weight in reference.state_dict().items()}
    reference.load_state_dict(weights)
    results = in_processes(CUTS[cut].model_parallel_size, measure, CUTS[cut], weights, None, False)
    ids, _ = inputs()
    for found in (result for result in results if result is not None):
        for name, layout in layouts().items():
            expected = reference.logits(reference(ids, layout)).detach()
            inside = layout.document >= 0
            assert (found[name]["logits"] - expected)[inside].abs().max() < 1e-4 * expected[inside].abs().max(), name


def test_layouts_are_told_apart(reference: PoetTransformer) -> None:
    ids, _ = inputs()
    logits = [reference.logits(reference(ids, layout)).detach() for layout in layouts().values()]
    for place, one in enumerate(logits):
        assert all((one - other).abs().max() > 0.1 for other in logits[:place])


def test_flex_attention_sees_what_the_dense_masks_show(reference: PoetTransformer) -> None:
    [found] = in_processes(1, measure, Parallelism(), reference.state_dict(), True)
    ids, _ = inputs()
    for name, layout in layouts().items():
        expected = reference.logits(reference(ids, layout)).detach()
        inside = layout.document >= 0
        assert (found[name]["logits"] - expected)[inside].abs().max() < 1e-4 * expected[inside].abs().max(), name
