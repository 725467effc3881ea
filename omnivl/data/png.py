"""The picture that an animated PNG is for whoever knows no animation."""

_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_SIGNATURE_BYTES = 8


def still_png(data: bytes) -> bytes:
    """A PNG without the chunks of its animation, so that every decoder gives the default image.

    The default image (IDAT) need not be part of the animation, and decoders differ in which of both they give.
    Source: PNG specification, third edition, 4.9 and 11.3.6.
    """
    if b"acTL" not in data[: data.find(b"IDAT") + 1]:
        return data
    kept = [data[:_SIGNATURE_BYTES]]
    place = _SIGNATURE_BYTES
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")  # length, name and check sum
        if data[place + 4 : place + 8] not in _ANIMATION:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)
