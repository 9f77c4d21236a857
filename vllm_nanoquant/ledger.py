# SPDX-License-Identifier: Apache-2.0
"""What has been quantized so far, and the one line that says so when all of it is."""

from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Counts the modules of one worker from the moment they are built until they are int4."""

    recipe: str
    """What the modules are quantized by, in words, for the log."""
    stored: bool = False
    """Whether the checkpoint holds int4; else the modules are quantized while they load."""
    pending: set[str] = field(default_factory=set)
    """Modules built, weights not there yet."""
    done: set[str] = field(default_factory=set)
    """Modules in int4."""
    bytes_before: int = 0
    """Bytes of the quantized modules' weights as the checkpoint has them."""
    bytes_after: int = 0
    """Bytes of the same weights in int4, scales and zero points included."""

    def expect(self, module: str) -> None:
        """Note a module that will be quantized."""
        self.pending.add(module)

    def finish(self, module: str, bytes_before: int, bytes_after: int) -> bool:
        """Note that a module is in int4. True if it was the last one, and for the first time."""
        if module in self.done:  # a reload quantizes again
            return False
        self.done.add(module)
        self.pending.discard(module)
        self.bytes_before += bytes_before
        self.bytes_after += bytes_after
        return not self.pending

    def summary(self) -> str:
        """The line for the log: how many modules, by which recipe, their size before and after."""
        before, after = f"{self.bytes_before / 1e6:.2f} MB", f"{self.bytes_after / 1e6:.2f} MB"
        if self.stored:
            count = f"loaded {len(self.done)} int4 modules"
            return f"{count} ({self.recipe}): {after}, {before} in BF16"
        return f"quantized {len(self.done)} modules to int4 ({self.recipe}): {before} to {after}"
