# SPDX-License-Identifier: Apache-2.0
"""What changes an engine that is running."""
