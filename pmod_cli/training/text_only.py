"""Batches without an image, in a run of several processes.

A process whose batch is text only must still use the vision tower and the projector: otherwise DDP waits for their
gradients, and FSDP2 and ZeRO-3 for their weights, forever. So a blank image goes through them, and reaches the loss
times zero. (Routers see to themselves, in the decoder.)
"""

from torch import Tensor, nn, zeros
from torch import tensor as as_tensor
from transformers import PreTrainedModel

from pmod_cli.families.configs import known_family


class BlankImage:
    """Adds the features of a blank image, times zero, to the embeddings of the next step of a LLaVA.

    Args:
        model: stock or p-MoD, before it is wrapped for distributed training. The features are made while its own
            forward runs, where all engines have its weights at hand.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.llava = model.model
        self.wanted = False
        self.llava.language_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, decoder: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict] | None:
        if not self.wanted:
            return None
        self.wanted = False
        embeds = named["inputs_embeds"]
        features = self.llava.get_image_features(**self._inputs(embeds), return_dict=True).pooler_output
        return arguments, {**named, "inputs_embeds": embeds + 0.0 * sum(image.sum() for image in features)}

    def _inputs(self, embeds: Tensor) -> dict[str, Tensor]:
        config = self.llava.config
        tile = config.vision_config.image_size
        shape, others = known_family(config).pixel_inputs(config, [(tile, tile)])
        pixels = zeros(shape, dtype=embeds.dtype, device=embeds.device)
        return {"pixel_values": pixels, **{name: as_tensor(o, device=embeds.device) for name, o in others.items()}}
