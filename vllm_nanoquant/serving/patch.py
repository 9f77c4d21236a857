# SPDX-License-Identifier: Apache-2.0
"""``patch_nemotron_h``: an engine that has loaded a BF16 model goes on in int4.

The layers are replaced by ``layers/replace.py``, compiled code and CUDA graphs by
``layers/recompile.py``; here is the way to the workers and back. vLLM is imported when it is used.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_nanoquant import __version__
from vllm_nanoquant.recipe import METHOD, Recipe
from vllm_nanoquant.roles import role_of

__all__ = ["PatchReport", "PatchWorker", "patch_nemotron_h"]

_WORKER_METHOD = "nanoquant_patch"
_EXTENSION = f"{__name__}.PatchWorker"


@dataclass(frozen=True)
class PatchReport:
    """What ``patch_nemotron_h`` did. Bytes are of all ranks together."""

    modules: tuple[str, ...]
    """Modules that became int4 in this call, by vLLM's names."""
    left: Mapping[str, str]
    """Modules that the recipe names and that stay as they were, with the reason."""
    bytes_before: int
    """Bytes of the replaced modules' weights before."""
    bytes_after: int
    """Bytes of the same weights in int4, scales and zero points included."""
    bytes_freed: int
    """Less device memory in use, as PyTorch's allocator counts it; on a CPU before minus after."""
    compiled_again: bool
    """Whether the model was compiled, and its CUDA graphs were captured, anew."""
    ranks: int = 1
    """Workers that were asked."""

    @property
    def replaced(self) -> dict[str, int]:
        """Number of modules that became int4, by role (mamba, mlp, attention, lm_head)."""
        return dict(Counter(str(role_of(name) or "other") for name in self.modules))

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {role}" for role, count in self.replaced.items()) or "none"
        return (
            f"{len(self.modules)} modules became int4 ({counts}): {self.bytes_before / 1e6:.2f} MB "
            f"to {self.bytes_after / 1e6:.2f} MB, {self.bytes_freed / 1e6:.2f} MB freed on "
            f"{self.ranks} rank(s); {len(self.left)} modules left as they were"
        )

    @classmethod
    def of_ranks(cls, reports: Iterable[PatchReport]) -> PatchReport:
        """One report of all ranks: bytes added up, names of any rank."""
        all_ranks = list(reports)
        names = dict.fromkeys(name for report in all_ranks for name in report.modules)
        return cls(
            modules=tuple(names),
            left={name: why for report in all_ranks for name, why in report.left.items()},
            bytes_before=sum(report.bytes_before for report in all_ranks),
            bytes_after=sum(report.bytes_after for report in all_ranks),
            bytes_freed=sum(report.bytes_freed for report in all_ranks),
            compiled_again=any(report.compiled_again for report in all_ranks),
            ranks=len(all_ranks),
        )


class PatchWorker:
    """An extension of vLLM's workers, by which they can be told to patch their model by name.

    ``LLM(..., worker_extension_cls="vllm_nanoquant.serving.patch.PatchWorker")``
    """

    def nanoquant_patch(self, check_only: bool = False, **options: Any) -> dict[str, Any]:
        """Patch this worker's model; see ``patch_nemotron_h``.

        Args:
            check_only: find out whether it would be refused, and change nothing.
            **options: of the recipe.

        Returns:
            The fields of a ``PatchReport``, or ``{"refused": text}``: plain data, which vLLM sends
            from process to process without pickling.
        """
        return _patch_in_worker(self, check_only, **options)


def patch_nemotron_h(model: Any, preset: str = "balanced", **options: Any) -> PatchReport:
    """Make the layers of a loaded vLLM model int4, in place.

    Covers every model whose projections have the names of Nemotron-H's (`roles.py`); routed experts
    and a tied LM head stay as they are. A second call replaces only what the first left. All that
    can be refused is refused before the first layer is touched. Where something fails after that,
    the error says so, and the engine must be started anew.

    No request may be running. The prefix cache is emptied. Compiled code and CUDA graphs are made
    anew, for the capture sizes that the engine was started with. The KV cache keeps its size: freed
    memory is free for other uses of the device, not for more blocks. ``reload_weights`` is refused
    afterwards.

    Under tensor parallelism each rank quantizes the weight that it has, and the groups of a
    row-parallel layer begin at the rank's own first column. Quantizing while loading reads the
    neighbours' columns of a group that two ranks share. So the bytes of the two differ in
    row-parallel layers where a rank's share is no multiple of the group size; elsewhere, and on one
    rank, they are the same.

    Args:
        model: an ``LLM``; or a worker of vLLM, in a function given to ``collective_rpc``; or the
            model of one, in a function given to ``apply_model``, which works for engines with
            ``enforce_eager=True`` only, since a model does not know its worker. An ``LLM`` whose
            workers are other processes needs ``worker_extension_cls`` as `PatchWorker` says, or
            ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``.
        preset: ``ssm``, ``balanced``, ``quality`` or ``full``.
        **options: ``group_size``, ``algorithm`` (``minmax`` or ``mse``), ``ignore``,
            ``overrides``, as in a recipe; patterns name vLLM's modules (`qkv_proj`, not `q_proj`).

    Raises:
        RecipeError: options that are wrong, or fit no module of this model.
        TypeError: not an ``LLM``, a worker, or a model of vLLM.
        ValueError: an engine that cannot be patched, requests that are running, or a weight that
            is not finite.
        RuntimeError: it failed half way; the engine must be started anew.
    """
    recipe = Recipe.parse({"preset": preset, **options})
    if isinstance(model, torch.nn.Module):
        return _patch_model(model, recipe)
    if hasattr(model, "collective_rpc"):
        return _patch_engine(model, recipe)
    if hasattr(model, "model_runner"):
        return _patch_worker(model, recipe)
    raise TypeError(
        f"{METHOD}: patch_nemotron_h takes vLLM's LLM, one of its workers or a model that it has "
        f"loaded, not {type(model).__name__}; outside vLLM use W4A16Linear.from_linear"
    )


