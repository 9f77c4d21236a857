# SPDX-License-Identifier: Apache-2.0
"""The command line. A command is one module with `add_to` and `run`; main.py lists them."""
