# SPDX-License-Identifier: Apache-2.0
"""The demo without vLLM: its checks, what it reads from the log, and a server that is a script."""

import socket
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import _checks
import demo
import pytest
from _console import Failure, guarded
from _server import Server, stage, telling_lines

LINE = (
    "nanoquant_w4a16: quantized 12 modules to int4 (preset balanced, group size 128, minmax): "
    "5.27 MB to 1.42 MB"
)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def script(tmp_path: Path, code: str) -> list[str]:
    """A server that is a Python script; its first argument is the port."""
    file = tmp_path / "server.py"
    file.write_text(textwrap.dedent(code))
    return [sys.executable, str(file)]


def started(tmp_path: Path, code: str, port: int) -> Server:
    command = [*script(tmp_path, code), str(port)]
    return Server(command, tmp_path / "server.log", f"http://127.0.0.1:{port}/health")


def gone(pid: int) -> bool:
    """Whether the process has ended, or ends within five seconds."""
    for _ in range(50):
        try:
            status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if status == "Z":
            return True
        time.sleep(0.1)
    return False


def test_quantized_line_is_found_in_a_log():
    log = f"(Worker pid=7) INFO 11-21 08:18:23 [linear.py:132] {LINE}\nINFO more"
    found = demo.find_quantized(log)
    assert found is not None
    assert (found.modules, found.before, found.after) == (12, "5.27 MB", "1.42 MB")
    assert found.ratio == pytest.approx(5.27 / 1.42)
    assert str(found) == (
        "12 modules to int4 (preset balanced, group size 128, minmax): 5.27 MB before, "
        "1.42 MB after, 3.7 times smaller"
    )


def test_quantized_line_with_two_units_and_one_module():
    found = demo.find_quantized(
        "nanoquant_w4a16: quantized 1 module to int4 (x): 1.20 GB to 300 MB"
    )
    assert found is not None
    assert found.ratio == pytest.approx(4.0)


def test_log_without_the_line():
    assert demo.find_quantized("INFO loading weights took 3 s") is None


def test_speed_is_tokens_over_seconds():
    assert demo.speed(64, 1.28) == "50.0 tokens/s (64 tokens in 1.28 s, one request)"
    assert demo.speed(0, 0.0).startswith("0.0 tokens/s")


def test_busy_port_names_a_free_one():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        with pytest.raises(Failure, match=rf"port {taken} on 127\.0\.0\.1 is in use") as caught:
            _checks.check_port("127.0.0.1", taken)
    assert "make demo PORT=" in str(caught.value)


@pytest.mark.parametrize("number", [0, -1, 65536])
def test_number_that_is_no_port(number):
    with pytest.raises(Failure, match="is no port"):
        _checks.check_port("127.0.0.1", number)


def test_missing_and_incomplete_model(tmp_path, model):
    with pytest.raises(Failure, match="there is no model in"):
        _checks.check_model(tmp_path / "nowhere")
    (model / "model.safetensors").unlink()
    with pytest.raises(Failure, match="no complete checkpoint"):
        _checks.check_model(model)


def test_check_fails_before_anything_slow(model, monkeypatch, capsys):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        arguments = ["--check", "--model", str(model), "--port", str(busy.getsockname()[1])]
        monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
        begun = time.monotonic()
        status = guarded(demo.main)
    error = capsys.readouterr().err
    assert status == 1
    assert time.monotonic() - begun < 2
    assert error.startswith("error: port ")
    assert len(error.splitlines()) == 1


def test_command_is_the_one_a_user_would_type(model):
    given = demo.parse(["--model", str(model), "--port", "8123", "--", "--seed", "1"])
    command = demo.serve_command("vllm", given, "cpu")
    assert command[:2] == ["vllm", "serve"]
    assert command[command.index("--quantization") + 1] == "nanoquant_w4a16"
    assert command[command.index("--port") + 1] == "8123"
    assert command[-2:] == ["--seed", "1"]
    assert "--enforce-eager" in command
    assert "--enforce-eager" not in demo.serve_command("vllm", given, "cuda")


def test_environment_keeps_caches_in_the_checkout_and_honours_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", "/mine")
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    env = demo.server_environment("cpu", tmp_path)
    assert env["HF_HOME"] == "/mine"
    assert env["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm")
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in demo.server_environment("cuda", tmp_path)


def test_server_is_waited_for_and_stopped(tmp_path, port, capsys):
    code = """
        import sys
        from http.server import BaseHTTPRequestHandler, HTTPServer
        class Health(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200); self.end_headers()
        HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
    """
    with started(tmp_path, code, port) as server:
        assert server.wait("[2/3] starting", 20) < 20
        pid = server.process.pid
    assert gone(pid)
    assert "[2/3] starting: ready" in capsys.readouterr().out


