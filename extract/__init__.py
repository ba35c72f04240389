"""Stage one, and what all rooms share. The version of Retort stands here: pyproject.toml reads it."""

__version__ = "0.2.0"
