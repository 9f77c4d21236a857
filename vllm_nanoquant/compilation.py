# SPDX-License-Identifier: Apache-2.0
"""The compilation hook: which batch sizes get a CUDA graph, and no bytecode hook.

Both concern engines with our method only. Nothing in vLLM is wrapped before the first such engine.
"""

import os

from vllm import envs
from vllm.config import CUDAGraphMode, VllmConfig

from vllm_nanoquant import compat
from vllm_nanoquant.command_line import RIGHT_FLAG
from vllm_nanoquant.recipe import MAX_CAPTURE_SIZE, METHOD

logger = compat.init_logger(__name__)

_BYTECODE_HOOK = "VLLM_USE_BYTECODE_HOOK"
_GRAPH_STEP = 8  # vLLM's own spacing of sizes above 8


def default_capture_sizes(cap: int, max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then steps of 8, as far as they can be of use.

    Args:
        cap: largest allowed size, in tokens.
        max_num_seqs: most sequences the engine runs at once; the last size is the first that
            covers it.
    """
    sizes = [size for size in (1, 2, 4) if size <= cap]
    sizes += range(_GRAPH_STEP, cap + 1, _GRAPH_STEP)
    enough = next((size for size in sizes if size >= max_num_seqs), sizes[-1])
    return [size for size in sizes if size <= enough]


def cap_capture_sizes(engine: VllmConfig) -> None:
    """Limit the capture sizes of an engine that uses our method; leave every other alone.

    Sizes that the user gave are kept up to the cap, and a warning names the dropped ones. What has
    no CUDA graphs (eager mode, graphs off) is left alone.

    Raises:
        ValueError: the user gave sizes, and all of them are above the cap.
    """
    if engine.quant_config is None or engine.quant_config.get_name() != METHOD:
        return
    if engine.model_config is None or engine.model_config.enforce_eager:
        return
    settings = engine.compilation_config
    if settings.cudagraph_mode == CUDAGraphMode.NONE or settings.cudagraph_capture_sizes == []:
        return
    cap = engine.quant_config.options.max_capture_size
    max_num_seqs = engine.scheduler_config.max_num_seqs
    if settings.cudagraph_capture_sizes is None:
        largest = min(
            cap,
            settings.max_cudagraph_capture_size or cap,
            engine.scheduler_config.max_num_batched_tokens,
        )
        settings.cudagraph_capture_sizes = default_capture_sizes(largest, max_num_seqs)
    else:
        settings.cudagraph_capture_sizes = _keep_up_to(cap, settings.cudagraph_capture_sizes)
    # vLLM takes the largest size for this one, and objects to another value beside a list.
    settings.max_cudagraph_capture_size = None
    if max_num_seqs > cap:
        _warn_of_uncaptured_batches(cap, max_num_seqs)


def _keep_up_to(cap: int, sizes: list[int]) -> list[int]:
    kept = [size for size in sizes if size <= cap]
    dropped = sorted(set(sizes) - set(kept))
    raise_it = f"raise the cap with {RIGHT_FLAG}.max_capture_size {max(sizes)}"
    if not kept:
        raise ValueError(
            f"{METHOD}: all cudagraph_capture_sizes {dropped} are above the cap of {cap}; give "
            f"smaller ones, or {raise_it}"
        )
    if dropped:
        logger.warning(
            "%s: cudagraph_capture_sizes %s are above the cap of %d and dropped; to keep them, %s",
            METHOD,
            dropped,
            cap,
            raise_it,
        )
    return kept


def _warn_of_uncaptured_batches(cap: int, max_num_seqs: int) -> None:
    logger.warning(
        "%s: CUDA graphs are captured for at most %d tokens, but max_num_seqs is %d; larger "
        "batches run without a graph, often slower than a batch of %d. Either serve fewer "
        "sequences (--max-num-seqs %d) or raise the cap (%s.max_capture_size %d), which costs "
        "start-up time and some GPU memory",
        METHOD,
        cap,
        max_num_seqs,
        cap,
        cap,
        RIGHT_FLAG,
        min(max_num_seqs, MAX_CAPTURE_SIZE),
    )


def install_capture_cap() -> None:
    """Have ``cap_capture_sizes`` called for every engine from now on."""
    compat.wrap_set_cudagraph_sizes(cap_capture_sizes)


def reject_bytecode_hook() -> None:
    """Refuse to start with vLLM's bytecode hook switched on by hand.

    Raises:
        ValueError: ``VLLM_USE_BYTECODE_HOOK`` is set, and not to 0.
    """
    value = os.environ.get(_BYTECODE_HOOK)
    if value is not None and value.strip() != "0":
        raise ValueError(
            f"{METHOD} does not run under vLLM's bytecode hook, and {_BYTECODE_HOOK}={value} is "
            f"set: one compiled graph must serve every batch size. Unset it, or set it to 0"
        )


def disable_bytecode_hook() -> None:
    """Switch the bytecode hook off in this worker, where vLLM's default would be on.

    Called by a worker before its model is compiled, so that the front end and other engines keep
    their setting. An engine inside the front end's own process shares its environment with it.

    Raises:
        ValueError: vLLM has already frozen the setting in this process, switched on.
    """
    os.environ.setdefault(_BYTECODE_HOOK, "0")
    if envs.VLLM_USE_BYTECODE_HOOK:
        raise ValueError(
            f"{METHOD}: {_BYTECODE_HOOK} is on and frozen by an engine that ran in this process "
            f"before; export {_BYTECODE_HOOK}=0 before the first engine starts"
        )
