# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that tasks get which would run remote code: none runs."""

import json
import shutil

import pytest

from vllm_nanoquant.evaluation.errors import EvaluationError
from vllm_nanoquant.evaluation.tokenizers import without_code


@pytest.fixture
def hostile(tiny_model, tmp_path):
    """A model whose tokenizer names a class in a file beside it that would leave a mark."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    shutil.copy(tiny_model / "tokenizer.json", folder)
    config = json.loads((tiny_model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast as Mine\n"
    )
    return folder


def test_no_code_runs_even_where_it_is_switched_on(hostile, tiny_model, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    expected = AutoTokenizer.from_pretrained(tiny_model).encode("It was a fine morning")
    with without_code(str(hostile)) as folder:
        assert not list(folder.glob("*.py"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "auto_map" not in config
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert tokenizer.encode("It was a fine morning") == expected
        assert tokenizer.chat_template
    assert not folder.exists()
    assert not (tmp_path / "mark").exists()


def test_where_there_is_no_tokenizer(tmp_path):
    with (
        pytest.raises(EvaluationError, match=r"has no tokenizer.json; give a folder"),
        without_code(str(tmp_path)),
    ):
        pass
    with pytest.raises(EvaluationError), without_code("maker/not a model"):
        pass
