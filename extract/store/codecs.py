"""Names of all codecs: float16, int8, int4 and transform:RATE with a rate in bits a value."""

from extract.base.errors import RetortError, unknown
from extract.store.codec import CODECS, Codec
from extract.store.transform import Transform

LISTED = (*CODECS, "transform:2", "transform:1", "transform:0.5", "transform:0.25")  # in tables and error lines


def codec_named(name: str) -> Codec:
    """Return the codec of a name, without parameters. Raises RetortError for another name."""
    if name in CODECS:
        return CODECS[name]
    kind, _, rate = name.partition(":")
    if kind != "transform":
        raise unknown("codec", name, LISTED)
    try:
        codec = Transform(float(rate))
    except RetortError:
        raise
    except ValueError:
        raise RetortError(f"codec {name!r}: expected a number of bits a value, such as transform:0.5") from None
    if codec.name != name:  # one name for one store
        raise RetortError(f"codec {name!r}: write {codec.name}")
    return codec
