# SPDX-License-Identifier: Apache-2.0
"""The compilation hook: which batch sizes get a CUDA graph, and no bytecode hook.

The hook is also the first to see all settings of an engine, so what is to be said about the dtype
of Mamba's states is said here. All of it concerns engines with our method only. Nothing in vLLM is
wrapped before the first such engine.
"""

import math
import os

from vllm import envs
from vllm.config import CUDAGraphMode, VllmConfig

from vllm_nanoquant import compat
from vllm_nanoquant.command_line import RIGHT_FLAG
from vllm_nanoquant.recipe import MAX_CAPTURE_SIZE, METHOD
from vllm_nanoquant.requirements import BYTECODE_HOOK, why_not_under

logger = compat.init_logger(__name__)

_GRAPH_STEP = 8  # vLLM's own spacing of sizes above 8


def default_capture_sizes(cap: int, max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then steps of 8, as far as they can be of use.

    Args:
        cap: largest allowed size.
        max_num_seqs: most sequences the engine runs at once. vLLM captures no decode of more, so
            where the cap allows it the last size is this one, and not the next step.
    """
    most = min(cap, max_num_seqs)
    steps = (1, 2, 4, *range(_GRAPH_STEP, most, _GRAPH_STEP))
    return [*(size for size in steps if size < most), most]


def settle_engine(engine: VllmConfig) -> None:
    """Do what an engine that uses our method needs in the front end; leave every other alone.

    Raises:
        ValueError: as ``cap_capture_sizes``.
    """
    if engine.quant_config is None or engine.quant_config.get_name() != METHOD:
        return
    if engine.model_config is None:
        return
    about_states = rounded_states(engine)
    if about_states:
        logger.warning(about_states)
    cap_capture_sizes(engine)


def rounded_states(engine: VllmConfig) -> str | None:
    """What to say of an engine that keeps Mamba's states in less than float32; None if none does.

    vLLM has put the model's own choice in the place of "auto" by now: for Nemotron-H float32,
    unless config.json names another. Where "auto" still stands, nobody chose.
    """
    dtype, model = engine.cache_config.mamba_ssm_cache_dtype, engine.model_config
    if dtype in ("auto", "float32") or model is None:
        return None
    if not (model.is_hybrid or model.is_attention_free):
        return None
    return (
        f"{METHOD}: mamba_ssm_cache_dtype is {dtype}. The state of a Mamba layer is rounded to it "
        "at every token, and the errors add up over a sequence, beside those of the int4 weights; "
        "use --mamba-ssm-cache-dtype float32 unless the memory for states is short"
    )


def cap_capture_sizes(engine: VllmConfig) -> None:
    """Limit the capture sizes of an engine.

    Sizes that the user gave are kept up to the cap, and a warning names the dropped ones. What has
    no CUDA graphs (eager mode, graphs off) is left alone. With speculative decoding a sequence
    takes more than one token of a batch, and vLLM captures decodes of multiples of that number
    only: sizes and cap are multiplied by it, which is as many graphs, for as many sequences. A
    model that drafts takes one token of each sequence, and has graphs of its own in vLLM's second
    model runner: its sizes are added there.

    Raises:
        ValueError: the user gave sizes, and all of them are above the cap.
    """
    settings = engine.compilation_config
    if engine.model_config.enforce_eager or settings.cudagraph_mode == CUDAGraphMode.NONE:
        return
    if settings.cudagraph_capture_sizes == []:
        return
    tokens_each = 1 + engine.num_speculative_tokens
    cap = engine.quant_config.options.max_capture_size
    max_num_seqs = engine.scheduler_config.max_num_seqs
    if settings.cudagraph_capture_sizes is None:
        largest = min(
            cap * tokens_each,
            settings.max_cudagraph_capture_size or cap * tokens_each,
            engine.scheduler_config.max_num_batched_tokens,
        )
        sizes = default_capture_sizes(max(1, largest // tokens_each), max_num_seqs)
        drafts = sizes if _drafts_have_graphs(engine) else []
        settings.cudagraph_capture_sizes = sorted(
            {*drafts, *(size * tokens_each for size in sizes)}
        )
    else:
        settings.cudagraph_capture_sizes = _keep_up_to(
            cap * tokens_each, settings.cudagraph_capture_sizes, tokens_each
        )
    # vLLM takes the largest size for this one, and objects to another value beside a list.
    settings.max_cudagraph_capture_size = None
    if max_num_seqs > cap:
        _warn_of_uncaptured_batches(cap, max_num_seqs)


def _drafts_have_graphs(engine: VllmConfig) -> bool:
    """Whether a model drafts, and its steps are captured on their own."""
    speculative = engine.speculative_config
    if speculative is None or speculative.method.startswith(("ngram", "suffix")):
        return False
    return engine.use_v2_model_runner


def _keep_up_to(cap: int, sizes: list[int], tokens_each: int) -> list[int]:
    kept = [size for size in sizes if size <= cap]
    dropped = sorted(set(sizes) - set(kept))
    enough = math.ceil(max(sizes) / tokens_each)
    raise_it = f"raise the cap with {RIGHT_FLAG}.max_capture_size {enough}"
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
        "%s: CUDA graphs are captured for at most %d sequences, but max_num_seqs is %d; larger "
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


def install_hook() -> None:
    """Have ``settle_engine`` called for every engine from now on, where there are CUDA graphs."""
    compat.wrap_set_cudagraph_sizes(settle_engine)


def reject_bytecode_hook() -> None:
    """Refuse to start with vLLM's bytecode hook switched on by hand.

    Raises:
        ValueError: ``VLLM_USE_BYTECODE_HOOK`` is set, and not to 0.
    """
    reason = why_not_under(os.environ)
    if reason is not None:
        raise ValueError(f"{METHOD} {reason}")


def disable_bytecode_hook() -> None:
    """Switch the bytecode hook off in this worker, where vLLM's default would be on.

    Called by a worker before its model is compiled, so that the front end and other engines keep
    their setting. An engine inside the front end's own process shares its environment with it.

    Raises:
        ValueError: vLLM has already frozen the setting in this process, switched on.
    """
    os.environ.setdefault(BYTECODE_HOOK, "0")
    if envs.VLLM_USE_BYTECODE_HOOK:
        raise ValueError(
            f"{METHOD}: {BYTECODE_HOOK} is on and frozen by an engine that ran in this process "
            f"before; export {BYTECODE_HOOK}=0 before the first engine starts"
        )
