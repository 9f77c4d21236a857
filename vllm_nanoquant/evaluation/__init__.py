# SPDX-License-Identifier: Apache-2.0
"""Evaluation: suites of tasks, run through a server or in process, and compared with BF16."""
