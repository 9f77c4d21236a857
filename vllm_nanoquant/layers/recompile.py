# SPDX-License-Identifier: Apache-2.0
"""Compiled code and CUDA graphs of a running worker: dropped before its layers change, made anew.

vLLM compiles a model's forward once, with the guards that would notice another layer dropped, and
captures graphs that hold the addresses of weights. It has a way to make both anew in a running
worker, for elastic expert parallelism (``distributed/elastic_ep``, 0.26 to 0.33); this is that way,
for an engine that has nothing to do meanwhile.
"""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper, reset_compile_wrapper
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config

from vllm_nanoquant.recipe import METHOD

_WAY_OUT = "serve with --quantization nanoquant_w4a16 instead"


def is_compiled(model: torch.nn.Module, engine: VllmConfig) -> bool:
    """Whether code that was compiled, or graphs that were captured, know the model's layers."""
    return bool(_compiled_parts(model)) or captures_graphs(engine)


def captures_graphs(engine: VllmConfig) -> bool:
    """Whether the engine has CUDA graphs."""
    mode = engine.compilation_config.cudagraph_mode
    return mode is not None and mode != CUDAGraphMode.NONE and not engine.model_config.enforce_eager


def engine_of(model: torch.nn.Module) -> VllmConfig:
    """Find the settings of the engine that a model belongs to.

    Raises:
        TypeError: it is no model of vLLM.
    """
    found = (getattr(module, "vllm_config", None) for module in model.modules())
    engine = next((config for config in found if isinstance(config, VllmConfig)), None)
    if engine is None:
        raise TypeError(
            f"{METHOD}: {type(model).__name__} is no model of a vLLM engine; outside vLLM use "
            "vllm_nanoquant.W4A16Linear.from_linear"
        )
    return engine


def refuse_unsuitable(engine: VllmConfig) -> None:
    """Refuse engines that keep weights, or something made of them, where we would not look.

    Raises:
        ValueError: the feature, and the way out.
    """
    offload = getattr(engine, "offload_config", None)
    uva, prefetch = getattr(offload, "uva", None), getattr(offload, "prefetch", None)
    reasons = {
        "LoRA (--enable-lora)": engine.lora_config is not None,
        "speculative decoding": engine.speculative_config is not None,
        "sleep mode (--enable-sleep-mode)": engine.model_config.enable_sleep_mode,
        "micro-batching (--enable-dbo)": engine.parallel_config.use_ubatching,
        "weights offloaded to the CPU": bool(
            getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0)
        ),
        "compilation mode 1 (stock torch.compile)": (
            engine.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE
        ),
    }
    for reason, given in reasons.items():
        if given:
            raise ValueError(
                f"{METHOD}: layers cannot be replaced in an engine with {reason}; {_WAY_OUT}"
            )


def refuse_lasting_graphs(worker: Any) -> None:
    """Refuse a worker that compiled its model, or captured graphs, and cannot do so again.

    Raises:
        ValueError: vLLM's second model runner before vLLM 0.32.
    """
    manager = getattr(worker.model_runner, "cudagraph_manager", None)
    # With this method came the other one that is needed, which puts requests aside.
    if manager is not None and not hasattr(manager, "release_graphs"):
        raise ValueError(
            f"{METHOD}: this vLLM cannot drop the compiled code and CUDA graphs of its second "
            "model runner (it can from 0.32 on); start the engine with enforce_eager=True, or "
            f"{_WAY_OUT}"
        )


def forget_compiled(worker: Any, fingerprint: str) -> None:
    """Drop a worker's CUDA graphs and compiled code, and give back their memory.

    Args:
        worker: vLLM's worker; no request may be running.
        fingerprint: of what changes. vLLM hashes ``hf_config`` into the key of its compiled
            artefacts, on disk too: those of before must never be loaded again.
    """
    engine = worker.vllm_config
    hf_config = engine.model_config.hf_config
    before = getattr(hf_config, "nanoquant_fingerprint", "")
    hf_config.nanoquant_fingerprint = f"{before}+{fingerprint}"
    if captures_graphs(engine):
        torch.cuda.synchronize()
        manager = getattr(worker.model_runner, "cudagraph_manager", None)
        if manager is not None:
            manager.release_graphs()
        CUDAGraphWrapper.clear_all_graphs()
        BreakableCUDAGraphWrapper.clear_all_graphs()
    torch.compiler.reset()
    with set_current_vllm_config(engine):
        for part in _compiled_parts(worker.get_model()):
            reset_compile_wrapper(part)
    # vLLM froze the heap after its warm-up, with the graphs in it.
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compile_again(worker: Any) -> None:
    """Compile and capture for the layers as they are now, as at the start of the engine."""
    runner = worker.model_runner
    if hasattr(runner, "warming_up_model"):  # on a CPU; its worker's own does nothing any more
        runner.warming_up_model()
        return
    from vllm.v1.worker.workspace import lock_workspace, unlock_workspace

    unlock_workspace()
    with _requests_put_aside(worker):
        runner._dummy_run(runner.max_num_tokens, is_profile=True)
        worker.compile_or_warm_up_model()
    lock_workspace()


@contextlib.contextmanager
def compiling_kernels_expected() -> Iterator[None]:
    """Keep vLLM's monitor of late kernel compilation quiet: this is not inference.

    Every kernel that vLLM's and our own warm-up compile here would be a warning, or an error with
    ``--jit-monitor-mode error``.
    """
    if not torch.cuda.is_available():
        yield
        return
    from triton import knobs

    hook = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = None
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook = hook


def _compiled_parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [
        module
        for module in model.modules()
        if isinstance(module, TorchCompileWithNoGuardsWrapper) and not module.do_not_compile
    ]


def _requests_put_aside(worker: Any) -> contextlib.AbstractContextManager[None]:
    """Keep warm-up runs out of the blocks and the lengths of the requests before them."""
    runner = worker.model_runner
    if getattr(worker, "use_v2_model_runner", False):
        from vllm.v1.worker.gpu.eplb_utils import preserve_serving_state

        return preserve_serving_state(runner)
    # Rows are written anew as requests are added; until then all of them name the null block.
    batch = runner.input_batch
    batch.block_table.clear()
    # A row whose request ended with its prompt would make Mamba layers capture a prefill as the
    # graph of a decode, which reads tensors that are gone when it is replayed.
    batch.num_prompt_tokens_cpu_tensor.zero_()
    batch.num_computed_tokens_cpu_tensor.zero_()
    return contextlib.nullcontext()
