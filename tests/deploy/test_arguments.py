# SPDX-License-Identifier: Apache-2.0
"""What is deployed is what `vllm serve` of this environment accepts, and fits its surroundings."""

from importlib import import_module

import pytest

from vllm_nanoquant.recipe import ServingOptions

from .files import DOCKER, deployments

pytestmark = pytest.mark.compat

CHECKS = (
    "vllm.entrypoints.common.cli_args",  # 0.33
    "vllm.entrypoints.launchers.launcher",
    "vllm.entrypoints.openai.api_server",  # up to 0.28
)
"""Where vLLM has what the server checks before it loads anything: the parsers' names."""

DEPLOYMENTS = {deployment.name: deployment for deployment in deployments()}


def server_check():
    """vLLM's `validate_api_server_args`."""
    for name in CHECKS:
        try:
            return import_module(name).validate_api_server_args
        except (ImportError, AttributeError):
            continue
    raise AssertionError(f"this vLLM has validate_api_server_args in none of {CHECKS}")


@pytest.fixture(scope="module")
def parse():
    """vLLM's own command line, with this plugin loaded: arguments in, options out."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.plugins import load_general_plugins
    from vllm.reasoning import ReasoningParserManager
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = FlexibleArgumentParser()
    commands = parser.add_subparsers(dest="subparser")
    command = ServeSubcommand()
    command.subparser_init(commands)
    check = server_check()

    def parsed(arguments):
        options = parser.parse_args(["serve", *arguments])
        command.validate(options)
        check(options)
        assert options.reasoning_parser in ("", *ReasoningParserManager.list_registered())
        return options

    return parsed


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request):
    return DEPLOYMENTS[request.param]


def test_every_file_that_starts_vllm_is_checked():
    started = {path.name for path in DOCKER.glob("compose.*.yml")} - {"compose.common.yml"}
    runtimes = {path.parent.name for path in DOCKER.glob("*/serving-runtime.yaml")}
    assert {"Dockerfile", *started, *runtimes} == set(DEPLOYMENTS)


def test_vllm_accepts_the_arguments(deployment, parse):
    options = parse(deployment.arguments)
    assert options.model_tag == deployment.arguments[0]
    assert options.quantization == "nanoquant_w4a16"
    assert options.tensor_parallel_size == deployment.gpus
    assert options.port == deployment.port


def test_a_wrong_argument_is_noticed(deployment, parse, capsys):
    with pytest.raises(SystemExit):
        parse([*deployment.arguments, "--max-model-length=1"])
    assert "--max-model-length" in capsys.readouterr().err


def test_graphs_cover_every_batch(deployment, parse):
    """No more sequences at once than CUDA graphs are captured for."""
    options = parse(deployment.arguments)
    ours = ServingOptions.model_validate(options.hf_overrides.get("quantization_config", {}))
    assert options.max_num_seqs <= ours.max_capture_size
