"""Ask a p-MoD model about one image and record what each layer kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pmod_cli.errors import PmodError
from pmod_cli.visualization.geometry import image_layout
from pmod_cli.visualization.record import SelectionRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

DEFAULT_QUESTION = "What is shown in this image?"
MAX_NEW_TOKENS = 32


def select(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str = DEFAULT_QUESTION,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    name: str = "p-MoD",
) -> SelectionRecord:
    """Run the prefill of one image and question, then answer greedily.

    Args:
        model: a p-MoD LLaVA in eval mode, on any device.
        processor: its processor, with a chat template.
        image: RGB.
        max_new_tokens: length limit of the answer; 0 for no answer, which costs the prefill alone.
        name: what pictures call the model.

    Raises:
        PmodError: the processor has no chat template, or its image tokens do not match the image's layout.
    """
    import torch

    from pmod_cli.model import capture_selection

    inputs = _prompt(processor, image, question).to(model.device, model.dtype)
    is_vision = (inputs["input_ids"][0] == model.config.image_token_id).cpu()  # (N,)
    layout = image_layout(processor.image_processor, processor.patch_size, image.height, image.width)
    if layout.size != int(is_vision.sum()):
        raise PmodError(
            f"the image has {int(is_vision.sum())} vision tokens in the prompt, and {layout.size} places in the image; "
            "patch size, vision_feature_select_strategy or grid of the processor are not those of a stock LLaVA",
            hint="compare processor_config.json with the checkpoint this one was converted from",
        )

    with torch.inference_mode(), capture_selection(model) as captured:
        if max_new_tokens:
            written = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None
            )
            new = written[0, inputs["input_ids"].shape[1] :]
            answer = processor.decode(new, skip_special_tokens=True).strip()
        else:
            model(**inputs, use_cache=False)
            answer = None

    retention = np.array(model.config.retention)
    kept = np.ones((len(retention), layout.size), dtype=bool)
    weight = np.ones((len(retention), layout.size), dtype=np.float32)
    for layer, selection in captured.layers.items():
        kept[layer] = selection.kept[0].cpu()[is_vision].numpy()
        weight[layer] = selection.weight[0].float().cpu()[is_vision].numpy()
    return SelectionRecord(
        image=image,
        layout=layout,
        kept=kept,
        weight=weight,
        routed=np.isin(np.arange(len(retention)), list(captured.layers)),
        retention=retention,
        question=question,
        answer=answer,
        router_state=model.config.router_state,
        model=name,
    )


def _prompt(processor: ProcessorMixin, image: Image.Image, question: str):
    if not processor.chat_template:
        raise PmodError(
            "the processor has no chat template, so the prompt's form is not known",
            hint="add chat_template.jinja of the stock checkpoint to the model's folder",
        )
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=image, text=text, return_tensors="pt")
