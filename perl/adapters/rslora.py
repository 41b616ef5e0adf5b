"""rsLoRA: LoRA whose scale, alpha / sqrt(rank), lets high ranks learn as fast as low ones (arXiv 2312.03732)."""

from peft import LoraConfig

from perl.adapters.lora import Lora
from perl.recipe.adapter import RsLoraSettings


class RsLora(Lora):
    """LoRA with another scale; all else, the fast path included, is LoRA's."""

    settings_type = RsLoraSettings
    section = "adapter"
    name = "rsLoRA"
    rate_factor = 0.4

    def peft_config(self) -> LoraConfig:
        """With the scale that this variant has."""
        config = super().peft_config()
        config.use_rslora = True
        return config
