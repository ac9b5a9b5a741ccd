"""The report: one HTML file with its tables, pictures and provenance, which needs neither network nor model."""

from __future__ import annotations

from autoq.report.page import page
from autoq.report.tables import Table, report_tables

__all__ = ["Table", "page", "report_tables"]
