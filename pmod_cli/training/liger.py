"""Liger's fused kernels in the decoder of a LLaVA."""

from transformers import PreTrainedModel


def use_liger(model: PreTrainedModel) -> None:
    """Put the fused RMSNorm, SwiGLU and rotary embedding in place of the decoder's, in this model.

    The Trainer's own switch goes by the model type and passes over p-MoD models without a word. The decoder is a stock
    one as far as these modules go, and the kernel takes the rotary tables that a routed layer gathers for each row.
    Liger's fused loss is left out: it belongs to the language model's own head, which a LLaVA does not call.

    Args:
        model: a LLaVA, stock or p-MoD.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    decoder = model.model.language_model
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[decoder.config.model_type]
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=decoder)
