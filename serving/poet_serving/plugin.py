"""What vLLM calls when one of its processes starts: it makes Poet's configuration and model known there.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in every process that it
starts, sometimes more than once. The model is named by a string, so that registering imports neither vLLM's layers
nor this package's.
"""

from transformers import AutoConfig

from poet.model.huggingface import PoetHuggingFaceConfig, PoetUpsamplerConfig
from poet.model.superresolution import UPSAMPLER_ARCHITECTURE

__all__ = ["ARCHITECTURE", "CANVAS_ARCHITECTURE", "MODEL_CLASSES", "UPSAMPLER_ARCHITECTURE", "register"]

ARCHITECTURE = "PoetForCausalLM"
CANVAS_ARCHITECTURE = "PoetForCanvas"
MODEL_CLASSES = {
    ARCHITECTURE: "poet_serving.vllm_model:PoetForCausalLM",
    CANVAS_ARCHITECTURE: "poet_serving.maskgit:PoetForCanvas",
    UPSAMPLER_ARCHITECTURE: "poet_serving.superresolution:PoetUpsampler",
}


def register() -> None:
    """Register Poet's configurations with transformers and its models with vLLM; twice does no harm."""
    from vllm import ModelRegistry  # here, not above: this module is also imported where vLLM is not installed

    for config in (PoetHuggingFaceConfig, PoetUpsamplerConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for architecture, model_class in MODEL_CLASSES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, model_class)
