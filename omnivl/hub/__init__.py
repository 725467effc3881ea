"""Finished models as classes of ``transformers``: importing this package registers them with its ``Auto`` classes.

    import omnivl.hub
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

``omnivl export`` writes such folders (``docs/huggingface.md``).
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from omnivl.hub.configuration import OmniVLConfig
from omnivl.hub.modeling import OmniVLModel, OmniVLOutput
from omnivl.hub.processing import OmniVLImageProcessor, OmniVLProcessor

AutoConfig.register(OmniVLConfig.model_type, OmniVLConfig, exist_ok=True)
AutoModel.register(OmniVLConfig, OmniVLModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(OmniVLConfig, OmniVLModel, exist_ok=True)
AutoImageProcessor.register(OmniVLConfig, slow_image_processor_class=OmniVLImageProcessor, exist_ok=True)
AutoProcessor.register(OmniVLConfig, OmniVLProcessor, exist_ok=True)

__all__ = ["OmniVLConfig", "OmniVLImageProcessor", "OmniVLModel", "OmniVLOutput", "OmniVLProcessor"]
