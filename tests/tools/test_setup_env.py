# SPDX-License-Identifier: Apache-2.0
"""Setting up the environment, without a network: what is asked of pip, and what people are told."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import _checks
import _pip
import _vllm_cpu
import pytest
import setup_env
from _console import ROOT, Failure, guarded, run_logged

REQUIREMENTS = [
    "regex",
    "transformers<5.20.0,>=5.16.1",
    'six>=1.16.0; python_version > "3.11"',
    'torch==2.13.0+cpu; platform_machine == "x86_64" or platform_machine == "aarch64"',
    'torch==2.13.0; platform_system == "Darwin"',
    'torchaudio; platform_machine != "s390x"',
    "torchvision",
    "torchcodec>=0.14",
    "torch-like-name",
    'zentorch==2.13.0.1; extra == "zen"',
]


def prepared(venv: Path, options: setup_env.Options) -> setup_env.Setup:
    """A set-up whose every step is on record as done."""
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    setup = setup_env.Setup(options)
    done = {step.name: step.key for step in setup.steps()}
    setup.env.save(steps=done, device=setup.device)
    return setup_env.Setup(options)


def test_wheel_requirements_are_read_and_torch_is_left_out(tmp_path):
    wheel = tmp_path / "vllm_cpu-0.32.0-cp38-abi3-linux.whl"
    lines = "".join(f"Requires-Dist: {line}\n" for line in REQUIREMENTS)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-0.32.0.dist-info/METADATA", f"Name: vllm-cpu\n{lines}\nText\n")

    found = _vllm_cpu.wheel_requirements(wheel)

    assert found == REQUIREMENTS
    assert _vllm_cpu.torch_version(found) == "2.13.0"
    assert _vllm_cpu.requirements_beside_torch(found) == [*REQUIREMENTS[:3], "torch-like-name"]


def test_torch_version_of_a_wheel_without_a_pin():
    assert _vllm_cpu.torch_version(["torch>=2", "numpy"]) is None


def test_stub_is_a_distribution_named_vllm(tmp_path):
    first = _vllm_cpu.write_stub(tmp_path, "0.32.0")
    content = {file.name: file.read_bytes() for file in first.iterdir()}

    again = _vllm_cpu.write_stub(tmp_path, "0.32.0")

    assert again == first
    assert {file.name: file.read_bytes() for file in again.iterdir()} == content
    found = list(importlib.metadata.distributions(name="vllm", path=[str(tmp_path)]))
    assert [distribution.version for distribution in found] == ["0.32.0+cpu"]
    assert sorted(str(file) for file in found[0].files or []) == sorted(
        f"vllm-0.32.0+cpu.dist-info/{name}" for name in content
    )


def test_stub_of_another_release_replaces_ours_and_nothing_else(tmp_path):
    real = tmp_path / "vllm-0.30.0.dist-info"
    real.mkdir()
    (real / "INSTALLER").write_text("pip\n")
    _vllm_cpu.write_stub(tmp_path, "0.28.0")

    _vllm_cpu.write_stub(tmp_path, "0.32.0")

    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == ["vllm-0.30.0.dist-info", "vllm-0.32.0+cpu.dist-info"]


def test_cpu_steps_install_torch_before_vllm(tmp_path):
    setup = setup_env.Setup(setup_env.Options(tmp_path / "venv", device="cpu"))
    names = [step.name for step in setup.missing()]
    assert names == ["venv", "wheel", "torch", "vllm", "trim", "plugin", "check"]


def test_gpu_steps_leave_the_choice_of_torch_to_vllm(tmp_path):
    setup = setup_env.Setup(setup_env.Options(tmp_path / "venv", device="cuda"))
    assert [step.name for step in setup.missing()] == ["venv", "vllm", "plugin", "check"]
    assert ">=0.26,<0.34" in setup.missing()[1].label


def test_finished_environment_is_recognised(tmp_path):
    options = setup_env.Options(tmp_path / "venv", device="cpu", test_tools=True)
    assert prepared(options.venv, options).missing() == []


def test_interrupted_setup_goes_on_where_it_stopped(tmp_path):
    options = setup_env.Options(tmp_path / "venv", device="cpu")
    setup = prepared(options.venv, options)
    done = setup.env.state["steps"]
    setup.env.save(steps={name: done[name] for name in ("venv", "wheel", "torch")})
    names = [step.name for step in setup_env.Setup(options).missing()]
    assert names == ["vllm", "trim", "plugin", "check"]


def test_changed_pyproject_repeats_the_plugin_alone(tmp_path, monkeypatch):
    options = setup_env.Options(tmp_path / "venv", device="cpu")
    prepared(options.venv, options)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    assert [step.name for step in setup_env.Setup(options).missing()] == ["plugin"]


def test_another_release_of_vllm_is_installed_anew(tmp_path):
    options = setup_env.Options(tmp_path / "venv", device="cpu")
    prepared(options.venv, options)
    other = setup_env.Options(options.venv, vllm_version="0.28.0", device="cpu")
    assert setup_env.Setup(other).missing()[0].name == "wheel"


def test_environment_without_its_interpreter_is_made_anew(tmp_path):
    options = setup_env.Options(tmp_path / "venv", device="cpu")
    prepared(options.venv, options)
    (options.venv / "bin" / "python").unlink()
    assert setup_env.Setup(options).missing()[0].name == "venv"


def test_unreadable_record_counts_as_empty(tmp_path):
    environment = setup_env.Environment(tmp_path)
    environment.folder.mkdir()
    (environment.folder / "state.json").write_text("{half")
    environment.load()
    assert environment.state == {}


def test_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    setup = setup_env.Setup(setup_env.Options(tmp_path, device="cpu"))
    with pytest.raises(Failure, match="is there and is no virtual environment"):
        setup.run()
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("options", "needed"),
    [({}, 4.5), ({"test_tools": True}, 5), ({"test_tools": True, "vllm_version": "0.28.0"}, 4.5)],
)
def test_too_little_disk_is_named_before_anything_is_made(tmp_path, monkeypatch, options, needed):
    def made(*_):
        raise InterruptedError

    monkeypatch.setattr(setup_env.Setup, "_make_venv", made)
    for check in ("check_compiler", "check_headers"):
        monkeypatch.setattr(setup_env, check, lambda *_: None)
    setup = setup_env.Setup(setup_env.Options(tmp_path / "venv", device="cpu", **options))
    for free, caught, said in (
        (
            needed - 0.1,
            Failure,
            f"has {needed - 0.1:.1f} GB free and the environment takes {needed} GB",
        ),
        (needed + 0.1, InterruptedError, ""),
    ):
        usage = SimpleNamespace(free=free * 1e9)
        monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _, usage=usage: usage)
        with pytest.raises(caught, match=said):
            setup.run()


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 14, 0), (2, 7, 18)])
def test_python_that_does_not_fit(version):
    with pytest.raises(Failure, match=r"3\.11 to 3\.13 is needed.*make demo PYTHON=") as caught:
        _checks.check_python(version)
    assert ".".join(map(str, version)) in str(caught.value)


def test_pythons_agree_with_pyproject():
    (low, high) = _checks.PYTHONS
    expected = f'requires-python = ">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"'
    assert expected in (ROOT / "pyproject.toml").read_text()
    assert f'cuda = ["vllm{setup_env.CUDA_RANGE}"]' in (ROOT / "pyproject.toml").read_text()


def test_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failure, match=r"no C\+\+ compiler.*apt-get install g\+\+"):
        _checks.check_compiler()
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(Failure, match=r"CXX names 'g\+\+-99', which is not there"):
        _checks.check_compiler()


def test_compiler_that_is_there(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    (tmp_path / "clang++").chmod(0o755)
    _checks.check_compiler()


@pytest.mark.parametrize(
    ("script", "device"),
    [
        ("echo 'GPU 0: NVIDIA (UUID: GPU-1)'", "cuda"),
        ("echo failed to talk to the driver; exit 9", "cpu"),
        (None, "cpu"),
    ],
)
def test_device(monkeypatch, tmp_path, script, device):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _checks.find_device() == device


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("x: Temporary failure in name resolution", "could not be downloaded"),
        ("Collecting a\nERROR: No matching distribution found for a==9.", "found for a==9"),
        ("ERROR: Could not find a version of a==9 (from versions: none)", "check the network"),
        ("", "pip stopped"),
    ],
)
def test_failed_pip_is_explained(output, reason):
    text = _pip.explain(output.splitlines())
    assert reason in text
    assert not text.endswith(".")


def test_failed_pip_names_its_log(tmp_path, capsys):
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\necho 'ERROR: No matching distribution found for torch==9'\nexit 1\n"
    )
    fake.chmod(0o755)
    log = tmp_path / "setup.log"
    with pytest.raises(Failure) as caught:
        _pip.run(fake, "[3/7] installing PyTorch", log, "install", "torch==9")
    text = str(caught.value)
    assert text.startswith("installing PyTorch failed: No matching distribution found for torch==9")
    assert str(log) in text
    assert "No matching distribution" in capsys.readouterr().out
    assert "-m pip install torch==9" in log.read_text()


def test_progress_shows_only_what_pip_is_doing():
    assert _pip.progress("  Downloading x-1.whl (80 MB)") == "Downloading x-1.whl (80 MB)"
    assert _pip.progress("Requirement already satisfied: x") is None
    assert len(_pip.progress("Collecting " + "x" * 200) or "") == 70


def test_command_output_goes_to_the_log_and_status_comes_back(tmp_path, capsys):
    log = tmp_path / "logs" / "all.log"
    code = "print('hello'); raise SystemExit(3)"
    status, start = run_logged([sys.executable, "-c", code], "[1/1] trying", log)
    assert status == 3
    assert log.read_bytes()[start:] == b"hello\n"
    assert "[1/1] trying: failed" in capsys.readouterr().out


def test_failure_is_one_sentence_and_status_1(capsys):
    def broken() -> None:
        raise Failure("the sky is down: hold it up")

    assert guarded(broken) == 1
    assert capsys.readouterr().err == "error: the sky is down: hold it up\n"


def test_command_line_of_make_with_empty_variables():
    options = setup_env.parse(["--venv", "v", "--vllm-version", "", "--torch-index", ""])
    assert options == setup_env.Options(Path.cwd() / "v")


def test_script_starts_with_the_standard_library_alone():
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(ROOT / 'tools')!r}); sys.argv = ['x', '-h']; "
        f"runpy.run_path({str(ROOT / 'tools' / 'setup_env.py')!r}, run_name='__main__')"
    )
    shown = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--torch-index" in shown.stdout
