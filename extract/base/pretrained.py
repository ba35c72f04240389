"""Strict opening of a model folder with transformers: weights that are missing, unused or misshapen are errors."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from extract.base.errors import RetortError

# Errors of transformers for a config or weights that are damaged or of another model.
_UNREADABLE = (
    OSError, ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, ImportError, ZeroDivisionError,
    AssertionError, EOFError, pickle.UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip
_UNUSED = {"masked_spec_embed"}  # weights that only pre-training uses may be missing
_UNUSED_LAST = "num_batches_tracked"  # training step counter of batch norm


def open_pretrained(
    opener: Callable[..., Any],
    folder: Path,
    *,
    refusal: str,
    fix: str,
    own: re.Pattern[str] | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """Return the model in a folder and the names of weights that the folder lacks, which transformers initialises.

    opener: a `from_pretrained` of transformers. own: pattern of the model's own weight names. Raises RetortError, which
    begins with `refusal` and ends with `fix`, for a folder that can't be opened, for weights of another shape, and for
    unused weights whose names match `own`.
    """
    from transformers import logging  # imported late: it takes seconds

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # Other shapes are refused below with their names, which the error of transformers does not contain.
        model, loading = opener(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, ImportError):
            fix = f"install what it needs, or {fix}"
        raise RetortError(f"{refusal} ({reason}); {fix}") from None
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise RetortError(
            f"{refusal}: {len(mismatched)} of its weights have other shapes than config.json states, such as "
            f"{name}: got {list(found)}, expected {list(expected)}; {fix}"
        )
    if own is not None and (odd := sorted(name for name in loading["unexpected_keys"] if own.search(name))):
        raise RetortError(
            f"{folder}: {len(odd)} weights do not belong to the model of config.json, such as {odd[0]}; config and "
            f"weights are not of one model, {fix} (to keep fewer layers, use --layers)"
        )
    missing = {name for name in loading["missing_keys"] if not name.endswith(_UNUSED_LAST)}
    return model, sorted(missing - _UNUSED)
