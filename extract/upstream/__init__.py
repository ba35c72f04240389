"""Upstreams: teachers, students and filter banks, identified, loaded and run."""
