# SPDX-License-Identifier: Apache-2.0
"""``patch_nemotron_h`` without an engine: who is asked, what is refused, how ranks add up."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import CompilationMode, CUDAGraphMode

from vllm_nanoquant import PatchReport, compat, patch_nemotron_h
from vllm_nanoquant.layers import recompile
from vllm_nanoquant.recipe import RecipeError
from vllm_nanoquant.serving import patch

pytestmark = pytest.mark.compat

DONE = {
    "modules": ["model.layers.0.mixer.in_proj", "lm_head"],
    "left": {"model.layers.1.mixer.experts": "routed experts"},
    "bytes_before": 1_000_000,
    "bytes_after": 300_000,
    "bytes_freed": 600_000,
    "compiled_again": True,
    "ranks": 1,
}
NOTHING = DONE | {"modules": [], "bytes_before": 0, "bytes_after": 0, "bytes_freed": 0}


class Llm:
    """An engine whose workers answer as they are told."""

    def __init__(self, *answers, extension="vllm_nanoquant.serving.patch.PatchWorker", busy=False):
        self.answers = list(answers)
        self.calls = []
        self.resets = 0
        parallel = SimpleNamespace(worker_extension_cls=extension)
        self.llm_engine = SimpleNamespace(
            has_unfinished_requests=lambda: busy,
            vllm_config=SimpleNamespace(parallel_config=parallel),
            engine_core=None,
        )

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, kwargs))
        return self.answers.pop(0)

    def reset_prefix_cache(self):
        self.resets += 1


def engine(**changes):
    """Settings of an engine with nothing special."""
    config = SimpleNamespace(
        lora_config=None,
        speculative_config=None,
        model_config=SimpleNamespace(enable_sleep_mode=False, enforce_eager=False),
        parallel_config=SimpleNamespace(use_ubatching=False),
        offload_config=None,
        compilation_config=SimpleNamespace(
            mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE
        ),
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        target = config
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return config


def test_all_ranks_are_asked_before_one_is_patched():
    llm = Llm([NOTHING, NOTHING], [DONE, DONE])
    report = patch_nemotron_h(llm, "full", group_size=64)
    first, second = (kwargs for _, kwargs in llm.calls)
    assert first == second | {"check_only": True}
    assert second["preset"] == "full" and second["group_size"] == 64
    assert {method for method, _ in llm.calls} == {"nanoquant_patch"}
    assert hasattr(patch.PatchWorker, "nanoquant_patch")
    assert report.ranks == 2 and report.bytes_freed == 1_200_000
    assert report.modules == tuple(DONE["modules"])
    assert llm.resets == 1


def test_a_rank_that_refuses_leaves_the_others_alone():
    llm = Llm([NOTHING, {"refused": "in_proj.weight: 1 weights are not finite"}])
    with pytest.raises(ValueError, match="1 weights are not finite"):
        patch_nemotron_h(llm)
    assert len(llm.calls) == 1 and llm.resets == 0


def test_nothing_new_leaves_the_prefix_cache():
    llm = Llm([NOTHING], [NOTHING])
    assert patch_nemotron_h(llm).modules == ()
    assert llm.resets == 0


def test_a_report_in_words():
    report = PatchReport(**DONE | {"modules": tuple(DONE["modules"])})
    assert report.replaced == {"mamba": 1, "lm_head": 1}
    assert str(report) == (
        "2 modules became int4 (1 mamba, 1 lm_head): 1.00 MB to 0.30 MB, 0.60 MB freed on "
        "1 rank(s); 1 modules left as they were"
    )


def test_running_requests_are_refused():
    llm = Llm(busy=True)
    with pytest.raises(ValueError, match=r"requests are running"):
        patch_nemotron_h(llm)
    assert llm.calls == []


def test_worker_processes_without_the_extension_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    llm = Llm(extension="")
    with pytest.raises(ValueError, match=r'worker_extension_cls="vllm_nanoquant\.serving\.patch'):
        patch_nemotron_h(llm)
    assert llm.calls == []


def test_worker_processes_that_take_functions_are_given_one(monkeypatch):
    monkeypatch.setattr(compat, "workers_take_functions", lambda llm: True)
    llm = Llm([NOTHING], [NOTHING], extension="")
    patch_nemotron_h(llm)
    assert all(callable(method) for method, _ in llm.calls)


def test_an_asynchronous_engine_is_told_how():
    class AsyncEngine:
        async def collective_rpc(self, method):
            """As AsyncLLM's."""

    with pytest.raises(TypeError, match=r'AsyncEngine is asynchronous.*"nanoquant_patch"'):
        patch_nemotron_h(AsyncEngine())


