#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the training text of ``tools/train_small_model.py``: fetch, clean, tokenize, compress.

    python tools/prepare_small_corpus.py --out build/small-corpus

It downloads Debian packages (tools/small_model/packages.json) with apt-get, so it wants Debian or
Ubuntu with the package lists of Debian 12, and takes some ten minutes. The folder that it writes
has all that training needs, about 45 MB, and can be carried to a machine without a network.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from small_model.corpus import Document, documents, fetch_packages
from small_model.data import prepare


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the prepared text")
    parser.add_argument(
        "--packages", type=Path, default=Path("build/small-corpus-packages"), help="downloads"
    )
    parser.add_argument("--text", type=Path, nargs="+", help="plain texts instead of packages")
    parser.add_argument("--vocabulary", type=int, default=16384)
    options = parser.parse_args()
    if options.text:
        found = [Document(str(path), path.read_text(encoding="utf-8")) for path in options.text]
    else:
        found = list(documents(fetch_packages(options.packages)))
    about = prepare(found, options.vocabulary, options.out)
    print(json.dumps(about, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
