# SPDX-License-Identifier: Apache-2.0
"""Write docs/messages.md: every error and warning of the package, as users see it, by its source.

    python tools/docs_messages.py docs/messages.md

Messages are read off the source: what is raised, logged as a warning or reported by `verify`, and
the helpers that put such texts together. What varies is shown as an ellipsis.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "vllm_nanoquant"
GAP = "…"

# `doctor` has a table of its own in docs/errors.md: what it prints depends on the machine.
_LEFT_OUT = {"doctor"}
# Its functions return and yield parts of a model card.
_WRITES_TEXTS = {"checkpoint/card.py"}
_LEAST_WORDS = 2
_WORD = re.compile(r"[A-Za-z]{2,}")

_HEAD = """\
<!-- Made by tools/docs_messages.py; change the messages in the source, and run it again. -->

# Every message

Each error and warning of vllm-nanoquant, as its source has it, for searching: names, values and
places stand where there is an ellipsis (…). What led to the common ones, and the way out:
[errors.md](errors.md). What `nanoquant doctor` prints is [there](errors.md#the-surroundings), too.
Messages of vLLM itself are not here.

A message that says "please report" is a defect of ours, whatever led to it.
"""


def constants() -> dict[str, str]:
    """Module-level strings of the package by name, where a name stands for one string."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                value = node.value.value
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(value, str):
                        found.setdefault(target.id, set()).add(value)
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


class _Messages(ast.NodeVisitor):
    """Collects the messages of one module."""

    def __init__(self, known: dict[str, str], with_helpers: bool) -> None:
        self.found: dict[str, None] = {}
        self._known = known
        self._with_helpers = with_helpers

    def text_of(self, node: ast.expr) -> str | None:
        """Template of an expression that is a string; None for anything else."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return "".join(self._part(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.text_of(node.left), self.text_of(node.right)
            return None if left is None and right is None else (left or GAP) + (right or GAP)
        return None

    def _part(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        assert isinstance(node, ast.FormattedValue)
        value = node.value
        name = getattr(value, "id", None) or getattr(value, "attr", None)
        if name is None or name not in self._known:
            return GAP
        return repr(self._known[name]) if node.conversion == ord("r") else self._known[name]

    def take(self, node: ast.AST | None) -> None:
        """Collect the strings below a node, each as long as it goes."""
        if node is None:
            return
        text = self.text_of(node) if isinstance(node, ast.expr) else None
        if text is None:
            for child in ast.iter_child_nodes(node):
                self.take(child)
            return
        text = re.sub(r"%[sdr]", GAP, " ".join(text.split()))
        text = re.sub(f"{GAP}(?:[^A-Za-z]?{GAP})+", GAP, text)
        if len(_WORD.findall(text)) >= _LEAST_WORDS and " " in text:
            self.found[text] = None

    def visit_Raise(self, node: ast.Raise) -> None:
        """What is raised."""
        self.take(node.exc)

    def visit_Call(self, node: ast.Call) -> None:
        """What is logged as a warning, or added to a list of problems."""
        name = getattr(node.func, "attr", "")
        if name.startswith("warning"):
            for argument in node.args:
                self.take(argument)
        elif name in ("append", "extend") and "problem" in ast.unparse(node.func):
            self.take(node.args[0])
        self.generic_visit(node)

    def visit_Yield(self, node: ast.Yield) -> None:
        """What `verify` reports."""
        if self._with_helpers:
            self.take(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Helpers that return a message, or none where all is well."""
        returned = ast.unparse(node.returns) if node.returns else ""
        helper = node.name.startswith(("_", "why", "missing")) and self._with_helpers
        if helper and re.match(r"(tuple.*)?str\b", returned):
            for child in ast.walk(node):
                if isinstance(child, ast.Return):
                    self.take(child.value)
        self.generic_visit(node)


def messages() -> Iterator[tuple[str, str, list[str]]]:
    """Source file, first line of its docstring, and messages, for each file that has any."""
    known = constants()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] in _LEFT_OUT:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        collected = _Messages(known, with_helpers=str(name) not in _WRITES_TEXTS)
        collected.visit(tree)
        if collected.found:
            about = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
            yield str(name), about, list(collected.found)


def code(text: str) -> str:
    """A code span, whatever backticks there are in the text."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for name, about, found in messages():
        lines = "\n".join(f"- {code(text)}" for text in found)
        parts.append(f"## {name}\n\n{about}\n\n{lines}\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write the page of all messages.")
    parser.add_argument("page", type=Path)
    parser.parse_args(arguments).page.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
