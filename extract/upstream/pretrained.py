"""Opening a folder of weights by transformers, and what it lacks."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from extract.base.errors import RetortError

# What transformers raises for a config or weights that are damaged or of something else.
_UNREADABLE = (
    OSError, ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, ImportError, ZeroDivisionError,
    AssertionError, EOFError, pickle.UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip
_UNUSED = {"masked_spec_embed"}  # what only pre-training uses may be missing
_UNUSED_LAST = "num_batches_tracked"  # a counter of batch norm's training


def open_pretrained(
    opener: Callable[..., Any],
    folder: Path,
    *,
    refusal: str,
    mend: str,
    own: re.Pattern[str] | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """The model in a folder, and the weights that the folder lacks: those are random, so the caller refuses.

    opener: a `from_pretrained` of transformers, which itself warns of weights that are missing and goes on. Raises
    RetortError, which begins with `refusal` and ends with `mend`, for a folder that can't be opened, and for weights
    that the model has no place for though their names match `own`.
    """
    from transformers import logging  # late: it takes seconds to import

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # Other shapes are refused below, with their names: transformers says no more than "see the report".
        model, loading = opener(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, ImportError):
            mend = f"install what it needs, or {mend}"
        raise RetortError(f"{refusal} ({reason}); {mend}") from None
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise RetortError(
            f"{refusal}: {len(mismatched)} of its weights are of other shapes than config.json asks for, such as "
            f"{name}: got {list(found)}, expected {list(expected)}; {mend}"
        )
    if own is not None and (odd := sorted(name for name in loading["unexpected_keys"] if own.search(name))):
        raise RetortError(
            f"{folder}: the weights hold {len(odd)} that config.json has no place for, such as {odd[0]}; config and "
            f"weights are not of one model, {mend} (fewer layers are kept by --layers)"
        )
    missing = {name for name in loading["missing_keys"] if not name.endswith(_UNUSED_LAST)}
    return model, sorted(missing - _UNUSED)
