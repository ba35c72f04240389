"""The feature store: its format, written and read with numpy and zarr alone."""
