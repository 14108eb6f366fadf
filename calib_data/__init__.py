"""Text for calibration and evaluation: files, data sets of the hub, and a small bundled text of our own.

A source is spelt as on the command line: `default`, `default:eval`, `hub:NAME[@CONFIG][:SPLIT]`, or a file.
"""

from __future__ import annotations

from quantize.calib_data.records import Document
from quantize.calib_data.rows import CalibrationText, token_rows
from quantize.calib_data.sources import documents, read_text

__all__ = ["CalibrationText", "Document", "documents", "read_text", "token_rows"]
