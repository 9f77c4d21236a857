# SPDX-License-Identifier: Apache-2.0
"""Serve the repository's model in int4 with real vLLM, ask it for a text, and stop.

``make demo`` calls this twice: with ``--check`` under the system's Python, before anything slow,
and then in the environment that tools/setup_env.py made.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from _checks import (
    check_compiler,
    check_model,
    check_port,
    check_python,
    find_device,
)
from _console import ROOT, Failure, guarded, say, shown
from _server import Server

METHOD = "nanoquant_w4a16"
HOST = "127.0.0.1"
PROMPT = "It was a fine morning, and"
_NAME = "demo"
_TEMPERATURE, _SEED = 0.7, 1
_QUANTIZED = re.compile(
    rf"{METHOD}: quantized (?P<modules>\d+) modules? to int4 \((?P<how>[^)]*)\): "
    r"(?P<before>[\d.]+) (?P<before_unit>[KMG]?B) to (?P<after>[\d.]+) (?P<after_unit>[KMG]?B)"
)
_UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Quantized:
    """What the plugin says that it did, read from the server's log."""

    modules: int
    how: str
    before: str
    after: str
    ratio: float

    def __str__(self) -> str:
        """Return the sentence for a person."""
        return (
            f"{self.modules} modules to int4 ({self.how}): {self.before} before, "
            f"{self.after} after, {self.ratio:.1f} times smaller"
        )


def find_quantized(log: str) -> Quantized | None:
    """Find the plugin's line in the server's log; None when it quantized nothing."""
    match = _QUANTIZED.search(log)
    if match is None:
        return None
    before = float(match["before"]) * _UNITS[match["before_unit"]]
    after = float(match["after"]) * _UNITS[match["after_unit"]]
    return Quantized(
        modules=int(match["modules"]),
        how=match["how"],
        before=f"{match['before']} {match['before_unit']}",
        after=f"{match['after']} {match['after_unit']}",
        ratio=before / after if after else 0.0,
    )


def speed(tokens: int, seconds: float) -> str:
    """Return tokens per second as text, with what it was made from."""
    rate = tokens / seconds if seconds > 0 else 0.0
    return f"{rate:.1f} tokens/s ({tokens} tokens in {seconds:.2f} s, one request)"


def serve_command(vllm: str, given: argparse.Namespace, device: str) -> list[str]:
    """Return the command that starts the server.

    On the CPU the model is served without torch.compile: it would take half a minute more to
    start and answer no faster. ``-- --no-enforce-eager`` compiles it all the same.
    """
    command = [vllm, "serve", shown(given.model), "--quantization", METHOD]
    command += ["--served-model-name", _NAME, "--host", HOST, "--port", str(given.port)]
    command += ["--max-model-len", "512", "--max-num-seqs", "8"]
    if device == "cuda":
        command += ["--gpu-memory-utilization", "0.3"]
    else:
        command.append("--enforce-eager")
    return command + list(given.vllm_arguments)


def server_environment(device: str, cache: Path) -> dict[str, str]:
    """Return the server's environment: no network, and every cache inside the checkout."""
    env = dict(os.environ)
    env.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", NO_COLOR="1")
    folders = {
        "HF_HOME": "huggingface",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "VLLM_CACHE_ROOT": "vllm",
        "VLLM_CONFIG_ROOT": "vllm-config",
    }
    for variable, folder in folders.items():
        env.setdefault(variable, str(cache / folder))
    if device == "cpu":
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return env


@dataclass(frozen=True)
class Answer:
    """A completion, and how long it took."""

    text: str
    tokens: int
    seconds: float


def complete(client: Any, prompt: str, max_tokens: int) -> Answer:
    """Ask for one completion: sampled, as greedy text of a small model repeats itself."""
    started = time.perf_counter()
    reply = client.completions.create(
        model=_NAME, prompt=prompt, max_tokens=max_tokens, temperature=_TEMPERATURE, seed=_SEED
    )
    seconds = time.perf_counter() - started
    return Answer(reply.choices[0].text, reply.usage.completion_tokens, seconds)


def ask(port: int, prompt: str, max_tokens: int) -> Answer:
    """Ask twice through the OpenAI client, and return the second answer: the first one warms up."""
    try:
        import openai
    except ImportError:
        raise Failure("the openai package is missing: run 'make demo', which installs it") from None

    with openai.OpenAI(
        base_url=f"http://{HOST}:{port}/v1",
        api_key="none",
        timeout=300,
        http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy to this machine
    ) as client:
        try:
            complete(client, prompt, 4)
            return complete(client, prompt, max_tokens)
        except openai.OpenAIError as error:
            raise Failure(f"the server did not answer the request: {error}") from None


def report(answer: Answer, prompt: str, log: Path) -> None:
    """Print the text, the speed and what was quantized."""
    quantized = find_quantized(log.read_text(encoding="utf-8", errors="replace"))
    say()
    say(f"prompt:    {prompt}")
    say(f"text:      {answer.text.strip()}")
    say(f"speed:     {speed(answer.tokens, answer.seconds)}")
    if quantized is None:
        raise Failure(
            f"the server answered, but {shown(log)} has no line about quantized modules, so the "
            "text above came from the weights as they are"
        )
    say(f"quantized: {quantized}")
    say()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; what follows ``--`` goes to vLLM."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        description="Serve the repository's model in int4, and ask it."
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-nemotron-h")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for the server")
    parser.add_argument("--check", action="store_true", help="only check what can fail at once")
    options = parser.parse_args(given[:split])
    options.vllm_arguments = given[split + 1 :]
    return options


def preflight(given: argparse.Namespace) -> None:
    """Check what can be checked before anything slow."""
    check_python()
    check_port(HOST, given.port)
    check_model(given.model)
    check_compiler()


def main() -> None:
    """Check, serve, ask, report, stop."""
    started = time.monotonic()
    given = parse()
    preflight(given)
    if given.check:
        return
    vllm = Path(sys.executable).parent / "vllm"
    if not vllm.exists():
        raise Failure(f"there is no vllm beside {sys.executable}: run 'make demo'")
    device = find_device()
    work = Path(sys.prefix) / "demo"
    command = serve_command(shown(vllm), given, device)
    say(f"[1/3] {shlex.join(command)}")
    say(f"      log: {shown(work / 'server.log')}")
    health = f"http://{HOST}:{given.port}/health"
    env = server_environment(device, work / "cache")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with Server(command, work / "server.log", health, env) as server:
            server.wait("[2/3] starting vLLM", given.timeout)
            say("[3/3] asking for a completion through the OpenAI API")
            report(ask(given.port, given.prompt, given.max_tokens), given.prompt, server.log)
    finally:
        say(f"server stopped; {time.monotonic() - started:.0f} s in all")


def _terminated(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that the server is stopped on the way out."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(guarded(main))
