# SPDX-License-Identifier: Apache-2.0
"""`nanoquant bench`: how fast a running server decodes, and how long our op takes on this machine.

Importing this imports neither torch nor vLLM.
"""
