"""Errors, files, configuration and progress: shared by all rooms."""
