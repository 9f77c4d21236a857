# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_nanoquant.command_line import misplaced_flag, refuse_misplaced_flags

OURS = ["vllm", "serve", "model", "--quantization", "nanoquant_w4a16"]


@pytest.mark.parametrize(
    ("extra", "flag"),
    [
        (["--quantization-config", '{"group_size": 64}'], "--quantization-config"),
        (["--quantization-config.linear", "fp8_per_tensor"], "--quantization-config.linear"),
        (["--quantization_config={}"], "--quantization_config"),
        (["--preset", "full"], "--preset"),
        (["--group-size=64"], "--group-size"),
        (["--max-capture-size", "32"], "--max-capture-size"),
        (["--hf-overrides.quantization_config.preset", "full"], None),
        (["--max-num-seqs", "8", "--served-model-name", "ignore"], None),
    ],
)
def test_the_wrong_flag_is_found(extra, flag):
    assert misplaced_flag([*OURS, *extra]) == flag


@pytest.mark.parametrize("asking", [["-q", "nanoquant_w4a16"], ["--quantization=nanoquant_w4a16"]])
def test_every_way_to_ask_for_our_method(asking):
    assert misplaced_flag(["vllm", "serve", "m", *asking, "--preset", "full"]) == "--preset"


@pytest.mark.parametrize("method", ["fp8", "nanoquant"])
def test_other_methods_are_none_of_our_business(method):
    line = ["vllm", "serve", "m", "--quantization", method, "--quantization-config", "{}"]
    assert misplaced_flag(line) is None


def test_the_refusal_names_the_right_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        refuse_misplaced_flags([*OURS, "--preset", "full"])
    assert stopped.value.code == 2
    assert "--hf-overrides.quantization_config.preset" in capsys.readouterr().err
    refuse_misplaced_flags(OURS)