def _patch_engine(llm: Any, recipe: Recipe) -> PatchReport:
    """Patch the models of all workers of an ``LLM``."""
    from vllm_nanoquant import compat

    if inspect.iscoroutinefunction(llm.collective_rpc):
        raise TypeError(
            f"{METHOD}: {type(llm).__name__} is asynchronous; start it with worker_extension_cls "
            f'"{_EXTENSION}" and, without requests, await its collective_rpc("{_WORKER_METHOD}", '
            'kwargs={"preset": ...}) and reset_prefix_cache()'
        )
    if llm.llm_engine.has_unfinished_requests():
        raise ValueError(
            f"{METHOD}: requests are running, and would end in another model than they began in; "
            "patch when generate() has returned"
        )
    target: Any = _WORKER_METHOD
    if not compat.workers_have(llm, PatchWorker):
        if not compat.workers_take_functions(llm):
            raise ValueError(
                f"{METHOD}: the workers of this engine are other processes and know nothing of "
                f'patching; start it with LLM(..., worker_extension_cls="{_EXTENSION}")'
            )
        target = _patch_in_worker
    options = recipe.model_dump(mode="json")
    # All ranks are asked first: one that refuses must find the others as they were.
    _reports(llm.collective_rpc(target, kwargs={**options, "check_only": True}))
    reports = _reports(llm.collective_rpc(target, kwargs=options))
    if any(report.modules for report in reports):
        llm.reset_prefix_cache()
    return PatchReport.of_ranks(reports)


def _reports(answers: Iterable[dict[str, Any]]) -> list[PatchReport]:
    """Reports of all ranks, from what ``_patch_in_worker`` gave.

    Raises:
        ValueError: a rank refused.
    """
    reports = []
    for answer in answers:
        if "refused" in answer:
            raise ValueError(answer["refused"])
        reports.append(PatchReport(**{**answer, "modules": tuple(answer["modules"])}))
    return reports


def _patch_in_worker(worker: Any, check_only: bool = False, **options: Any) -> dict[str, Any]:
    """Patch a worker's model; plain data in and out, and no exception where it was refused."""
    try:
        return asdict(_patch_worker(worker, Recipe.parse(options), check_only))
    except (TypeError, ValueError) as error:
        return {"refused": str(error)}


def _patch_worker(worker: Any, recipe: Recipe, check_only: bool = False) -> PatchReport:
    from vllm_nanoquant.layers import recompile

    model, engine = worker.get_model(), worker.vllm_config
    again = recompile.is_compiled(model, engine)
    if again:
        recompile.refuse_lasting_graphs(worker)
    plan = _plan(model, engine, recipe)
    if check_only:
        plan.replacements.clear()
    again = again and bool(plan.replacements)
    with recompile.compiling_kernels_expected():
        if again:
            recompile.forget_compiled(worker, f"{__version__}-patched-{recipe.fingerprint}")
        report = _carry_out(plan, again)
        if again:
            try:
                recompile.compile_again(worker)
            except Exception as error:
                raise RuntimeError(
                    f"{METHOD}: the layers are int4, but compiling the model and capturing its "
                    f"CUDA graphs failed ({error}); start the engine anew"
                ) from error
    return report


def _patch_model(model: torch.nn.Module, recipe: Recipe) -> PatchReport:
    from vllm_nanoquant.layers import recompile

    engine = recompile.engine_of(model)
    if recompile.is_compiled(model, engine):
        raise ValueError(
            f"{METHOD}: this model is compiled, or has CUDA graphs, which only its worker can make "
            "anew; give patch_nemotron_h the LLM, or start the engine with enforce_eager=True"
        )
    return _carry_out(_plan(model, engine, recipe), compiled_again=False)


def _plan(model: torch.nn.Module, engine: Any, recipe: Recipe) -> Any:
    """Plan of one rank's model; everything that can be refused is refused here."""
    from vllm_nanoquant import compat
    from vllm_nanoquant.layers import recompile, replace

    compat.require_supported_vllm()
    recompile.refuse_unsuitable(engine)
    return replace.plan_replacements(model, recipe, engine.model_config.hf_config)


def _carry_out(plan: Any, compiled_again: bool) -> PatchReport:
    """Replace the layers of a plan, one after the other.

    Raises:
        RuntimeError: after the first layer had been replaced, another could not be.
    """
    from vllm_nanoquant import compat
    from vllm_nanoquant.layers.replace import replace

    in_use = _device_bytes()
    done: list[str] = []
    after = 0
    for item in plan.replacements:
        try:
            after += replace(item)
        except Exception as error:
            raise RuntimeError(
                f"{METHOD}: {item.name} could not be replaced ({error}), after {len(done)} of "
                f"{len(plan.replacements)} modules had been; start the engine anew"
            ) from error
        done.append(item.name)
    before = sum(item.nbytes for item in plan.replacements)
    freed = before - after if in_use is None else in_use - (_device_bytes() or 0)
    report = PatchReport(
        modules=tuple(sorted(done)),
        left=dict(plan.left),
        bytes_before=before,
        bytes_after=after,
        bytes_freed=freed,
        compiled_again=compiled_again,
    )
    compat.init_logger(__name__).info("%s: %s", METHOD, report)
    return report


def _device_bytes() -> int | None:
    """Bytes of device memory that tensors take; None on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None
