# SPDX-License-Identifier: Apache-2.0
"""Ask vLLM for the engine configuration of command lines, in a process of its own.

python engine_configs.py JOBS.json RESULTS.json; a job is ["serve", words], ["bench", words] or
["LLM", arguments], a result None or the text of the error.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

# Where vLLM has it: 0.33, 0.29 to 0.32, and before.
_PLACES = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)


def _serve_module():
    for name in _PLACES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(_PLACES)


def serve(words):
    module = _serve_module()
    parser = module.make_arg_parser(FlexibleArgumentParser())
    given = parser.parse_args(words)
    if getattr(given, "model_tag", None):
        given.model = given.model_tag
    module.validate_parsed_serve_args(given)
    known = ToolParserManager.list_registered()
    assert given.tool_call_parser is None or given.tool_call_parser in known
    known = ReasoningParserManager.list_registered()
    parser = (
        getattr(given, "reasoning_parser", None) or given.structured_outputs_config.reasoning_parser
    )
    assert not parser or parser in known
    AsyncEngineArgs.from_cli_args(given).create_engine_config()


def bench(words):
    module = importlib.import_module(f"vllm.benchmarks.{words[0]}")
    parser = FlexibleArgumentParser()
    module.add_cli_args(parser)
    parser.parse_args(words[1:])


def engine(arguments):
    EngineArgs(**arguments).create_engine_config()


def result_of(kind, what):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            {"serve": serve, "bench": bench, "LLM": engine}[kind](what)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error} {said.getvalue()[-300:]}"
    return None


def main():
    jobs, results = map(Path, sys.argv[1:])
    load_general_plugins()
    found = [result_of(*job) for job in json.loads(jobs.read_text())]
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
