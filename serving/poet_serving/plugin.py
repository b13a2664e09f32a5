"""What vLLM calls when one of its processes starts: it makes Poet's configuration and model known there.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in every process that it
starts, sometimes more than once. The model is named by a string, so that registering imports neither vLLM's layers
nor this package's.
"""

from transformers import AutoConfig

from poet.model.huggingface import PoetHuggingFaceConfig

__all__ = ["ARCHITECTURE", "CANVAS_ARCHITECTURE", "CANVAS_MODEL_CLASS", "MODEL_CLASS", "register"]

ARCHITECTURE = "PoetForCausalLM"
CANVAS_ARCHITECTURE = "PoetForCanvas"
MODEL_CLASS = "poet_serving.vllm_model:PoetForCausalLM"
CANVAS_MODEL_CLASS = "poet_serving.maskgit:PoetForCanvas"


def register() -> None:
    """Register the `poet` configuration with transformers and both models with vLLM; twice does no harm."""
    from vllm import ModelRegistry  # here, not above: this module is also imported where vLLM is not installed

    AutoConfig.register(PoetHuggingFaceConfig.model_type, PoetHuggingFaceConfig, exist_ok=True)
    for architecture, model_class in ((ARCHITECTURE, MODEL_CLASS), (CANVAS_ARCHITECTURE, CANVAS_MODEL_CLASS)):
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, model_class)
