"""How long it takes to have the samples of a step ready, while the step before computes."""

from collections.abc import Mapping

from engine.estimate.hardware import HardwareConfig

STORAGE, DECODING = "storage", "decoding"


def loading_seconds(
    hardware: HardwareConfig,
    *,
    node_bytes: float,
    node_images: float,
    decoded_images_per_second: float | None = None,
) -> Mapping[str, float]:
    """Seconds of a step's samples on a node, by what gives them; each works beside the others.

    Args:
        hardware: Of the node: its storage, its cores and what each decodes.
        node_bytes: That the node reads.
        node_images: That its cores decode; frames of clips are counted one by one.
        decoded_images_per_second: Of all cores of the node together; None: what the hardware says, and where that does
            not know, decoding is left out.
    """
    found = {STORAGE: node_bytes / (1e9 * hardware.storage_gigabytes_per_second)}
    rate = decoded_images_per_second or hardware.decoded_images_per_second
    if rate is not None:
        found[DECODING] = node_images / rate
    return found
