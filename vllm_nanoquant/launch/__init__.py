# SPDX-License-Identifier: Apache-2.0
"""`nanoquant serve`: the `vllm serve` line of a model, completed with what the user left out.

`given` reads the options that the user gave, `model` what the checkpoint says of itself, `machine`
what it runs on; `additions` decides what is missing, `command` how vLLM is started here. None of
them imports vLLM.
"""