def test_stubborn_children_are_stopped_on_the_way_out_of_an_error(tmp_path, port, monkeypatch):
    monkeypatch.setattr("_server._STOP_SECONDS", 0.5)
    code = """
        import pathlib, signal, subprocess, sys, time
        ignore = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", ignore])
        time.sleep(0.5)
        pathlib.Path(sys.argv[0]).with_name("pid").write_text(str(child.pid))
        time.sleep(60)
    """
    with pytest.raises(KeyboardInterrupt), started(tmp_path, code, port):
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert gone(int((tmp_path / "pid").read_text()))


def test_dead_server_is_explained(tmp_path, port, capsys):
    code = """
        import sys
        print("(EngineCore pid=7) INFO 11-21 08:12:38 [core.py:133] Initializing a V1 LLM engine")
        print("(EngineCore pid=7) ERROR 11-21 08:12:38 [core.py:9] Traceback (most recent call):")
        print("(EngineCore pid=7) ERROR 11-21 08:12:38 [core.py:9] ValueError: no preset 'ful'")
        print("ValueError: no preset 'ful'")
        print("RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(3)
    """
    with (
        pytest.raises(Failure, match=r"vLLM stopped while starting \(exit status 3\)") as caught,
        started(tmp_path, code, port) as server,
    ):
        server.wait("[2/3] starting", 20)
    assert str(tmp_path / "server.log") in str(caught.value)
    output = capsys.readouterr().out
    assert output.count("ValueError: no preset 'ful'") == 1
    assert "Engine core" not in output
    assert "Traceback" not in output


def test_killed_server_is_explained(tmp_path, port):
    code = "import os; os.kill(os.getpid(), 9)"
    with (
        pytest.raises(Failure, match="killed by SIGKILL"),
        started(tmp_path, code, port) as server,
    ):
        server.wait("[2/3] starting", 20)


def test_server_that_never_answers(tmp_path, port):
    with (
        pytest.raises(Failure, match=r"not ready after 1 s.*--timeout"),
        started(tmp_path, "import time; time.sleep(60)", port) as server,
    ):
        server.wait("[2/3] starting", 0.6)


def test_error_from_a_pydantic_check_is_shown_without_its_decoration():
    lines = [
        "(APIServer pid=7) INFO 11-21 08:12:38 [api.py:1] args: {'q': 'nanoquant_w4a16'}",
        "(APIServer pid=7) pydantic_core.ValidationError: 1 validation error for VllmConfig",
        "(APIServer pid=7)   Value error, nanoquant_w4a16: no preset 'ful' [type=value_error, "
        "input_value=ArgsKwargs((), {'model_co...), input_type=ArgsKwargs]",
    ]
    assert telling_lines(lines) == ["Value error, nanoquant_w4a16: no preset 'ful'"]


def test_log_without_errors_shows_its_last_lines():
    assert telling_lines(["one", "", "two"], 1) == ["two"]


def test_stage_is_the_latest_one():
    lines = ["Resolved architecture: X", "Starting to load model x...", "something else"]
    assert stage(lines) == "loading the weights"
    assert stage([]) == "importing vLLM"


def test_report_without_the_line_is_a_failure(tmp_path, capsys):
    log = tmp_path / "server.log"
    log.write_text("INFO nothing of interest\n")
    with pytest.raises(Failure, match="no line about quantized modules"):
        demo.report(demo.Answer(" fine weather", 2, 0.1), "It was", log)
    log.write_text(LINE)
    demo.report(demo.Answer(" fine weather", 2, 0.1), "It was", log)
    assert "quantized: 12 modules" in capsys.readouterr().out


def test_completion_is_measured():
    reply = SimpleNamespace(
        choices=[SimpleNamespace(text="a b")], usage=SimpleNamespace(completion_tokens=2)
    )
    create = SimpleNamespace(create=lambda **options: reply)
    answer = demo.complete(SimpleNamespace(completions=create), "x", 2)
    assert (answer.text, answer.tokens) == ("a b", 2)
    assert answer.seconds >= 0


def test_openai_client_reaches_the_server_past_a_proxy(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)

    class Model(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            body = (
                b'{"id":"1","object":"text_completion","created":1,"model":"demo","choices":'
                b'[{"index":0,"text":" indeed","finish_reason":"stop","logprobs":null}],'
                b'"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}'
            )
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answer = demo.ask(server.server_port, "It is", 8)
    finally:
        server.shutdown()
        server.server_close()
    assert (answer.text, answer.tokens) == (" indeed", 1)
