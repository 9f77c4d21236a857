# SPDX-License-Identifier: Apache-2.0
"""Calibration: quantizing with the inputs that a text causes, a layer at a time."""