@pytest.mark.parametrize("wrong", [7, "models/tiny-nemotron-h", None])
def test_something_else_is_refused(wrong):
    with pytest.raises(TypeError, match=r"takes vLLM's LLM, one of its workers or a model"):
        patch_nemotron_h(wrong)


def test_a_model_of_no_engine_is_refused():
    with pytest.raises(TypeError, match=r"Linear is no model of a vLLM engine.*from_linear"):
        patch_nemotron_h(torch.nn.Linear(4, 4))


def test_wrong_options_are_refused():
    with pytest.raises(RecipeError, match="unknown option 'grup_size'"):
        patch_nemotron_h(Llm(), grup_size=64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora_config": object()}, "--enable-lora"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config__enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
        (
            {"offload_config": SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=1))},
            "offloaded to the CPU",
        ),
        (
            {"offload_config": SimpleNamespace(prefetch=SimpleNamespace(offload_group_size=2))},
            "offloaded to the CPU",
        ),
        (
            {"compilation_config__mode": CompilationMode.STOCK_TORCH_COMPILE},
            "stock torch.compile",
        ),
    ],
)
def test_engines_that_keep_weights_elsewhere_are_refused(change, named):
    recompile.refuse_unsuitable(engine())
    with pytest.raises(ValueError, match=f"in an engine with .*{named}.*; serve with --quant"):
        recompile.refuse_unsuitable(engine(**change))


def test_graphs_that_cannot_be_dropped_are_refused():
    """Compiled code without graphs neither: what would put requests aside came with it."""

    def worker(manager):
        return SimpleNamespace(model_runner=SimpleNamespace(cudagraph_manager=manager))

    recompile.refuse_lasting_graphs(worker(None))
    recompile.refuse_lasting_graphs(worker(SimpleNamespace(release_graphs=print)))
    with pytest.raises(ValueError, match=r"cannot drop the compiled code.*enforce_eager=True"):
        recompile.refuse_lasting_graphs(worker(object()))


def test_graphs_are_captured_as_if_no_request_had_been_there(monkeypatch):
    """A row whose request ended with its prompt looks like a prefill to Mamba layers."""
    for name in ("lock_workspace", "unlock_workspace"):
        monkeypatch.setattr(f"vllm.v1.worker.workspace.{name}", lambda: None)
    rows = torch.tensor([[3, 4], [5, 0]])
    lengths = {"num_prompt_tokens_cpu_tensor": torch.tensor([8, 5])}
    lengths["num_computed_tokens_cpu_tensor"] = torch.tensor([0, 29])
    batch = SimpleNamespace(block_table=SimpleNamespace(clear=rows.zero_), **lengths)
    seen = {}

    def capture():
        computed, prompts = batch.num_computed_tokens_cpu_tensor, batch.num_prompt_tokens_cpu_tensor
        seen["prefills"] = (computed < prompts).tolist()
        seen["blocks"] = rows.tolist()

    runner = SimpleNamespace(input_batch=batch, max_num_tokens=16, _dummy_run=lambda *_, **__: None)
    recompile.compile_again(SimpleNamespace(model_runner=runner, compile_or_warm_up_model=capture))
    assert seen == {"prefills": [False, False], "blocks": [[0, 0], [0, 0]]}
