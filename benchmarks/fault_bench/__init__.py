"""Faults injected into everything that autoq writes: kill -9, full disks, folders that may not be written."""
