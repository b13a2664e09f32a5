"""What vLLM calls when one of its processes starts: it makes Poet's configuration and model known there.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in every process that it
starts, sometimes more than once. The model is named by a string, so that registering imports neither vLLM's layers
nor this package's.
"""

import multiprocessing
import os
import signal
import threading
import time

from transformers import AutoConfig

from poet.model.huggingface import PoetHuggingFaceConfig, PoetUpsamplerConfig
from poet.model.superresolution import UPSAMPLER_ARCHITECTURE

__all__ = [
    "ARCHITECTURE",
    "CANVAS_ARCHITECTURE",
    "END_WITH_PARENT",
    "MODEL_CLASSES",
    "UPSAMPLER_ARCHITECTURE",
    "register",
    "register_classes",
]

END_WITH_PARENT = "POET_END_WITH_PARENT"
"""Environment variable: where it is set, the processes that vLLM starts end when whoever started them is gone."""

_WATCH_EVERY = 0.5  # seconds

ARCHITECTURE = "PoetForCausalLM"
CANVAS_ARCHITECTURE = "PoetForCanvas"
MODEL_CLASSES = {
    ARCHITECTURE: "poet_serving.vllm_model:PoetForCausalLM",
    CANVAS_ARCHITECTURE: "poet_serving.maskgit:PoetForCanvas",
    UPSAMPLER_ARCHITECTURE: "poet_serving.superresolution:PoetUpsampler",
}


def register() -> None:
    """Register Poet's configurations with transformers and its models with vLLM; twice does no harm."""
    _end_with_parent()
    from vllm import ModelRegistry  # here, not above: this module is also imported where vLLM is not installed

    for config in (PoetHuggingFaceConfig, PoetUpsamplerConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for architecture, model_class in MODEL_CLASSES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, model_class)


def register_classes() -> None:
    """`register`, and import the models: to inspect one that is a string, vLLM starts a process of its own."""
    from vllm import ModelRegistry

    from poet_serving.maskgit import PoetForCanvas
    from poet_serving.superresolution import PoetUpsampler
    from poet_serving.vllm_model import PoetForCausalLM

    ModelRegistry.register_model(ARCHITECTURE, PoetForCausalLM)
    ModelRegistry.register_model(CANVAS_ARCHITECTURE, PoetForCanvas)
    ModelRegistry.register_model(UPSAMPLER_ARCHITECTURE, PoetUpsampler)
    register()


def _end_with_parent() -> None:
    """Watch from a thread whether the parent is there: one that was killed cannot end the processes of vLLM."""
    if END_WITH_PARENT not in os.environ or multiprocessing.parent_process() is None:
        return
    if any(thread.name == END_WITH_PARENT for thread in threading.enumerate()):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_EVERY)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name=END_WITH_PARENT, daemon=True).start()
